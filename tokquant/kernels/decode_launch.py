"""Launches attention to pages: splits keys between programs, computes the grid, and merges partial results."""

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
"""Keys of a run where the bits of a result must depend only on the sequence."""

SHORTEST = 256
"""The fewest keys of a run that are worth a program of their own."""

TOGETHER = 16
"""Runs that the merging kernel reads at once."""


@dataclass(frozen=True)
class Call:
    """A prepared launch of attention to pages."""

    planned: Callable[..., DecodePlan]
    """Makes the plan of the kernel, given `one_run`: whether one program visits all keys, so that nothing is merged."""
    config: Config
    split: int | None
    """Programs per multiprocessor that the keys are split into; None for runs of a fixed length."""
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
    """Keys in pages of the longest sequence, or an upper bound."""

    @cached_property
    def plan(self) -> DecodePlan:
        """The plan of the kernel whose programs visit all keys; tuning knows both kernels by its name."""
        return self.planned(one_run=True)

    @cached_property
    def seen(self) -> int:
        """Keys of the longest sequence that its queries see."""
        return keys_seen(self.longest, self.q.shape[2], self.features.left)

    @cached_property
    def blocks(self) -> int:
        """Blocks of queries per head of K and V."""
        rows = self.q.shape[1] // self.k.codes.shape[1] * self.q.shape[2]
        return -(-rows // self.config.block_m)

    @cached_property
    def runs(self) -> "Runs":
        """How keys are split between programs."""
        programs = self.q.shape[0] * self.k.codes.shape[1] * self.blocks
        return Runs.of(self.longest, self.seen, programs, self.config.block_n, self.target, self.split)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(blocks of queries times runs, heads of K and V, batch). Raises UnsupportedError as `launch.grid`."""
        return launch.grid("q", self.blocks * self.runs.count, self.k.codes.shape[1], self.q.shape[0])

    def compiled(self) -> Any:
        """Triton's compiled kernel for these arguments, without launching it."""
        with launch.on(self.q.device):
            return self._kernel().warmup(*self._arguments(*self._parts()), grid=self.grid, **self.config.options())

    def run(self) -> tuple[Tensor, Tensor]:
        """Launch, and merge if there are several runs. Returns output `[B, H_q, n_q, D]` and natural LSE, float32."""
        parts, lses = self._parts()
        with launch.on(self.q.device):
            self._kernel()[self.grid](*self._arguments(parts, lses), **self.config.options())
            return (parts[0], lses[0]) if self.runs.count == 1 else merge_runs(parts, lses)

    def _kernel(self) -> Any:
        return generate.load(self.plan if self.runs.count == 1 else self.planned(one_run=False))

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Memory for the output and LSE of each run."""
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
    """Keys of a run, a multiple of those of a tile."""
    count: int
    """Runs of the sequence with the most keys to read."""
    step: int
    """The first run begins at a multiple of this many keys: at 0, or at the last one before the first query's window."""

    @classmethod
    def of(cls, longest: int, seen: int, programs: int, tile: int, target: Target, split: int | None) -> "Runs":
        """Split keys into runs, so that there are about `split` programs per multiprocessor.

        If `split` is None, runs have a fixed length and begin at the same keys for all queries, so that results depend only on
        the sequence. Groups of `TOGETHER` runs also begin at fixed keys, because the order of merging changes the rounding.

        Args:
            longest, seen: keys of the longest sequence, and how many of them its queries see.
            programs: programs per run: one for each block of queries, head of K and V, and sequence.
            tile: keys of a tile.
        """
        keys = max(RUN, tile)
        step = tile if split is not None else keys * TOGETHER
        # the first run begins up to step - 1 keys before the window
        read = min(longest, seen + step - 1)
        if split is not None:
            count = max(1, min(-(-split * target.multiprocessors // programs), seen // max(SHORTEST, tile)))
            # a single run also covers the keys before the window; with several there may be one more run than `count`
            keys = max(1, -(-(read if count == 1 else seen) // (count * tile))) * tile
        return cls(keys, max(1, -(-read // keys)), step)


def keys_seen(longest: int, n_q: int, left: int | None) -> int:
    """How many of a sequence's `longest` keys its last n_q queries see, each its own and `left` before it (all where None)."""
    return longest if left is None else min(longest, left + n_q)


def merge_runs(parts: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the outputs `[runs, B, H, n_q, D]` and natural LSEs of attention to runs of keys, float32."""
    runs, *_, d = parts.shape
    out, lse = torch.empty_like(parts[0]), torch.empty_like(lses[0])
    sizes = dict(D=d, D_TILE=1 << (d - 1).bit_length(), BLOCK=TOGETHER)
    rows = lse.numel()
    merge[(rows,)](parts, lses, out, lse, runs, rows, **sizes, num_warps=4, num_stages=2, enable_fp_fusion=True)
    return out, lse
