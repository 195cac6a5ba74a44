"""`tokquant record`: writes the Q, K and V of a model's attention layers to a file of activations."""

from pathlib import Path
from typing import Annotated

import typer

from tokquant import activations
from tokquant.cli import models, options, output


def record(
    model: models.Model,
    texts: models.Texts,
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    tokens: models.Tokens = 512,
    windows: Annotated[int, typer.Option("--windows", min=1, help="How many windows to take; the file grows with them.")] = 1,
    device: options.Device = None,
    dtype: models.Dtype = None,
    json: options.Json = False,
) -> None:
    """Run a model on texts and write Q, K and V of each of its layers, for `compare`, `run` and `calibrate`."""
    options.check_writable("--output", output_path, texts)
    loaded, ids = models.load(model, texts, tokens, windows, device, dtype)
    from tokquant.integrations.transformers import record as record_model

    layers = record_model(loaded, output.progress(ids, "windows", len(ids)))
    activations.save(output_path, layers)
    shapes = {name: [list(x.shape) for x in operands] for name, operands in layers.items()}
    if json:
        output.print_json(
            {"output": str(output_path), "layers": {n: dict(zip("qkv", s, strict=True)) for n, s in shapes.items()}}
        )
    else:
        q, k, _ = next(iter(shapes.values()))
        output.console().print(f"{len(layers)} layers, q {q}, k and v {k}, written to {output_path}", markup=False)
