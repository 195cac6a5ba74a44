"""`tokquant calibrate`: from activations to a file of scales."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tokquant.activations import sample
from tokquant.calibration import observers
from tokquant.calibration.calibrator import Calibrator
from tokquant.calibration.scales import Scales
from tokquant.cli import options, output
from tokquant.export import save_scales
from tokquant.schemes import read


def calibrate(
    scheme: options.Scheme,
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    input: Annotated[
        list[Path] | None, typer.Option("--input", "-i", help="Activation files; repeat for more. The sample if left out.")
    ] = None,
    observer: Annotated[
        str, typer.Option("--observer", help="amax; percentile:99.9 or mse to clip; ema:0.99 to average over batches.")
    ] = "amax",
    margin: Annotated[
        float, typer.Option("--margin", help="Ranges are so many times as wide as the observer found them.")
    ] = 1.0,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="A file to go on from if it exists, written after each input; none counts twice."),
    ] = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Calibrate a static scheme on activations and write its scales, with the scheme in the file."""
    options.check_writable("--output", output_path)
    options.check_writable("--state", state)
    calibrator = _begun(scheme, observer, state)
    paths = input or [sample()]
    for number, path in enumerate(paths, start=1):
        layers = options.Layers(path, device)
        _observe_file(calibrator, layers, f"{layers.name}, {number} of {len(paths)}", state)
    scales = calibrator.scales(margin)
    save_scales(output_path, scales)
    if json:
        output.print_json(
            {
                "scheme": scales.scheme.name,
                "observer": str(calibrator.observer),
                "output": str(output_path),
                "layers": {
                    layer: {name: list(value.shape) for name, value in part.tensors.items()} for layer, part in scales.items()
                },
            }
        )
    else:
        output.console().print(_table(scales, f"calibrated with {calibrator.observer}, written to {output_path}"))


def _begun(scheme: str, observer: str, state: Path | None) -> Calibrator:
    """A new calibrator, or the one in the state file, which must be of this scheme and observer."""
    if state is None or not state.exists():
        return Calibrator(scheme, observer)
    calibrator = Calibrator.load(state)
    if (calibrator.scheme, calibrator.observer) != (read(scheme), observers.parse(observer)):
        raise ValueError(
            f"--state: {state} is of scheme {calibrator.scheme.name!r} and observer {calibrator.observer}; "
            "give those, or another file"
        )
    return calibrator


def _observe_file(calibrator: Calibrator, layers: options.Layers, what: str, state: Path | None) -> None:
    """Add the layers of a file and write the state, which a file that it has seen leaves as it is."""
    if state is not None:
        with open(layers.file.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest in calibrator.sources:
            return
        calibrator.sources[digest] = layers.name
    for name, (q, k, v) in layers.each(what):
        with layers.naming(name):
            calibrator.observe(name, q, k, v)
    if state is not None:
        calibrator.save(state)


def _table(scales: Scales, title: str) -> Table:
    table = Table(title=escape(f"{scales.scheme.name} {title}"))
    table.add_column("layer")
    table.add_column("tensor")
    for column in ("shape", "smallest", "largest"):
        table.add_column(column, justify="right")
    for layer, part in scales.items():
        for name, value in part.tensors.items():
            low, high = value.float().min().item(), value.float().max().item()
            table.add_row(escape(layer), name, "x".join(map(str, value.shape)), f"{low:.4g}", f"{high:.4g}")
    return table
