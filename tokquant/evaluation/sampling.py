"""A sample of the queries of a long sequence, where measuring all of them would take too long."""

import numpy as np

RUN = 32
"""Consecutive queries that are sampled together."""


def runs(n: int, wanted: int | None) -> list[slice]:
    """About `wanted` of n queries, in evenly spaced runs that include the last; all where `wanted` is None."""
    if wanted is None or wanted >= n:
        return [slice(0, n)]
    size = min(RUN, wanted)
    starts = np.linspace(n - size, 0, wanted // size).astype(int)
    return [slice(int(start), int(start) + size) for start in sorted(set(starts))]
