"""Where a kernel stands: what it moves beside the bounds, and beside the same attention in 16 bits."""

from dataclasses import dataclass

import torch

from tokquant.io_model.bounds import Bounds, Problem, lower_bounds, problem
from tokquant.io_model.traffic import Traffic, traffic
from tokquant.io_model.workload import Workload
from tokquant.kernels.compile import Kernel, kernel_of
from tokquant.schemes import QuantScheme

SIXTEEN_BIT = QuantScheme(name="sixteen-bit", **{role: {"precision": "fp16"} for role in "qkvp"})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Standing:
    """A kernel at a workload, on its target."""

    kernel: Kernel
    problem: Problem
    traffic: Traffic
    sixteen_bit: Traffic
    """Of the kernel for 16-bit Q, K, V and P, launched as it is without tuning."""
    memory: float
    """Bytes of fast memory that a multiprocessor is taken to have."""
    bounds: Bounds

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products, of scores that causality and the window leave."""
        return 4 * self.problem.scores * self.problem.head_dim

    @property
    def intensity(self) -> float:
        """Operations a byte that is moved."""
        return self.operations / self.traffic.total

    @property
    def sixteen_bit_intensity(self) -> float:
        """The same of the 16-bit kernel."""
        return self.operations / self.sixteen_bit.total

    @property
    def above_bound(self) -> float:
        """Times the greatest lower bound."""
        return self.traffic.total / self.bounds.greatest

    def milliseconds(self, moved: float) -> float:
        """For so many bytes at the bandwidth of the target's memory, by its datasheet: a prediction, not a measurement."""
        return moved / self.kernel.target.terabytes / 1e9


def standing(kernel: Kernel, workload: Workload, memory: float | None = None) -> Standing:
    """Count and bound what a kernel moves. Raises as `traffic` and `lower_bounds`.

    Args:
        memory: bytes of fast memory of each multiprocessor; all of its registers, shared and tensor memory where None.
    """
    target = kernel.target
    other = kernel_of(
        SIXTEEN_BIT,
        kernel.wanted,
        head_dim=kernel.head_dim,
        dtype=torch.float16 if kernel.dtype == torch.float32 else kernel.dtype,
        shared_heads=workload.heads // workload.kv_heads(kernel),
        target=target,
    )
    what = problem(kernel, workload)
    memory = target.fast_bytes if memory is None else memory
    return Standing(
        kernel,
        what,
        traffic(kernel, workload),
        traffic(other, workload),
        memory,
        lower_bounds(what, memory, target.multiprocessors),
    )


def launches(kernel: Kernel, workload: Workload) -> list[tuple[Kernel, Traffic]]:
    """Every launch that tuning may choose and what it moves, the one that moves least first.

    Fewest bytes is not fastest: `tokquant.tuning.planner` puts launches in order by time. Raises as `traffic`.
    """
    found = [(each, traffic(each, workload)) for each in kernel.candidates()]
    return sorted(found, key=lambda one: one[1].total)


def bytes_per_score(kernel: Kernel, workload: Workload) -> float:
    """Bytes that the kernel moves for each score that causality and the window leave. Raises as `traffic`."""
    return traffic(kernel, workload).total / problem(kernel, workload).scores
