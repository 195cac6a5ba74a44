"""The inputs of a kernel that decide its traffic: sizes, the visible range of keys, and the widths of masks and biases."""

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
    """A mask or a dense bias: a value for each pair of a query and a key, which may be broadcast."""

    bytes: int | None = None
    """Bytes of a value; where None, 1 if it is boolean and 4 if not."""
    rows: bool = True
    """Whether values differ between queries, instead of being broadcast."""
    keys: bool = True
    """Whether values differ between keys; broadcast ones are read once per tile."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a call to `tq.attention`. Raises ValueError for one that is no whole number from 1."""

    batch: int = 1
    heads: int
    """Heads of Q; those of K and V follow from the kernel."""
    n_q: int
    n_k: int
    window: tuple[int | None, int | None] = (None, None)
    """(left, right), as `tq.attention` takes it. Where the kernel has a right bound and none is given, it is causal: 0."""
    mask: Pairs = Pairs()
    bias: Pairs = Pairs()
    """Of a dense bias; others have no values for pairs."""
    sink_bytes: int = 4

    @classmethod
    def of(cls, q: QuantizedTensor, k: QuantizedTensor, features: Features) -> "Workload":
        """The workload of a call with these codes and features."""
        bias = features.bias.values if isinstance(features.bias, Dense) else None
        return cls(
            batch=q.shape[0],
            heads=q.shape[1],
            n_q=q.shape[2],
            n_k=k.shape[2],
            window=features.reach(),
            mask=_pairs(features.mask),
            bias=_pairs(bias),
            sink_bytes=4 if features.sinks is None else features.sinks.itemsize,
        )

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "n_q", "n_k"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        object.__setattr__(self, "window", window_of(self.window))

    def reach(self, kernel: Kernel) -> tuple[int | None, int | None]:
        """Keys visible before and after a query's own (None: all). Raises ValueError where kernel and window do not fit."""
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
        """Heads of K and V. Raises ValueError where the kernel's GQA group does not divide the heads of Q."""
        return self.heads // shared_heads(kernel, self.heads)


def shared_heads(kernel: Kernel, heads: int) -> int:
    """Heads of Q that share one of K and V in a kernel. Raises ValueError where that does not divide `heads`."""
    shared: int = kernel.plan.constants["SHARED_HEADS"]
    if heads % shared:
        raise ValueError(f"heads: {heads} is no multiple of the {shared} that share one of K and V in this kernel")
    return shared


def _pairs(x: Tensor | None) -> Pairs:
    return Pairs() if x is None else Pairs(bytes=x.itemsize, rows=x.stride(2) != 0, keys=x.stride(3) != 0)


def seen(n_q: int, n_k: int, reach: tuple[int | None, int | None]) -> tuple[Integers, Integers]:
    """The range of keys that each query sees: `[first, end)`, int64 `[n_q]` each; empty where end <= first."""
    place = np.arange(n_q, dtype=np.int64) + (n_k - n_q)
    left, right = reach
    first = np.zeros_like(place) if left is None else np.clip(place - left, 0, n_k)
    end = np.full_like(place, n_k) if right is None else np.clip(place + right + 1, 0, n_k)
    return first, end


@dataclass(frozen=True)
class Walk:
    """The tiles of keys that the programs of one head visit; each array has an entry per block of queries."""

    block_m: int
    block_n: int
    n_k: int
    rows: Integers
    """Queries of the block; the last block may have fewer."""
    begin: Integers
    """First key of the first tile."""
    tiles: Integers
    """Tiles visited."""

    @classmethod
    def of(cls, kernel: Kernel, workload: Workload) -> "Walk":
        """The tiles of the kernel's loops: from that of the first key that a query of the block sees to that of the last."""
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
        """Keys in the visited tiles."""
        return self.keys_of(self.n_k)

    def keys_of(self, n: int) -> Integers:
        """Keys in the visited tiles if there are n in all, `n_k` or padded up to the end of the last tile."""
        return np.minimum(self.begin + self.tiles * self.block_n, n) - np.minimum(self.begin, n)

    def row_groups(self, tokens: int) -> int:
        """Values that the blocks load where `tokens` queries (a power of two) share one: once per group and block."""
        return int((-(-self.rows // tokens)).sum())

    def key_groups(self, tokens: int) -> int:
        """Values that the tiles load where `tokens` keys (a power of two) share one: once per group and tile."""
        if tokens >= self.block_n:
            return int(self.tiles.sum())
        return int((-(-self.keys // tokens)).sum())
