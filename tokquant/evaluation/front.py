"""Pareto fronts of combinations, where each unit takes one of its options: none beats a kept one in both cost and error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEPT = 2000
"""The most combinations that a merge keeps, evenly spread over the range of costs."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Front:
    """A Pareto front: combinations in order of rising cost and falling error."""

    cost: Floats
    """`[points]`."""
    error: Floats
    """`[points]`."""
    choice: NDArray[np.int32]
    """`[points, units]`: which option each unit takes."""

    def __len__(self) -> int:
        return len(self.cost)

    def cheapest(self, most_error: float) -> int | None:
        """The point of least cost whose error is at most this."""
        found = np.flatnonzero(self.error <= most_error)
        return int(found[0]) if found.size else None

    def best(self, most_cost: float) -> int | None:
        """The point of least error whose cost is at most this."""
        found = np.flatnonzero(self.cost <= most_cost)
        return int(found[-1]) if found.size else None


def of_options(cost: Floats, error: Floats) -> Front:
    """The front of one unit, from the cost and error of each option; options without finite error are left out."""
    usable = np.flatnonzero(np.isfinite(error) & np.isfinite(cost))
    return _pruned(cost[usable], error[usable], lambda kept: usable[kept, None].astype(np.int32))


def merged(units: Sequence[Front], join: Callable[[Floats, Floats], Floats]) -> Front:
    """The front of all combinations of the units' options: costs add up, errors are joined by `np.add` or `np.maximum`."""
    whole, *rest = units
    for unit in rest:
        first, second = (x.ravel() for x in np.indices((len(whole), len(unit))))

        def choice(kept, whole=whole, unit=unit, first=first, second=second):
            return np.concatenate([whole.choice[first[kept]], unit.choice[second[kept]]], axis=1)

        whole = _pruned(whole.cost[first] + unit.cost[second], join(whole.error[first], unit.error[second]), choice)
    return whole


def _pruned(cost: Floats, error: Floats, choice: Callable[[NDArray], NDArray[np.int32]]) -> Front:
    """The front of these points, of which `choice(kept)` gives the options."""
    order = np.lexsort((error, cost))
    falls = np.r_[True, error[order][1:] < np.minimum.accumulate(error[order])[:-1]] if order.size else []
    kept = order[falls]
    if len(kept) > KEPT:
        # of all points within one step of cost, keep the last, which errs least; and the cheapest point of all
        step = np.floor((cost[kept] - cost[kept[0]]) / (cost[kept[-1]] - cost[kept[0]]) * (KEPT - 1))
        kept = kept[np.r_[True, (step[1:-1] < step[2:]), True]]
    return Front(cost[kept], error[kept], choice(kept))
