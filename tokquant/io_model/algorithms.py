"""Upper bounds: what known algorithms move, and an implementation of the one for small memories."""

import math

import numpy as np
from numpy.typing import NDArray

from tokquant.errors import quote
from tokquant.io_model.bounds import Problem
from tokquant.whole_numbers import whole_number

Floats = NDArray[np.float64]


class SlowMemory:
    """A matrix in slow memory that counts the words read and written."""

    def __init__(self, values: Floats):
        self.values = values
        self.words = 0

    def read(self, *place: slice) -> Floats:
        """Copy a part to fast memory."""
        part = self.values[place].copy()
        self.words += part.size
        return part

    def write(self, part: Floats, *place: slice) -> None:
        """Put a part back."""
        self.values[place] = part
        self.words += part.size


def side(memory: int) -> int:
    """B, the side of SquareTiling's squares, four of which fit `memory` words. Raises ValueError for fewer than four words."""
    return math.isqrt(whole_number("memory", memory, 4, instead=": four squares need a word each") // 4)


def square_tiling(q: Floats, k: Floats, v: Floats, memory: int) -> tuple[Floats, int]:
    """Run Algorithm 1 of Saha and Ye, SquareTilingAttention: exp(Q K^T) V over its row sums, and the words it moved.

    It works on squares of side B = sqrt(M / 4) instead of flash attention's long tiles: Q K^T is written to slow memory and
    read back, which pays where M is well below d^2. A reference for the theory, in float64: as in the paper, the scores
    `[N, N]` are kept whole, not scaled, and not lowered by their maximum, so large ones overflow.

    Args:
        q, k, v: `[N, d]`.
        memory: words of fast memory, at least 4.
    """
    n, d = q.shape
    b = side(memory)
    queries, keys, values = (SlowMemory(np.asarray(x, dtype=np.float64)) for x in (q, k, v))
    weights, sums, out = SlowMemory(np.empty((n, n))), SlowMemory(np.empty((n, 1))), SlowMemory(np.empty((n, d)))
    tokens, channels = ([slice(start, start + b) for start in range(0, size, b)] for size in (n, d))
    for i in tokens:
        total = np.zeros((len(range(n)[i]), 1))
        for j in tokens:
            square = np.zeros((len(total), len(range(n)[j])))
            for c in channels:
                square += queries.read(i, c) @ keys.read(j, c).T
            square = np.exp(square)
            weights.write(square, i, j)
            total += square.sum(axis=1, keepdims=True)
        sums.write(total, i)
    for i in tokens:
        total = sums.read(i)
        for c in channels:
            square = np.zeros((len(total), len(range(d)[c])))
            for j in tokens:
                square += weights.read(i, j) @ values.read(j, c) / total
            out.write(square, i, c)
    return out.values, sum(x.words for x in (queries, keys, values, weights, sums, out))


def square_tiling_words(n: int, head_dim: int, memory: int) -> int:
    """Words that `square_tiling` moves: 4 N^2 d / B + N^2 + N d + 2 N where B divides N and d."""
    b = side(memory)
    return 3 * n * head_dim * -(-n // b) + n**2 * -(-head_dim // b) + n**2 + n * head_dim + 2 * n


def flash_words(n: int, head_dim: int, memory: int) -> int:
    """Words that flash attention moves with the largest blocks of queries that fit: 2 N d, and K and V once for each block.

    Fast memory holds, for each query of a block, the query, its output, a score, a maximum and a sum; and one key and value.
    Raises ValueError where not even one query fits.
    """
    rows = (memory - 2 * head_dim) // (2 * head_dim + 3)
    if rows < 1:
        raise ValueError(f"memory: {quote(memory)}; a query of {head_dim} channels needs {4 * head_dim + 3} words")
    return 2 * n * head_dim + -(-n // rows) * 2 * n * head_dim


def flash_bytes(of: Problem, memory: float) -> float:
    """`flash_words` in bytes, for operands and sums of any widths; infinite where not even one query fits.

    A block reads just the keys that its queries see, not whole tiles of them.
    """
    d = of.head_dim
    rows = math.floor((memory - d * (of.k + of.v)) / (d * (of.q + of.sums) + 3 * of.sums))
    if rows < 1:
        return math.inf
    q_and_out = of.queries * d * of.q + of.outputs * (d * of.o + of.lse)
    # K and V are read at least once
    return q_and_out + max(of.scores / rows, of.keys) * d * (of.k + of.v)


def square_tiling_bytes(of: Problem, memory: float) -> float:
    """Bytes that SquareTiling moves with squares of elements as wide as sums, without rounding up to whole squares."""
    d, b = of.head_dim, math.sqrt(memory / 4 / of.sums)
    # each operand is read at least once
    queries, keys, passes = max(of.scores / b, of.queries), max(of.scores / b, of.keys), max(d / b, 1)
    read = queries * d * of.q + keys * d * (of.k + of.v) + of.scores * passes * of.sums
    return read + of.scores * of.sums + of.outputs * (d * of.o + of.lse + 2 * of.sums)
