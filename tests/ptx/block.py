"""One block of threads: what they share, and in which order they take turns."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ptx.barriers import Barrier, Meeting
from ptx.memory import RESERVED, Memory
from ptx.text import Kernel
from ptx.warps import Warps

WARPGROUP = 128


class Deadlock(Exception):
    """Nobody can go on."""


class Block:
    """Shared memory and barriers, and threads that go through a kernel together: all of them, or, where warpgroups have
    registers of their own number and so part, each warpgroup."""

    def __init__(self, kernel: Kernel, given: dict[str, bytes], memory: Memory, shared: int, place: dict[str, int]):
        """Of each parameter's bytes, memory, how many bytes are shared, and special registers that are one for all threads."""
        self.kernel, self.given, self.memory = kernel, given, memory
        self.held = np.full(RESERVED + shared, 0xFF, np.uint8)  # NaN in every type, until it is written
        self.shared = Memory([(RESERVED, self.held[RESERVED:])])
        self.barriers: dict[int, Barrier] = {}
        self.meetings: dict[int, Meeting] = defaultdict(Meeting)
        apart = any(each.opcode.startswith("setmaxnreg") for each in kernel.body)
        together = WARPGROUP if apart else kernel.threads
        self.warps = [Warps(self, range(first, first + together), place) for first in range(0, kernel.threads, together)]

    @property
    def unfenced(self) -> int:
        """Products of bytes that were fresh or unmet when they were begun: tensor cores need not see those."""
        return sum(warps.unfenced for warps in self.warps)

    def run(self, order: Sequence[int] = ()) -> None:
        """From the first instruction to `ret`. Whoever can go on and comes first in `order` does, of all where that is empty.

        Raises OutOfBounds; NotImplementedError for what no kernel here has needed; Deadlock where all wait.
        """
        going = {place: self.warps[place].run() for place in order or range(len(self.warps))}
        ready = dict.fromkeys(going, lambda: True)
        while going:
            place = next((place for place in going if ready[place]()), None)
            if place is None:
                raise Deadlock("; ".join(f"warpgroup {place} waits at {self.warps[place].at}" for place in going))
            with np.errstate(all="ignore"):
                pause = next(going[place], None)
            if pause is None:
                del going[place]
            else:
                ready[place] = pause
