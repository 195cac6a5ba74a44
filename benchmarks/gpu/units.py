"""Triton microbenchmarks, each of which saturates one execution unit of a multiprocessor."""

import triton
import triton.language as tl


@triton.jit
def nothing(out):
    """An empty kernel, to time a launch."""


@triton.jit
def multiply_adds(out, rounds, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32)
    for _ in range(rounds):
        x = x * 0.5 + 1.0
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


@triton.jit
def exponentials(out, rounds, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(rounds):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


@triton.jit
def floats_of_integers(out, rounds, BLOCK: tl.constexpr):
    """Conversions from int32 to float32, each with an integer and a float addition."""
    x = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(rounds):
        total += x.to(tl.float32)
        x += 3
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def integers_of_floats(out, rounds, BLOCK: tl.constexpr):
    """Conversions from float32 to int32, each with a float and an integer addition."""
    x = tl.arange(0, BLOCK).to(tl.float32)
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(rounds):
        total += x.to(tl.int32)
        x += 3.0
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total.to(tl.float32))


@triton.jit
def integers_by_adding(out, rounds, BLOCK: tl.constexpr):
    """Conversions as for P's codes: add 1.5 * 2^23 and take the low bits. Each with a float and an integer addition."""
    x = tl.arange(0, BLOCK).to(tl.float32)
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(rounds):
        total += (x + 12582912.0).to(tl.int32, bitcast=True)
        x += 3.0
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total.to(tl.float32))


@triton.jit
def maxima_of_integers(out, rounds, BLOCK: tl.constexpr):
    """Maxima of int32, each with an exclusive or."""
    x = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.int32)
    for i in range(rounds):
        most = tl.maximum(most, x ^ i)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), most.to(tl.float32))


@triton.jit
def int8_products(a, b, out, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """a `[m, k]` times b `[n, k]` transposed, int8, to int32 `[m, n]`; programs go by groups of eight rows of tiles, for L2."""
    columns = tl.cdiv(n, COLUMNS)
    group = tl.program_id(0) // (8 * columns)
    row = group * 8 + tl.program_id(0) % 8
    column = tl.program_id(0) % (8 * columns) // 8
    i = row * ROWS + tl.arange(0, ROWS)
    j = column * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, k, DEPTH):
        left = tl.load(a + i[:, None] * k + start + step[None, :])
        right = tl.load(b + j[:, None] * k + start + step[None, :])
        total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
    tl.store(out + i[:, None] * n + j[None, :], total)
