"""`tokquant tune`: the fastest launch of a scheme's kernel on this machine's GPU, found once and kept."""

from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from tokquant.cli import options, output
from tokquant.kernels.tuning import Tuned
from tokquant.schemes import resolve
from tokquant.tune import need_gpu
from tokquant.tune import tune as tune_call


def tune(
    scheme: Annotated[str, typer.Argument(help="A preset or the path of a YAML file.")] = "int8",
    layer: options.Layer = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", min=1, help="Sequence lengths; repeat for more.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 1,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Of Q.")] = 32,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", min=1, help="Of K and V; as many as Q's if left out.")] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=1)] = 128,
    causal: options.Causal = False,
    dtype: options.Dtype = "fp16",
    device: options.Device = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each candidate.")] = 20,
    json: options.Json = False,
) -> None:
    """Time a kernel's candidates on random tensors of this shape and keep the fastest: attention then takes it."""
    where, kind, resolved = options.device_of(device), options.dtype_of(dtype), resolve(scheme, layer)
    need_gpu(where)
    found = []
    for n in tokens or [1024, 4096, 16384]:
        q, k, v = (torch.randn(batch, h, n, head_dim, device=where, dtype=kind) for h in (heads, *[kv_heads or heads] * 2))
        found.append(tune_call(q, k, v, resolved, causal=causal, repeats=repeats))
    if json:
        output.print_json([{**result.entry.model_dump(), "kept": result.kept, "trials": _trials(result)} for result in found])
        return
    for result in found:
        table = Table(title=escape(f"{scheme}, {result.entry.key.n_q} tokens, on {result.entry.key.device}"))
        table.add_column("tiles")
        table.add_column("ms", justify="right")
        table.add_column("")
        for trial in result.trials:
            note = "taken from now on" if trial.config == result.entry.config else trial.why
            table.add_row(str(trial.config), "" if trial.ms is None else f"{trial.ms:.4f}", escape(note))
        output.console().print(table)
        if not result.kept:
            output.console().print("not kept: the cache folder cannot be written (see `tokquant doctor`)")


def _trials(result: Tuned) -> list[dict]:
    return [asdict(trial) for trial in result.trials]
