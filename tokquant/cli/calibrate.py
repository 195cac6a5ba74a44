"""`tokquant calibrate`: from activations to a file of scales."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tokquant.calibration.calibrator import Calibrator
from tokquant.cli import models, options, output
from tokquant.export import save_scales


def calibrate(
    scheme: options.Scheme,
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    input: Annotated[
        list[Path] | None, typer.Option("--input", "-i", help="Activation files; repeat for more. The sample if left out.")
    ] = None,
    model: Annotated[Path | None, models.MODEL] = None,
    texts: Annotated[Path | None, models.TEXTS] = None,
    tokens: models.Tokens = 512,
    windows: models.Windows = None,
    observer: Annotated[str, typer.Option("--observer", help="amax, or percentile:99.9 to clip the rest.")] = "amax",
    device: options.Device = None,
    dtype: models.Dtype = None,
    json: options.Json = False,
) -> None:
    """Calibrate a static scheme on activations, or on a model that reads texts, and write its scales, with the scheme."""
    if not output_path.parent.is_dir():
        raise ValueError(f"--output: there is no folder {output_path.parent}")
    if (model is None) != (texts is None) or (model is not None and input):
        raise ValueError("--model: give --model and --texts together, or --input")
    calibrator = Calibrator(scheme, observer)
    if model is not None and texts is not None:
        loaded, ids = models.load(model, texts, tokens, windows, device, dtype)
        from tokquant.integrations.transformers import run_observed

        run_observed(loaded, output.progress(ids, "windows", len(ids)), calibrator.observe)
    else:
        _observe_files(calibrator, input or [None], device)
    scales = calibrator.scales()
    save_scales(output_path, scales)
    if json:
        output.print_json(
            {
                "scheme": scales.scheme.name,
                "output": str(output_path),
                "layers": {
                    layer: {name: list(value.shape) for name, value in part.tensors.items()} for layer, part in scales.items()
                },
            }
        )
        return
    table = Table(title=escape(f"{scales.scheme.name} calibrated with {observer}, written to {output_path}"))
    table.add_column("layer")
    table.add_column("tensor")
    for column in ("shape", "smallest", "largest"):
        table.add_column(column, justify="right")
    for layer, part in scales.items():
        for name, value in part.tensors.items():
            low, high = value.float().min().item(), value.float().max().item()
            table.add_row(escape(layer), name, "x".join(map(str, value.shape)), f"{low:.4g}", f"{high:.4g}")
    output.console().print(table)


def _observe_files(calibrator: Calibrator, paths: Sequence[Path | None], device: str | None) -> None:
    for path in paths:
        layers = options.Layers(path, device)
        for name, (q, k, v) in layers.each(layers.name):
            with layers.naming(name):
                calibrator.observe(name, q, k, v)
