"""Find the fastest launch of a kernel: read every candidate's machine code, time those that are left."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokquant.errors import UnsupportedError
from tokquant.kernels import launch, targets, tuned
from tokquant.kernels.candidates import Config
from tokquant.kernels.compile import Kernel
from tokquant.reference import Features
from tokquant.schemes import QuantScheme
from tokquant.timing import interleaved_medians

STACK_BYTES = 64
"""Of a thread, that a candidate may spill outside its loop."""
WORTH_TIMING = 0.6
"""Of the best candidate's predicted rate, below which one is not timed."""


@dataclass(frozen=True)
class Trial:
    """A candidate, and what became of it."""

    config: Config
    ms: float | None
    """None where it was not timed."""
    why: str = ""
    """Why it was not."""


@dataclass(frozen=True)
class Tuned:
    """What tuning found."""

    entry: tuned.Entry
    trials: tuple[Trial, ...]
    kept: bool
    """Whether the entry could be written."""


def tune(
    operands: launch.Operands, scheme: QuantScheme, features: Features, *, return_lse: bool = False, repeats: int = 20
) -> Tuned:
    """Tune the kernel of this call on its device, and keep the result. Raises UnsupportedError where no candidate runs."""
    q, k, _ = operands
    call = launch.prepare(*operands, scheme, features, return_lse, deterministic=True)
    wanted, _ = launch.asked(features, return_lse)
    kernel = Kernel.of(call.plan, scheme, q.shape[3], q.dtype, targets.of(q.device), wanted)
    trials = time(call, prune(kernel.candidates()), repeats)
    timed = {trial.ms: trial.config for trial in trials if trial.ms is not None}
    if not timed:
        raise UnsupportedError(f"tune: no candidate of {kernel!r} runs: {'; '.join(trial.why for trial in trials)}")
    best = min(timed)
    entry = tuned.Entry(
        key=tuned.key_of(call.plan, q.device, q.shape[0] * q.shape[1], q.shape[2], k.shape[2]),
        config=timed[best],
        ms=best,
        default_ms=trials[0].ms,
    )
    return Tuned(entry, trials, tuned.record(entry) is not None)


def prune(kernels: Sequence[Kernel]) -> list[Trial]:
    """The candidates, each with why it is not worth timing: judged by its machine code, without a GPU.

    The first, which is taken without tuning, is always timed. Where all others spill, those that do least are.
    """
    trials, read = [], {}
    for kernel in kernels:
        try:
            read[kernel.config] = kernel.resources
        except Exception as error:  # Triton's compiler raises whatever it comes upon
            trials.append(Trial(kernel.config, None, f"does not compile: {_first_line(error)}"))
    fitting = {config: found for config, found in read.items() if found.fits}
    least = min((found.spill_bytes for found in fitting.values()), default=0)
    rates = {kernel.config: kernel.prediction.serial_tops for kernel in kernels if kernel.config in fitting}
    for config, found in read.items():
        why = ""
        if not found.fits:
            why = f"takes {found.shared_bytes} bytes of shared memory and {found.registers} registers: no block fits"
        elif found.spill_bytes > max(least, STACK_BYTES):
            why = f"spills {found.spill_bytes} bytes of a thread"
        elif rates[config] < WORTH_TIMING * max(rates.values()):
            why = f"{found.instructions_per_score:.1f} instructions a score, others have far fewer"
        trials.append(Trial(config, None, why if config != kernels[0].config or not found.fits else ""))
    order = [kernel.config for kernel in kernels]
    return sorted(trials, key=lambda trial: order.index(trial.config))


def time(call: launch.Call, trials: Sequence[Trial], repeats: int) -> tuple[Trial, ...]:
    """Time what is left, in turn. The one that `call` was made with comes first and is timed in any case."""
    tried = [trial if trial.why else _tried(call, trial) for trial in trials]
    left = [trial.config for trial in tried if not trial.why]
    runs = [replace(call, config=config).run for config in left]
    times = dict(zip(left, interleaved_medians(runs, repeats, call.out.device), strict=True))
    return tuple(replace(trial, ms=times.get(trial.config)) for trial in tried)


def _tried(call: launch.Call, trial: Trial) -> Trial:
    """Run once: what the driver refuses is not timed."""
    try:
        replace(call, config=trial.config).run()
    except Exception as error:  # of Triton or of the driver
        return replace(trial, why=f"does not run: {_first_line(error)}")
    return trial


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
