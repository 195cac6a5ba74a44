"""Lower bounds on the bytes that attention moves, for operands of any widths and a fast memory of any size.

Saha and Ye (arXiv 2402.07443) prove Theta(min(N^2 d / sqrt(M), N^2 d^2 / M)) words for a fast memory of M words. Here are
the constants that their proofs give, in bytes: words of Q, K and sums weigh what they take. Each bound holds alone, and may be
0: where all that is computed fits fast memory, nothing but inputs and outputs need move.

`processors` have a fast memory of their own each; the bytes are those that all of them move. What is computed is what the
kernels here compute, so masks that a kernel is given at a call do not make it less.
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
    """What is computed, over all heads: counts of what no algorithm can leave out, and bytes of an element."""

    scores: int
    """Pairs of a query and a key that causality and the window leave."""
    queries: int
    """That see a key, in all heads of Q."""
    keys: int
    """That a query sees, in all heads of K."""
    outputs: int
    """Rows that are written."""
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
    """Each bound in bytes, and which of them says most."""

    compulsory: float
    pebble: float
    small_memory: float

    @property
    def active(self) -> str:
        """The name of the greatest."""
        return max(vars(self), key=lambda name: vars(self)[name])

    @property
    def greatest(self) -> float:
        """Bytes that no algorithm of this kind moves less than."""
        return max(vars(self).values())


def problem(kernel: Kernel, workload: Workload) -> Problem:
    """What a kernel computes at this workload, its operands as wide as their codes. Raises ValueError as `traffic` does."""
    n_q, n_k = workload.n_q, workload.n_k
    first, end = seen(n_q, n_k, workload.reach(kernel))
    sees = end > first
    # reach moves by a key from one query to the next, so what is seen has no gaps
    keys = int(end[sees].max() - first[sees].min()) if sees.any() else 0
    heads = workload.batch * workload.heads
    own = kernel.dtype.itemsize
    kept = {role: getattr(kernel.scheme, role).format.of(kernel.dtype) for role in "qkv"}
    return Problem(
        scores=heads * int(np.maximum(end - first, 0).sum()),
        queries=heads * int(sees.sum()),
        keys=workload.batch * workload.kv_heads(kernel) * keys,
        outputs=heads * n_q,
        head_dim=kernel.head_dim,
        **{role: precision.stored.itemsize / precision.packed for role, precision in kept.items()},
        o=own,
        lse=4 * kernel.wanted.lse,
    )


def lower_bounds(of: Problem, memory: float, processors: int = 1) -> Bounds:
    """All bounds for fast memories of so many bytes. Raises ValueError for sizes that are none."""
    if not memory > 0 or not math.isfinite(memory):
        raise ValueError(f"memory: {quote(memory)}; give bytes of fast memory above 0")
    whole_number("processors", processors, 1)
    return Bounds(compulsory(of), pebble(of, memory, processors), small_memory(of, memory, processors))


def compulsory(of: Problem) -> float:
    """Every code that some score or output depends on is read once, every output written once, whatever the fast memory.

    Scales, zeros, sums and means come on top.
    """
    d = of.head_dim
    return of.queries * d * of.q + of.keys * d * (of.k + of.v) + of.outputs * (d * of.o + of.lse)


def pebble(of: Problem, memory: float, processors: int = 1) -> float:
    """Scores as sums of products, each term multiplied (no fast matrix multiplication): a pebble game with weighted words.

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
    """Who computes attention has computed Q K^T but for writing the scores: what that takes, less the writes (Theorem 3.7).

    For the product, the bound of Smith, Lowery, Langou and van de Geijn (arXiv 1702.02017), in weighted words: while 2 M bytes
    are read at most 3 M are at hand, and a elements of Q meet b of K in c sums in at most sqrt(a b c) products (Loomis and
    Whitney), which are most where each of the three takes M bytes. It falls as 1 / sqrt(M), and says most below d^2 words.
    """
    at_hand = math.sqrt(memory**3 / (of.q * of.k * of.sums))
    phases = of.scores * of.head_dim / at_hand
    return max(0.0, max(0.0, 2 * memory - of.widest) * max(0.0, phases - processors) - of.scores * of.sums)


def communication(n: int, head_dim: int, memory: float, values: float) -> float:
    """In words, for one head: *any* algorithm that gives exact scores, fast matrix multiplication included (their Theorem 4.8).

    min(N^2 d^2 / (8 M), N^2 / 8) - M: who knows Q and who knows K can only learn the scores from what passes between them, and
    in a run that is what is read, written and held. Elements are of a field of `values`, which the proof needs to be more than
    N: codes of 8 bits and less are too few, and 0 is returned. Never more than `pebble` in words of one width, which assumes
    more.
    """
    if values <= n:
        return 0.0
    return max(0.0, min(n**2 * head_dim**2 / (8 * memory), n**2 / 8) - memory)
