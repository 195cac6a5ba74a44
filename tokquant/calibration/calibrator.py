"""Calibrator: watch activations, then fix the static parts of a scheme."""

import torch
from torch import Tensor

from tokquant.calibration import observers
from tokquant.calibration.balance import Maxima
from tokquant.calibration.observers import Percentile, Statistics
from tokquant.calibration.scales import Scales, needed
from tokquant.errors import SchemeError, quote
from tokquant.inputs import check_tensors
from tokquant.quantize import asymmetric_scale, frames, symmetric_scale
from tokquant.schemes import Operand, QuantScheme, resolve
from tokquant.schemes.placement import place
from tokquant.transforms import Frame, sixteen_bit


class Calibrator:
    """Gathers statistics of Q, K and V layer by layer and turns them into scales.

    Args:
        scheme: with at least one static part; a QuantScheme, a preset's name or a path.
        observer: `"amax"`, or `"percentile:99.9"` to clip the rest.

    Raises SchemeError where there is nothing to calibrate, or where the observer cannot serve the scheme.
    """

    def __init__(self, scheme: QuantScheme | str, observer: str | observers.Observer = "amax"):
        self.scheme = resolve(scheme)
        self.observer = observers.parse(observer)
        if not needed(self.scheme):
            raise SchemeError(
                f"scheme {self.scheme.name!r} has no static part to calibrate; "
                "give an operand or a balance scale: static (an operand's per tensor, head or channel), or k smooth: static"
            )
        _check_balance(self.scheme, self.observer)
        if isinstance(self.observer, Percentile):
            _check_percentile(self.scheme)
        self.layers: dict[str, dict[str, Statistics]] = {}
        self.maxima: dict[str, Maxima] = {}
        """By layer, where the scheme has a static balance."""
        self._types: dict[str, torch.dtype] = {}

    def observe(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Add a batch of layer `name`: q `[B, H_q, N_q, D]`, k and v `[B, H_kv, N_k, D]`, any lengths.

        Raises ValueError if a value is not finite, or the heads or channels are not those of earlier batches; nothing of the
        batch then counts.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: {quote(name)} is no name of a layer")
        with torch.no_grad():
            check_tensors(q, k, v)
        for role, x in (("q", q), ("k", k), ("v", v)):
            if not bool(x.isfinite().all()):
                raise ValueError(f"{name}.{role}: holds a value that is not finite")
        seen = self.layers.get(name)
        if seen is None:
            histogram = isinstance(self.observer, Percentile)
            seen = {role: Statistics(x.shape[1], x.shape[3], histogram) for role, x in (("q", q), ("k", k), ("v", v))}
        for role, x in (("q", q), ("k", k), ("v", v)):
            shape, earlier = [x.shape[1], x.shape[3]], list(seen[role].low.shape)
            if shape != earlier:
                raise ValueError(f"{name}.{role}: heads and channels {shape} are not {earlier}, as in earlier batches")
        # calibrated offsets and factors are known only at the end; they are linear, so the extremes can be changed by them then
        in_frames = frames(q, k, v, without_static_parts(self.scheme))
        rule = self.scheme.balance
        if rule != "none" and rule.scale == "static":
            maxima = self.maxima.get(name) or Maxima(rule, moves=self.scheme.k.smooth == "static")
            maxima.observe(q, Frame(offset=in_frames[1].offset).apply(k))
            self.maxima[name] = maxima
        for role, x, frame in zip("qkv", (q, k, v), in_frames, strict=True):
            seen[role].observe(x, frame.apply(x))
        self.layers[name] = seen
        self._types.setdefault(name, k.dtype)

    def merge(self, other: "Calibrator") -> None:
        """Add what another calibrator of the same scheme and observer saw, as if this one had seen it.

        Raises ValueError if scheme, observer or shapes differ.
        """
        if (self.scheme, self.observer) != (other.scheme, other.observer):
            raise ValueError("merge: the other calibrator has another scheme or observer")
        for name, theirs in other.layers.items():
            for role, statistics in self.layers.get(name, {}).items():
                statistics.check_mergeable(theirs[role], f"{name}.{role}")
        for name, maxima in other.maxima.items():
            self.maxima.setdefault(name, Maxima(maxima.rule, maxima.moves)).merge(maxima)
        for name, theirs in other.layers.items():
            if name not in self.layers:
                self.layers[name] = {role: statistics.empty() for role, statistics in theirs.items()}
                self._types[name] = other._types[name]
            for role, statistics in self.layers[name].items():
                statistics.merge(theirs[role])

    def scales(self) -> Scales:
        """The scales of every layer seen. Raises ScalesError if there is none."""
        return Scales(self.scheme, {name: self._layer(name) for name in self.layers})

    def _layer(self, name: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for operand in (self.scheme.k, self.scheme.q, self.scheme.v):
            role, statistics = operand.role, self.layers[name][operand.role]
            offset = None
            if operand.smooth == "static":
                offset = statistics.mean()
                tensors[f"{role}_offset"] = offset[:, None].to(sixteen_bit(self._types[name])).contiguous()
            if role == "k" and name in self.maxima:
                tensors["k_balance"] = self.maxima[name].factors(tensors.get("k_offset"))
            if operand.scale == "static":
                low, high = statistics.low, statistics.high
                if offset is not None:
                    kept = tensors[f"{role}_offset"][None]
                    shift = Frame(offset=kept, rotated=self._rotated(role)).apply(torch.zeros_like(kept)).squeeze((0, 2))
                    low, high = low + shift, high + shift
                if role in "qk" and "k_balance" in tensors:
                    factor = tensors["k_balance"].squeeze(1).repeat_interleave(low.shape[0] // len(tensors["k_balance"]), dim=0)
                    low, high = (low * factor, high * factor) if role == "k" else (low / factor, high / factor)
                if role == "q" and place(self.scheme.k) == "q" and self.scheme.k.scale == "static":
                    fold = tensors["k_scale"].float().squeeze(1)
                    fold = fold.repeat_interleave(low.shape[0] // fold.shape[0], dim=0)
                    low, high = low * fold, high * fold
                tensors.update(self._scale(operand, statistics, low, high))
        return tensors

    def _scale(self, operand: Operand, statistics: Statistics, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        kind = operand.granularity.kind
        if isinstance(self.observer, Percentile):
            largest = statistics.quantile(self.observer.percent, per_head=kind == "head")
            return {f"{operand.role}_scale": symmetric_scale(largest[:, None, None], operand)}
        low, high = low[:, None], high[:, None]  # [H, 1, D]
        if kind != "channel":
            low, high = low.amin(dim=2, keepdim=True), high.amax(dim=2, keepdim=True)
        if kind == "tensor":
            low, high = low.amin(dim=0, keepdim=True), high.amax(dim=0, keepdim=True)
        if operand.symmetric:
            return {f"{operand.role}_scale": symmetric_scale(torch.maximum(low.abs(), high.abs()), operand)}
        scale, zero = asymmetric_scale(low, high, operand)
        return {f"{operand.role}_scale": scale, f"{operand.role}_zero": zero}

    def _rotated(self, role: str) -> bool:
        return (self.scheme.rotate_v if role == "v" else self.scheme.rotate) == "hadamard"


def without_static_parts(scheme: QuantScheme) -> QuantScheme:
    """The scheme as it is before its offsets and its factors of balance are known."""
    changed: dict[str, object] = {
        role: getattr(scheme, role).model_copy(update={"smooth": "none"})
        for role in "kv"
        if getattr(scheme, role).smooth == "static"
    }
    if scheme.balance != "none" and scheme.balance.scale == "static":
        changed["balance"] = "none"
    return scheme.model_copy(update=changed)


def _check_balance(scheme: QuantScheme, observer: observers.Observer) -> None:
    """Extremes of a channel can be multiplied by its factor once that is known; sums of channels and histograms cannot."""
    fixed = [role for role in "qk" if getattr(scheme, role).scale == "static"]
    if not fixed or scheme.balance == "none":
        return
    if scheme.balance.scale == "dynamic":
        if scheme.k.smooth == "static":
            text = "its scale cannot be static beside a static offset of K under a balance, which depends on that offset"
            raise SchemeError([(fixed[0], f"{text}; use balance {{{scheme.balance.kind}: {{scale: static}}}}")])
    elif scheme.rotate != "none":
        text = "its scale cannot be static where a static balance is rotated: what the rotation adds up is known only after it"
        raise SchemeError([(fixed[0], f"{text}; use scale: dynamic, or rotate: none")])
    elif isinstance(observer, Percentile):
        text = "a static scale under a static balance cannot come from percentiles; use observer 'amax'"
        raise SchemeError([(fixed[0], text)])


def _check_percentile(scheme: QuantScheme) -> None:
    """A histogram a head holds magnitudes only: not channels, not signs, not values less an offset that comes later."""
    for operand in (scheme.q, scheme.k, scheme.v):
        if operand.scale != "static":
            continue
        folded = operand.role == "q" and place(scheme.k) == "q"
        obstacle = (
            "per channel"
            if operand.granularity.kind == "channel"
            else "asymmetric"
            if not operand.symmetric
            else "with a static offset"
            if operand.smooth == "static"
            else "with K's scale per channel in it"
            if folded
            else None
        )
        if obstacle:
            raise SchemeError([(operand.role, f"a static scale {obstacle} cannot come from percentiles; use observer 'amax'")])
