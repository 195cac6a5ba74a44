"""Checks arguments that are whole numbers, of any type: Python's, NumPy's, or tensors."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tokquant.errors import quote

Numbers = int | Sequence[int] | Tensor
"""One whole number for all sequences, or one per sequence."""


def whole_number(name: str, given: Any, least: int, most: int | None = None, instead: str = "") -> int:
    """`given` as an int, if it is a whole number of any type from `least` to `most`; both are at least 0.

    Raises ValueError, whose message ends with `instead`, to say what else would work.
    """
    try:
        number = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = -1
    if number < least or (most is not None and number > most):
        to = f" to {most}" if most else ""
        raise ValueError(f"{name}: {quote(given)} is not a whole number from {least}{to}{instead}")
    return number


def whole_numbers(name: str, given: Numbers, size: int, most: int | np.ndarray) -> np.ndarray:
    """`given` as an array of `size` whole numbers from 0 to `most`, one per sequence. Raises ValueError."""
    numbers = _integers(given)
    if numbers is None or numbers.shape not in ((), (size,)):
        raise ValueError(f"{name}: {quote(given)}; give a whole number, or {size}, one for each sequence")
    numbers, limits = np.broadcast_to(numbers, (size,)).astype(np.int64), np.broadcast_to(most, (size,))
    if (wrong := np.nonzero((numbers < 0) | (numbers > limits))[0]).size:
        raise ValueError(f"{name}: {numbers[wrong[0]]} for sequence {wrong[0]}; give 0 to {limits[wrong[0]]}")
    return numbers


def sequence_numbers(given: Numbers, size: int) -> np.ndarray:
    """`given` as an array of indices of `size` sequences, which may repeat, in any order. Raises ValueError."""
    numbers = _integers(given)
    if numbers is None or numbers.ndim > 1 or not numbers.size:
        raise ValueError(f"sequences: {quote(given)}; give numbers of sequences, such as [0, 0, 1]")
    if ((numbers < 0) | (numbers >= size)).any():
        raise ValueError(f"sequences: {quote(given)}; there are sequences 0 to {size - 1}")
    return np.atleast_1d(numbers).astype(np.int64)


def _integers(given: object) -> np.ndarray | None:
    try:
        numbers = np.asarray(given.tolist() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a meta or fake tensor, which has no data
        return None
    return numbers if numbers.dtype.kind in "iu" else None
