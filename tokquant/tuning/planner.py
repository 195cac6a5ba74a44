"""Ranks a kernel's launches before any is timed, by a model of their traffic, their machine code and how they fill a GPU."""

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
"""Launches of each loop that are timed by default."""
SPILL = 4
"""Instructions that a load or store of a spilled register counts as: a multiprocessor's load units serve 32 threads a clock,
its schedulers issue for four times as many."""


@dataclass(frozen=True)
class Expected:
    """Predicted milliseconds that each part of a GPU is busy with a launch. They overlap, so the slowest one decides."""

    memory: float
    """Reading inputs and writing outputs once, at the bandwidth of memory."""
    cache: float
    """All loads and stores of all programs, at the bandwidth of the L2 cache."""
    processors: float
    """Instructions and products on the multiprocessors, from the first block's start to the last one's end."""
    merging: float = 0.0
    """Merging partial results after the launch, where the keys were split."""

    @property
    def ms(self) -> float:
        """The whole time, merging included."""
        return max(self.memory, self.cache, self.processors) + self.merging

    @property
    def limit(self) -> str:
        """The bottleneck: `memory`, `cache` or `processors`."""
        return max(("memory", "cache", "processors"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Trial:
    """A launch that tuning may choose, with its predicted and its measured time."""

    config: Config
    ms: float | None = None
    """Measured; None where it was not timed."""
    why: str = ""
    """Why it was not timed; empty where it was."""
    predicted_ms: float | None = None
    """None where the launch cannot run."""
    limit: str = ""
    """The predicted bottleneck, as in `Expected`."""
    split: int | None = None
    """For a kernel that reads pages: the programs per multiprocessor that its keys are split into."""

    def untuned(self, plan: Plan) -> bool:
        """Whether this is the launch that is used without tuning. A launch that cannot run has no split."""
        return self.config == plan.config and self.split in (None, plan.splits[0])


def expect(kernel: Kernel, does: Work) -> Expected:
    """Predict the time of a launch. The model leaves out latencies and the cost of masks in edge tiles. Raises as `Kernel.asm`.

    A multiprocessor computes the products of its blocks' tiles, then the longer of their exponentials and their other
    instructions, at the rates of `Kernel.prediction` (in the loop for Hopper P V overlaps with these): published kernels of
    this kind reach 0.7 to 0.95 of that with one block and with two. Blocks start in grid order, each in the slot that is free
    first (`schedule`). Register spills in the loop over whole tiles cost what `SPILL` says, others nothing.
    """
    target, config, predicted, found = kernel.target, kernel.config, kernel.prediction, kernel.resources
    spilled = found.spills_in_loop * target.lanes * config.num_warps / config.roles / (config.block_m * config.block_n)
    score = predicted.clocks((SPILL - 1) * spilled / target.issued)

    def clocks(blocks: int) -> float:
        """Clocks for one score of each of `blocks` resident blocks. Fewer warps than schedulers leave some of these idle."""
        return score * max(blocks, target.schedulers / config.num_warps)

    resident = found.blocks_per_multiprocessor
    return Expected(
        memory=does.memory_bytes / target.terabytes / 1e9,
        cache=does.moved / target.cache_terabytes(does.programs) / 1e9,
        processors=busy(does.programs, does.scores, target.multiprocessors, resident, clocks) / target.gigahertz / 1e6,
        merging=does.merged / target.cache_terabytes(target.multiprocessors) / 1e9,
    )


def planned(kernel: Kernel, given: Workload | Step, keep: int | None = KEEP) -> list[Trial]:
    """Every launch of the kernel that tuning may choose, the fastest by prediction first.

    To be timed are the `keep` first of each loop, and the launch that is used without tuning; all that run where `keep` is
    None. The others say why not in `why`, and those that do not compile or do not fit come last.

    Raises as `work`; ValueError for a `keep` that is no whole number from 1.
    """
    if keep is not None:
        keep = whole_number("keep", keep, 1, instead="; give None to time every launch that runs")
    refused: list[Trial] = []
    running: list[tuple[float, Trial]] = []
    for each in kernel.candidates():
        try:
            found = each.resources
        except Exception as error:  # Triton's compiler may raise anything
            refused.append(Trial(each.config, why=f"does not compile: {first_line(error)[:200]}"))
            continue
        if not found.fits:
            taken = f"{found.shared_bytes} bytes of shared memory and {found.registers} registers"
            refused.append(Trial(each.config, why=f"takes {taken}: no block fits"))
            continue
        distinct: dict[Work, int | None] = {}  # splits that give the same work are one launch
        for split in kernel.plan.splits:
            distinct.setdefault(work(each, given, split), split)
        for does, split in distinct.items():
            expected = expect(each, does)
            trial = Trial(each.config, predicted_ms=expected.ms, limit=expected.limit, split=split)
            running.append((expected.ms, trial))
    running.sort(key=lambda one: one[0])
    ranked, seen = [], Counter[str]()
    for ms, trial in running:
        # what overlaps in each loop is the least certain part of the model, so every loop has launches that are timed
        seen[trial.config.loop] += 1
        late = keep is not None and seen[trial.config.loop] > keep and not trial.untuned(kernel.plan)
        ranked.append(replace(trial, why=f"predicted {ms / running[0][0]:.1f} x the best" if late else ""))
    return ranked + refused
