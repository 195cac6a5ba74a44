"""`tokquant compile`: compiles kernels for a GPU that need not be present, and reports their resources."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tokquant.cli import features, options, output
from tokquant.cli.tune import launch_of
from tokquant.errors import UnsupportedError
from tokquant.io_model import Workload, bytes_per_score
from tokquant.kernels import launch
from tokquant.kernels.compile import Kernel
from tokquant.kernels.compile import compile as compile_kernel
from tokquant.kernels.decode_plan import DecodePlan
from tokquant.tuning.planner import KEEP, Trial, planned
from tokquant.tuning.work import Step


def compile(
    schemes: Annotated[
        list[str] | None, typer.Argument(help="Presets or YAML files; int8 if left out, or kv-int8 with --decode.")
    ] = None,
    layer: options.Layer = None,
    head_dim: options.HeadDim = 128,
    target: options.Target = "sm_90",
    causal: options.Causal = False,
    window: features.Window = None,
    softcap: features.Softcap = None,
    mask: features.Mask = "none",
    bias: features.Bias = "none",
    bias_rank: features.BiasRank = 16,
    sinks: features.Sinks = False,
    lse: features.Lse = False,
    varlen: features.Varlen = False,
    dtype: options.Dtype = "fp16",
    decode: features.Decode = False,
    shared_heads: features.SharedHeads = 1,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Compare every launch that tuning may choose, best prediction first.")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a sequence, for predictions.")] = 8192,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences, for predictions.")] = 1,
    kv_heads: Annotated[int, typer.Option("--kv-heads", min=1, help="Heads of K and V, for predictions.")] = 8,
    keep: Annotated[int, typer.Option("--keep", min=0, help="Launches that tuning will time; 0 for all that run.")] = KEEP,
    json: options.Json = False,
) -> None:
    """Compile kernels for a GPU, which need not be here: resources, instructions of the main loop, predicted speed.

    Rates and times are predicted from instructions, bytes and datasheets; nothing is measured. JSON of one scheme is an object,
    of several, or with --candidates, a list.
    """
    wanted = features.Wanted(
        causal=causal, window=window, softcap=softcap, mask=mask, bias=bias, bias_rank=bias_rank, sinks=sinks, lse=lse
    )
    kernels = [
        compile_kernel(
            name,
            layer=layer,
            head_dim=head_dim,
            **wanted.flags(),
            varlen=varlen,
            shared_heads=shared_heads,
            decode=decode,
            target=target,
            dtype=options.dtype_of(dtype),
        )
        for name in schemes or ["kv-int8" if decode else "int8"]
    ]
    sizes = batch, kv_heads * shared_heads
    workload: Workload | Step = wanted.step(*sizes, 1, tokens) if decode else wanted.workload(*sizes, tokens, tokens)
    if candidates:
        _compare(kernels, workload, keep or None, json)
    elif json:
        reports = [_whole_report(kernel, workload) for kernel in kernels]
        output.print_json(reports if len(reports) > 1 else reports[0])
    else:
        for kernel in kernels:
            output.console().print(_table(kernel))


def _table(kernel: Kernel) -> Table:
    resources, predicted = kernel.resources, kernel.prediction
    title = f"{kernel.scheme.name} for {kernel.target.name}, head_dim {kernel.head_dim}"
    rows = {
        "tiles of queries x keys": str(kernel.config),
        "registers a thread": str(resources.registers),
        "spilled bytes a thread": str(resources.spill_bytes),
        "shared memory a block": f"{resources.shared_bytes} bytes",
        "blocks a multiprocessor": str(resources.blocks_per_multiprocessor),
        "instructions a score": f"{resources.instructions_per_score:.2f} in the loop over whole tiles",
        "tensor-core instructions": ", ".join(f"{count} {name}" for name, count in resources.tensor_core.items()) or "none",
        "predicted": _bandwidth(kernel)
        if isinstance(kernel.plan, DecodePlan)
        else f"{predicted.serial_tops:.0f} TOPS on {predicted.card} if softmax and products wait for one another, "
        f"{100 * predicted.share:.0f} % of the roofline of {predicted.roofline_tops:.0f}",
        **kernel.plan.explain(),
    }
    return output.facts(rows, title)


def _bandwidth(kernel: Kernel) -> str:
    rate = kernel.bandwidth
    return (
        f"{rate.predicted:.2f} TB/s of keys and values at {rate.bits_per_value:g} bits on {rate.card}: instructions, "
        f"{rate.instructions_per_value:.2f} a value, allow {rate.issued:.2f}, its memory {rate.memory:g}"
    )


def _whole_report(kernel: Kernel, workload: Workload | Step) -> dict[str, Any]:
    about = {"scheme": kernel.scheme.name, "kernel": kernel.plan.name, "target": kernel.target.name}
    return {**about, **_report(kernel, workload), "decisions": kernel.plan.explain()}


def _report(kernel: Kernel, workload: Workload | Step) -> dict[str, Any]:
    report: dict[str, Any] = {
        "config": asdict(kernel.config),
        "resources": asdict(kernel.resources),
        "prediction": {**asdict(kernel.prediction), "share": kernel.prediction.share},
    }
    if isinstance(kernel.plan, DecodePlan):
        report["bandwidth"] = {**asdict(kernel.bandwidth), "predicted": kernel.bandwidth.predicted}
    elif (moved := _bytes_per_score(kernel, workload)) is not None:
        report["bytes_per_score"] = moved
    return report


def _bytes_per_score(kernel: Kernel, workload: Workload | Step) -> float | None:
    """Bytes per score; None for decoding and for sequences of different lengths, which are not modelled."""
    return bytes_per_score(kernel, workload) if isinstance(workload, Workload) and not kernel.wanted.varlen else None


def _compare(kernels: list[Kernel], workload: Workload | Step, keep: int | None, json: bool) -> None:
    if launch.interpreted():
        raise UnsupportedError("compile: Triton's interpreter is on; unset TRITON_INTERPRET before Python starts")
    reports: list[dict[str, Any]] = []
    for kernel in kernels:
        trials = planned(kernel, workload, keep)
        if json:
            reports += _launch_reports(kernel, trials, workload)
        else:
            running = [trial for trial in trials if trial.predicted_ms is not None]
            output.console().print(_launch_table(kernel, running, workload))
            for trial in trials[len(running) :]:
                output.console().print(escape(f"{trial.config}: {trial.why}"))
    if json:
        output.print_json(reports)


def _launch_reports(kernel: Kernel, trials: list[Trial], workload: Workload | Step) -> Iterator[dict[str, Any]]:
    kernels = {variant.config: variant for variant in kernel.candidates()}
    for trial in trials:
        prediction = {"split": trial.split, "predicted_ms": trial.predicted_ms, "limit": trial.limit}
        decision = {"default": trial.untuned(kernel.plan), "why_not": trial.why}
        runs = trial.predicted_ms is not None
        # for a launch that does not compile there is only its configuration to report
        report = _report(kernels[trial.config], workload) if runs else {"config": asdict(trial.config)}
        yield {"scheme": kernel.scheme.name, **report, **prediction, **decision}


def _launch_table(kernel: Kernel, trials: list[Trial], workload: Workload | Step) -> Table:
    title = f"{kernel.scheme.name} for {kernel.target.name}, head_dim {kernel.head_dim}: what tuning times, and what not"
    table = Table(title=escape(title))
    table.add_column("queries x keys", no_wrap=True)
    for column in ("registers", "spilled", "shared", "blocks", "instructions a score", "bytes a score", "predicted ms"):
        table.add_column(column, justify="right")
    table.add_column("waits for")
    table.add_column("", no_wrap=True)
    kernels = {variant.config: variant for variant in kernel.candidates()}
    for trial in trials:
        variant = kernels[trial.config]
        resources, moved = variant.resources, _bytes_per_score(variant, workload)
        numbers = (resources.registers, resources.spill_bytes, resources.shared_bytes, resources.blocks_per_multiprocessor)
        rates = (
            f"{resources.instructions_per_score:.2f}",
            "" if moved is None else f"{moved:.2f}",
            f"{trial.predicted_ms:.4f}",
        )
        note = trial.why or ("taken without tuning" if trial.untuned(kernel.plan) else "")
        table.add_row(launch_of(trial.config, trial.split), *map(str, numbers), *rates, trial.limit, escape(note))
    return table
