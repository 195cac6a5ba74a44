"""The launches of a kernel beside one another, by what they move."""

from tokquant.io_model.bounds import problem
from tokquant.io_model.traffic import Traffic, traffic
from tokquant.io_model.workload import Workload
from tokquant.kernels.compile import Kernel


def launches(kernel: Kernel, workload: Workload) -> list[tuple[Kernel, Traffic]]:
    """Every launch that tuning may choose and what it moves, the one that moves least first.

    Fewest bytes is not fastest: `tokquant.tuning.planner` puts launches in order by time. Raises as `traffic`.
    """
    found = [(each, traffic(each, workload)) for each in kernel.candidates()]
    return sorted(found, key=lambda one: one[1].total)


def bytes_per_score(kernel: Kernel, workload: Workload) -> float:
    """Bytes that the kernel moves for each score that causality and the window leave. Raises as `traffic`."""
    return traffic(kernel, workload).total / problem(kernel, workload).scores
