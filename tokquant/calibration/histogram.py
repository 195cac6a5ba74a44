"""Histograms of channels whose bins depend on a channel's extremes alone, so that merging two is exact."""

import torch
from torch import Tensor

from tokquant.calibration.statistics import Change, Extremes, batch_extremes

LOG2_BINS = 9
BINS = 2**LOG2_BINS
"""Bins of a channel; the range between its extremes takes up at least half of them."""
CHUNK = 2**22
"""Values binned per pass, which bounds temporary memory."""
POINTS = 4
"""Evenly spread points that represent the values of a bin."""
MOST = 2**31 - 1
"""The most values per channel: counts are int32."""


class Histogram(Extremes):
    """Counts of values in bins `[i 2^e, (i + 1) 2^e)`, int32 `[H, D, 512]`, from the bin of the channel's minimum on.

    e is the least exponent at which 512 bins reach the channel's maximum. So the bins are a function of the extremes: a wider
    range only joins pairs of bins, and neither the order nor the grouping of batches changes a count.
    """

    KEPT = ("low", "high", "bins")

    def __init__(self, heads: int, channels: int):
        super().__init__(heads, channels)
        self.bins = torch.zeros(heads, channels, BINS, dtype=torch.int32, device="cpu")

    def observe(self, x: Tensor) -> None:
        """Add float32 `[B, H, N, D]`."""
        self._widen(*batch_extremes(x))
        first, exponent = window(self.low, self.high)
        for part in x.split(max(1, CHUNK * x.shape[2] // x.numel()), dim=2):
            self.bins += counted(part, first, exponent)

    def merge(self, other: Extremes) -> None:
        """Add what another saw."""
        assert isinstance(other, Histogram)
        self._widen(other.low, other.high)
        self.bins += joined(other.bins, window(other.low, other.high), window(self.low, self.high))

    def _widen(self, low: Tensor, high: Tensor) -> None:
        before = (self.low, self.high)
        super()._widen(low, high)
        if not bool(before[0].isinf().any()):
            self.bins = joined(self.bins, window(*before), window(self.low, self.high))

    def check(self, tokens: int) -> None:
        super().check(tokens)
        if bool((self.bins < 0).any()) or bool((self.bins.sum(dim=2) != tokens).any()):
            raise ValueError(f"bins: not the counts of {tokens} tokens in each channel")

    def widest(self, kind: str, change: Change, symmetric: bool) -> tuple[Tensor, Tensor]:
        """The range of the values under each scale, in its shape; from -a to a where it is symmetric."""
        low, high = self.extremes(kind, change)
        if symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        return low, high

    def cells(self, low: Tensor, high: Tensor, change: Change, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, means and standard deviations in `size` equal cells from low to high, under each scale: `[G, size]` float64.

        `low` and `high` are in the shape of the scales. The first and the last cell also count the values beyond them.
        """
        h, d, groups = *self.low.shape, low.numel()
        # float64: in float32 the width of an extreme range would overflow or vanish
        low, high = low.double(), high.double()
        width = torch.where(high > low, (high - low) / size, 1.0)
        start, width = (x.expand(h, 1, d).reshape(h, d, 1) for x in (low, width))
        group = torch.arange(groups, dtype=torch.int32, device="cpu").reshape(low.shape).expand(h, 1, d).reshape(h, d, 1)
        first, exponent = (x[..., None] for x in window(self.low, self.high))
        weights = self.bins.flatten().double()
        counts, sums, squares = (torch.zeros(groups * size, dtype=torch.float64, device="cpu") for _ in range(3))
        for point in range(POINTS):
            place = torch.arange(BINS, device="cpu") + first + (point + 0.5) / POINTS
            x = place.mul_(power_of_two(exponent)).clamp_(self.low[..., None], self.high[..., None])
            x = change(x)
            index = ((x - start) / width).clamp_(0, size - 1).int().add_(group * size).flatten()
            counts += torch.bincount(index, weights, counts.numel())
            x = x.flatten().double()
            sums += torch.bincount(index, x * weights, sums.numel())
            squares += torch.bincount(index, x * x * weights, squares.numel())
        counts, means, squares = (each.reshape(groups, size) for each in (counts, sums / counts, squares / counts))
        means, squares = (torch.where(counts > 0, each, 0.0) for each in (means, squares))
        return counts, means, (squares - means * means).clamp_min_(0).sqrt_()


def window(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the first bin and exponent of the bins' width, int64 `[H, D]` each, for channels with these extremes."""
    low, high = low.double(), high.double()
    # bins narrower than 2^-22 of the magnitude would resolve more than float32 does
    exponent = torch.maximum(_exponent(high - low) - LOG2_BINS, _exponent(torch.maximum(low.abs(), high.abs())) - 22)
    exponent = exponent.clamp(-126, 125)
    first, last = (_bin(x, exponent) for x in (low, high))
    exponent = exponent + (last - first >= BINS)
    return _bin(low, exponent), exponent


def counted(x: Tensor, first: Tensor, exponent: Tensor) -> Tensor:
    """Histogram of `[B, H, N, D]` in the bins of each channel: int32 `[H, D, BINS]`, on the CPU."""
    h, d = first.shape
    channel = torch.arange(h * d, device="cpu").reshape(h, d) * BINS
    power, start = (each.to(x.device)[:, None] for each in (power_of_two(-exponent), (channel - first).int()))
    index = (x * power).floor_().int().add_(start)
    return torch.bincount(index.flatten(), minlength=h * d * BINS).reshape(h, d, BINS).int().cpu()


def joined(bins: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """The same counts in the bins of a new window that contains the old one."""
    if all(torch.equal(a, b) for a, b in zip(old, new, strict=True)):
        return bins
    (first, exponent), (new_first, new_exponent) = old, new
    place = torch.arange(BINS, device="cpu") + first[..., None]
    place = (place >> (new_exponent - exponent).clamp(max=40)[..., None]) - new_first[..., None]
    # old bins that fall outside of the new window are empty
    return torch.zeros_like(bins).scatter_add_(2, place.clamp(0, BINS - 1), bins)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, float32; exponents from -126 to 127."""
    return ((exponent + 127) << 23).int().view(torch.float32)


def _bin(x: Tensor, exponent: Tensor) -> Tensor:
    return (x * power_of_two(-exponent)).floor().long()


def _exponent(x: Tensor) -> Tensor:
    """The least e with |x| < 2^e; for 0 an e below all others."""
    return torch.where(x == 0, -1000, torch.frexp(x).exponent.long())
