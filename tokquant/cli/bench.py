"""`tokquant bench`: times schemes and torch's attention in turn."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import rich.table
import typer
from rich.markup import escape

from tokquant.cli import options, output
from tokquant.errors import nearest, quote
from tokquant.evaluation import bench as workloads
from tokquant.evaluation.bench import Shape, Table


@dataclass(frozen=True)
class Workload:
    """The function that times a workload, and the defaults of its options."""

    measure: Callable[..., Table]
    schemes: list[str]
    heads: tuple[int, int]
    tokens: int
    head_dims: list[int]
    causal: list[bool]


WORKLOADS = {
    "attention": Workload(workloads.attention, ["int8", "int8-fast"], (8, 8), 2048, [64, 128], [False, True]),
    "quantization": Workload(workloads.quantization, ["int8", "int8-fast"], (8, 8), 2048, [64, 128], [False]),
    "decode": Workload(workloads.decode, ["int8", "kv-int8", "kv-int4"], (32, 8), 8192, [128], [False]),
}

UNSTEADY = 2
"""Times its fastest run that a median may be before the machine counts as busy."""


def bench(
    workload: Annotated[
        str, typer.Argument(help="attention or quantization of whole sequences, or decode: one query over many keys.")
    ] = "attention",
    scheme: Annotated[
        list[str] | None, typer.Option("--scheme", "-s", help="A preset or a YAML file; repeat for more.")
    ] = None,
    batch: options.Batch = 1,
    heads: Annotated[
        int | None, typer.Option("--heads", min=1, help="Heads of Q; 8 if left out, and 32 over 8 of K and V for decode.")
    ] = None,
    kv_heads: options.KvHeads = None,
    queries: Annotated[
        int | None, typer.Option("--queries", min=1, help="New queries of a decode step; 1 if left out.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", min=1, help="Sequence lengths; repeat for more.")] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option("--head-dim", min=1, help="Channels of a head; repeat for more.")
    ] = None,
    causal: Annotated[
        bool | None,
        typer.Option(
            "--causal/--no-causal", help="Each query sees the keys up to its own; attention is timed both ways, if left out."
        ),
    ] = None,
    cold: Annotated[
        bool | None,
        typer.Option("--cold/--warm", help="For decode: empty the processor's caches before each call (if left out), or not."),
    ] = None,
    device: options.Device = None,
    repeats: options.Repeats = 15,
    json: options.Json = False,
) -> None:
    """Time schemes beside torch's attention, all in turn in one process; ratios are of medians, to torch's fastest.

    Attention is timed on codes and with quantization, decode on codes, and quantization beside copying memory.
    """
    if workload not in WORKLOADS:
        raise ValueError(
            f"workload: {quote(workload)} is not valid; use one of {', '.join(WORKLOADS)}{nearest(workload, WORKLOADS)}"
        )
    defaults, where = WORKLOADS[workload], options.device_of(device)
    q_heads = heads or defaults.heads[0]
    shared = options.kv_heads_of(q_heads, kv_heads or heads or defaults.heads[1])
    if workload != "decode" and queries is not None:
        raise ValueError(f"--queries: {workload} has as many as --tokens; use it to decode")
    if workload != "decode" and cold is not None:
        raise ValueError(f"--cold, --warm: {workload} is timed as it comes; use them to decode")
    shapes = [
        Shape(batch, q_heads, shared, queries or (1 if workload == "decode" else n), n, d, each)
        for n in tokens or [defaults.tokens]
        for d in head_dim or defaults.head_dims
        for each in (defaults.causal if causal is None else [causal])
    ]
    more = {} if cold is None else {"cold": cold}
    tables = [
        defaults.measure(shape, scheme or defaults.schemes, device=where, repeats=repeats, **more)
        for shape in output.progress(shapes, workload, len(shapes))
    ]
    if json:
        output.print_json([asdict(table) for table in tables])
        return
    for each in tables:
        output.console().print(_table(each))
    _warn_of_a_busy_machine(tables)


def _warn_of_a_busy_machine(tables: list[Table]) -> None:
    """Say on stderr that ratios are worth little where the median of a row is far above its fastest run."""
    slowed = [row.ms / row.least_ms for table in tables for row in table.rows if row.ms and row.least_ms]
    if slowed and max(slowed) > UNSTEADY:
        print(
            f"warning: a median is {max(slowed):.1f} times the fastest run, so something else was running and the ratios say "
            "little; measure on an idle machine, or with fewer threads (OMP_NUM_THREADS)",
            file=sys.stderr,
        )


def _table(measured: Table) -> rich.table.Table:
    machine = "; ".join(f"{name} {value}" for name, value in measured.machine.items())
    headings = "ms", f"x {measured.peer or 'peer'}", measured.unit, "of peak"
    table = output.table(f"{measured.workload}: {measured.shape}", ["provider"], headings, caption=escape(machine))
    noted = any(row.note for row in measured.rows)
    if noted:
        table.add_column("")
    for row in measured.rows:
        numbers = ((row.ms, "{:.3f}"), (row.ratio, "{:.2f}"), (row.rate, "{:.1f}"), (row.share, "{:.0%}"))
        cells = ("" if number is None else form.format(number) for number, form in numbers)
        table.add_row(escape(row.provider), *cells, *([escape(row.note)] if noted else []))
    return table
