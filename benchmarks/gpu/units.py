"""Triton kernels that keep one unit of a multiprocessor busy, and next to nothing else."""

import triton
import triton.language as tl


@triton.jit
def nothing(out):
    """To launch."""


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
    """With an integer and a float addition each."""
    x = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(rounds):
        total += x.to(tl.float32)
        x += 3
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def integers_of_floats(out, rounds, BLOCK: tl.constexpr):
    """With a float and an integer addition each."""
    x = tl.arange(0, BLOCK).to(tl.float32)
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(rounds):
        total += x.to(tl.int32)
        x += 3.0
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total.to(tl.float32))


@triton.jit
def integers_by_adding(out, rounds, BLOCK: tl.constexpr):
    """How kernels make P's codes: 1.5 * 2^23 added, and the low bits taken. With a float and an integer addition each."""
    x = tl.arange(0, BLOCK).to(tl.float32)
    total = tl.zeros([BLOCK], tl.int32)
    for _ in range(rounds):
        total += (x + 12582912.0).to(tl.int32, bitcast=True)
        x += 3.0
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total.to(tl.float32))


@triton.jit
def maxima_of_integers(out, rounds, BLOCK: tl.constexpr):
    """With an exclusive or each."""
    x = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.int32)
    for i in range(rounds):
        most = tl.maximum(most, x ^ i)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), most.to(tl.float32))


@triton.jit
def int8_products(a, b, out, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """a `[m, k]` by b `[n, k]`, both int8, to int32 `[m, n]`; eight rows of tiles at a time, for the sake of caches."""
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
