"""Functions that templates call in every kernel. A generated kernel has those that it uses."""

from tokquant.precisions.base import tl, triton


@triton.jit
def load_tile(at, rows, columns, MASKED: tl.constexpr):
    # full tiles are loaded without a mask
    if MASKED:
        tile = tl.load(at, mask=rows[:, None] & columns[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_row(at, columns, MASKED: tl.constexpr):
    # one value for each key
    if MASKED:
        row = tl.load(at, mask=columns, other=0.0)
    else:
        row = tl.load(at)
    return row


@triton.jit
def load_pairs(at, row, column, i, j, first, start, here, inside):
    # [BLOCK_M, BLOCK_N]: a head's values for pairs of query and key; 64-bit offsets to the tile, 32-bit ones within
    at += first.to(tl.int64) * row + tl.cast(start, tl.int64) * column
    return load_tile(at + (i - first)[:, None] * row + (j - start)[None, :] * column, here, inside, True)


@triton.jit
def consecutive(first, N: tl.constexpr):
    # [N] float32, exact to 2^24. As 8 n + m, because tensor cores give a thread two of every eight columns: the n are then
    # constants, while a converted arange would take a register per column
    m = (first + tl.arange(0, 8)).to(tl.float32)
    n = (8 * tl.arange(0, N // 8)).to(tl.float32)
    return (n[:, None] + m[None, :]).reshape(N)


@triton.jit
def tanh(x):
    # 1 - 2 / (exp(2 x) + 1) is right at both ends, where exp(2 x) is inf or 0; near zero it cancels, so there the series
    square = x * x
    series = x + x * square * (-0.33333334 + square * (0.13333334 + square * -0.053968254))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))


@triton.jit
def hadamard(x, M: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    # butterflies from stride 1: [M, D] times a block-diagonal Hadamard matrix of order 2^STAGES, not normalized. The partner of
    # a value is the sum of both, as integers, minus its own bits: a warp shuffle, without shared memory
    for stage in tl.static_range(STAGES):
        pairs = x.reshape(M, D // (2 << stage), 2, 1 << stage)
        bits = pairs.to(tl.int32, bitcast=True)
        partner = (tl.sum(bits, 2)[:, :, None, :] - bits).to(tl.float32, bitcast=True)
        x = (partner + pairs * (1 - 2 * tl.arange(0, 2))[None, None, :, None].to(tl.float32)).reshape(M, D)
    return x


@triton.jit
def group_max(x, there, T: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    # [T, D] -> [T / TOKENS, D / CHANNELS]. The maximum of integers that are ordered as the floats are, with NaN above all:
    # maxima of floats would drop a NaN
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    order = tl.where(there, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)
    top = tl.max(tl.max(order.reshape(T // TOKENS, TOKENS, D // CHANNELS, CHANNELS), 3), 1)
    return (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def group_max_magnitude(x, there, T: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    # group_max of |x|, whose bits are ordered as the floats are
    bits = tl.where(there, tl.abs(x).to(tl.int32, bitcast=True), 0)
    top = tl.max(tl.max(bits.reshape(T // TOKENS, TOKENS, D // CHANNELS, CHANNELS), 3), 1)
    return top.to(tl.float32, bitcast=True)


@triton.jit
def sum_in_lanes(x, sums, M: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr):
    # add x [M, N] to partial sums [M, LANES]; each belongs to one thread, so threads exchange sums only once, after the loop
    return sums + tl.sum(x.reshape(M, N // LANES, LANES), 1)
