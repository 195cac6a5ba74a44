"""What is begun and done later, and where warps wait for one another."""

from collections import deque
from collections.abc import Callable, Iterable

from ptx.text import Instruction

Finish = Callable[[], None]
"""Does what was begun."""

Ready = Callable[[], bool]
"""Whether warps that wait may go on."""


class Later:
    """What is begun and done in groups, as late as may be: when a group is waited for."""

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
        """All of it, which somebody else does from now on."""
        found = [finish for group in (*self.groups, self.begun) for finish in group]
        self.groups.clear()
        self.begun = []
        return found


class Barrier:
    """An mbarrier: a phase ends with as many arrivals as it was made for, and what was copied until then is there when somebody
    has waited for that."""

    def __init__(self, count: int) -> None:
        self.count = self.lacking = count
        self.phase = 0
        self.arrived: list[Finish] = []
        self.ended: list[Finish] = []

    def arrive(self, count: int, copies: Iterable[Finish] = ()) -> None:
        """So many threads, with copies that they began. Raises AssertionError where that is more than a phase lacks."""
        assert count <= self.lacking, f"{count} arrivals at a barrier that lacks {self.lacking} of {self.count}"
        self.arrived += copies
        self.lacking -= count
        if not self.lacking:
            self.phase, self.lacking = self.phase + 1, self.count
            self.ended += self.arrived
            self.arrived = []

    def passed(self, parity: int) -> bool:
        """Whether the last phase of that parity has ended."""
        if self.phase % 2 == parity:
            return False
        for finish in self.ended:
            finish()
        self.ended = []
        return True


class Meeting:
    """A barrier by number, `bar.sync`: nobody goes on before so many threads are there."""

    def __init__(self) -> None:
        self.present = self.held = 0

    def come(self, count: int, wanted: int) -> Ready:
        """So many threads, of those that it is held for."""
        own = self.held
        self.present += count
        if self.present == wanted:
            self.present, self.held = 0, own + 1
        return lambda: self.held > own
