"""What this processor multiplies at most, to be timed beside kernels: a share of it says how much of the machine one uses."""

import ctypes
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from tokquant.kernels.cpu import build

KINDS = ("integers", "bfloats", "floats")
"""Of products, as a plan names them."""
STEPS = 2**21
"""Some milliseconds."""


def peaks(threads: int) -> dict[str, tuple[Callable[[], int], int]]:
    """`integers`, `bfloats`, `floats` -> a call, and the multiplications and additions of so many threads, all in registers.

    Those that the instruction set has no product of are missing. Raises UnsupportedError without a compiler.
    """
    library = _library(build.instructions())
    found: dict[str, tuple[Callable[[], int], int]] = {}
    for kind in KINDS:
        if products := getattr(library, f"products_of_{kind}")():
            call = partial(getattr(library, f"multiply_{kind}"), STEPS, threads)
            found[kind] = (call, 2 * products * STEPS * threads)
    return found


@lru_cache(maxsize=4)
def _library(instructions: str) -> ctypes.CDLL:
    text = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    library = build.load("peak", text, instructions)
    for kind in KINDS:
        multiply = getattr(library, f"multiply_{kind}")
        multiply.argtypes, multiply.restype = (ctypes.c_int64, ctypes.c_int), ctypes.c_uint64
        getattr(library, f"products_of_{kind}").restype = ctypes.c_int64
    return library
