"""`tokquant calibrate`: calibrates static scales on activations and writes them to a file."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tokquant.activations import sample
from tokquant.calibration import observers
from tokquant.calibration.calibrator import Calibrator
from tokquant.calibration.scales import Scales
from tokquant.cli import models, options, output
from tokquant.export import save_scales
from tokquant.schemes import read


def calibrate(
    scheme: options.Scheme,
    output_path: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    input: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", help="Activation files; repeat for more; the sample that ships, if left out."),
    ] = None,
    model: Annotated[Path | None, models.MODEL] = None,
    texts: Annotated[Path | None, models.TEXTS] = None,
    tokens: models.Tokens = 512,
    windows: models.Windows = None,
    observer: Annotated[
        str, typer.Option("--observer", help="amax; percentile:99.9 or mse, which clip; ema:0.99, which averages over batches.")
    ] = "amax",
    margin: Annotated[float, typer.Option("--margin", help="Multiply the ranges that the observer found by this.")] = 1.0,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", help="Continue from this file if it exists, and write it after each input; no input counts twice."
        ),
    ] = None,
    device: options.Device = None,
    dtype: models.Dtype = None,
    json: options.Json = False,
) -> None:
    """Calibrate a static scheme on activations, or on a model that reads texts, and write scales and scheme to a file."""
    options.check_writable("--output", output_path, state, texts, *(input or []))
    options.check_writable("--state", state)
    if (model is None) != (texts is None) or (model is not None and input):
        raise ValueError("--model: give --model and --texts together, or --input")
    calibrator = _calibrator(scheme, observer, state)
    if model is not None and texts is not None:
        with _counted_once(calibrator, texts, state) as new:
            if new:
                loaded, ids = models.load(model, texts, tokens, windows, device, dtype)
                from tokquant.integrations.transformers import run_observed

                run_observed(loaded, output.progress(ids, "windows", len(ids)), calibrator.observe)
    paths = [] if model is not None else input or [sample()]
    for number, path in enumerate(paths, start=1):
        with _counted_once(calibrator, path, state) as new:
            if new:
                layers = options.Layers(path, device)
                for name, (q, k, v) in layers.each(f"{layers.name}, {number} of {len(paths)}"):
                    with layers.naming(name):
                        calibrator.observe(name, q, k, v)
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


def _calibrator(scheme: str, observer: str, state: Path | None) -> Calibrator:
    """A new calibrator, or the one from the state file, which must have this scheme and observer."""
    if state is None or not state.exists():
        return Calibrator(scheme, observer)
    calibrator = Calibrator.load(state)
    if (calibrator.scheme, calibrator.observer) != (read(scheme), observers.parse(observer)):
        raise ValueError(
            f"--state: {state} is of scheme {calibrator.scheme.name!r} and observer {calibrator.observer}; "
            "give those, or another file"
        )
    return calibrator


@contextmanager
def _counted_once(calibrator: Calibrator, path: Path, state: Path | None) -> Iterator[bool]:
    """Yields whether an input is new to the calibration. If so, it is recorded and the state is saved when the block ends."""
    if state is None:
        yield True
        return
    digest = _digest(path)
    new = digest not in calibrator.sources
    yield new
    if new:
        calibrator.sources[digest] = path.name
        calibrator.save(state)


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _table(scales: Scales, title: str) -> Table:
    table = output.table(f"{scales.scheme.name} {title}", ["layer", "tensor"], ["shape", "smallest", "largest"])
    for layer, part in scales.items():
        for name, value in part.tensors.items():
            low, high = value.float().min().item(), value.float().max().item()
            table.add_row(escape(layer), name, "x".join(map(str, value.shape)), f"{low:.4g}", f"{high:.4g}")
    return table
