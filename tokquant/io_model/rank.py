"""Launches in the order of what they move, for what registers and shared memory hold."""

from dataclasses import dataclass

from tokquant.io_model.bounds import problem
from tokquant.io_model.traffic import Traffic, traffic
from tokquant.io_model.workload import Workload
from tokquant.kernels.compile import Kernel

REGISTERS = 255
"""That a thread can have."""
TOKENS = 8192
"""Of a sequence in which ends hardly count."""


@dataclass(frozen=True)
class Ranked:
    """A launch, what it moves, and what it needs at least."""

    kernel: Kernel
    traffic: Traffic
    registers: int
    """Of a thread, for the tile's scores and outputs alone."""

    @property
    def fits(self) -> bool:
        """Whether a thread can have so many. Whether shared memory suffices has decided what is a candidate."""
        return self.registers <= REGISTERS


def rank(kernel: Kernel, workload: Workload) -> list[Ranked]:
    """Every launch that tuning may choose, the one that moves least first, behind them those that cannot be held.

    Fewest bytes is not fastest: a large tile also waits longer for itself. So nothing is left out of tuning by this.

    Raises as `traffic`.
    """
    channels = int(dict(kernel.plan.constants)["D_TILE"])
    found = []
    for each in kernel.candidates():
        config = each.config
        held = config.block_m * (channels + config.block_n)
        threads = config.num_warps * each.target.lanes
        found.append(Ranked(each, traffic(each, workload), -(-held // threads)))
    return sorted(found, key=lambda one: (not one.fits, one.traffic.total))


def bytes_per_score(kernel: Kernel) -> float:
    """Bytes that the kernel moves for each score that causality leaves, over a sequence of 8192 tokens."""
    heads = int(dict(kernel.plan.constants)["SHARED_HEADS"])
    workload = Workload(heads=heads, n_q=TOKENS, n_k=TOKENS)
    return traffic(kernel, workload).total / problem(kernel, workload).scores
