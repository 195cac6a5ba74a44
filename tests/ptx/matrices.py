"""Instructions of many threads together: exchanges within a warp, and matrix products of registers or shared memory.

Layouts are those of the PTX ISA, sections "Matrix multiply-accumulate instructions" and "Asynchronous warpgroup level matrix
instructions". In accumulators and operands in registers, thread `4 g + t` of a warp holds parts of rows g and g + 8.
"""

import re
from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import RAW, bits, typed

Array = np.ndarray


def shuffled(mode: str, x: Array, by: Array, clamp: Array) -> Array:
    """`shfl.sync`: read another lane's register."""
    lane = np.arange(len(x)) % 32
    by, clamp = by.astype(np.int64), clamp.astype(np.int64)
    segment, last = clamp >> 8 & 31, clamp & 31
    least, most = lane & segment, (lane & segment) | (last & ~segment)
    other = {"bfly": lane ^ by, "idx": least | (by & ~segment), "up": lane - by, "down": lane + by}[mode]
    other = np.where((other >= least) if mode == "up" else (other <= most), other, lane)
    return x[np.arange(len(x)) // 32 * 32 + other]


REDUCTIONS = {"min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or}


def reduced(opcode: str, x: Array) -> Array:
    """`redux.sync`: reduce over all lanes of a warp."""
    _, _, by, kind = opcode.split(".")
    lanes = typed(x, kind).reshape(-1, 32)
    return np.repeat(REDUCTIONS[by].reduce(lanes, axis=1).astype(lanes.dtype), 32).view(np.uint32)


def matrix_rows(count: int, addresses: Array) -> Array:
    """`ldmatrix` and `stmatrix`: addresses of each matrix's 8 rows, `[warps, count, 8]`; eight lanes give those of a matrix."""
    return addresses.reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)


def spread(matrices: Array) -> list[Array]:
    """Registers of `[warps, count, 8, 8]` 16-bit elements: lane `4 r + c` has elements 2 c and 2 c + 1 of row r."""
    words = np.ascontiguousarray(matrices).view(np.uint32)
    return [words[:, each].reshape(-1) for each in range(matrices.shape[1])]


def gathered(registers: list[Array]) -> Array:
    """The inverse of `spread`."""
    return np.stack([x.reshape(-1, 8, 4) for x in registers], axis=1).view(np.uint16)


def elements(registers: list[Array], kind: str) -> Array:
    """Registers as `[registers, warps, 8, values]`: four neighbouring lanes hold the values of a row."""
    width = bits(kind)
    held = np.stack([np.ascontiguousarray(x).reshape(-1, 8, 4) for x in registers]).view(RAW[width])
    return typed(held, kind)


def matrix_a(registers: list[Array], kind: str) -> Array:
    """A as `[warps, 16, K]`: registers are ordered by half of the rows, then along K."""
    x = elements(registers, kind)
    x = x.reshape(-1, 2, *x.shape[1:])  # [along K, half, warps, 8, values]
    return x.transpose(2, 1, 3, 0, 4).reshape(x.shape[2], 16, -1)


def matrix_b(registers: list[Array], kind: str) -> Array:
    """B^T as `[warps, 8, K]`: each row is a column of the product."""
    x = elements(registers, kind)  # [along K, warps, 8, values]
    return x.transpose(1, 2, 0, 3).reshape(x.shape[1], 8, -1)


def accumulator(registers: list[Array], kind: str) -> Array:
    """An accumulator as `[warps, 16, N]`: registers are ordered by pair of columns, half of the rows, then along columns."""
    x = np.stack([typed(x, kind).reshape(-1, 8, 4) for x in registers])
    x = x.reshape(-1, 2, 2, *x.shape[1:])  # [along N, half, pair, warps, 8, 4]
    return x.transpose(3, 1, 4, 0, 5, 2).reshape(x.shape[3], 16, -1)


def accumulator_registers(values: Array) -> list[Array]:
    """The inverse of `accumulator`."""
    warps, _, n = values.shape
    x = values.reshape(warps, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(x.reshape(-1, warps * 32)).view(np.uint32))


FRACTION = 13
"""Fraction bits that tensor cores of Ada and Hopper keep when they add products of 8-bit floats (SageAttention2, arXiv
2411.10958, section 3.4; DeepSeek-V3, arXiv 2412.19437, section 3.5.2)."""


def multiply_add(a: Array, b: Array, c: Array, operand_kind: str, sum_kind: str) -> Array:
    """`a b^T + c` in int32 or float32. A float32 sum is rounded once, but for 8-bit floats it keeps only FRACTION bits."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if operand_kind in ("e4m3", "e5m2"):
        terms = np.concatenate([a[..., :, None, :] * b[..., None, :, :], c[..., None].astype(np.float64)], axis=-1)
        largest = np.abs(terms).max(axis=-1, keepdims=True)
        return truncate(truncate(terms, largest).sum(axis=-1), None).astype(np.float32)
    product = a @ b.swapaxes(-1, -2)
    return (product.astype(np.int64) + c).astype(np.int32) if sum_kind == "s32" else (product + c).astype(np.float32)


def truncate(x: Array, largest: Array | None) -> Array:
    """Truncate to FRACTION bits, relative to the exponent of `largest`, or else to that of x itself."""
    last = np.exp2(np.frexp(x if largest is None else largest)[1] - 1.0 - FRACTION)
    return np.where(np.isfinite(x), np.trunc(x / last) * last, x)


def mma(opcode: str, d: list[Array], a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """`mma.sync` for each warp."""
    kinds = re.findall(r"\.(f32|s32|f16|bf16|s8|u8|e4m3|e5m2)(?=\.|$)", opcode)
    assert len(kinds) == 4 and ".row.col" in opcode, opcode
    to, of_a, of_b, _ = kinds
    return accumulator_registers(multiply_add(matrix_a(a, of_a), matrix_b(b, of_b), accumulator(c, to), of_a, to))


SWIZZLES = {0: 0, 3: 1, 2: 2, 1: 3}
"""Address bits that swizzling changes, by a descriptor's mode, for rows of 16, 32, 64 and 128 bytes."""


def descriptor_addresses(descriptor: int, rows: int, kind: str, transposed: bool, contracted: int) -> Array:
    """Addresses of an operand's bytes in shared memory, `[rows, contracted, bytes]`, from its descriptor."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    assert not descriptor >> 49 & 7, "a swizzled operand begins at an address that is a multiple of its swizzle"
    swizzle = SWIZZLES[descriptor >> 62 & 3]
    width, size = 16 << swizzle, bits(kind) // 8
    row, along = np.arange(rows)[:, None], np.arange(contracted)[None, :]
    if transposed:
        # rows lie side by side: [contracted // 8][8] lines of `width` bytes, and further such columns
        at = along // 8 * stride + along % 8 * width + row * size // width * leading + row * size % width
    elif swizzle:
        at = row // 8 * stride + row % 8 * width + along * size
    else:
        at = row // 8 * stride + row % 8 * 16 + along * size // 16 * leading + along * size % 16
    at = start + at
    at ^= (at >> 7 & (1 << swizzle) - 1) << 4
    return at[..., None] + np.arange(size)


@dataclass(frozen=True)
class Wgmma:
    """`wgmma.mma_async` for each warpgroup: 64 rows of A, from registers or shared memory, times B from shared memory."""

    n: int
    k: int
    to: str
    a: str
    b: str

    @classmethod
    def of(cls, opcode: str) -> "Wgmma":
        n, k, *kinds = re.search(r"m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)", opcode).groups()
        return cls(int(n), int(k), *kinds)

    def addresses(self, descriptors: Array, is_b: bool, transposed: bool) -> Array:
        """Addresses of an operand's bytes in shared memory, `[groups, rows, K, bytes]`."""
        groups = descriptors.reshape(-1, 128)
        assert (groups == groups[:, :1]).all(), "one descriptor for each warpgroup"
        rows, kind = (self.n, self.b) if is_b else (64, self.a)
        return np.stack([descriptor_addresses(int(each), rows, kind, transposed, self.k) for each in groups[:, 0]])

    def run(self, d: list[Array], a: list[Array] | Array, b: Array, scaled: Array) -> list[Array]:
        """Multiply A, in registers or as bytes of shared memory, by B, as bytes; add `d` where `scaled` is true."""
        rows = matrix_a(a, self.a).reshape(-1, 64, self.k) if isinstance(a, list) else values_of_bytes(a, self.a)
        before = np.where(scaled.reshape(-1, 128)[:, :1, None], accumulator(d, self.to).reshape(-1, 64, self.n), 0)
        return accumulator_registers(
            multiply_add(rows, values_of_bytes(b, self.b), before, self.a, self.to).reshape(-1, 16, self.n)
        )


def values_of_bytes(data: Array, kind: str) -> Array:
    """The values of bytes, which are the last dimension."""
    return typed(np.ascontiguousarray(data).view(RAW[8 * data.shape[-1]])[..., 0], kind)
