"""Queries that stand for all of a long sequence."""

import numpy as np

RUN = 32
"""Queries next to each other that are taken where not all are."""


def runs(n: int, wanted: int | None) -> list[slice]:
    """All of n queries, or about as many as wanted, in runs from the first to the last."""
    if wanted is None or wanted >= n:
        return [slice(0, n)]
    long = min(RUN, wanted)
    starts = np.linspace(n - long, 0, wanted // long).astype(int)
    return [slice(int(start), int(start) + long) for start in sorted(set(starts))]
