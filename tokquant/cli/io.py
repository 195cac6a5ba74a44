"""`tokquant io`: the exact number of bytes that a scheme's kernel moves, and lower bounds for any algorithm."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tokquant.cli import features, options, output
from tokquant.evaluation import plot
from tokquant.io_model import launches, standing
from tokquant.io_model.plot import draw
from tokquant.io_model.report import Standing
from tokquant.io_model.workload import Workload
from tokquant.kernels.compile import compile


def io(
    scheme: Annotated[str, typer.Argument(help="A preset or a YAML file.")] = "int8",
    layer: options.Layer = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Keys, and queries if --queries is left out.")] = 8192,
    queries: Annotated[
        int | None, typer.Option("--queries", min=1, help="Queries, the last of the sequence; as many as keys, if left out.")
    ] = None,
    batch: options.Batch = 1,
    heads: options.Heads = 32,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = 128,
    causal: options.Causal = False,
    lse: features.Lse = False,
    target: options.Target = "sm_90",
    dtype: options.Dtype = "fp16",
    memory: Annotated[
        int | None,
        typer.Option(
            "--fast-memory", min=1, help="Bytes of fast memory per multiprocessor for the bound; all it has, if left out."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw bytes against fast memory, with the bounds, into this file.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Count the bytes that a kernel moves between its registers and memory, exactly, and compare with the lower bounds.

    Nothing runs and no GPU is needed. Times are these bytes divided by the datasheet's bandwidth, not measurements.
    """
    options.check_writable("--plot", picture)
    if picture is not None:
        plot.check(picture)
    kernel = compile(
        scheme,
        layer=layer,
        head_dim=head_dim,
        causal=causal,
        return_lse=lse,
        shared_heads=heads // options.kv_heads_of(heads, kv_heads),
        dtype=options.dtype_of(dtype),
        target=target,
    )
    workload = Workload(batch=batch, heads=heads, n_q=queries or tokens, n_k=tokens)
    result, other_launches = standing(kernel, workload, memory), launches(kernel, workload)
    if picture is not None:
        draw(result, other_launches, picture)
    if json:
        output.print_json(
            {
                "scheme": kernel.scheme.name,
                "target": target,
                "config": asdict(kernel.config),
                "bytes": result.traffic.total,
                "kinds": result.traffic.kinds,
                "tensors": dict(result.traffic.tensors),
                "operations": result.operations,
                "intensity": result.intensity,
                "sixteen_bit": {"bytes": result.sixteen_bit.total, "intensity": result.sixteen_bit_intensity},
                "fast_memory": result.memory,
                "processors": kernel.target.multiprocessors,
                "bounds": {**asdict(result.bounds), "active": result.bounds.active, "times": result.above_bound},
                "ms": {name: result.milliseconds(moved) for name, moved in _dram_bytes(result).items()},
                "launches": [{"config": asdict(other.config), "bytes": moved.total} for other, moved in other_launches],
            }
        )
        return
    table = output.table(f"{kernel.scheme.name} for {target}, {kernel.config}", [""], ["bytes", "of all"])
    for name, moved in result.traffic.kinds.items():
        table.add_row(name.upper() if name in ("q", "k", "v", "o", "lse") else name, f"{moved:,}", _share(moved, result))
    table.add_section()
    table.add_row("all", f"{result.traffic.total:,}", _share(result.traffic.total, result))
    table.add_row("in 16 bits", f"{result.sixteen_bit.total:,}", _share(result.sixteen_bit.total, result))
    table.add_row(f"lower bound ({result.bounds.active.replace('_', ' ')})", f"{result.bounds.greatest:,.0f}", "")
    output.console().print(table)
    card = kernel.target
    times = ", ".join(f"{name} {result.milliseconds(moved):.3f} ms" for name, moved in _dram_bytes(result).items())
    output.console().print(
        f"{result.above_bound:.1f} times the bound for {card.multiprocessors} multiprocessors of {result.memory:,} bytes. "
        f"{result.intensity:.0f} operations a byte, {result.sixteen_bit_intensity:.0f} in 16 bits.\n"
        f"At {card.terabytes:g} TB/s ({card.card}): {times}; caches lie between.",
        highlight=False,
    )


def _dram_bytes(result: Standing) -> dict[str, float]:
    """The least and the most bytes that DRAM may have to move: inputs and outputs once, and all that the kernel accesses."""
    return {"inputs and outputs once": result.bounds.compulsory, "everything": result.traffic.total}


def _share(moved: float, result: Standing) -> str:
    return f"{100 * moved / result.traffic.total:.2f} %"
