"""Attention to pages, launched: how keys are split between programs, the grid, and the parts merged."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokquant.kernels import generate, launch
from tokquant.kernels.candidates import Config
from tokquant.kernels.decode_plan import DecodePlan
from tokquant.kernels.plan import Wanted
from tokquant.kernels.targets import Target
from tokquant.kernels.triton.merge import merge
from tokquant.kernels.triton.operands import Features, Pages, Table
from tokquant.schemes import QuantScheme
from tokquant.tensor import QuantizedTensor

RUN = 512
"""Keys that a program takes where results must depend on nothing but the sequence."""

SHORTEST = 256
"""Keys that are worth a program of their own."""


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

    def run(self) -> tuple[Tensor, Tensor]:
        """Launch. Returns output `[B, H_q, n_q, D]` and natural LSE, float32."""
        (b, heads, n_q, _), device = self.q.shape, self.q.device
        kv_heads = self.k.codes.shape[1]
        blocks = -(-n_q * (heads // kv_heads) // self.config.block_m)
        keys = keys_of_a_run(self.longest, b * kv_heads * blocks, self.config.block_n, self.target, self.split)
        runs = max(1, -(-self.longest // keys))
        kernel = generate.load(self.plan if runs == 1 else self.planned(one_run=False))
        parts = torch.empty(runs, *self.q.shape, dtype=torch.float32, device=device)
        lses = torch.empty(runs, *self.q.shape[:3], dtype=torch.float32, device=device)
        operands = (launch.operand(self.q), self.k, self.v, self.table, parts, lses, self.features, self.scale, n_q, keys)
        with on(device):
            grid = launch.grid("q", blocks * runs, kv_heads, b)
            kernel[grid](*operands, self.config.block_m, self.config.block_n, **self.config.options())
            return (parts[0], lses[0]) if runs == 1 else merged(parts, lses, self.features.sinks)


def keys_of_a_run(longest: int, programs: int, tile: int, target: Target, split: int | None) -> int:
    """Keys of a program, in whole tiles: so few that there are about `split` programs for each multiprocessor.

    A fixed number where `split` is None, so that results depend on the sequence alone.
    """
    if split is None:
        return max(RUN, tile)
    runs = max(1, min(-(-split * target.multiprocessors // programs), longest // max(SHORTEST, tile)))
    return max(1, -(-longest // (runs * tile))) * tile


def merged(parts: Tensor, lses: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over all keys, of that over runs of them: parts `[runs, B, H, n_q, D]` and natural LSEs, float32.

    sinks: `[H]`, natural logits that take their part of the softmax once.
    """
    runs, b, heads, n_q, d = parts.shape
    out, lse = torch.empty_like(parts[0]), torch.empty_like(lses[0])
    rows = b * heads * n_q
    sizes = dict(D=d, D_TILE=1 << (d - 1).bit_length(), SINKS=sinks is not None, BLOCK=16)
    merge[(rows,)](
        parts, lses, sinks, out, lse, runs, rows, n_q, heads, **sizes, num_warps=4, num_stages=2, enable_fp_fusion=True
    )
    return out, lse


def on(device: torch.device) -> Any:
    """A context in which launches are on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
