"""`tokquant tune`: finds the fastest launch of a scheme's kernel on this GPU and stores it."""

from dataclasses import asdict
from itertools import product
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from tokquant.calibration.scales import LayerScales
from tokquant.cli import features, options, output
from tokquant.evaluation.costs import scales_for
from tokquant.kernels.candidates import Config
from tokquant.kv_cache import KVCache
from tokquant.schemes import QuantScheme, resolve
from tokquant.tune import need_gpu, tune_decode
from tokquant.tune import tune as tune_call
from tokquant.tuning.planner import KEEP
from tokquant.tuning.trials import Tuned


def tune(
    schemes: Annotated[
        list[str] | None, typer.Argument(help="Presets or YAML files; int8 if left out, or kv-int8 with --decode.")
    ] = None,
    layer: options.Layer = None,
    decode: features.Decode = False,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Sequence lengths, or keys of a cache; repeat for more.")
    ] = None,
    batch: options.Batch = 1,
    heads: options.Heads = 32,
    kv_heads: options.KvHeads = None,
    head_dim: options.HeadDim = 128,
    causal: options.Causal = False,
    window: features.Window = None,
    softcap: features.Softcap = None,
    mask: features.Mask = "none",
    bias: features.Bias = "none",
    bias_rank: features.BiasRank = 16,
    sinks: features.Sinks = False,
    lse: features.Lse = False,
    dtype: options.Dtype = "fp16",
    device: options.Device = None,
    keep: Annotated[
        int,
        typer.Option(
            "--keep", min=0, help="How many of the planner's best launches to time, of each loop; 0 for all that run."
        ),
    ] = KEEP,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each launch.")] = 20,
    json: options.Json = False,
) -> None:
    """Time a kernel's best launches on random tensors of this shape and keep the fastest, for attention or decode to use.

    Torch's 16-bit attention is timed beside the whole, quantization included. Where it is faster, backend 'auto' takes it.
    Sequences of different lengths use what is found for a batch. Static scales are those of the random tensors.
    """
    wanted = features.Wanted(
        causal=causal, window=window, softcap=softcap, mask=mask, bias=bias, bias_rank=bias_rank, sinks=sinks, lse=lse
    )
    on, tensor_type = options.device_of(device), options.dtype_of(dtype)
    resolved = [resolve(name, layer) for name in schemes or ["kv-int8" if decode else "int8"]]
    k_heads = options.kv_heads_of(heads, kv_heads)
    decode_features = wanted.of_cache() if decode else {}
    need_gpu(on)
    trials: dict[str, Any] = dict(keep=keep or None, repeats=repeats)
    results = []
    for scheme, n in product(resolved, tokens or [1024, 4096, 16384]):
        q, k, v = (torch.randn(batch, h, n, head_dim, device=on, dtype=tensor_type) for h in (heads, k_heads, k_heads))
        scales = scales_for(scheme, q, k, v)
        if decode:
            results.append((scheme.name, tune_decode(q[:, :, -1:], _cache(scheme, k, v, scales), **decode_features, **trials)))
        else:
            results.append((scheme.name, tune_call(q, k, v, scheme, scales=scales, **wanted.tensors(q, k), **trials)))
    if json:
        output.print_json(
            [
                {"scheme": name, **each.entry.model_dump(), "kept": each.kept, "trials": [asdict(t) for t in each.trials]}
                for name, each in results
            ]
        )
        return
    for name, result in results:
        _print(name, result)


def _cache(scheme: QuantScheme, k: torch.Tensor, v: torch.Tensor, scales: LayerScales | None) -> KVCache:
    batch, heads, _, d = k.shape
    cache = KVCache(scheme, batch=batch, kv_heads=heads, head_dim=d, dtype=k.dtype, device=k.device, scales=scales)
    cache.append(k, v)
    return cache


def _print(name: str, result: Tuned) -> None:
    entry = result.entry
    table = Table(title=escape(f"{name}, {entry.key.n_q} x {entry.key.n_k} tokens, on {entry.key.device}"))
    table.add_column("launch, in the planner's order", no_wrap=True)
    for column in ("predicted ms", "waits for", "ms", ""):
        table.add_column(column, justify="right" if "ms" in column else "left")
    for trial in result.trials:
        taken = (trial.config, trial.split) == (entry.config, entry.split)
        predicted, measured = ("" if ms is None else f"{ms:.4f}" for ms in (trial.predicted_ms, trial.ms))
        table.add_row(
            launch_of(trial.config, trial.split),
            predicted,
            trial.limit,
            measured,
            escape("taken from now on" if taken else trial.why),
        )
    output.console().print(table)
    output.console().print(f"the fastest of {entry.timed} that were timed is number {entry.rank} of the planner's order")
    if entry.whole_ms is not None and entry.sdpa_ms is not None:
        output.console().print(
            f"with quantization {entry.whole_ms:.4f} ms, torch's attention in 16 bits {entry.sdpa_ms:.4f} ms: "
            + ("backend='auto' takes torch's here from now on" if entry.sixteen_bit else "backend='auto' quantizes")
        )
    if not result.kept:
        output.console().print("not kept: the cache folder cannot be written (see `tokquant doctor`)")


def launch_of(config: Config, split: int | None) -> str:
    """A launch as text: its configuration, and how keys are split."""
    return str(config) + ("" if split is None else f", split {split}")
