"""`tokquant compile`: a scheme's kernel for a GPU that need not be here, and what it takes of it."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tokquant.cli import options, output
from tokquant.io_model import bytes_per_score
from tokquant.kernels import launch
from tokquant.kernels.compile import Kernel
from tokquant.kernels.compile import compile as compile_kernel
from tokquant.kernels.decode_plan import DecodePlan
from tokquant.kernels.targets import TARGETS
from tokquant.kernels.tuning import prune


def compile(
    scheme: Annotated[str, typer.Argument(help="A preset or the path of a YAML file.")] = "int8",
    layer: options.Layer = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 128,
    target: Annotated[str, typer.Option("--target", help=f"One of {', '.join(TARGETS)}.")] = "sm_90",
    causal: options.Causal = False,
    dtype: options.Dtype = "fp16",
    decode: Annotated[bool, typer.Option("--decode", help="The kernel that reads a KV cache, for one new token.")] = False,
    shared_heads: Annotated[int, typer.Option("--shared-heads", min=1, help="Heads of Q to one of K and V.")] = 1,
    candidates: Annotated[
        bool, typer.Option("--candidates", help="Compare every launch that tuning may choose, best prediction first.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Compile a kernel for a GPU that need not be here: what it takes, what its main loop is made of, how fast that should be.

    Rates are predicted from instructions and datasheets; nothing is measured.
    """
    kernel = compile_kernel(
        scheme,
        layer=layer,
        head_dim=head_dim,
        causal=causal,
        shared_heads=shared_heads,
        decode=decode,
        target=target,
        dtype=options.dtype_of(dtype),
    )
    if candidates:
        return _compare(kernel, json)
    resources, predicted = kernel.resources, kernel.prediction
    if json:
        output.print_json(
            {
                "scheme": kernel.scheme.name,
                "kernel": kernel.plan.name,
                "target": target,
                **_report(kernel),
                "decisions": kernel.plan.explain(),
            }
        )
        return
    table = Table(title=escape(f"{kernel.scheme.name} for {target}, head_dim {head_dim}"), show_header=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "tiles of queries x keys": str(kernel.config),
        "registers a thread": str(resources.registers),
        "spilled bytes a thread": str(resources.spill_bytes),
        "shared memory a block": f"{resources.shared_bytes} bytes",
        "blocks a multiprocessor": str(resources.blocks_per_multiprocessor),
        "instructions a score": f"{resources.instructions_per_score:.2f} in the loop over whole tiles",
        "tensor-core instructions": ", ".join(f"{count} {name}" for name, count in resources.tensor_core.items()) or "none",
        "predicted": _bandwidth(kernel)
        if decode
        else f"{predicted.serial_tops:.0f} TOPS on {predicted.card} if softmax and products wait for one another, "
        f"{100 * predicted.share:.0f} % of the roofline of {predicted.roofline_tops:.0f}",
        **kernel.plan.explain(),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    output.console().print(table)


def _bandwidth(kernel: Kernel) -> str:
    found = kernel.bandwidth
    return (
        f"{found.predicted:.2f} TB/s of keys and values at {found.bits_per_value:g} bits on {found.card}: instructions, "
        f"{found.instructions_per_value:.2f} a value, allow {found.issued:.2f}, its memory {found.memory:g}"
    )


def _report(kernel: Kernel) -> dict:
    report: dict[str, Any] = {
        "config": asdict(kernel.config),
        "resources": asdict(kernel.resources),
        "prediction": {**asdict(kernel.prediction), "share": kernel.prediction.share},
    }
    if isinstance(kernel.plan, DecodePlan):
        report["bandwidth"] = {**asdict(kernel.bandwidth), "predicted": kernel.bandwidth.predicted}
    else:
        report["bytes_per_score"] = bytes_per_score(kernel)
    return report


def _compare(kernel: Kernel, json: bool) -> None:
    if launch.interpreted():
        _ = kernel.compiled  # which says why it cannot be
    kernels = kernel.candidates()
    # pruning reads every candidate; one that does not compile has nothing to show but that
    judged = dict(zip(kernels, prune(kernels), strict=True))
    built = [each for each, trial in judged.items() if not trial.why.startswith("does not compile")]
    built.sort(key=lambda each: (bool(judged[each].why), -each.prediction.serial_tops))
    if json:
        default = kernel.config
        output.print_json([{**_report(each), "default": each.config == default, "why_not": judged[each].why} for each in built])
        return
    title = f"{kernel.scheme.name} for {kernel.target.name}, head_dim {kernel.head_dim}: what tuning would time, and what not"
    table = Table(title=escape(title))
    table.add_column("queries x keys")
    for column in ("registers", "spilled", "shared", "blocks", "instructions a score", "bytes a score", "predicted TOPS"):
        table.add_column(column, justify="right")
    table.add_column("")
    for each in built:
        found = each.resources
        numbers = (found.registers, found.spill_bytes, found.shared_bytes, found.blocks_per_multiprocessor)
        moved = "" if isinstance(each.plan, DecodePlan) else f"{bytes_per_score(each):.2f}"
        rates = (f"{found.instructions_per_score:.2f}", moved, f"{each.prediction.serial_tops:.0f}")
        note = judged[each].why or ("taken without tuning" if each.config == kernel.config else "")
        table.add_row(str(each.config), *map(str, numbers), *rates, escape(note))
    output.console().print(table)
