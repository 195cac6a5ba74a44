"""The peak rate of this processor's multiply-adds, to be timed beside kernels and compared with theirs."""

import ctypes
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from tokquant.kernels.cpu import build

KINDS = ("integers", "bfloats", "floats")
"""Kinds of products, by the names that plans use."""
STEPS = 2**21
"""Iterations of a call, for some milliseconds."""


def peaks(threads: int) -> dict[str, tuple[Callable[[], int], int]]:
    """For each kind of product, a function to time, which multiplies in registers, and the operations of one call.

    Operations are multiplications and additions of all threads. Kinds without an instruction are missing. Raises
    UnsupportedError without a compiler.
    """
    library = _library(build.instructions())
    peaks: dict[str, tuple[Callable[[], int], int]] = {}
    for kind in KINDS:
        if products := getattr(library, f"products_of_{kind}")():
            call = partial(getattr(library, f"multiply_{kind}"), STEPS, threads)
            peaks[kind] = (call, 2 * products * STEPS * threads)
    return peaks


@lru_cache(maxsize=4)
def _library(instructions: str) -> ctypes.CDLL:
    text = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    library = build.load("peak", text, instructions)
    for kind in KINDS:
        multiply = getattr(library, f"multiply_{kind}")
        multiply.argtypes, multiply.restype = (ctypes.c_int64, ctypes.c_int), ctypes.c_uint64
        getattr(library, f"products_of_{kind}").restype = ctypes.c_int64
    return library
