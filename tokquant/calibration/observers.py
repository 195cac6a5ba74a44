"""Observers: how the range of a static scale is chosen from the activations."""

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
    """How a static scale is chosen: the statistics it needs, and the range `(low, high)` that its codes will cover."""

    def statistics(self, heads: int, channels: int) -> Extremes:
        """Empty statistics of an operand."""
        return Extremes(heads, channels)

    def range(self, seen: Extremes, operand: Operand, change: Change) -> tuple[Tensor, Tensor]:
        """The range under each scale, in the operand's scale shape without the batch; symmetric codes use its magnitude."""
        return seen.extremes(operand.granularity.kind, change)


@dataclass(frozen=True)
class Amax(Observer):
    """The range of all values: nothing is clipped."""

    def __str__(self) -> str:
        return "amax"


@dataclass(frozen=True)
class Ema(Observer):
    """An exponential moving average of the batches' extremes, over about `1 / (1 - decay)` batches."""

    decay: float = 0.99

    def __post_init__(self):
        _check("decay", self.decay, 0 <= _number(self.decay) < 1, "at least 0 and below 1; 0.99 is usual")

    def statistics(self, heads: int, channels: int) -> Extremes:
        return MovingExtremes(heads, channels, self.decay)

    def __str__(self) -> str:
        return f"ema:{float(self.decay)!r}"


@dataclass(frozen=True)
class Percentile(Observer):
    """The range that holds `percent` of all values; the rest is clipped."""

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
    """The range with the least expected squared error in the operand's own precision."""

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
