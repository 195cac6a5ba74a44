"""Comparisons of schemes gathered over the layers of a model: the figures behind a table, JSON and an HTML page."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from statistics import fmean
from typing import Any

import torch

from tokquant.evaluation.bound import Bound
from tokquant.evaluation.compare import Comparison
from tokquant.evaluation.explain import WorstRow
from tokquant.schemes import QuantScheme, SchemeMap, read


@dataclass(frozen=True)
class Judged:
    """One scheme's comparisons over all layers; its figures are means over the layers."""

    name: str
    """The scheme's, with a number where another has the same."""
    scheme: QuantScheme | SchemeMap
    layers: Mapping[str, Comparison]

    def mean(self, of: Callable[[Comparison], float]) -> float:
        """The mean over layers of a figure."""
        return fmean(of(each) for each in self.layers.values())

    @property
    def rel_l1(self) -> float:
        """Relative L1 error."""
        return self.mean(lambda each: each.errors.rel_l1)

    @property
    def worst_layer(self) -> str:
        """The layer with the largest relative L1 error; NaN counts as the largest."""
        return max(self.layers, key=lambda name: _order(self.layers[name].errors.rel_l1))

    @property
    def bits(self) -> dict[str, float]:
        """Bits per value of q, k and v."""
        return {role: self.mean(lambda each, role=role: each.bits[role]) for role in "qkv"}  # type: ignore[misc]

    @property
    def parts(self) -> dict[str, float] | None:
        """Relative L1 error that q, k, v and p each add; None where it was not measured."""
        found = [each.explanation.parts for each in self.layers.values() if each.explanation is not None]
        return {role: fmean(parts[role] for parts in found) for role in found[0]} if found else None

    @property
    def bound(self) -> dict[str, Any] | None:
        """Means over all queries of the error, its certified bound and the bound's parts, and the tightness; None without."""
        certified = [each for each in self.layers.values() if each.bound is not None]
        if not certified:
            return None
        tightness = torch.cat([each.tightness.flatten() for each in certified])  # type: ignore[union-attr]
        return {
            "error": fmean(each.row_errors.mean().item() for each in certified),
            **{part.name: fmean(getattr(each.bound, part.name).mean().item() for each in certified) for part in fields(Bound)},
            "tightness": {"median": tightness.median().item(), "largest": tightness.max().item()},
        }

    def worst_rows(self, most: int) -> list[tuple[str, WorstRow]]:
        """The rows with the largest errors, with their layers, the worst first."""
        rows = [(name, row) for name, each in self.layers.items() if each.explanation for row in each.explanation.worst]
        return sorted(rows, key=lambda found: _order(found[1].error), reverse=True)[:most]

    def summary(self) -> dict:
        """The means, by their keys in JSON."""
        first = next(iter(self.layers.values()))
        found = {
            "cosine": self.mean(lambda each: each.errors.cosine),
            "rel_l1": self.rel_l1,
            "worst_rel_l1": self.layers[self.worst_layer].errors.rel_l1,
            "worst_layer": self.worst_layer,
            "rmse": self.mean(lambda each: each.errors.rmse),
            "bits": self.bits,
            "ms": self.mean(lambda each: each.ms),
            "quantize_ms": self.mean(lambda each: each.quantize_ms),
            "sdpa_ms": self.mean(lambda each: each.sdpa_ms),
            "backend": first.backend,
        }
        more = {"parts": self.parts, "bound": self.bound}
        return found | {name: value for name, value in more.items() if value is not None}

    def to_json(self) -> dict:
        """Everything: the means, the scheme, and each layer with its heads."""
        layers = []
        for name, each in self.layers.items():
            layer = {
                "name": name,
                **asdict(each.errors),
                "heads": [asdict(head) for head in each.heads],
                "bits": dict(each.bits),
            }
            layer |= {"ms": each.ms, "quantize_ms": each.quantize_ms, "sdpa_ms": each.sdpa_ms}
            layers.append(layer if each.explanation is None else layer | {"explanation": asdict(each.explanation)})
        return {"scheme": self.scheme.name, **self.summary(), "written": self.scheme.to_yaml(), "layers": layers}


@dataclass(frozen=True)
class Report:
    """Schemes over the same layers."""

    input: str
    """Name of the activations."""
    setting: Mapping[str, str]
    """Conditions of the measurement (shape, features, machine, versions), by name."""
    schemes: Sequence[Judged]

    @property
    def layers(self) -> list[str]:
        """Their names, in order."""
        return list(self.schemes[0].layers)

    def front(self, cost: Callable[[Judged], float]) -> list[Judged]:
        """The Pareto front of cost and relative L1 error, the cheapest scheme first."""
        sound = [each for each in self.schemes if isfinite(each.rel_l1) and isfinite(cost(each))]
        ordered = sorted(sound, key=lambda each: (cost(each), each.rel_l1))
        front: list[Judged] = []
        for each in ordered:
            if not front or each.rel_l1 < front[-1].rel_l1:
                front.append(each)
        return front

    def to_json(self) -> dict:
        """Everything, as plain data."""
        return {"input": self.input, "setting": dict(self.setting), "schemes": [each.to_json() for each in self.schemes]}


def bits_of_cache(judged: Judged) -> float:
    """Mean bits per value of k and v, the operands that a cache stores and every step reads."""
    return fmean((judged.bits["k"], judged.bits["v"]))


def gather(
    input: str,
    setting: Mapping[str, str],
    schemes: Sequence[QuantScheme | SchemeMap | str],
    layers: Mapping[str, Sequence[Comparison]],
) -> Report:
    """Gather what `compare` returned for each layer with these schemes into a report.

    Raises ValueError where there is nothing, or a layer has not one comparison per scheme; SchemeError.
    """
    if not layers or not all(layers.values()):
        raise ValueError("layers: there is nothing to report; give the comparisons of at least one layer and scheme")
    if counts := {len(found) for found in layers.values()} - {len(schemes)}:
        raise ValueError(f"layers: {sorted(counts)} comparisons of {len(schemes)} schemes; compare the same ones on each")
    names: Counter[str] = Counter()
    judged = []
    for place, scheme in enumerate(map(read, schemes)):
        names[scheme.name] += 1
        name = scheme.name + (f" ({names[scheme.name]})" if names[scheme.name] > 1 else "")
        judged.append(Judged(name, scheme, {layer: found[place] for layer, found in layers.items()}))
    return Report(input, setting, judged)


def _order(error: float) -> float:
    """A sort key under which NaN is the largest error."""
    return error if error == error else float("inf")
