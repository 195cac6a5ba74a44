"""How long a launch keeps multiprocessors busy: its programs in the order they start, each where a place is free first."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from heapq import heapreplace
from itertools import cycle, islice

MANY = 256
"""Programs a place, from which on what the last of them add is a hundredth at most, and is left out."""


def busy(programs: int, scores: Sequence[int], processors: int, resident: int, clocks: Callable[[int], float]) -> float:
    """Clocks from the first program's start to the last one's end.

    Args:
        programs: how many there are.
        scores: that each computes, in the order they start; from its beginning again where there are more programs.
        processors, resident: places for programs are so many multiprocessors times so many.
        clocks: of a score of each of so many programs beside one another on one multiprocessor.
    """
    places = processors * resident
    if programs > MANY * places:
        return programs / places * sum(scores) / len(scores) * clocks(resident)
    start, free = 0.0, [(0.0, place) for place in range(min(programs, places))]  # in order, so a heap
    for score in islice(cycle(scores), programs):
        start, place = free[0]
        heapreplace(free, (start + score * clocks(resident), place))
    # from here on nothing follows, and a multiprocessor's programs have it to fewer and fewer
    left = defaultdict(list)
    for end, place in free:
        left[place % processors].append((end - start) / clocks(resident))
    return start + max(_together(sorted(each), clocks) for each in left.values())


def _together(scores: Sequence[float], clocks: Callable[[int], float]) -> float:
    """Clocks that programs take which begin together on one multiprocessor, the shortest first."""
    steps = zip(scores, (0.0, *scores), range(len(scores), 0, -1), strict=False)
    return sum((score - before) * clocks(count) for score, before, count in steps)
