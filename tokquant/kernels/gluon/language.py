"""Gluon as `tl` and `triton`: the names that the portable kernel's fragments use, so that these work here too."""

from triton.experimental import gluon as triton
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.6 and 3.9 have different names for these
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(tl, "barrier", None) or tl.thread_barrier

__all__ = [
    "async_copy",
    "async_load",
    "barrier",
    "fence_async_shared",
    "mbarrier",
    "tl",
    "triton",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
