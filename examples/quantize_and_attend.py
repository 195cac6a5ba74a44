"""Quantize once, attend often, and see what a scheme of one's own costs.

Run: python examples/quantize_and_attend.py
"""

import tokquant as tq
from tokquant.activations import Activations, sample

q, k, v = Activations(sample())["layers.3"]  # [1, 2, 512, 32], real activations that ship with the package

# a scheme is data: a precision and a granularity for each operand
scheme = tq.QuantScheme(
    name="mine",
    q={"precision": "int8", "granularity": "token"},
    k={"precision": "int4", "granularity": "token", "symmetric": False, "smooth": "mean"},
    v={"precision": "int8", "granularity": {"channel_block": 64}, "smooth": "mean"},
    p={"precision": "uint8", "granularity": {"row_block": 64}},
    rotate="hadamard",
)

codes = tq.quantize(q, k, v, scheme)
for name, x in zip("qkv", codes, strict=True):
    print(f"{name}: {x.bits_per_value:.2f} bits a value, {x.nbytes} bytes in all")

out, lse = tq.attention(*codes, scheme, causal=True, return_lse=True)
windowed = tq.attention(*codes, scheme, causal=True, window=(64, 0))  # the same codes again
print(f"out {list(out.shape)} {out.dtype}, the window moves it by up to {(out - windowed).abs().max():.2f}")

for found in tq.compare(q, k, v, ["int8", scheme], causal=True, repeats=1):
    print(f"{found.scheme.name}: relative L1 {found.errors.rel_l1:.2%}, cosine {found.errors.cosine:.6f}")

bound = tq.error_bound(q, k, v, scheme, causal=True)
print(
    "certified, mean over queries: "
    + ", ".join(f"{part} {getattr(bound, part).mean():.3f}" for part in ("total", "q", "k", "p", "v"))
)
