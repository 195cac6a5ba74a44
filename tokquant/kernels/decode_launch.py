"""Attention to pages, launched: how keys are split between programs, the grid, and the parts merged."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokquant.kernels import generate, launch
from tokquant.kernels.candidates import Config
from tokquant.kernels.decode_plan import DecodePlan
from tokquant.kernels.targets import Target
from tokquant.kernels.triton.merge import merge
from tokquant.kernels.triton.operands import Features, Pages, Table
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import QuantScheme
from tokquant.tensor import QuantizedTensor

RUN = 512
"""Keys that a program takes where results must depend on nothing but the sequence."""

SHORTEST = 256
"""Keys that are worth a program of their own."""

TOGETHER = 16
"""Runs that merging takes at once."""


@dataclass(frozen=True)
class Call:
    """Attention to pages, but for the launch."""

    planned: Callable[..., DecodePlan]
    """The plan of the kernel, by `one_run`: whether a program goes over all keys, so that nothing is merged."""
    config: Config
    split: int | None
    """Programs for each multiprocessor that keys are split for; None for runs of a fixed length."""
    scheme: QuantScheme
    target: Target
    wanted: Wanted
    q: QuantizedTensor
    k: Pages
    v: Pages
    table: Table
    features: Features
    scale: float
    longest: int
    """No sequence has more keys in pages."""

    @cached_property
    def plan(self) -> DecodePlan:
        """Of the kernel that goes over all keys, whose name is that of both."""
        return self.planned(one_run=True)

    @cached_property
    def seen(self) -> int:
        """Keys of the longest sequence that queries see."""
        return keys_seen(self.longest, self.q.shape[2], self.features.left)

    @cached_property
    def blocks(self) -> int:
        """Of queries, for each head of K and V."""
        rows = self.q.shape[1] // self.k.codes.shape[1] * self.q.shape[2]
        return -(-rows // self.config.block_m)

    @cached_property
    def runs(self) -> "Runs":
        """How keys are split between programs."""
        programs = self.q.shape[0] * self.k.codes.shape[1] * self.blocks
        return Runs.of(self.longest, self.seen, programs, self.config.block_n, self.target, self.split)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of queries with each run of keys, heads of K and V, and batch. Raises UnsupportedError as `launch.grid`."""
        return launch.grid("q", self.blocks * self.runs.count, self.k.codes.shape[1], self.q.shape[0])

    def compiled(self) -> Any:
        """Triton's compiled kernel, which this launch is of; it is not started."""
        with launch.on(self.q.device):
            return self._kernel().warmup(*self._arguments(*self._parts()), grid=self.grid, **self.config.options())

    def run(self) -> tuple[Tensor, Tensor]:
        """Launch. Returns output `[B, H_q, n_q, D]` and natural LSE, float32."""
        parts, lses = self._parts()
        with launch.on(self.q.device):
            self._kernel()[self.grid](*self._arguments(parts, lses), **self.config.options())
            return (parts[0], lses[0]) if self.runs.count == 1 else merged(parts, lses)

    def _kernel(self) -> Any:
        return generate.load(self.plan if self.runs.count == 1 else self.planned(one_run=False))

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Memory for output and LSE of each run."""
        options: dict[str, Any] = dict(dtype=torch.float32, device=self.q.device)
        shape = (self.runs.count, *self.q.shape)
        return torch.empty(*shape, **options), torch.empty(*shape[:4], **options)

    def _arguments(self, parts: Tensor, lses: Tensor) -> tuple[Any, ...]:
        operands = (launch.operand(self.q), self.k, self.v, self.table, parts, lses, self.features, self.scale, self.q.shape[2])
        return (*operands, self.runs.keys, self.runs.step, self.config.block_m, self.config.block_n)


@dataclass(frozen=True)
class Runs:
    """How the keys of every sequence are split between programs."""

    keys: int
    """Of a run, in whole tiles."""
    count: int
    """Runs, as many as the sequence with most keys to read needs."""
    step: int
    """The first run begins at a multiple of it: at 0, or the last before the window of the first query."""

    @classmethod
    def of(cls, longest: int, seen: int, programs: int, tile: int, target: Target, split: int | None) -> "Runs":
        """Runs so short that there are about `split` programs for each multiprocessor.

        Where `split` is None, runs have a fixed length and begin at the same keys whatever is asked about them, so that results
        depend on the sequence alone; and as sums round by their order, so do those that are merged at once.

        Args:
            longest, seen: keys of the longest sequence, and those of them that its queries see.
            programs: that take the same run, of other queries, heads and sequences.
            tile: keys of a tile.
        """
        keys = max(RUN, tile)
        step = tile if split is not None else keys * TOGETHER
        # the window may begin anywhere
        read = min(longest, seen + step - 1)
        if split is not None:
            many = max(1, min(-(-split * target.multiprocessors // programs), seen // max(SHORTEST, tile)))
            # wherever a window begins, it is one run where that was wanted; several may become one more
            keys = max(1, -(-(read if many == 1 else seen) // (many * tile))) * tile
        return cls(keys, max(1, -(-read // keys)), step)


def keys_seen(longest: int, n_q: int, left: int | None) -> int:
    """Of so many keys, those that the last n_q queries see, each as many as `left` before its own place."""
    return longest if left is None else min(longest, left + n_q)


def merged(parts: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys, of that over runs of them: parts `[runs, B, H, n_q, D]` and natural LSEs, float32."""
    runs, *_, d = parts.shape
    out, lse = torch.empty_like(parts[0]), torch.empty_like(lses[0])
    sizes = dict(D=d, D_TILE=1 << (d - 1).bit_length(), BLOCK=TOGETHER)
    rows = lse.numel()
    merge[(rows,)](parts, lses, out, lse, runs, rows, **sizes, num_warps=4, num_stages=2, enable_fp_fusion=True)
    return out, lse
