"""`tokquant run`: runs one scheme on a file of activations."""

from dataclasses import asdict
from typing import Annotated

from rich.markup import escape

from tokquant.cli import options, output
from tokquant.evaluation.compare import compare
from tokquant.evaluation.page.numbers import thousandths
from tokquant.schemes import read


def run(
    scheme: Annotated[str | None, options.SCHEME] = None,
    input: options.Input = None,
    scales: options.ScaleFile = None,
    backend: options.Backend = "auto",
    causal: options.Causal = False,
    device: options.Device = None,
    repeats: options.Repeats = 5,
    json: options.Json = False,
) -> None:
    """Run a scheme on activations, layer by layer: errors against float64, bits per value, time beside torch's SDPA.

    Without --scheme, the scheme is that of --scales, or else int8.
    """
    layers = options.Layers(input, device)
    calibrated = None if scales is None else layers.scales(scales)
    resolved = read(scheme if scheme is not None else calibrated.scheme if calibrated else "int8")
    if calibrated and resolved != calibrated.scheme:
        raise ValueError(f"--scheme {scheme} is not what {scales} was calibrated for ({calibrated.scheme.name}); leave one out")
    rows = []
    for name, (q, k, v) in layers.each(resolved.name):
        with layers.naming(name):
            layer_scales = None if calibrated is None else calibrated.get(name)
            rows += [
                (name, r)
                for r in compare(
                    q, k, v, [resolved], layer=name, scales=layer_scales, backend=backend, causal=causal, repeats=repeats
                )
            ]
    chosen = rows[0][1].backend
    if json:
        output.print_json(
            {
                "scheme": resolved.name,
                "backend": chosen,
                "layers": [
                    {
                        "name": name,
                        **asdict(result.errors),
                        "ms": result.ms,
                        "quantize_ms": result.quantize_ms,
                        "sdpa_ms": result.sdpa_ms,
                        "bits": dict(result.bits),
                    }
                    for name, result in rows
                ],
            }
        )
        return
    title = f"{resolved.name} on {layers.name}, head_dim {layers.head_dims}, backend {chosen}"
    numbers = ["cosine", "rel. L1", "RMSE", "max", "bits q / k / v", "ms", "quantize ms", "SDPA ms"]
    table = output.table(title, ["layer"], numbers)
    for name, result in rows:
        errors = result.errors
        table.add_row(
            escape(name),
            f"{errors.cosine:.6f}",
            output.percent(errors.rel_l1),
            f"{errors.rmse:.2e}",
            f"{errors.max_abs:.2e}",
            " / ".join(thousandths(result.bits[role]) for role in "qkv"),
            f"{result.ms:.2f}",
            f"{result.quantize_ms:.2f}",
            f"{result.sdpa_ms:.2f}",
        )
    output.console().print(table)
