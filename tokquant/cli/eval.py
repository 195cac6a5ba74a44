"""`tokquant eval`: compares a language model's predictions with and without quantized attention."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tokquant.calibration.scales import Scales
from tokquant.cli import models, options, output
from tokquant.evaluation.logits import Agreement
from tokquant.export import load_scales
from tokquant.schemes import QuantScheme, SchemeMap, read

if TYPE_CHECKING:
    from tokquant.integrations.transformers.evaluation import Evaluation

DEFAULT = ("int8", "kv-int8", "kv-int4")


def eval(
    model: models.Model,
    texts: models.Texts,
    schemes: Annotated[
        list[str] | None,
        typer.Option("--scheme", "-s", help=f"A preset or a YAML file; repeat for more; {', '.join(DEFAULT)}, if left out."),
    ] = None,
    scales: options.ScaleFiles = None,
    tokens: models.Tokens = 512,
    windows: models.Windows = None,
    decoded: Annotated[
        int, typer.Option("--decode", min=0, help="Tokens of each window to predict one by one from a cache; 0 for none.")
    ] = 64,
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: models.Dtype = None,
    json: options.Json = False,
) -> None:
    """Compare a language model's predictions under schemes with those of its own 16-bit attention: perplexity, KL, top-1."""
    chosen: list[QuantScheme | SchemeMap] = [read(scheme) for scheme in schemes or (() if scales else DEFAULT)]
    calibrated = [load_scales(path) for path in scales or []]
    static_scales: list[Scales | None] = [None] * len(chosen) + calibrated
    chosen += [each.scheme for each in calibrated]
    loaded, ids = models.load(model, texts, tokens, windows, device, dtype)
    from tokquant.integrations.transformers.evaluation import evaluate

    progress = output.progress(ids, "windows", len(ids))
    baseline, evaluations = evaluate(loaded, progress, chosen, scales=static_scales, decoded=decoded, backend=backend)
    if json:
        rows = [
            {"scheme": r.scheme.name, "prefill": _figures(r.prefill), "decode": r.decode and _figures(r.decode)}
            for r in evaluations
        ]
        data = {"model": str(model), "windows": len(ids), "tokens": tokens, "decoded": decoded}
        output.print_json(data | {"perplexity": baseline.perplexity, "schemes": rows})
        return
    table = output.table(
        f"{model.name}: {len(ids)} windows of {tokens} tokens, perplexity {baseline.perplexity:.4f} without tokquant",
        ["scheme"],
        ["perplexity", "KL", "same top-1", "decode perplexity", "KL", "same top-1"],
        caption="KL in nats a token" + _decode_caption(decoded, evaluations),
    )
    for r in evaluations:
        table.add_row(escape(r.scheme.name), *_cells(r.prefill), *(_cells(r.decode) if r.decode else ("-",) * 3))
    output.console().print(table)
    for r in evaluations:
        if r.refusal:
            output.console().print(f"{r.scheme.name} is not decoded: {r.refusal}", markup=False)


def _figures(a: Agreement) -> dict[str, float]:
    return {"perplexity": a.perplexity, "kl": a.kl, "top1": a.top1, "tokens": a.tokens, "exact_perplexity": a.exact_perplexity}


def _decode_caption(decoded: int, evaluations: Sequence["Evaluation"]) -> str:
    exact = next((r.decode.exact_perplexity for r in evaluations if r.decode), None)
    if exact is None:
        return ""
    return (
        f"; decode: the last {decoded} tokens of a window one by one from a cache of codes; "
        f"perplexity of those without tokquant {exact:.4f}"
    )


def _cells(a: Agreement) -> tuple[str, str, str]:
    return f"{a.perplexity:.4f}", f"{a.kl:.2e}", f"{100 * a.top1:.2f} %"
