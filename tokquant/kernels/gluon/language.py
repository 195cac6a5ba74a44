"""Gluon under the names that fragments know, so that those of the portable kernel serve here too."""

from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
)

# Triton 3.6 and 3.9 call these by different names
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(tl, "barrier", None) or tl.thread_barrier
