"""`tokquant compare`: schemes side by side over a file of activations."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokquant.cli import options, output
from tokquant.evaluation.compare import Comparison
from tokquant.evaluation.compare import compare as compare_layer
from tokquant.export import load_scales
from tokquant.files import write_atomically
from tokquant.schemes import preset_names, resolve

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


def compare(
    schemes: Annotated[
        list[str] | None, typer.Argument(help="Presets or YAML files; every preset that needs no calibration if left out.")
    ] = None,
    input: options.Input = None,
    scales: Annotated[
        list[Path] | None, typer.Option("--scales", help="Calibrated scales; adds the scheme they were made for. Repeatable.")
    ] = None,
    backend: options.Backend = "auto",
    causal: options.Causal = False,
    repeats: options.Repeats = 5,
    json: options.Json = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the table as a page.")] = None,
) -> None:
    """Compare schemes on activations: means over the layers of errors against float64, bits, and times beside torch's SDPA."""
    calibrated = [load_scales(path) for path in scales or []]
    if not schemes and not calibrated:
        schemes = [name for name in preset_names() if resolve(name).k.scale == "dynamic"]
    chosen = [resolve(scheme) for scheme in schemes or []] + [each.scheme for each in calibrated]
    layers = options.activations(input)
    results: dict[str, list[Comparison]] = defaultdict(list)
    for layer in output.progress(layers, "layers", len(layers)):
        layer_scales = {each.scheme.name: each[layer] for each in calibrated}
        for result in compare_layer(
            *layers[layer], chosen, scales=layer_scales, backend=backend, causal=causal, repeats=repeats
        ):
            results[result.scheme.name].append(result)
    rows = {name: _summary(layer_results) for name, layer_results in results.items()}
    table = _table(rows, f"{layers.path.name}: {len(layers)} layers, backend {next(iter(results.values()))[0].backend}")
    if html is not None:
        page = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
        page.print(table)
        write_atomically(html, page.export_html().encode())
    if json:
        output.print_json({"input": str(layers.path), "schemes": [{"scheme": name, **row} for name, row in rows.items()]})
    else:
        output.console().print(table)


def _summary(results: list[Comparison]) -> dict:
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
    }


def _table(rows: Mapping[str, dict], title: str) -> Table:
    table = Table(title=title, caption="rel. L1 and RMSE against float64; ms are means over layers of interleaved medians")
    table.add_column("scheme")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['cosine']:.6f}",
            output.percent(row["rel_l1"]),
            output.percent(row["worst_rel_l1"]),
            f"{row['rmse']:.2e}",
            " / ".join(output.bits(row["bits"][role]) for role in "qkv"),
            *(f"{row[key]:.2f}" for key in ("ms", "quantize_ms", "sdpa_ms")),
        )
    return table
