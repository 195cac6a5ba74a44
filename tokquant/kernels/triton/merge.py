"""The kernel that merges attention over runs of keys, weighted by their LSE."""

from tokquant.precisions.base import tl, triton


@triton.jit
def merge(Parts, Lses, Out, Lse, runs, rows, D: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr):
    # Parts [runs, rows, D] and Lses [runs, rows] float32; a row is a query of a head
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D_TILE)
    held = column < D
    top = float("-inf")
    for start in range(0, runs, BLOCK):
        part = (start + tl.arange(0, BLOCK)).to(tl.int64)
        top = tl.maximum(top, tl.max(tl.load(Lses + part * rows + row, mask=part < runs, other=float("-inf")), 0))
    reference = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([D_TILE], tl.float32)
    for start in range(0, runs, BLOCK):
        part = (start + tl.arange(0, BLOCK)).to(tl.int64)
        lse = tl.load(Lses + part * rows + row, mask=part < runs, other=float("-inf"))
        weight = tl.exp(lse - reference)
        total += tl.sum(weight, 0)
        # partial outputs of runs without keys for this row were never written
        has = (weight > 0.0)[:, None] & held[None, :]
        o = tl.load(Parts + (part * rows + row)[:, None] * D + column[None, :], mask=has, other=0.0)
        acc += tl.sum(o * weight[:, None], 0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(Out + row * D + column, out, mask=held)
    tl.store(Lse + row, reference + tl.log(total))
