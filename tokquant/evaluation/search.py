"""Mixed-precision search: a scheme for each layer, from measured errors on its activations and from costs."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from tokquant.bias import Bias
from tokquant.calibration.scales import needed
from tokquant.errors import nearest, quote
from tokquant.evaluation import candidates as families
from tokquant.evaluation import front
from tokquant.evaluation.costs import Activations, Progress, Table, measure, operands
from tokquant.evaluation.front import Front
from tokquant.schemes import HeadSchemes, LayerScheme, QuantScheme, SchemeMap, read
from tokquant.whole_numbers import whole_number

Metric = Literal["rel_l1", "rmse", "max_abs", "cosine"]
Cost = Literal["bits", "kv_bits", "ms"]
Over = Literal["mean", "worst"]
METRICS, COSTS = get_args(Metric), get_args(Cost)
ROUNDING = 1e-9
"""Slack of a budget: sums of costs that are mathematically equal may differ by rounding."""


@dataclass(frozen=True)
class Choice:
    """The scheme that was found for one layer, its error and its cost."""

    layer: str
    scheme: LayerScheme
    error: float
    cost: float


@dataclass(frozen=True)
class Found:
    """The scheme map that a search found, with its error and cost, the whole Pareto front, and single schemes to compare."""

    map: SchemeMap
    error: float
    cost: float
    metric: Metric
    unit: Cost
    """Unit of the cost."""
    layers: list[Choice]
    front: list[tuple[float, float]]
    """(cost, error) of every combination on the Pareto front, cheapest first."""
    singles: dict[str, tuple[float, float]]
    """(cost, error) of using one scheme for all layers, by its name, for schemes that fit every layer."""
    held_out: dict[str, float]
    """Errors of the map and of single schemes on the held-out activations, by name."""
    unfit: dict[str, str]
    """Candidates that do not fit every layer, by name: the first layer that they do not fit, and why."""


def search(
    activations: Activations,
    candidates: Sequence[QuantScheme | str] | None = None,
    *,
    budget: str,
    metric: Metric | None = None,
    cost: Cost | None = None,
    over: Over = "mean",
    relative_to: QuantScheme | SchemeMap | str | None = None,
    heads: bool = False,
    rows: int | None = 256,
    target: str | None = None,
    held_out: Activations | None = None,
    name: str = "searched",
    progress: Progress | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Bias | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Found:
    """Find the scheme map of least error within a budget of cost, or of least cost within a budget of error.

    Each layer is judged on its own activations, so the effect of one layer's error on the next is not counted.

    Args:
        activations: Q, K and V of each layer, `[B, H, N, D]`; read one layer at a time.
        candidates: schemes to choose among; where None, the presets that need no calibration and a family of pairs of K and V
            (`tokquant.evaluation.candidates`). A static one is calibrated on the activations themselves. One that does not fit
            a layer is left out there, and `Found.unfit` says so.
        budget: `"bits=8.5"`, `"kv_bits=5"` or `"ms=20"`, the most it may cost; or `"rel_l1=0.01"`, `"rmse=0.001"`,
            `"max_abs=0.1"` or `"cosine=0.999"`, the most it may err, or the least a cosine may be.
        metric: the error to minimize if the budget is a cost; rel_l1 if None. The error of a cosine is 1 - cosine.
        cost: what to minimize if the budget is an error; bits if None. `bits` are per value of Q, K and V in a long
            sequence, scales included; `kv_bits` are of K and V alone; `ms` is measured, of all layers with quantization.
        over: judge by the mean over the layers, or by the worst layer.
        relative_to: divide each layer's error by this scheme's error in that layer.
        heads: let ranges of heads of K and V have their own schemes (not static, and no scale per tensor); only for the mean
            of rel_l1.
        rows: queries of each head that are measured, in runs spread over the sequence; all if None. All keys are used.
        target: for `ms`, a GPU (`sm_90` ...) whose time is predicted instead: of attention on codes, from the instructions of
            its compiled kernels for float16 tensors.
        held_out: the same layers' activations on other inputs, which the search does not see; its result is judged on them.
        name: of the map; not the name of a candidate.
        progress: wraps the names of the layers, and how many there are, as they are worked on.
        causal, scale, mask, bias, window, softcap, sinks: as for `attention`, of every layer.

    Raises ValueError and SchemeError for what cannot be read, and where no combination keeps the budget.
    """
    kind, limit = _budget(budget)
    metric, cost = _units(budget, kind, metric, cost)
    if over not in get_args(Over):
        raise ValueError(f"over: {quote(over)} is not valid; use mean or worst")
    if heads and (metric, over) != ("rel_l1", "mean"):
        raise ValueError(f"heads: the {over} {metric} of a layer is not a sum over its heads; use the mean of rel_l1")
    if target is not None and cost != "ms":
        raise ValueError(f"target: {quote(target)} says whose time is predicted, and the cost is {cost}; use cost ms")
    if rows is not None:
        rows = whole_number("rows", rows, 1, instead=", or None for all")
    _check_layers(activations, held_out)
    schemes = _schemes(candidates, activations)
    if heads:
        _check_for_heads(schemes)
    if name in (scheme.name for scheme in schemes):
        raise ValueError(f"name: {quote(name)}, of the map or its file, is a candidate's; give another")
    base = None if relative_to is None else read(relative_to)
    features = dict(causal=causal, scale=scale, mask=mask, bias=bias, window=window, softcap=softcap, sinks=sinks)
    judged: dict[str, Any] = dict(metric=metric, rows=rows, relative_to=base, progress=progress, **features)
    table = measure(activations, schemes, cost=cost, heads=heads, target=target, **judged)
    fronts = []
    for layer, costs, errors in zip(table.layers, table.cost, table.error, strict=True):
        units = [front.of_options(*each) for each in zip(costs, errors, strict=True)]
        if not all(map(len, units)):
            raise ValueError(f"candidates: none fits layer {quote(layer)}")
        fronts.append(front.merged(units, np.add))
    whole = front.merged(fronts, np.add if over == "mean" else np.maximum)
    summed = len(fronts) if over == "mean" else 1
    place = whole.best(limit + ROUNDING) if kind in COSTS else whole.cheapest((limit + ROUNDING) * summed)
    if place is None:
        raise ValueError(_unreachable(budget, whole, summed, metric, over, cost))
    choices = list(_choices(table, whole.choice[place]))
    points = [(float(c), float(e) / summed) for c, e in zip(whole.cost, whole.error, strict=True)]
    chosen = SchemeMap(tuple((glob.escape(each.layer), each.scheme) for each in choices), name)
    unseen = {} if held_out is None else of_schemes(measure(held_out, [chosen, *table.schemes], **judged), over)
    return Found(
        map=chosen,
        error=points[place][1],
        cost=points[place][0],
        metric=metric,
        unit=cost,
        layers=choices,
        front=points,
        singles=of_schemes(table, over),
        held_out={scheme: error for scheme, (_, error) in unseen.items()},
        unfit=table.unfit,
    )


def of_schemes(table: Table, over: Over) -> dict[str, tuple[float, float]]:
    """(cost, error) over all layers of each scheme in a table that fits every layer, by its name."""
    error = np.stack([each.sum(axis=0) for each in table.error])
    cost = np.stack([each.sum(axis=0) for each in table.cost]).sum(axis=0)
    joined = error.mean(axis=0) if over == "mean" else error.max(axis=0)
    found = zip(table.schemes, cost, joined, strict=True)
    return {scheme.name: (float(c), float(e)) for scheme, c, e in found if np.isfinite(e) and np.isfinite(c)}


def _check_layers(activations: object, held_out: object) -> None:
    for what, given in (("activations", activations), ("held_out", held_out)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"{what}: {quote(given)}; give tokquant.activations.Activations(path), or {{layer: (q, k, v)}}")
    assert isinstance(activations, Mapping)
    if not activations:
        raise ValueError("activations: there are no layers")
    if isinstance(held_out, Mapping) and (apart := activations.keys() ^ held_out.keys()):
        layer = min(apart)
        raise ValueError(f"held_out: {'has' if layer in held_out else 'lacks'} layer {quote(layer)}; give just the same layers")


def _schemes(candidates: Sequence[QuantScheme | str] | None, activations: Activations) -> list[QuantScheme]:
    """The candidates, each once; the default ones where None."""
    if candidates is None:
        return families.default(operands(activations, next(iter(activations)))[0].shape[3])
    if isinstance(candidates, str | QuantScheme | SchemeMap) or not candidates:
        raise ValueError(f"candidates: {quote(candidates)}; give a list of schemes to choose among")
    found: dict[str, QuantScheme] = {}
    for scheme in map(read, candidates):
        if isinstance(scheme, SchemeMap):
            raise ValueError(f"candidates: {scheme.name!r} is a scheme map; give schemes")
        if found.setdefault(scheme.name, scheme) != scheme:
            raise ValueError(f"candidates: two are called {scheme.name!r}; give each a name of its own")
    return list(found.values())


def _check_for_heads(schemes: Sequence[QuantScheme]) -> None:
    """Refuse schemes whose codes of a head depend on the other heads: heads are judged together, and may be split apart."""
    for scheme in schemes:
        whole = any(x.scaled and x.granularity.kind == "tensor" for x in (scheme.q, scheme.k, scheme.v))
        if whole or needed(scheme):
            why = "has a scale per tensor" if whole else "is static"
            raise ValueError(f"heads: candidate {scheme.name!r} {why}, which schemes of ranges of heads cannot; leave one out")


def _choices(table: Table, picked: np.ndarray) -> Iterator[Choice]:
    """The scheme of each layer, from the option that each of its units takes."""
    at = 0
    for layer, heads, error, cost in zip(table.layers, table.kv_heads, table.error, table.cost, strict=True):
        options, units = picked[at : at + len(error)], np.arange(len(error))
        at += len(error)
        schemes = [table.schemes[option] for option in options]
        scheme = _in_ranges(schemes) if len(schemes) == heads else schemes[0]
        yield Choice(layer, scheme, float(error[units, options].sum()), float(cost[units, options].sum()))


def _in_ranges(schemes: list[QuantScheme]) -> LayerScheme:
    """One scheme per head, as ranges of heads with equal schemes."""
    parts: list[tuple[int, QuantScheme]] = []
    for scheme in schemes:
        if parts and parts[-1][1] == scheme:
            parts[-1] = (parts[-1][0] + 1, scheme)
        else:
            parts.append((1, scheme))
    return parts[0][1] if len(parts) == 1 else HeadSchemes(tuple(parts))


def _budget(text: object) -> tuple[str, float]:
    """Name and limit of a budget such as `"bits=8.5"`; a cosine becomes the error 1 - cosine."""
    known = (*METRICS, *COSTS)
    name, _, number = text.partition("=") if isinstance(text, str) else ("", "", "")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if name not in known or not 0 < value < float("inf"):
        example = "write bits=8.5, kv_bits=5, ms=20, rel_l1=0.01, rmse=0.001, max_abs=0.1 or cosine=0.999"
        raise ValueError(f"budget: {quote(text)} is not valid; {example}{'' if name in known else nearest(name, known)}")
    return name, 1 - value if name == "cosine" else value


def _units(budget: str, kind: str, metric: str | None, cost: str | None) -> tuple[Metric, Cost]:
    """The metric of errors and the unit of costs, one of which is the budget's."""
    for what, given, known in (("metric", metric, METRICS), ("cost", cost, COSTS)):
        if given is not None and given not in known:
            raise ValueError(f"{what}: {quote(given)} is not valid; use {', '.join(known)}{nearest(given, known)}")
        if given is not None and kind in known and given != kind:
            raise ValueError(f"{what}: {quote(given)}, and the budget is {budget}; leave {what} out")
    return (kind, cost or "bits") if kind in METRICS else (metric or "rel_l1", kind)  # type: ignore[return-value]


def _unreachable(budget: str, whole: Front, summed: int, metric: str, over: str, cost: str) -> str:
    least = f"{cost} are at least {whole.cost[0]:.4g}"
    if budget.partition("=")[0] in METRICS:
        error = whole.error[-1] / summed
        least = f"the {over} {metric} is " + (f"at most {1 - error:.6g}" if metric == "cosine" else f"at least {error:.4g}")
    return f"budget: no combination of these candidates keeps {budget}; {least}"
