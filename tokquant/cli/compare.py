"""`tokquant compare`: schemes side by side over a file of activations."""

import io
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokquant.calibration.scales import Scales, needed
from tokquant.cli import options, output
from tokquant.errors import SchemeError
from tokquant.evaluation.bound import Bound
from tokquant.evaluation.compare import Comparison
from tokquant.evaluation.compare import compare as compare_layer
from tokquant.files import write_atomically
from tokquant.schemes import QuantScheme, SchemeMap, preset_names, read, resolve

COLUMNS = {
    "cosine": "cosine",
    "rel_l1": "rel. L1",
    "worst_rel_l1": "worst layer",
    "rmse": "RMSE",
    "bits": "bits q / k / v",
    "ms": "ms",
    "quantize_ms": "quantize ms",
    "sdpa_ms": "SDPA ms",
}

PARTS = tuple(field.name for field in fields(Bound))


def compare(
    schemes: Annotated[
        list[str] | None,
        typer.Argument(help="Presets or YAML files; if left out, every preset that fits and needs no calibration."),
    ] = None,
    input: options.Input = None,
    scales: Annotated[
        list[Path] | None, typer.Option("--scales", help="Calibrated scales; adds the scheme they were made for. Repeatable.")
    ] = None,
    backend: options.Backend = "auto",
    causal: options.Causal = False,
    device: options.Device = None,
    repeats: options.Repeats = 5,
    json: options.Json = False,
    bound: Annotated[bool, typer.Option("--bound", help="Certify the errors, and say which operand they come from.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the table as a page.")] = None,
) -> None:
    """Compare schemes on activations: means over the layers of errors against float64, bits, and times beside torch's SDPA."""
    if html is not None and not html.parent.is_dir():
        raise ValueError(f"--html: there is no folder {html.parent}")
    layers = options.Layers(input, device)
    calibrated = [layers.scales(path) for path in scales or []]
    fixed: list[Scales | None] = [None] * len(schemes) if schemes else []
    chosen: list[QuantScheme | SchemeMap] = [read(scheme) for scheme in schemes] if schemes else []
    if not schemes:
        head_dim = next(iter(layers.file.values()))[0].shape[-1]
        chosen = [scheme for name in preset_names() if not needed(scheme := resolve(name)) and _fits(scheme, head_dim)]
        fixed = [None] * len(chosen)
    chosen += [each.scheme for each in calibrated]
    fixed += calibrated
    results: list[list[Comparison]] = [[] for _ in chosen]
    for name, (q, k, v) in layers.each("layers"):
        with layers.naming(name):
            own = [None if each is None else each[name] for each in fixed]
            compared = compare_layer(
                q, k, v, chosen, layer=name, scales=own, backend=backend, causal=causal, repeats=repeats, bound=bound
            )
        for place, result in enumerate(compared):
            results[place].append(result)
    rows = [{"scheme": scheme.name, **_summary(each)} for scheme, each in zip(chosen, results, strict=True)]
    tables = [_table(rows, f"{layers.name}: {len(layers.file)} layers of head_dim {q.shape[3]}, backend {rows[0]['backend']}")]
    tables += [_bounds(rows)] if bound else []
    if html is not None:
        page = Console(record=True, width=160, file=io.StringIO())
        for each in tables:
            page.print(each)
        write_atomically(html, page.export_html().encode())
    if json:
        output.print_json({"input": str(layers.file.path), "schemes": rows})
    else:
        for each in tables:
            output.console().print(each)


def _fits(scheme: QuantScheme, head_dim: int) -> bool:
    try:
        scheme.bits_per_value(head_dim)
    except SchemeError:
        return False
    return True


def _summary(results: list[Comparison]) -> dict:
    certified = [r for r in results if r.bound is not None]
    return {
        "cosine": fmean(r.errors.cosine for r in results),
        "rel_l1": fmean(r.errors.rel_l1 for r in results),
        "worst_rel_l1": max(r.errors.rel_l1 for r in results),
        "rmse": fmean(r.errors.rmse for r in results),
        "bits": {role: fmean(r.bits[role] for r in results) for role in "qkv"},
        "ms": fmean(r.ms for r in results),
        "quantize_ms": fmean(r.quantize_ms for r in results),
        "sdpa_ms": fmean(r.sdpa_ms for r in results),
        "backend": results[0].backend,
        **({"bound": _bound(certified)} if certified else {}),
    }


def _bound(results: list[Comparison]) -> dict:
    """Means over all queries, and how near to the bound errors come."""

    certified = [r.bound for r in results if r.bound is not None]
    tightness = torch.cat([r.tightness.flatten() for r in results])  # type: ignore[union-attr]
    return {
        "error": fmean(r.row_errors.mean().item() for r in results),
        **{part: fmean(getattr(bound, part).mean().item() for bound in certified) for part in PARTS},
        "tightness": {"median": tightness.median().item(), "largest": tightness.max().item()},
    }


def _bounds(rows: list[dict]) -> Table:
    table = Table(
        title="certificates",
        caption="the largest error over channels, and the bound that it stays below, with its parts: means over queries and "
        "layers; tightness is error / bound",
    )
    for heading in ("scheme", "error", "bound", *(f"of {part}" for part in PARTS[1:]), "tightness: median", "largest"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    for row in rows:
        bound = row["bound"]
        numbers = [f"{bound[key]:.2e}" for key in ("error", *PARTS)]
        table.add_row(escape(row["scheme"]), *numbers, *(f"{bound['tightness'][key]:.2f}" for key in ("median", "largest")))
    return table


def _table(rows: list[dict], title: str) -> Table:
    table = Table(
        title=escape(title),
        caption="errors against float64; bits as stored, at this head_dim; ms are means over layers of interleaved medians, "
        "SDPA's in the tensors' own type",
    )
    table.add_column("scheme")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            escape(row["scheme"]),
            f"{row['cosine']:.6f}",
            output.percent(row["rel_l1"]),
            output.percent(row["worst_rel_l1"]),
            f"{row['rmse']:.2e}",
            " / ".join(output.bits(row["bits"][role]) for role in "qkv"),
            *(f"{row[key]:.2f}" for key in ("ms", "quantize_ms", "sdpa_ms")),
        )
    return table
