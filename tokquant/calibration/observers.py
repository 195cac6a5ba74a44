"""Observers: what is remembered of the activations that were seen, in a size that does not grow with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokquant.errors import nearest, quote

LOWEST, HIGHEST = -32, 32  # powers of two that the histogram tells apart
STEPS = 64  # bins between one power of two and the next: a quantile is known to 1.1 %


@dataclass(frozen=True)
class Amax:
    """The largest magnitude ever seen."""


@dataclass(frozen=True)
class Percentile:
    """The magnitude that `percent` of all values stay below; the rest is clipped."""

    percent: float

    def __post_init__(self):
        if isinstance(self.percent, bool) or not isinstance(self.percent, int | float) or not 50 <= self.percent <= 100:
            raise ValueError(f"percentile: {quote(self.percent)} is not between 50 and 100; 99.9 is usual")


Observer = Amax | Percentile


def parse(observer: object) -> Observer:
    """`"amax"`, `"percentile"` (99.9) or `"percentile:99.99"`, or an observer. Raises ValueError."""
    if isinstance(observer, Amax | Percentile):
        return observer
    name, _, percent = observer.partition(":") if isinstance(observer, str) else ("", "", "")
    if name == "amax" and not percent:
        return Amax()
    if name == "percentile":
        try:
            return Percentile(float(percent or 99.9))
        except ValueError:
            raise ValueError(f"observer: {quote(observer)} needs a percentage between 50 and 100, as percentile:99.9") from None
    raise ValueError(f"observer: {quote(observer)} is none; use amax or percentile:99.9{nearest(name, ('amax', 'percentile'))}")


class Statistics:
    """Of one operand of one layer: minimum, maximum, sum and count per channel, and a histogram of magnitudes a head.

    Merging the statistics of two halves gives those of the whole, but for the order in which sums are added.
    """

    def __init__(self, heads: int, channels: int, histogram: bool):
        self.low = torch.full((heads, channels), float("inf"), dtype=torch.float32, device="cpu")
        self.high = torch.full((heads, channels), float("-inf"), dtype=torch.float32, device="cpu")
        self.sum = torch.zeros(heads, channels, dtype=torch.float64, device="cpu")
        self.count = 0
        bins = (HIGHEST - LOWEST) * STEPS
        self.bins = torch.zeros(heads, bins, dtype=torch.int64, device="cpu") if histogram else None

    def empty(self) -> "Statistics":
        """Statistics of the same shape that have seen nothing."""
        heads, channels = self.low.shape
        return Statistics(heads, channels, self.bins is not None)

    def observe(self, raw: Tensor, x: Tensor) -> None:
        """Add `[B, H, N, D]`: the sum is of `raw`, what is left of `x`, the same in the frame it is quantized in."""
        x = x.detach().float().cpu()
        self.low = torch.minimum(self.low, x.amin(dim=(0, 2)))
        self.high = torch.maximum(self.high, x.amax(dim=(0, 2)))
        self.sum += raw.detach().cpu().sum(dim=(0, 2), dtype=torch.float64)
        self.count += x.shape[0] * x.shape[2]
        if self.bins is not None:
            place = ((x.abs().log2() - LOWEST) * STEPS).floor().clamp(0, self.bins.shape[1] - 1).long()
            for head in range(x.shape[1]):
                self.bins[head] += torch.bincount(place[:, head].flatten(), minlength=self.bins.shape[1])

    def check_mergeable(self, other: "Statistics", name: str) -> None:
        """Raise ValueError if the other saw other heads or channels."""
        if self.low.shape != other.low.shape:
            raise ValueError(f"merge: {name}: heads and channels {list(other.low.shape)} are not {list(self.low.shape)}")

    def merge(self, other: "Statistics") -> None:
        """Add what another saw."""
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self.sum += other.sum
        self.count += other.count
        if self.bins is not None and other.bins is not None:
            self.bins += other.bins

    def mean(self) -> Tensor:
        """`[H, D]` float32."""
        return (self.sum / self.count).float()

    def quantile(self, percent: float, per_head: bool) -> Tensor:
        """The upper edge of the bin that `percent` of the magnitudes reach: `[H]`, or `[1]` over all heads."""
        assert self.bins is not None
        bins = self.bins if per_head else self.bins.sum(dim=0, keepdim=True)
        reached = bins.cumsum(dim=1).double() >= bins.sum(dim=1, keepdim=True) * (percent / 100)
        edge = torch.exp2((reached.int().argmax(dim=1) + 1).double() / STEPS + LOWEST).float()
        largest = torch.maximum(self.low.abs(), self.high.abs()).amax(dim=1)
        return torch.minimum(edge, largest if per_head else largest.amax(dim=0, keepdim=True))
