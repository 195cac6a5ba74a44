"""Compares what a kernel moves with the lower bounds, and with the same attention in 16 bits."""

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
    """The traffic of a kernel at a workload on its target, with the bounds and the 16-bit kernel to compare it to."""

    kernel: Kernel
    problem: Problem
    traffic: Traffic
    sixteen_bit: Traffic
    """Traffic of the kernel for 16-bit Q, K, V and P, in its untuned launch."""
    memory: float
    """Bytes of fast memory per multiprocessor that the bounds assume."""
    bounds: Bounds

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products, for the scores that causality and the window leave."""
        return 4 * self.problem.scores * self.problem.head_dim

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: operations per byte moved."""
        return self.operations / self.traffic.total

    @property
    def sixteen_bit_intensity(self) -> float:
        """Arithmetic intensity of the 16-bit kernel."""
        return self.operations / self.sixteen_bit.total

    @property
    def above_bound(self) -> float:
        """Bytes moved, as a multiple of the greatest lower bound."""
        return self.traffic.total / self.bounds.greatest

    def milliseconds(self, moved: float) -> float:
        """Time to move these bytes at the memory bandwidth of the target's datasheet: a prediction, not a measurement."""
        return moved / self.kernel.target.terabytes / 1e9


def standing(kernel: Kernel, workload: Workload, memory: float | None = None) -> Standing:
    """Count and bound what a kernel moves. Raises as `traffic` and `lower_bounds`.

    Args:
        memory: bytes of fast memory of each multiprocessor; all of its registers, shared and tensor memory where None.
    """
    target = kernel.target
    sixteen_bit = kernel_of(
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
        traffic(sixteen_bit, workload),
        memory,
        lower_bounds(what, memory, target.multiprocessors),
    )


def launches(kernel: Kernel, workload: Workload) -> list[tuple[Kernel, Traffic]]:
    """Every launch that tuning may choose with its traffic, the least traffic first.

    The fewest bytes are not the fastest launch: `tokquant.tuning.planner` predicts times. Raises as `traffic`.
    """
    found = [(each, traffic(each, workload)) for each in kernel.candidates()]
    return sorted(found, key=lambda one: one[1].total)


def bytes_per_score(kernel: Kernel, workload: Workload) -> float:
    """Bytes that the kernel moves for each score that causality and the window leave. Raises as `traffic`."""
    return traffic(kernel, workload).total / problem(kernel, workload).scores
