"""Functions that the template calls whatever fills its holes. A kernel gets those it uses."""

from tokquant.precisions.base import tl, triton


@triton.jit
def load_tile(at, rows, columns, MASKED: tl.constexpr):
    # a whole tile needs no mask
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
    # [BLOCK_M, BLOCK_N]: what a head has for each pair; 64-bit offsets to the tile, and from there
    at += first.to(tl.int64) * row + tl.cast(start, tl.int64) * column
    return load_tile(at + (i - first)[:, None] * row + (j - start)[None, :] * column, here, inside, True)


@triton.jit
def consecutive(first, N: tl.constexpr):
    # [N] float32, exact to 2^24. As 8 n + m, because tensor cores give a thread two of every eight columns: the n are
    # constants then, where a converted arange would fill a register a column
    m = (first + tl.arange(0, 8)).to(tl.float32)
    n = (8 * tl.arange(0, N // 8)).to(tl.float32)
    return (n[:, None] + m[None, :]).reshape(N)


@triton.jit
def tanh(x):
    # right at both ends, 1 - 2 / (inf + 1) and 1 - 2 / (0 + 1); near zero, where that cancels, the series
    square = x * x
    series = x + x * square * (-0.33333334 + square * (0.13333334 + square * -0.053968254))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))


@triton.jit
def hadamard(x, M: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    # butterflies from stride 1: [M, D] times a block-diagonal matrix of order 2^STAGES, not normalized. A value finds its
    # partner as what the sum of their bits lacks: one exchange of a warp's lanes, and nothing goes through shared memory
    for stage in tl.static_range(STAGES):
        pairs = x.reshape(M, D // (2 << stage), 2, 1 << stage)
        bits = pairs.to(tl.int32, bitcast=True)
        partner = (tl.sum(bits, 2)[:, :, None, :] - bits).to(tl.float32, bitcast=True)
        x = (partner + pairs * (1 - 2 * tl.arange(0, 2))[None, None, :, None].to(tl.float32)).reshape(M, D)
    return x


@triton.jit
def group_max(x, there, T: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    # [T, D] -> [T / TOKENS, D / CHANNELS]. Of integers in the order of the floats, where a NaN is above all: maxima of
    # floats lose it
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    order = tl.where(there, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)
    top = tl.max(tl.max(order.reshape(T // TOKENS, TOKENS, D // CHANNELS, CHANNELS), 3), 1)
    return (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def group_max_magnitude(x, there, T: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr):
    # the same of |x|, whose bits are in the order of the floats as they are
    bits = tl.where(there, tl.abs(x).to(tl.int32, bitcast=True), 0)
    top = tl.max(tl.max(bits.reshape(T // TOKENS, TOKENS, D // CHANNELS, CHANNELS), 3), 1)
    return top.to(tl.float32, bitcast=True)


@triton.jit
def sum_in_lanes(x, sums, M: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr):
    # sums [M, LANES] and those of x [M, N]: lanes that no two threads share are added up once, after the loop
    return sums + tl.sum(x.reshape(M, N // LANES, LANES), 1)
