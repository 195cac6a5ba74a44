"""`tokquant compare`: compares schemes on a file of activations."""

import sys
from collections import Counter
from dataclasses import fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tokquant.calibration.scales import Scales, needed
from tokquant.cli import options, output
from tokquant.evaluation import page
from tokquant.evaluation.bound import Bound
from tokquant.evaluation.candidates import fits
from tokquant.evaluation.compare import Comparison
from tokquant.evaluation.compare import compare as compare_layer
from tokquant.evaluation.machine import machine
from tokquant.evaluation.page.numbers import thousandths
from tokquant.evaluation.report import Report, gather
from tokquant.files import write_atomically
from tokquant.schemes import QuantScheme, SchemeMap, preset_names, read, resolve

PARTS = tuple(field.name for field in fields(Bound))
COLUMNS = ("cosine", "rel. L1", "worst layer", "RMSE", "bits q / k / v", "ms", "quantize ms", "SDPA ms")


def compare(
    schemes: Annotated[
        list[str] | None,
        typer.Argument(help="Presets or YAML files; if left out, every preset that fits all layers and needs no calibration."),
    ] = None,
    input: options.Input = None,
    scales: options.ScaleFiles = None,
    backend: options.Backend = "auto",
    causal: options.Causal = False,
    device: options.Device = None,
    repeats: options.Repeats = 5,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also measure what Q, K, V and P each add to the error, and find the worst rows.")
    ] = False,
    bound: Annotated[
        bool, typer.Option("--bound", help="Certify the errors: also print proven bounds, and which operand they come from.")
    ] = False,
    json: options.Json = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Also write a page for a browser: errors by layer and head, and all of --explain."),
    ] = None,
) -> None:
    """Compare schemes on activations: errors against float64, bits, and times beside torch's SDPA, as means over the layers."""
    options.check_writable("--html", html, input, *(scales or []))
    layers = options.Layers(input, device)
    calibrated = [layers.scales(path) for path in scales or []]
    chosen: list[QuantScheme | SchemeMap] = [read(scheme) for scheme in schemes or ()]
    if not schemes:
        dynamic = [scheme for name in preset_names() if not needed(scheme := resolve(name))]
        chosen += [scheme for scheme in dynamic if all(fits(scheme, head_dim) for head_dim in layers.file.head_dims())]
    static_scales: list[Scales | None] = [None] * len(chosen) + calibrated
    chosen += [each.scheme for each in calibrated]
    results: dict[str, list[Comparison]] = {}
    shapes: Counter[str] = Counter()
    not_finite: list[str] = []
    arguments = {
        "backend": backend,
        "causal": causal,
        "repeats": repeats,
        "bound": bound,
        "explained": explain or html is not None,
    }
    for name, (q, k, v) in layers.each("layers"):
        with layers.naming(name):
            layer_scales = [None if each is None else each.get(name) for each in static_scales]
            results[name] = compare_layer(q, k, v, chosen, layer=name, scales=layer_scales, **arguments)
        shapes[_shape(q, k)] += 1
        not_finite += [f"{name}.{role}" for role, x in zip("qkv", (q, k, v), strict=True) if not bool(x.isfinite().all())]
    if not_finite:
        which = f"{', '.join(not_finite[:4])}{' and others' if len(not_finite) > 4 else ''}"
        print(f"warning: {layers.name}: not all values are finite in {which}; errors there may be no number", file=sys.stderr)
    chosen_backend = next(iter(results.values()))[0].backend
    setting = {
        "activations": layers.name,
        "layers": "; ".join(f"{count} of {shape}" for shape, count in shapes.items()),
        "attention": f"{'causal' if causal else 'every query sees every key'}, scores times head_dim ** -0.5",
        "timed runs": str(repeats),
        "tokquant": version("tokquant"),
        **machine(layers.device, chosen_backend),
        "date": date.today().isoformat(),
    }
    report = gather(layers.name, setting, chosen, results)
    if json:
        output.print_json(report.to_json() | {"input": str(layers.file.path)})
    else:
        title = f"{layers.name}: {len(layers)} layers of head_dim {layers.head_dims}, backend {chosen_backend}"
        output.console().print(_table(report, title, explain))
        if bound:
            output.console().print(_bounds(report))
    if html is not None:
        write_atomically(html, page.render(report).encode())


def _shape(q: Tensor, k: Tensor) -> str:
    (batch, heads, queries, head_dim), (_, kv_heads, keys, _) = q.shape, k.shape
    tokens = f"{queries} tokens" if queries == keys else f"{queries} queries and {keys} keys"
    over = f" over {kv_heads}" if kv_heads != heads else ""
    return f"batch {batch}, {heads} heads{over}, {tokens}, head_dim {head_dim}, {str(q.dtype).removeprefix('torch.')}"


def _bounds(report: Report) -> Table:
    table = output.table(
        "certificates",
        ["scheme"],
        ["error", "bound", *(f"of {part}" for part in PARTS[1:]), "tightness: median", "largest"],
        caption="the largest error over channels, and the bound that it stays below, with its parts: means over queries and "
        "layers; tightness is error / bound",
    )
    for result in report.schemes:
        bound = result.bound
        assert bound is not None
        numbers = [f"{bound[key]:.2e}" for key in ("error", *PARTS)]
        table.add_row(escape(result.name), *numbers, *(f"{bound['tightness'][key]:.2f}" for key in ("median", "largest")))
    return table


def _table(report: Report, title: str, explained: bool) -> Table:
    table = output.table(
        title,
        ["scheme"],
        [*COLUMNS, *(["of q / k / v / p"] if explained else [])],
        caption="errors against float64; bits as stored, at this head_dim; ms are means over layers of interleaved medians, "
        "SDPA's in the tensors' own type, on a CPU in the faster of fp32 and bf16",
    )
    for result in report.schemes:
        row = result.summary()
        table.add_row(
            escape(result.name),
            f"{row['cosine']:.6f}",
            output.percent(row["rel_l1"]),
            output.percent(row["worst_rel_l1"]),
            f"{row['rmse']:.2e}",
            " / ".join(thousandths(row["bits"][role]) for role in "qkv"),
            *(f"{row[key]:.2f}" for key in ("ms", "quantize_ms", "sdpa_ms")),
            *([" / ".join(output.percent(row["parts"][role]) for role in "qkvp")] if explained else []),
        )
    return table
