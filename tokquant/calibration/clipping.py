"""Clipping ranges from histograms: percentiles, and the range with the least squared error."""

import torch
from torch import Tensor

from tokquant.calibration.histogram import Histogram
from tokquant.calibration.statistics import Change
from tokquant.quantize import asymmetric_scale, codes_of, symmetric_scale
from tokquant.schemes import Operand

CELLS = 512
"""Cells of the histogram under a scale; each round that narrows the range makes it anew."""
STEP = 2**0.5
COARSE = [STEP**-i for i in range(11)]
FINE = [1 - i / 24 for i in range(13)]
SHARES = (COARSE, COARSE, FINE)
"""Shares of the range that each round tries: twice down to 1/32, then in steps of 4 %."""


def percentile(seen: Histogram, operand: Operand, change: Change, percent: float) -> tuple[Tensor, Tensor]:
    """The range that holds `percent` of the values under each scale, in the shape of the scales.

    A symmetric range is a percentile of magnitudes; an asymmetric one clips half of the rest at each end.
    """
    widest = low, high = _widest(seen, operand, change)
    for _ in range(2):
        counts, _, _ = seen.cells(low, high, change, CELLS)
        cell = (high - low) / CELLS
        if operand.symmetric:
            # the first half of the cells is the negative magnitudes, largest first
            folded = counts[:, CELLS // 2 :] + counts[:, : CELLS // 2].flip(1)
            largest = high * _reached(folded, percent).reshape(high.shape)
            found = -largest, largest
        else:
            upper, lower = (_reached(x, (percent + 100) / 2).reshape(high.shape) for x in (counts, counts.flip(1)))
            found = low * lower + high * (1 - lower), high * upper + low * (1 - upper)
        # the second round has narrower cells; with some margin, as the outermost cells also count what lies beyond them
        low = torch.maximum(found[0] - 2 * cell, widest[0])
        high = torch.minimum(found[1] + 2 * cell, widest[1])
    return found


def least_error(seen: Histogram, operand: Operand, change: Change) -> tuple[Tensor, Tensor]:
    """The range with the least expected squared error under each scale, in the shape of the scales.

    The error is that of the operand's precision, with scales rounded as they are stored. A grid search pulls the ends of the
    range in towards 0, or, asymmetric, towards the mean: both ends together, then each alone.
    """
    widest = low, high = _widest(seen, operand, change)
    for number, shares in enumerate(SHARES):
        counts, means, deviations = seen.cells(low, high, change, CELLS)
        centre = torch.zeros_like(low)
        if not operand.symmetric:
            centre = ((counts * means).sum(dim=1) / counts.sum(dim=1)).float().reshape(low.shape).clamp(low, high)
        # a cell is represented by two values, mean -+ deviation: with 8 bits the means alone would all lie equally far from the
        # codes of the current range, whose grid the cells divide, and its error would look too small
        values = torch.cat([means - deviations, means + deviations], dim=1).float()
        counts = torch.cat([counts, counts], dim=1).float()
        for ends in ((1, 1),) if operand.symmetric else ((1, 1), (0, 1), (1, 0)):
            start, best = (low, high), torch.full_like(low, float("inf"), dtype=torch.float64)
            for share in shares:
                tried = _pulled(*start, centre, share, ends)
                error = _error(counts, values, *tried, operand).reshape(best.shape)
                low, high = (torch.where(error < best, new, old) for new, old in zip(tried, (low, high), strict=True))
                best = torch.minimum(error, best)
        if number + 1 < len(SHARES):
            # the next round starts one step wider, with narrower cells
            low, high = _pulled(low, high, centre, STEP, (1, 1))
            low, high = torch.maximum(low, widest[0]), torch.minimum(high, widest[1])
    return low, high


def _widest(seen: Histogram, operand: Operand, change: Change) -> tuple[Tensor, Tensor]:
    """The range of all values under each scale. Raises ValueError where `change` makes one overflow float32."""
    low, high = seen.widest(operand.granularity.kind, change, operand.symmetric)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError(f"{operand.role}_scale: holds a value that is not finite")
    return low, high


def _reached(counts: Tensor, percent: float) -> Tensor:
    """The fraction of the cells `[G, n]`, from the first on, that holds `percent` of the values, interpolated: `[G, 1]`."""
    total = counts.cumsum(dim=1)
    wanted = total[:, -1:] * (percent / 100)
    cell = torch.searchsorted(total, wanted)
    within = counts.gather(1, cell)
    return (cell + (wanted - (total.gather(1, cell) - within)) / within).float() / counts.shape[1]


def _pulled(low: Tensor, high: Tensor, centre: Tensor, share: float, ends: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The range with each end that is 1 in `ends` moved to `share` of its distance from the centre."""
    pulled = (centre + (end - centre) * share for end in (low, high))
    first, second = (new if moves else old for new, old, moves in zip(pulled, (low, high), ends, strict=True))
    return first, second


def _error(counts: Tensor, values: Tensor, low: Tensor, high: Tensor, operand: Operand) -> Tensor:
    """Sum of squared errors of quantizing values `[G, n]`, each `counts` times, in these ranges: `[G]`, float64."""
    low, high = low.reshape(-1, 1), high.reshape(-1, 1)
    if operand.symmetric:
        scale, zero = symmetric_scale(high, operand).float(), None
    else:
        scale, zero = (x.float() for x in asymmetric_scale(low, high, operand))
    coded = operand.format.decode(codes_of(values, scale, zero, operand))
    back = coded * scale if zero is None else (coded + 2 ** (operand.format.bits - 1)) * scale + zero
    return ((values - back).square_() * counts).sum(dim=1, dtype=torch.float64)
