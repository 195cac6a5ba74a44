"""Lower bounds on the bytes that attention moves, for operands of any widths and a fast memory of any size.

Saha and Ye (arXiv 2402.07443) prove Theta(min(N^2 d / sqrt(M), N^2 d^2 / M)) words for a fast memory of M words. The bounds
here have the constants of their proofs, and count bytes: each of Q, K and sums has a width of its own. Each bound holds alone,
and may be 0: where the whole computation fits fast memory, only inputs and outputs need to move.

Each of `processors` has a fast memory of its own; the bytes are those that all of them move. Every score that the kernels here
compute counts, so a mask that is passed to a call does not lower the bounds.
"""

import math
from dataclasses import dataclass

import numpy as np

from tokquant.errors import quote
from tokquant.io_model.workload import Workload, seen
from tokquant.kernels.compile import Kernel
from tokquant.whole_numbers import whole_number


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An attention to bound: counts, over all heads, of what every algorithm has to compute, and bytes of an element."""

    scores: int
    """Pairs of a query and a key that causality and the window leave."""
    queries: int
    """Queries that see a key, in all heads of Q."""
    keys: int
    """Keys that a query sees, in all heads of K."""
    outputs: int
    """Rows of the output."""
    head_dim: int
    q: float
    k: float
    v: float
    o: float
    lse: float = 0
    """Bytes of a row's LSE; 0 where it is not asked for."""
    sums: float = 4
    """Bytes of a score, and of the partial sums that it comes from."""

    @property
    def widest(self) -> float:
        """Bytes of the widest word that moves."""
        return max(self.q, self.k, self.v, self.o, self.sums)


@dataclass(frozen=True)
class Bounds:
    """The lower bounds in bytes, and which is the greatest."""

    compulsory: float
    pebble: float
    small_memory: float

    @property
    def active(self) -> str:
        """The name of the greatest bound."""
        return max(vars(self), key=lambda name: vars(self)[name])

    @property
    def greatest(self) -> float:
        """The bytes that every algorithm of this kind moves at least."""
        return max(vars(self).values())


def problem(kernel: Kernel, workload: Workload) -> Problem:
    """The problem that a kernel solves at a workload, with operands as wide as their codes. Raises ValueError as `traffic`."""
    n_q, n_k = workload.n_q, workload.n_k
    first, end = seen(n_q, n_k, workload.reach(kernel))
    sees = end > first
    # from one query to the next the visible range moves by one key, so their union has no gaps
    keys = int(end[sees].max() - first[sees].min()) if sees.any() else 0
    heads = workload.batch * workload.heads
    formats = {role: getattr(kernel.scheme, role).format.of(kernel.dtype) for role in "qkv"}
    return Problem(
        scores=heads * int(np.maximum(end - first, 0).sum()),
        queries=heads * int(sees.sum()),
        keys=workload.batch * workload.kv_heads(kernel) * keys,
        outputs=heads * n_q,
        head_dim=kernel.head_dim,
        **{role: precision.stored.itemsize / precision.packed for role, precision in formats.items()},
        o=kernel.dtype.itemsize,
        lse=4 * kernel.wanted.lse,
    )


def lower_bounds(of: Problem, memory: float, processors: int = 1) -> Bounds:
    """All bounds, for processors with `memory` bytes of fast memory each. Raises ValueError for sizes that are not positive."""
    if not memory > 0 or not math.isfinite(memory):
        raise ValueError(f"memory: {quote(memory)}; give bytes of fast memory above 0")
    whole_number("processors", processors, 1)
    return Bounds(compulsory(of), pebble(of, memory, processors), small_memory(of, memory, processors))


def compulsory(of: Problem) -> float:
    """Bytes of inputs and outputs: every code that an output depends on is read once, every output written once.

    Holds for a fast memory of any size. Scales, zeros, sums and means are not counted.
    """
    d = of.head_dim
    return of.queries * d * of.q + of.keys * d * (of.k + of.v) + of.outputs * (d * of.o + of.lse)


def pebble(of: Problem, memory: float, processors: int = 1) -> float:
    """A pebble game with weighted words: holds for scores computed as sums of products, not by fast matrix multiplication.

    Cut a run into parts, each as long as it moves no more than M bytes: what a part computes depends on at most 2 M bytes,
    held or read, and leaves at most 2 M. With I queries and J keys among the former, I d w_q + J d w_k <= 2 M, so that at most
    I J <= M^2 / (d^2 w_q w_k) scores are made of inputs alone (arithmetic and geometric mean). Every other score that the part
    touches has a partial sum of w_a bytes among what it depends on or leaves, and those are at most 4 M / w_a. All scores are
    touched, so

        parts >= scores / (M^2 / (d^2 w_q w_k) + 4 M / w_a)

    and all but a processor's last move M bytes, or less by part of a word. In words of one width that is
    N^2 d^2 / (M + 4 d^2) - M: Lemma 3.4 of Saha and Ye, who bound I J by four times as much. It falls as 1 / M above d^2 words.
    """
    inputs = memory**2 / (of.head_dim**2 * of.q * of.k)
    parts = of.scores / (inputs + 4 * memory / of.sums)
    return max(0.0, memory - of.widest) * max(0.0, parts - processors)


def small_memory(of: Problem, memory: float, processors: int = 1) -> float:
    """The bound of a matrix product: attention computes Q K^T, except that it need not write the scores (Theorem 3.7).

    For the product, the bound of Smith, Lowery, Langou and van de Geijn (arXiv 1702.02017), in weighted words: while 2 M bytes
    are read at most 3 M are at hand, and a elements of Q meet b of K in c sums in at most sqrt(a b c) products (Loomis and
    Whitney), which is largest where each of the three takes M bytes. It falls as 1 / sqrt(M), and is the greatest below d^2
    words.
    """
    at_hand = math.sqrt(memory**3 / (of.q * of.k * of.sums))
    phases = of.scores * of.head_dim / at_hand
    return max(0.0, max(0.0, 2 * memory - of.widest) * max(0.0, phases - processors) - of.scores * of.sums)


def communication(n: int, head_dim: int, memory: float, values: float) -> float:
    """A bound in words, for one head, on *any* algorithm with exact scores, fast matrix multiplication included (Theorem 4.8).

    min(N^2 d^2 / (8 M), N^2 / 8) - M, from communication complexity: one party knows Q and one knows K, so the scores can only
    come from what passes between them, which in a run is what is read, written and held. The proof needs elements from a field
    of `values` > N elements: codes of 8 bits and less are too few, and 0 is returned. It assumes less than `pebble`, and is
    never greater in words of one width.
    """
    if values <= n:
        return 0.0
    return max(0.0, min(n**2 * head_dim**2 / (8 * memory), n**2 / 8) - memory)
