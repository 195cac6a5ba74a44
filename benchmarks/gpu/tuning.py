"""Tunes the kernels at the shapes of the tables, and exports the fastest launches to a file that the package can ship."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context

import torch
from record import Rows
from running import Item, Setting

import tokquant as tq
from tokquant.evaluation.bench import Shape
from tokquant.evaluation.costs import scales_for
from tokquant.inputs import features_of
from tokquant.kernels import launch, tuned
from tokquant.tune import need_gpu
from tokquant.tuning.planner import KEEP
from tokquant.tuning.trials import Tuned

SCHEMES = ["int8-fp8", "int8-fast", "int8", "int8-fp16", "fp8"]
HEAD_DIMS = [128, 64]
TOKENS = [8192, 1024, 512]
CACHES = ["kv-int8", "kv-int4", "kv-fp8"]
BATCHES = [1, 16]
KEYS = 32768
"""Tokens of a cache; `tables` times these sizes too."""
LAUNCHES = "launches.json"
"""File of the fastest launches, in the format of tokquant/kernels/shipped/."""


def items(setting: Setting) -> Iterator[Item]:
    """First all kernels are compiled, on all CPU cores; then the launches of each are timed."""
    load_tuned(setting)
    wanted = [(name, d, causal) for name in SCHEMES for d in HEAD_DIMS for causal in (False, True)]
    if setting.small:
        wanted = wanted[:1]
    yield Item("kernels, compiled", 60, partial(_compile, setting, wanted), prepares=True)
    # short sequences last: there torch's attention may be the faster one, which an entry says for its own shape only
    first, *others = TOKENS
    yield from _attention(setting, wanted, first)
    for name, batch in [(name, batch) for name in CACHES for batch in BATCHES][: 1 if setting.small else None]:
        # mostly Triton's compiler, which compiles a kernel for one run of keys and one for several
        yield Item(f"{name}, decoding, batch {batch}, {KEYS} keys", 25, partial(_tune_decode, setting, name, batch))
    for n in [] if setting.small else others:
        yield from _attention(setting, wanted, n)


def _attention(setting: Setting, wanted: list[tuple[str, int, bool]], n: int) -> Iterator[Item]:
    for name, d, causal in wanted:
        title = f"{name}, head_dim {d}, {n} tokens{', causal' * causal}"
        # at 250 TOPS, 7 runs each of KEEP launches of two loops, of the untuned one, of quantization and of torch's attention
        seconds = 4 + (2 * KEEP + 3) * 7 * Shape(4, 32, 32, n, n, d, causal).operations / 2.5e14
        yield Item(title, seconds, partial(_tune, setting, name, d, causal, n))


def load_tuned(setting: Setting) -> None:
    """Put the launches that earlier runs found into the tuning cache."""
    path = setting.folder / LAUNCHES
    for entry in tuned.load(path) if path.exists() else ():
        tuned.record(entry)


def _tune(setting: Setting, name: str, d: int, causal: bool, n: int) -> Rows:
    need_gpu(setting.device)
    n = 256 if setting.small else n
    q, k, v = (torch.randn(4, 32, n, d, device=setting.device, dtype=torch.float16) for _ in range(3))
    return _exported(setting, tq.tune(q, k, v, name, causal=causal, repeats=5))


def _tune_decode(setting: Setting, name: str, batch: int) -> Rows:
    """Tune a decoding kernel: its warps and stages, and how keys are split."""
    need_gpu(setting.device)
    n = 1024 if setting.small else KEYS
    return _exported(setting, tq.tune_decode(*_filled(name, batch, setting.device, n), repeats=5))


def _filled(name: str, batch: int, device: torch.device, n: int = KEYS) -> tuple[torch.Tensor, tq.KVCache]:
    """A query and a cache filled with random keys and values."""
    k, v = (torch.randn(batch, 8, n, 128, device=device, dtype=torch.float16) for _ in range(2))
    q = torch.randn(batch, 32, 1, 128, device=device, dtype=torch.float16)
    scheme = tq.preset(name)
    cache = tq.KVCache(scheme, batch=batch, kv_heads=8, head_dim=128, device=device, scales=scales_for(scheme, q, k, v))
    cache.append(k, v)
    return q, cache


def _exported(setting: Setting, found: Tuned) -> Rows:
    """Export the tuned launches; return every launch in the planner's order with predicted and measured time, and its peers."""
    tuned.export(setting.folder / LAUNCHES)
    rows: Rows = []
    for trial in found.trials:
        split = {} if trial.split is None else {"split": trial.split}
        row = {"launch": str(trial.config), **split, "predicted ms": trial.predicted_ms, "ms": trial.ms, "note": trial.why}
        if (trial.config, trial.split) == (found.entry.config, found.entry.split):
            row["note"] = "taken from now on" if found.kept else "the fastest; the cache folder cannot be written"
        rows.append(row)
    if found.entry.sdpa_ms is not None:
        taken = "what backend='auto' takes of tensors from now on"
        rows.append({"launch": "the fastest, with quantization", "ms": found.entry.whole_ms})
        rows.append({"launch": "torch's attention", "ms": found.entry.sdpa_ms, "note": taken * found.entry.sixteen_bit})
    return rows


