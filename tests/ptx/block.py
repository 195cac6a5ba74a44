"""Simulation of a block of threads: its shared memory, its barriers and the scheduling of its warps."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ptx.barriers import Barrier, NamedBarrier
from ptx.memory import RESERVED, Memory
from ptx.text import Kernel
from ptx.warps import Warps

WARPGROUP = 128


class Deadlock(Exception):
    """All warps wait for each other."""


class Block:
    """Shared memory, barriers, and groups of threads that run in lockstep: the warpgroups of a warp-specialized kernel, which
    `setmaxnreg` indicates, or else all threads."""

    def __init__(self, kernel: Kernel, parameters: dict[str, bytes], memory: Memory, shared: int, special: dict[str, int]):
        """
        Args:
            parameters: the bytes of each parameter.
            memory: global memory.
            shared: bytes of shared memory.
            special: special registers that have the same value in all threads, such as the block's index.
        """
        self.kernel, self.parameters, self.memory = kernel, parameters, memory
        self.shared_bytes = np.full(RESERVED + shared, 0xFF, np.uint8)  # NaN in every type, until it is written
        self.shared = Memory([(RESERVED, self.shared_bytes[RESERVED:])])
        self.barriers: dict[int, Barrier] = {}
        self.named_barriers: dict[int, NamedBarrier] = defaultdict(NamedBarrier)
        warp_specialized = any(instruction.opcode.startswith("setmaxnreg") for instruction in kernel.body)
        lockstep = WARPGROUP if warp_specialized else kernel.threads
        self.warps = [Warps(self, range(first, first + lockstep), special) for first in range(0, kernel.threads, lockstep)]

    @property
    def unfenced(self) -> int:
        """How many tensor core products read shared memory with no fence, or no barrier, after a write, which they may miss."""
        return sum(warps.unfenced for warps in self.warps)

    def run(self, order: Sequence[int] = ()) -> None:
        """Run from the first instruction to `ret`. The first group in `order` (default: all) that can proceed runs next.

        Raises OutOfBounds; NotImplementedError for an instruction that is not simulated; Deadlock if all groups wait.
        """
        running = {index: self.warps[index].run() for index in order or range(len(self.warps))}
        ready = dict.fromkeys(running, lambda: True)
        while running:
            index = next((index for index in running if ready[index]()), None)
            if index is None:
                raise Deadlock("; ".join(f"warpgroup {index} waits at {self.warps[index].at}" for index in running))
            with np.errstate(all="ignore"):
                wait = next(running[index], None)
            if wait is None:
                del running[index]
            else:
                ready[index] = wait
