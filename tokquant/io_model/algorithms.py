"""Algorithms to hold the bounds against: what they move, and the one for small memories carried out."""

import math

import numpy as np
from numpy.typing import NDArray

from tokquant.errors import quote
from tokquant.io_model.bounds import Problem
from tokquant.whole_numbers import whole_number

Floats = NDArray[np.float64]


class SlowMemory:
    """A matrix in slow memory, and the words that went to and fro."""

    def __init__(self, values: Floats):
        self.values = values
        self.words = 0

    def read(self, *place: slice) -> Floats:
        """A part of it, in fast memory."""
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
    """Algorithm 1 of Saha and Ye, SquareTilingAttention: exp(Q K^T) V over its row sums, and the words it moved.

    Squares of B = sqrt(M / 4) in place of flash attention's long tiles: Q K^T goes to slow memory and comes back, which pays
    where M is well below d^2. A reference for the theory, in float64, that keeps the scores `[N, N]` as the paper's does; as
    there, they are neither scaled nor lowered by their maximum, so that large ones overflow.

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
    """What `square_tiling` moves: 4 N^2 d / B + N^2 + N d + 2 N words where B divides N and d."""
    b = side(memory)
    return 3 * n * head_dim * -(-n // b) + n**2 * -(-head_dim // b) + n**2 + n * head_dim + 2 * n


def flash_words(n: int, head_dim: int, memory: int) -> int:
    """Words that flash attention moves at best, one block of queries after another: 2 N d, and K and V once for each block.

    A block holds, for each query, the query, its output, a score, a maximum and a sum, and beside them a key and its value.
    Raises ValueError where no query fits.
    """
    rows = (memory - 2 * head_dim) // (2 * head_dim + 3)
    if rows < 1:
        raise ValueError(f"memory: {quote(memory)}; a query of {head_dim} channels needs {4 * head_dim + 3} words")
    return 2 * n * head_dim + -(-n // rows) * 2 * n * head_dim


def flash_bytes(of: Problem, memory: float) -> float:
    """The same in bytes, for operands and sums of any widths; infinite where no query fits.

    A block reads as many keys as its queries see, without their last tile's rest.
    """
    d = of.head_dim
    rows = math.floor((memory - d * (of.k + of.v)) / (d * (of.q + of.sums) + 3 * of.sums))
    if rows < 1:
        return math.inf
    own = of.queries * d * of.q + of.outputs * (d * of.o + of.lse)
    # never fewer than once
    return own + max(of.scores / rows, of.keys) * d * (of.k + of.v)


def square_tiling_bytes(of: Problem, memory: float) -> float:
    """SquareTiling in bytes, with squares as wide as sums; what only fills squares in part is not counted."""
    d, b = of.head_dim, math.sqrt(memory / 4 / of.sums)
    # each at least once
    queries, keys, passes = max(of.scores / b, of.queries), max(of.scores / b, of.keys), max(d / b, 1)
    read = queries * d * of.q + keys * d * (of.k + of.v) + of.scores * passes * of.sums
    return read + of.scores * of.sums + of.outputs * (d * of.o + of.lse + 2 * of.sums)
