"""`tokquant export` and `tokquant import`: exchange scales with vLLM, compressed-tensors, ModelOpt and SGLang."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tokquant.cli import options, output
from tokquant.exchange.checkpoint import import_checkpoint_scales
from tokquant.exchange.compressed_tensors import to_compressed_tensors
from tokquant.exchange.engines import FORMATS, export_checkpoint_scales
from tokquant.export import load_scales, save_scales


def export(
    scales: Annotated[Path, typer.Argument(help="Scales, from `tokquant calibrate` or `tokquant import`.")],
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "compressed-tensors",
    model_type: Annotated[
        str | None, typer.Option("--model-type", help="For sglang: model_type of config.json, such as llama.")
    ] = None,
    tp_size: Annotated[int, typer.Option("--tp-size", help="For sglang: tensor-parallel ranks.")] = 1,
    json: options.Json = False,
) -> None:
    """Write calibrated fp8 scales in the format of vLLM (compressed-tensors), ModelOpt or SGLang."""
    options.check_writable("--output", output_path, scales)
    loaded = load_scales(scales)
    export_checkpoint_scales(output_path, loaded, format, model_type=model_type, tp_size=tp_size)
    config = to_compressed_tensors(loaded.scheme) if format == "compressed-tensors" else None
    if json:
        report = {"format": format, "output": str(output_path), "layers": len(loaded), "quantization_config": config}
        output.print_json(report)
        return
    output.console().print(escape(f"{len(loaded)} layers of {loaded.scheme.name} written to {output_path}"), soft_wrap=True)
    if config:
        output.console().print("config.json says so with")
        output.print_json({"quantization_config": config})


def import_scales(
    checkpoint: Annotated[Path, typer.Argument(help="A safetensors file, or a folder of shards.")],
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The file of scales to write.")],
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", "-s", help="A scheme with the same K and V; the one that the scales imply, if left out."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Read the attention scales from a checkpoint of llm-compressor or ModelOpt, with the scheme that they imply."""
    options.check_writable("--output", output_path, checkpoint)
    scales = import_checkpoint_scales(checkpoint, scheme)
    save_scales(output_path, scales)
    if json:
        shapes = {layer: {name: list(value.shape) for name, value in part.tensors.items()} for layer, part in scales.items()}
        output.print_json({"scheme": scales.scheme.name, "output": str(output_path), "layers": shapes})
        return
    text = f"{len(scales)} layers of {scales.scheme.name} ({scales.scheme}) written to {output_path}"
    output.console().print(escape(text), soft_wrap=True)
