"""Times the launches that the planner selected, and records the fastest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokquant.errors import UnsupportedError, first_line
from tokquant.features import Features
from tokquant.io_model.workload import Workload
from tokquant.kernels import decode_launch, launch, sixteen_bit, targets, tuned
from tokquant.kernels.compile import Kernel
from tokquant.kernels.plan import Plan
from tokquant.kernels.quantize import quantize_operands
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import QuantScheme
from tokquant.timing import interleaved_medians
from tokquant.tuning.planner import Trial, planned
from tokquant.tuning.work import Step

APART = 0.01
"""Relative difference allowed between outputs of launches with equal tiles: another order of a sum may flip a code of P."""


@dataclass(frozen=True)
class Tuned:
    """The result of tuning one kernel for one shape."""

    entry: tuned.Entry
    trials: tuple[Trial, ...]
    """In the planner's order, the best prediction first."""
    kept: bool
    """Whether the entry could be written to the tuning cache."""

    @property
    def rank(self) -> int:
        """Rank of the fastest launch in the planner's order, from 1."""
        assert self.entry.rank is not None
        return self.entry.rank


def tune_attention(
    operands: launch.Operands,
    scheme: QuantScheme,
    features: Features,
    *,
    return_lse: bool,
    keep: int | None,
    repeats: int,
    tensors: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tuned:
    """Tune the kernel of this call on its device, and record the result. Raises UnsupportedError where no candidate runs.

    Given `tensors`, which the operands were quantized from, quantization and attention together are also timed against torch's
    attention, where that computes the same.
    """
    q, k, _ = operands
    call = launch.prepare(*operands, scheme, features, return_lse, deterministic=True)
    kernel = Kernel.of(call.plan, scheme, q.shape[3], q.dtype, targets.of(q.device), Wanted.of(features, return_lse))
    # the planner reads the very kernel that is timed afterwards, so that it is compiled once
    kernel = replace(kernel, launched=lambda config: replace(call, config=config).compiled())
    trials = planned(kernel, Workload.of(q, k, features), keep)
    timed = time(call.plan, trials, lambda trial: replace(call, config=trial.config).run, repeats, q.device)
    key = tuned.key_of(call.plan, q.device, q.shape[0] * q.shape[1], q.shape[2], k.shape[2])
    beside: dict[str, float] = {}
    if tensors is not None and not return_lse:
        beside = _beside(tensors, scheme, features, fastest(kernel, timed), repeats)
    return settle(kernel, key, timed, **beside)


def tune_pages(call: decode_launch.Call, *, keep: int | None, repeats: int) -> Tuned:
    """Tune attention to the pages of a cache, and record the result. Raises UnsupportedError where no candidate runs."""
    (b, heads, n_q, d), device = call.q.shape, call.q.device
    kernel = Kernel.of(call.plan, call.scheme, d, call.q.dtype, call.target, call.wanted)
    untuned = call.plan.splits[0]
    kernel = replace(kernel, launched=lambda config: replace(call, config=config, split=untuned).compiled())
    step = Step(batch=b, heads=heads, queries=n_q, keys=call.longest, left=call.features.left)
    trials = planned(kernel, step, keep)
    timed = time(call.plan, trials, lambda trial: replace(call, config=trial.config, split=trial.split).run, repeats, device)
    return settle(kernel, tuned.key_of(call.plan, device, b * heads, n_q, call.seen), timed)


def _beside(
    tensors: tuple[Tensor, Tensor, Tensor], scheme: QuantScheme, features: Features, best: Trial, repeats: int
) -> dict[str, float]:
    """Times of quantization with the best launch, and of torch's attention, as fields of an entry.

    Empty where torch's attention does not compute the same, or does not run.
    """
    q, k, v = tensors
    if not sixteen_bit.does(q, k, v, scheme, features):
        return {}
    peer = partial(sixteen_bit.attention, q, k, v, features)
    try:
        peer()
    except Exception:  # of torch's kernel or of the driver
        return {}

    def whole() -> None:
        call = launch.prepare(*quantize_operands(q, k, v, scheme), scheme, features, False, deterministic=True)
        replace(call, config=best.config).run()

    whole_ms, sdpa_ms = interleaved_medians([whole, peer], repeats, q.device)
    return {"whole_ms": whole_ms, "sdpa_ms": sdpa_ms}


def fastest(kernel: Kernel, trials: Sequence[Trial]) -> Trial:
    """The fastest of the trials that were timed. Raises UnsupportedError where none was."""
    timed = [trial for trial in trials if trial.ms is not None]
    if not timed:
        raise UnsupportedError(f"tune: no candidate of {kernel!r} runs: {'; '.join(trial.why for trial in trials)}")
    return min(timed, key=_ms)


def settle(kernel: Kernel, key: tuned.Key, trials: Sequence[Trial], **beside: float) -> Tuned:
    """Record the fastest of these trials, which are in the planner's order, with the times of `_beside`."""
    best = fastest(kernel, trials)
    entry = tuned.Entry(
        key=key,
        config=best.config,
        split=best.split,
        ms=_ms(best),
        default_ms=next((trial.ms for trial in trials if trial.untuned(kernel.plan)), None),
        rank=1 + trials.index(best),
        timed=sum(trial.ms is not None for trial in trials),
        **beside,
    )
    return Tuned(entry, tuple(trials), tuned.record(entry) is not None)


def time(
    plan: Plan, trials: Sequence[Trial], run: Callable[[Trial], Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[Trial, ...]:
    """Time the selected trials, interleaved. `run` makes a trial's launch, which returns output and LSE.

    A launch whose output differs from that of the first with the same tiles and split (the untuned one, where it is among
    them) is not timed: where a compiler or a GPU makes an error, tuning must not choose it.
    """
    tried, first = list(trials), dict[tuple[int, int | None], Tensor]()
    for index in sorted(range(len(tried)), key=lambda index: not tried[index].untuned(plan)):
        trial = tried[index]
        if trial.why:
            continue
        try:
            out, _ = run(trial)()
        except Exception as error:  # of Triton or of the driver
            tried[index] = replace(trial, why=f"does not run: {first_line(error)[:200]}")
            continue
        order_of_sums = trial.config.block_n, trial.split
        if order_of_sums not in first:
            first[order_of_sums] = out.clone()
        expected = first[order_of_sums]
        apart = (out.float() - expected.float()).abs().nanmean() / expected.float().abs().nanmean()
        if apart > APART or not torch.equal(out.isnan(), expected.isnan()):
            tried[index] = replace(trial, why=f"other numbers than a launch before it: {apart.item():.1%} apart")
        out.fill_(torch.nan)  # the next launch may get this memory: what it does not write shows
    left = [index for index, trial in enumerate(tried) if not trial.why]
    medians = interleaved_medians([run(tried[index]) for index in left], repeats, device)
    for index, ms in zip(left, medians, strict=True):
        tried[index] = replace(tried[index], ms=ms)
    return tuple(tried)


def _ms(trial: Trial) -> float:
    assert trial.ms is not None
    return trial.ms
