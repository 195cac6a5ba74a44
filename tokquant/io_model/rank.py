"""Launches in the order of what they move, for what registers and shared memory hold."""

from dataclasses import dataclass

from tokquant.io_model.traffic import Traffic, traffic
from tokquant.io_model.workload import Workload
from tokquant.kernels.compile import Kernel

REGISTERS = 255
"""That a thread can have."""


@dataclass(frozen=True)
class Ranked:
    """A launch, what it moves, and what it needs at least."""

    kernel: Kernel
    traffic: Traffic
    registers: int
    """Of a thread, for the tile's scores and outputs alone."""

    @property
    def fits(self) -> bool:
        """Whether those are as many as a thread can have; shared memory holds every candidate as far as `candidates` can tell."""
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
