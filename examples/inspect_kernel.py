"""The kernel that a scheme becomes: its text, its launch, and where there is a compiler for GPUs what it takes of one.

Run: python examples/inspect_kernel.py
"""

import tokquant as tq

kernel = tq.compile("int8-fast", head_dim=64, causal=True, target="sm_90")
print(kernel.config)
for part, how in kernel.plan.explain().items():
    print(f"  {part}: {how}")
print(f"{len(kernel.source.splitlines())} lines of Triton that import nothing else; the main loop begins:")
lines = kernel.source.splitlines()
start = next(place for place, line in enumerate(lines) if "for start in range" in line)
print("\n".join(lines[start : start + 8]))

# no GPU is needed to compile; TRITON_INTERPRET=1 would replace the compiler
found, card = kernel.resources, kernel.prediction
print(
    f"{found.registers} registers, {found.spill_bytes} bytes spilled, {found.instructions_per_score:.2f} instructions a score"
)
print(f"predicted, a model: {card.serial_tops:.0f} to {card.roofline_tops:.0f} TOPS on {card.card}")
