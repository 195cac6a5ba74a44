"""Simulates how a launch's programs fill the multiprocessors: in grid order, each in the slot that is free first."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from heapq import heapreplace
from itertools import cycle, islice

MANY = 256
"""Programs per slot above which the tail of a launch is at most a hundredth of its time, and is not simulated."""


def busy(programs: int, scores: Sequence[int], processors: int, resident: int, clocks: Callable[[int], float]) -> float:
    """Clocks from the first program's start to the last one's end.

    Args:
        programs: size of the grid.
        scores: scores that each program computes, in grid order; repeated where there are more programs.
        processors: multiprocessors.
        resident: programs that one multiprocessor holds at a time.
        clocks: of n, the clocks for one score of each of n programs that share a multiprocessor.
    """
    slots = processors * resident
    if programs > MANY * slots:
        return programs / slots * sum(scores) / len(scores) * clocks(resident)
    start, free = 0.0, [(0.0, slot) for slot in range(min(programs, slots))]  # sorted, so already a heap
    for score in islice(cycle(scores), programs):
        start, slot = free[0]
        heapreplace(free, (start + score * clocks(resident), slot))
    # the tail: no program is left to start, so those still running share a multiprocessor with fewer and fewer
    left = defaultdict(list)
    for end, slot in free:
        left[slot % processors].append((end - start) / clocks(resident))
    return start + max(_tail(sorted(each), clocks) for each in left.values())


def _tail(scores: Sequence[float], clocks: Callable[[int], float]) -> float:
    """Clocks until one multiprocessor has finished these programs, the shortest first, which speed up as others end."""
    steps = zip(scores, (0.0, *scores), range(len(scores), 0, -1), strict=False)
    return sum((score - before) * clocks(count) for score, before, count in steps)
