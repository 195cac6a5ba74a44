"""`tokquant search`: finds the scheme map with the least error within a budget, from activations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from tokquant.cli import options, output
from tokquant.evaluation.plot import check, draw
from tokquant.evaluation.search import Found
from tokquant.evaluation.search import search as search_call
from tokquant.schemes import HeadSchemes
from tokquant.schemes.scheme import name_of

SHOWN = 12
"""Points of the Pareto front in the table."""


def search(
    budget: Annotated[
        str,
        typer.Option("--budget", "-b", help="A cost: bits=8.5, kv_bits=5 or ms=20; or an error: rel_l1=0.01, cosine=0.999 ..."),
    ],
    schemes: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme", "-s", help="A preset or YAML file; repeat for more; presets and pairs of K and V, if left out."
        ),
    ] = None,
    input: options.Input = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="The error to minimize within a cost: rel_l1 (if left out), rmse, max_abs or cosine."),
    ] = None,
    cost: Annotated[
        str | None, typer.Option("--cost", help="The cost to minimize within an error: bits (if left out), kv_bits or ms.")
    ] = None,
    worst: Annotated[bool, typer.Option("--worst", help="Judge by the error of the worst layer instead of the mean.")] = False,
    relative_to: Annotated[
        str | None, typer.Option("--relative-to", help="Divide each layer's error by the error of this scheme.")
    ] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Let ranges of heads have their own schemes.")] = False,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Queries of each head that are measured.")] = 256,
    target: Annotated[
        str | None, typer.Option("--target", help="With ms: the GPU to predict times for, such as sm_90.")
    ] = None,
    causal: options.Causal = False,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Other activations, which the search does not see, to judge its result on."),
    ] = None,
    output_path: Annotated[Path | None, typer.Option("--output", "-o", help="Write the scheme map here, as YAML.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the front: .svg, .png or .pdf. Needs matplotlib.")] = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Find a scheme for each layer: the least error within a cost, or the least cost within an error."""
    options.check_writable("--output", output_path)
    options.check_writable("--plot", plot)
    if output_path is not None and output_path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output: {output_path} has to end in .yaml, by which --scheme knows a file from a preset")
    if plot is not None:
        check(plot)

    def progress(names: Iterator[str], total: int) -> Iterator[str]:
        return output.progress(names, "layers", total)

    goal: dict[str, Any] = dict(metric=metric, cost=cost, over="worst" if worst else "mean")
    found = search_call(
        options.Layers(input, device),
        schemes,
        budget=budget,
        **goal,
        relative_to=relative_to,
        heads=heads,
        rows=rows,
        target=target,
        held_out=None if held_out is None else options.Layers(held_out, device),
        name=name_of(output_path) if output_path else "searched",
        progress=progress,
        causal=causal,
    )
    if output_path is not None:
        found.map.dump(output_path)
    if plot is not None:
        draw(found, plot)
    if json:
        output.print_json(_json(found, budget))
        return
    console = output.console()
    console.print(_layers(found))
    console.print(_points(found))
    for name, why in found.unfit.items():
        console.print(escape(f"{name} does not fit {why}"))
    if output_path is None:
        print(found.map.to_yaml(), end="")


def _json(found: Found, budget: str) -> dict:
    return {
        "budget": budget,
        "metric": found.metric,
        "unit": found.unit,
        "cost": found.cost,
        "error": found.error,
        "map": found.map.to_data(),
        "layers": [{"name": each.layer, "error": each.error, "cost": each.cost} for each in found.layers],
        "front": found.front,
        "singles": found.singles,
        "held_out": found.held_out,
        "unfit": found.unfit,
    }


def _layers(found: Found) -> Table:
    title = f"{found.map.name}: {found.unit} {found.cost:.4g}, {found.metric} {found.error:.4g}"
    table = output.table(title, ["layer", "scheme"], [found.metric])
    for each in found.layers:
        scheme = str(each.scheme) if isinstance(each.scheme, HeadSchemes) else each.scheme.name
        table.add_row(escape(each.layer), scheme, f"{each.error:.4g}")
    return table


def _points(found: Found) -> Table:
    """A table of the Pareto front of maps and of single schemes, by cost; a point that has a name of its own has one row."""
    rows = [(cost, error, name) for name, (cost, error) in found.singles.items()]
    rows.append((found.cost, found.error, found.map.name))
    named = {_rounded(cost, error) for cost, error, _ in rows}
    places = np.unique(np.linspace(0, len(found.front) - 1, SHOWN).astype(int))
    rows += [(*found.front[place], "a map") for place in places if _rounded(*found.front[place]) not in named]
    numbers = [found.unit, found.metric, *(["held out"] if found.held_out else [])]
    table = output.table("the front, and one scheme for all layers", [""], numbers)
    for cost, error, name in sorted(rows):
        held_out = [f"{found.held_out[name]:.4g}" if name in found.held_out else ""] if found.held_out else []
        style = "bold" if name == found.map.name else None
        table.add_row(escape(name), *_rounded(cost, error), *held_out, style=style)
    return table


def _rounded(cost: float, error: float) -> tuple[str, str]:
    """A point as the table shows it."""
    return f"{cost:.4g}", f"{error:.4g}"
