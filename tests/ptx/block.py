"""Simulates one block of threads: its shared memory and barriers, and the scheduling of its warps."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ptx.barriers import Barrier, Meeting
from ptx.memory import RESERVED, Memory
from ptx.text import Kernel
from ptx.warps import Warps

WARPGROUP = 128


class Deadlock(Exception):
    """All warps wait for one another."""


class Block:
    """Shared memory, barriers, and groups of threads that run in lockstep: each warpgroup is one if the kernel is
    warp-specialized, which `setmaxnreg` shows; else all threads are."""

    def __init__(self, kernel: Kernel, given: dict[str, bytes], memory: Memory, shared: int, place: dict[str, int]):
        """
        Args:
            given: the bytes of each parameter.
            memory: global memory.
            shared: bytes of shared memory.
            place: special registers with the same value for all threads, such as the block's index.
        """
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
        """How many products read shared memory that was written without a fence or barrier before: tensor cores need not see
        such writes."""
        return sum(warps.unfenced for warps in self.warps)

    def run(self, order: Sequence[int] = ()) -> None:
        """Run from the first instruction to `ret`. Of the groups that can proceed, the first in `order` (default: all) does.

        Raises OutOfBounds; NotImplementedError for instructions that no kernel here has needed; Deadlock where all wait.
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