def _compile(setting: Setting, wanted: list[tuple[str, int, bool]]) -> Rows:
    """Compile every launch into Triton's cache, in parallel, for the later items and stages.

    Triton specializes on strides, so the tensors given here are like those that are timed.
    """
    need_gpu(setting.device)
    jobs: list[partial[None]] = [partial(_quantize, *each) for each in dict.fromkeys((name, d) for name, d, _ in wanted)]
    jobs += [partial(_of_pages, name) for name in CACHES[: 1 if setting.small else None]]
    for n in TOKENS[:2]:  # a long and a short length cover all specializations
        for each in wanted:
            jobs += [partial(_of_tensors, *each, n, index) for index in range(len(_prepared(*each, n).plan.candidates))]
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    failures = _failures(jobs, workers)
    return [
        {"jobs": len(jobs), "processes": workers, "failed": len(failures), "note": "; ".join(dict.fromkeys(failures))[:300]}
    ]


def _failures(jobs: list[partial[None]], workers: int) -> list[str]:
    """Run jobs in processes, and say which failed. Where a compiler crashes, another pool goes on with what had not begun."""
    failures: list[str] = []
    while jobs:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            runs = [pool.submit(_failure, job) for job in jobs]
        lost = [isinstance(run.exception(), BrokenProcessPool) for run in runs]
        failures += [why for run, gone in zip(runs, lost, strict=True) if not gone and (why := run.result())]
        jobs = [job for job, gone in zip(jobs, lost, strict=True) if gone]
        failures += [f"{_name(job)}: it or one beside it crashed" for job in jobs[:workers]]  # as many as were running
        jobs = jobs[workers:]
    return failures


def _failure(job: partial[None]) -> str:
    try:
        job()
    except Exception as error:  # Triton's compiler may raise anything
        return f"{_name(job)}: {type(error).__name__}"
    return ""


def _name(job: partial[None]) -> str:
    return f"{job.func.__name__[1:]} {', '.join(map(str, job.args))}"


def _quantize(name: str, d: int) -> None:
    tq.quantize(*_tensors(d, TOKENS[0]), name)


def _of_tensors(name: str, d: int, causal: bool, n: int, index: int) -> None:
    call = _prepared(name, d, causal, n)
    replace(call, config=call.plan.candidates[index]).compiled()


def _of_pages(name: str) -> None:
    q, cache = _filled(name, 1, torch.device("cuda"))
    call = cache.launch(q, features_of(q, q, causal=True))
    for config in call.plan.candidates:
        for split in call.plan.splits:
            replace(call, config=config, split=split).compiled()


@cache
def _prepared(name: str, d: int, causal: bool, n: int) -> launch.Call:
    """A launch of attention. Quantized in torch, so that not every process compiles the quantization kernels too."""
    q, k, v = _tensors(d, n)
    scheme = tq.preset(name)
    operands = launch.packed(tq.quantize(q, k, v, scheme, backend="reference"), scheme)
    return launch.prepare(*operands, scheme, features_of(q, k, causal=causal), False, deterministic=True)


def _tensors(d: int, n: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 16, n, d, device="cuda", dtype=torch.float16) for _ in range(3))
