"""Observers: from the activations that were seen to the range that codes will cover."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from tokquant.calibration import clipping
from tokquant.calibration.histogram import Histogram
from tokquant.calibration.statistics import Change, Extremes, MovingExtremes
from tokquant.errors import nearest, quote
from tokquant.schemes import Operand


@dataclass(frozen=True)
class Observer:
    """How a static scale is chosen: what is remembered for it, and the range `(low, high)` that its codes will cover."""

    def statistics(self, heads: int, channels: int) -> Extremes:
        """What is remembered of an operand, nothing seen yet."""
        return Extremes(heads, channels)

    def range(self, seen: Extremes, operand: Operand, change: Change) -> tuple[Tensor, Tensor]:
        """In the shape of the operand's scales without the batch; of a symmetric one the larger magnitude counts."""
        return seen.extremes(operand.granularity.kind, change)


@dataclass(frozen=True)
class Amax(Observer):
    """All that was ever seen."""

    def __str__(self) -> str:
        return "amax"


@dataclass(frozen=True)
class Ema(Observer):
    """The extremes of batches, averaged over a moving window of about `1 / (1 - decay)` of them."""

    decay: float = 0.99

    def __post_init__(self):
        _check("decay", self.decay, 0 <= _number(self.decay) < 1, "at least 0 and below 1; 0.99 is usual")

    def statistics(self, heads: int, channels: int) -> Extremes:
        return MovingExtremes(heads, channels, self.decay)

    def __str__(self) -> str:
        return f"ema:{float(self.decay)!r}"


@dataclass(frozen=True)
class Percentile(Observer):
    """What `percent` of all values lie in; the rest is clipped."""

    percent: float = 99.9

    def __post_init__(self):
        _check("percentile", self.percent, 50 <= _number(self.percent) <= 100, "between 50 and 100; 99.9 is usual")

    def statistics(self, heads: int, channels: int) -> Extremes:
        return Histogram(heads, channels)

    def range(self, seen: Extremes, operand: Operand, change: Change) -> tuple[Tensor, Tensor]:
        return clipping.percentile(cast(Histogram, seen), operand, change, self.percent)

    def __str__(self) -> str:
        return f"percentile:{float(self.percent)!r}"


@dataclass(frozen=True)
class Mse(Observer):
    """The range whose codes, in the operand's own precision, have the least expected squared error."""

    def statistics(self, heads: int, channels: int) -> Extremes:
        return Histogram(heads, channels)

    def range(self, seen: Extremes, operand: Operand, change: Change) -> tuple[Tensor, Tensor]:
        return clipping.least_error(cast(Histogram, seen), operand, change)

    def __str__(self) -> str:
        return "mse"


OBSERVERS: dict[str, Callable[..., Observer]] = {"amax": Amax, "percentile": Percentile, "mse": Mse, "ema": Ema}
NUMBERED = ("percentile", "ema")


def parse(observer: object) -> Observer:
    """`amax`, `percentile` or `percentile:99.99`, `mse`, `ema` or `ema:0.9`, or an observer. Raises ValueError."""
    if isinstance(observer, Observer):
        return observer
    name, colon, number = observer.partition(":") if isinstance(observer, str) else ("", "", "")
    if name not in OBSERVERS or (colon and name not in NUMBERED):
        known = "amax, percentile:99.9, mse or ema:0.99"
        raise ValueError(f"observer: {quote(observer)} is not valid; use {known}{nearest(name, OBSERVERS)}")
    if not colon:
        return OBSERVERS[name]()
    try:
        return OBSERVERS[name](float(number))
    except ValueError as error:
        raise ValueError(f"observer: {quote(observer)}: {error}") from None


def _number(value: Any) -> float:
    return float("nan") if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)


def _check(name: str, value: object, right: bool, words: str) -> None:
    if not right:
        raise ValueError(f"{name}: {quote(value)} is not {words}")
