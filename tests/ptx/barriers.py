"""Asynchronous operations, and barriers where warps wait for one another."""

from collections import deque
from collections.abc import Callable, Iterable

from ptx.text import Instruction

Finish = Callable[[], None]
"""Completes an asynchronous operation."""

Ready = Callable[[], bool]
"""Whether warps that wait may go on."""


class Later:
    """Asynchronous operations in groups. Each completes as late as is allowed: when its group is waited for."""

    def __init__(self) -> None:
        self.begun: list[Finish] = []
        self.groups: deque[list[Finish]] = deque()

    def begin(self, finish: Finish) -> None:
        self.begun.append(finish)

    def order(self, each: Instruction) -> None:
        """`commit_group`, `wait_group` or `wait_all`."""
        if "commit_group" in each.opcode:
            self.groups.append(self.begun)
            self.begun = []
            return
        pending = int(each.operands[0]) if each.operands else 0
        while len(self.groups) > pending:
            for finish in self.groups.popleft():
                finish()

    def taken(self) -> list[Finish]:
        """Hand over all operations that are not complete; the caller completes them."""
        found = [finish for group in (*self.groups, self.begun) for finish in group]
        self.groups.clear()
        self.begun = []
        return found


class Barrier:
    """An mbarrier: a phase ends after `count` arrivals. The copies that arrived with it complete when a thread has waited for
    the phase."""

    def __init__(self, count: int) -> None:
        self.count = self.lacking = count
        self.phase = 0
        self.arrived: list[Finish] = []
        self.ended: list[Finish] = []

    def arrive(self, count: int, copies: Iterable[Finish] = ()) -> None:
        """Count `count` arrivals, with copies that these threads began. Raises AssertionError for more than the phase lacks."""
        assert count <= self.lacking, f"{count} arrivals at a barrier that lacks {self.lacking} of {self.count}"
        self.arrived += copies
        self.lacking -= count
        if not self.lacking:
            self.phase, self.lacking = self.phase + 1, self.count
            self.ended += self.arrived
            self.arrived = []

    def passed(self, parity: int) -> bool:
        """Whether the last phase of this parity has ended; if so, its copies complete."""
        if self.phase % 2 == parity:
            return False
        for finish in self.ended:
            finish()
        self.ended = []
        return True


class Meeting:
    """A numbered barrier, `bar.sync`: no thread proceeds before all have arrived."""

    def __init__(self) -> None:
        self.present = self.held = 0

    def come(self, count: int, wanted: int) -> Ready:
        """`count` threads arrive, of the `wanted` that the barrier is for. Returns whether they may proceed, as a function."""
        own = self.held
        self.present += count
        if self.present == wanted:
            self.present, self.held = 0, own + 1
        return lambda: self.held > own
