"""`tokquant calibrate`: from activations to a file of scales."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tokquant.calibration.calibrator import Calibrator
from tokquant.cli import options, output
from tokquant.export import save_scales


def calibrate(
    scheme: options.Scheme,
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    input: Annotated[
        list[Path] | None, typer.Option("--input", "-i", help="Activation files; repeat for more. The sample if left out.")
    ] = None,
    observer: Annotated[str, typer.Option("--observer", help="amax, or percentile:99.9 to clip the rest.")] = "amax",
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Calibrate a static scheme on activations and write its scales, with the scheme in the file."""
    if not output_path.parent.is_dir():
        raise ValueError(f"--output: there is no folder {output_path.parent}")
    calibrator = Calibrator(scheme, observer)
    paths: list[Path | None] = [*input] if input else [None]
    for path in paths:
        layers = options.Layers(path, device)
        for name, (q, k, v) in layers.each(layers.name):
            with layers.naming(name):
                calibrator.observe(name, q, k, v)
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
