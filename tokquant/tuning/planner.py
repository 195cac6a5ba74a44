"""Puts a kernel's launches in order before any is timed: by what they move, their machine code, and how they fill a GPU."""

from collections import Counter
from dataclasses import dataclass, replace

from tokquant.errors import first_line
from tokquant.io_model.workload import Workload
from tokquant.kernels.candidates import Config
from tokquant.kernels.compile import Kernel
from tokquant.kernels.plan import Plan
from tokquant.tuning.schedule import busy
from tokquant.tuning.work import Step, Work, work
from tokquant.whole_numbers import whole_number

KEEP = 5
"""Launches of each loop that are timed, if nobody asks for another number."""
SPILL = 4
"""Instructions that a load or store of a spilled register counts as: a multiprocessor's load units take 32 threads a clock, its
schedulers four times as many."""


@dataclass(frozen=True)
class Expected:
    """Milliseconds that each part of a GPU is busy with a launch. They overlap, so the slowest decides."""

    memory: float
    """Inputs and outputs once, at its bandwidth."""
    cache: float
    """All that programs ask for, at the bandwidth of the cache that they share."""
    processors: float
    """The multiprocessors: instructions and products, from the first block's start to the last one's end."""
    merging: float = 0.0
    """Afterwards, where the keys were split."""

    @property
    def ms(self) -> float:
        """Of the launch, and of merging."""
        return max(self.memory, self.cache, self.processors) + self.merging

    @property
    def limit(self) -> str:
        """What the launch waits for: `memory`, `cache` or `processors`."""
        return max(("memory", "cache", "processors"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Trial:
    """A launch that tuning may choose, what is expected of it, and what became of it."""

    config: Config
    ms: float | None = None
    """None where it was not timed."""
    why: str = ""
    """Why it is not timed."""
    predicted_ms: float | None = None
    """None where it cannot run."""
    limit: str = ""
    """What it is expected to wait for, as in `Expected`."""
    split: int | None = None
    """Of a kernel that reads pages: programs for each multiprocessor that its keys are split for."""

    def untuned(self, plan: Plan) -> bool:
        """Whether this launch is the one that is taken without tuning. One that cannot run has no split."""
        return self.config == plan.config and self.split in (None, plan.splits[0])


def expect(kernel: Kernel, does: Work) -> Expected:
    """The model. Latencies, and what masks add to the tiles at the edges, are not in it. Raises as `Kernel.asm`.

    A multiprocessor computes a tile's products, then whatever is longer of its exponentials and instructions, for all of its
    blocks together as `Kernel.prediction` has it for one (which has P V beside them in the loop for Hopper): published kernels
    of this kind come to 0.7 to 0.95 of that with one block and with two. Blocks start in the kernel's own order, each where a
    place is free first (`schedule`). What is spilled outside the loop over whole tiles costs nothing here, and within it as
    `SPILL` says.
    """
    target, config, predicted, found = kernel.target, kernel.config, kernel.prediction, kernel.resources
    spilled = found.spills_in_loop * target.lanes * config.num_warps / config.roles / (config.block_m * config.block_n)
    score = predicted.clocks((SPILL - 1) * spilled / target.issued)

    def clocks(blocks: int) -> float:
        """For a score of each of so many blocks on one multiprocessor. A block of few warps leaves schedulers without one."""
        return score * max(blocks, target.schedulers / config.num_warps)

    resident = found.blocks_per_multiprocessor
    return Expected(
        memory=does.memory_bytes / target.terabytes / 1e9,
        cache=does.moved / target.cache_terabytes(does.programs) / 1e9,
        processors=busy(does.programs, does.scores, target.multiprocessors, resident, clocks) / target.gigahertz / 1e6,
        merging=does.merged / target.cache_terabytes(target.multiprocessors) / 1e9,
    )


def planned(kernel: Kernel, given: Workload | Step, keep: int | None = KEEP) -> list[Trial]:
    """Every launch of the kernel that tuning may choose, the one that should be fastest first, with why it is not timed.

    The `keep` first of each loop are left, and the one that is taken without tuning; all that run where `keep` is None. What
    does not compile or does not fit comes last.

    Raises as `work`; ValueError for a `keep` that is none.
    """
    if keep is not None:
        keep = whole_number("keep", keep, 1, instead="; give None to time every launch that runs")
    refused: list[Trial] = []
    running: list[tuple[float, Trial]] = []
    for each in kernel.candidates():
        try:
            found = each.resources
        except Exception as error:  # Triton's compiler raises whatever it comes upon
            refused.append(Trial(each.config, why=f"does not compile: {first_line(error)[:200]}"))
            continue
        if not found.fits:
            taken = f"{found.shared_bytes} bytes of shared memory and {found.registers} registers"
            refused.append(Trial(each.config, why=f"takes {taken}: no block fits"))
            continue
        distinct: dict[Work, int | None] = {}  # splits that come to the same runs are one launch
        for split in kernel.plan.splits:
            distinct.setdefault(work(each, given, split), split)
        for does, split in distinct.items():
            expected = expect(each, does)
            trial = Trial(each.config, predicted_ms=expected.ms, limit=expected.limit, split=split)
            running.append((expected.ms, trial))
    running.sort(key=lambda one: one[0])
    order, left = [], Counter[str]()
    for ms, trial in running:
        # what one loop overlaps and the other does not is the least certain part of the model: it puts none out of the race
        left[trial.config.loop] += 1
        late = keep is not None and left[trial.config.loop] > keep and not trial.untuned(kernel.plan)
        order.append(replace(trial, why=f"predicted {ms / running[0][0]:.1f} x the best" if late else ""))
    return order + refused
