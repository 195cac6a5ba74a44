"""The work of a launch, as the planner's model needs it: its programs, the scores that each computes, and the bytes moved."""

from dataclasses import dataclass, replace

import numpy as np

from tokquant.io_model.bounds import compulsory, problem
from tokquant.io_model.traffic import traffic
from tokquant.io_model.workload import Walk, Workload, shared_heads
from tokquant.kernels.compile import Kernel
from tokquant.kernels.decode_launch import Runs, keys_seen
from tokquant.kernels.order import abreast
from tokquant.whole_numbers import whole_number


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one launch under one configuration."""

    programs: int
    scores: tuple[int, ...]
    """Scores that each program computes, in whole tiles and in grid order; repeated where there are more programs."""
    memory_bytes: float
    """Bytes of inputs and outputs, each once: the traffic of memory if the L2 cache serves everything else."""
    moved: float
    """Bytes of all loads and stores of all programs: the traffic of the L2 cache."""
    merged: float = 0.0
    """Bytes moved after the launch to merge partial results, where the keys are split."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The sizes of a call to `tq.decode`. Raises ValueError for one that is no whole number from 1."""

    batch: int = 1
    heads: int
    """Heads of Q; those of K and V follow from the kernel."""
    queries: int = 1
    keys: int
    """Keys of the longest sequence; the others are counted as if they were as long."""
    left: int | None = None
    """Keys that a window leaves visible before a query's own; None without a window."""

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "queries", "keys"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))


def work(kernel: Kernel, given: Workload | Step, split: int | None = None) -> Work:
    """The work of attention at a workload, or of a step of decoding from pages, its keys split by `split`.

    Raises ValueError where kernel and sizes do not fit.
    """
    return _of_attention(kernel, given) if isinstance(given, Workload) else _of_pages(kernel, given, split)


def _of_attention(kernel: Kernel, workload: Workload) -> Work:
    # sequences of their own lengths count as a batch of the longest
    kernel = replace(kernel, wanted=replace(kernel.wanted, varlen=False))
    walk, needed = Walk.of(kernel, workload), problem(kernel, workload)
    heads, kv_heads = workload.batch * workload.heads, workload.batch * workload.kv_heads(kernel)
    kv_bytes = int(kv_heads * workload.n_k * kernel.head_dim * (needed.k + needed.v))
    scores = kernel.config.block_m * kernel.config.block_n * walk.tiles
    if kernel.wanted.right:
        scores = np.repeat(scores[::-1], abreast(heads, kv_heads, kv_bytes, kernel.target.cache_size))
    return Work(
        programs=heads * len(walk.tiles),
        scores=tuple(scores.tolist()),
        memory_bytes=compulsory(needed),
        moved=traffic(kernel, workload).total,
    )


def _of_pages(kernel: Kernel, step: Step, split: int | None) -> Work:
    block_m, block_n = kernel.config.block_m, kernel.config.block_n
    shared = shared_heads(kernel, step.heads)
    kv_heads = step.batch * step.heads // shared
    blocks = -(-step.queries * shared // block_m)
    seen = keys_seen(step.keys, step.queries, step.left)
    runs = Runs.of(step.keys, seen, kv_heads * blocks, block_n, kernel.target, split)
    tiles = -(-step.keys // block_n) - (step.keys - seen) // block_n
    of_run = runs.keys // block_n
    bits = kernel.scheme.bits_per_value(kernel.head_dim)
    codes = kv_heads * seen * kernel.head_dim * (bits["k"] + bits["v"]) / 8
    # bytes of the partial output and LSE of a run, in float32
    part = 4 * step.batch * step.heads * step.queries * (kernel.head_dim + 1)
    tiles_in_order = [max(0, min(of_run, tiles - of_run * run)) for run in range(runs.count) for _ in range(blocks)]
    return Work(
        programs=kv_heads * len(tiles_in_order),
        scores=tuple(block_m * block_n * each for each in tiles_in_order),
        memory_bytes=codes,
        moved=codes * blocks + part * runs.count,
        merged=part * (runs.count + 1) if runs.count > 1 else 0.0,
    )
