"""A scheme for each layer within a budget, judged on tokens that the search has not seen.

Run: python examples/search.py
"""

import tokquant as tq
from tokquant.activations import Activations, sample

layers = Activations(sample())
seen, unseen = (
    {name: tuple(x[:, :, part] for x in layers[name]) for name in layers} for part in (slice(0, 256), slice(256, 512))
)

found = tq.search(seen, budget="bits=8.5", held_out=unseen)
print(f"{found.cost:.2f} bits a value, relative L1 {found.error:.2%}, on tokens not seen {found.held_out['searched']:.2%}")
for each in found.layers:
    print(f"  {each.layer}: {each.scheme.name}, {each.error:.2%}")

print("one scheme for all layers, of no more bits:")
for name, (bits, error) in sorted(found.singles.items(), key=lambda single: single[1][1]):
    if bits <= 8.5:
        print(f"  {name}: {bits:.2f} bits, {error:.2%}, not seen {found.held_out[name]:.2%}")

print(found.map.to_yaml())
