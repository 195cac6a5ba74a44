"""Groups of asynchronous operations, and the barriers at which warps wait for each other."""

from collections import deque
from collections.abc import Callable, Iterable

from ptx.text import Instruction

Finish = Callable[[], None]
"""Completes an asynchronous operation."""

Ready = Callable[[], bool]
"""Whether waiting warps may proceed."""


class AsyncGroups:
    """Asynchronous operations in groups. Each completes as late as the ISA allows: when its group is waited for."""

    def __init__(self) -> None:
        self.uncommitted: list[Finish] = []
        self.groups: deque[list[Finish]] = deque()

    def add(self, finish: Finish) -> None:
        self.uncommitted.append(finish)

    def execute(self, instruction: Instruction) -> None:
        """Execute `commit_group`, `wait_group` or `wait_all`."""
        if "commit_group" in instruction.opcode:
            self.groups.append(self.uncommitted)
            self.uncommitted = []
            return
        pending = int(instruction.operands[0]) if instruction.operands else 0
        while len(self.groups) > pending:
            for finish in self.groups.popleft():
                finish()

    def take_all(self) -> list[Finish]:
        """Remove and return all operations that are not complete; the caller completes them."""
        operations = [finish for group in (*self.groups, self.uncommitted) for finish in group]
        self.groups.clear()
        self.uncommitted = []
        return operations


class Barrier:
    """An mbarrier: a phase ends after `count` arrivals. Copies that arrive in a phase complete when it is waited for."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phase = 0
        self.phase_copies: list[Finish] = []
        self.ended_copies: list[Finish] = []

    def arrive(self, count: int, copies: Iterable[Finish] = ()) -> None:
        """Add arrivals, with copies that these threads began. Raises AssertionError for more than the phase expects."""
        assert count <= self.pending, f"{count} arrivals at a barrier that lacks {self.pending} of {self.count}"
        self.phase_copies += copies
        self.pending -= count
        if not self.pending:
            self.phase, self.pending = self.phase + 1, self.count
            self.ended_copies += self.phase_copies
            self.phase_copies = []

    def passed(self, parity: int) -> bool:
        """Whether the last phase of this parity has ended; if so, its copies complete."""
        if self.phase % 2 == parity:
            return False
        for finish in self.ended_copies:
            finish()
        self.ended_copies = []
        return True


class NamedBarrier:
    """A numbered barrier of `bar.sync`: no thread proceeds before all have arrived."""

    def __init__(self) -> None:
        self.arrived = self.completed = 0

    def arrive(self, count: int, expected: int) -> Ready:
        """`count` of `expected` threads arrive. Returns a function that says whether they may proceed."""
        phase = self.completed
        self.arrived += count
        if self.arrived == expected:
            self.arrived, self.completed = 0, phase + 1
        return lambda: self.completed > phase
