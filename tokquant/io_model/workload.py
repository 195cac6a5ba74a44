"""What a kernel is given, as far as it decides what moves: sizes, reach, and how wide masks and biases are."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokquant.bias import Dense
from tokquant.errors import quote
from tokquant.features import Features
from tokquant.inputs import window_of
from tokquant.kernels.compile import Kernel
from tokquant.tensor import QuantizedTensor
from tokquant.whole_numbers import whole_number

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A mask, or a dense bias: a value for each pair of a query and a key."""

    bytes: int | None = None
    """Of a value; 1 where it is boolean and 4 where not, if None."""
    rows: bool = True
    """Whether it differs from query to query,"""
    keys: bool = True
    """and from key to key; broadcast values are read once a tile."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a call to `tq.attention`. Raises ValueError where one is none."""

    batch: int = 1
    heads: int
    """Of Q; those of K and V follow from the kernel."""
    n_q: int
    n_k: int
    window: tuple[int | None, int | None] = (None, None)
    """(left, right), as `tq.attention` takes it. Where the kernel has a right bound and none is given, it is causal: 0."""
    mask: Pairs = Pairs()
    bias: Pairs = Pairs()
    """Of a dense bias."""
    sink_bytes: int = 4

    @classmethod
    def of(cls, q: QuantizedTensor, k: QuantizedTensor, features: Features) -> "Workload":
        """That of a call: its sizes, its reach, and how wide its mask, its dense bias and its sinks are."""
        given = features.bias.values if isinstance(features.bias, Dense) else None
        return cls(
            batch=q.shape[0],
            heads=q.shape[1],
            n_q=q.shape[2],
            n_k=k.shape[2],
            window=features.reach(),
            mask=_pairs(features.mask),
            bias=_pairs(given),
            sink_bytes=4 if features.sinks is None else features.sinks.itemsize,
        )

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "n_q", "n_k"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        object.__setattr__(self, "window", window_of(self.window))

    def reach(self, kernel: Kernel) -> tuple[int | None, int | None]:
        """Keys seen before and after a query's own place. Raises ValueError where kernel and window do not go together."""
        left, right = self.window
        if right is None and kernel.wanted.right:
            right = 0
        for side, given, has in (("left", left, kernel.wanted.left), ("right", right, kernel.wanted.right)):
            if (given is not None) != has:
                raise ValueError(
                    f"window: {quote(self.window)}, and the kernel has {'a' if has else 'no'} {side} bound; "
                    f"{'give one' if has else 'leave it out'}, or compile it {'without' if has else 'with'} one"
                )
        return left, right

    def kv_heads(self, kernel: Kernel) -> int:
        """Heads of K and V. Raises ValueError where the kernel's sharing does not divide those of Q."""
        return self.heads // shared_heads(kernel, self.heads)


def shared_heads(kernel: Kernel, heads: int) -> int:
    """Heads of Q that share one of K and V in a kernel. Raises ValueError where that does not divide so many heads."""
    shared = int(dict(kernel.plan.constants)["SHARED_HEADS"])
    if heads % shared:
        raise ValueError(f"heads: {heads} is no multiple of the {shared} that share one of K and V in this kernel")
    return shared


def _pairs(x: Tensor | None) -> Pairs:
    return Pairs() if x is None else Pairs(bytes=x.itemsize, rows=x.stride(2) != 0, keys=x.stride(3) != 0)


def seen(n_q: int, n_k: int, reach: tuple[int | None, int | None]) -> tuple[Integers, Integers]:
    """The first key that each query sees, and one past its last; the latter is not above the first where it sees none."""
    place = np.arange(n_q, dtype=np.int64) + (n_k - n_q)
    left, right = reach
    first = np.zeros_like(place) if left is None else np.clip(place - left, 0, n_k)
    end = np.full_like(place, n_k) if right is None else np.clip(place + right + 1, 0, n_k)
    return first, end


@dataclass(frozen=True)
class Walk:
    """How the programs of one head go over its keys: a number for each block of queries."""

    block_m: int
    block_n: int
    n_k: int
    rows: Integers
    """Queries, of which the last block may have fewer."""
    begin: Integers
    """Where the first tile of keys lies."""
    tiles: Integers

    @classmethod
    def of(cls, kernel: Kernel, workload: Workload) -> "Walk":
        """As the kernel's own loops have it: from the tile of the first key that some query of a block sees to the last's."""
        block_m, block_n = kernel.config.block_m, kernel.config.block_n
        n_q, n_k = workload.n_q, workload.n_k
        left, right = workload.reach(kernel)
        first = np.arange(0, n_q, block_m, dtype=np.int64)
        last = np.minimum(first + block_m, n_q)
        begin, end = np.zeros_like(first), np.full_like(first, n_k)
        if right is not None:
            end = np.minimum(n_k, last + n_k - n_q + right)
        if left is not None:
            begin = np.maximum(first + n_k - n_q - left, 0) // block_n * block_n
        return cls(block_m, block_n, n_k, last - first, begin, np.maximum(-((begin - end) // block_n), 0))

    @cached_property
    def keys(self) -> Integers:
        """Keys in those tiles."""
        return self.keys_of(self.n_k)

    def keys_of(self, n: int) -> Integers:
        """The same, where keys go on to n, within the last tile."""
        return np.minimum(self.begin + self.tiles * self.block_n, n) - np.minimum(self.begin, n)

    def row_groups(self, tokens: int) -> int:
        """Groups of so many queries, a power of two, that the blocks touch: once for each block."""
        return int((-(-self.rows // tokens)).sum())

    def key_groups(self, tokens: int) -> int:
        """Groups of so many keys, a power of two, that the tiles touch: once for each tile."""
        if tokens >= self.block_n:
            return int(self.tiles.sum())
        return int((-(-self.keys // tokens)).sum())
