"""The kernel for scales of more tokens than a tile has: it reduces the extremes of tiles to scales and zeros."""

from tokquant.kernels.triton.parts import group_max, group_max_magnitude
from tokquant.kernels.triton.quantize import finish
from tokquant.precisions.base import tl, triton

SEQUENCES = tl.constexpr(False)  # of different lengths, packed one after another
SYMMETRIC = tl.constexpr(True)
ASYMMETRIC = tl.constexpr(False)
SCALE_COLUMNS = tl.constexpr(64)  # scales of a group of tokens, one for each group of channels
COLUMNS_TILE = tl.constexpr(64)  # the next power of two
ROWS = tl.constexpr(32)  # tiles read per iteration


@triton.jit
def scales(E, Y, T, rows, group, groups, TOKENS: tl.constexpr):
    # E [planes, rows, SCALE_COLUMNS], Y [planes, groups, SCALE_COLUMNS]; a scale covers `group` rows, one row for each tile
    plane = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * group
    end = rows
    if SEQUENCES:
        # a group is a sequence; each of its rows is a tile of TOKENS
        sequence = tl.program_id(0) % groups
        start = tl.load(T.starts + sequence)
        first = start // TOKENS + sequence
        group = tl.cdiv(tl.load(T.starts + sequence + 1) - start, TOKENS)
        end = first + group
    column = tl.arange(0, COLUMNS_TILE)[None, :]
    if SYMMETRIC:
        top = tl.zeros([ROWS, COLUMNS_TILE], tl.float32)
    if ASYMMETRIC:
        top = tl.full([ROWS, COLUMNS_TILE], float("-inf"), tl.float32)
        bottom = tl.full([ROWS, COLUMNS_TILE], float("inf"), tl.float32)
    for start in range(0, group, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        there = (row < group) & (first + row < end) & (column < SCALE_COLUMNS)
        at = (plane * rows + first + row) * SCALE_COLUMNS + column
        if SYMMETRIC:
            top = tl.maximum(top, tl.load(E.highest + at, mask=there, other=0.0), propagate_nan=tl.PropagateNan.ALL)
        if ASYMMETRIC:
            some = tl.load(E.highest + at, mask=there, other=float("-inf"))
            top = tl.maximum(top, some, propagate_nan=tl.PropagateNan.ALL)
            some = tl.load(E.lowest + at, mask=there, other=float("inf"))
            bottom = tl.minimum(bottom, some, propagate_nan=tl.PropagateNan.ALL)
    kept = column < SCALE_COLUMNS
    if SYMMETRIC:
        highest = group_max_magnitude(top, kept, ROWS, ROWS, COLUMNS_TILE, 1)
        lowest = highest  # unused
    if ASYMMETRIC:
        highest = group_max(top, kept, ROWS, ROWS, COLUMNS_TILE, 1)
        lowest = -group_max(-bottom, kept, ROWS, ROWS, COLUMNS_TILE, 1)
    finish(highest, lowest, kept, Y, tl.program_id(0).to(tl.int64) * SCALE_COLUMNS + column)


KERNEL = (finish,)
"""Functions that are part of the kernel."""
