"""Certificates: a bound on the error of quantized attention for every query, as a sum of parts with their causes.

With t the logits of the codes, p = softmax(t), and p0, p1 the exact softmax and that with Q's rounding alone,

    exact = sum p0 v  ->  Q's rounding: sum p1 v  ->  K's: sum p v  ->  V's: sum p v~  ->  P's: sum p~ v~  ->  float32

and each arrow moves the output by at most one of the parts below.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tokquant.attention import Part, Scheme, check_operands, operands_of, quantize, ranges, scheme_of
from tokquant.autocast import no_autocast
from tokquant.bias import Bias
from tokquant.calibration.scales import LayerScales
from tokquant.evaluation.bound import float32
from tokquant.evaluation.bound.logits import Logits, logits
from tokquant.evaluation.bound.operands import Known, known
from tokquant.evaluation.bound.probabilities import rounding_of_p
from tokquant.features import Features
from tokquant.inputs import features_of
from tokquant.reference import LOG2E, matmul_kept, row_chunks
from tokquant.schemes import HeadSchemes, QuantScheme
from tokquant.schemes.placement import place
from tokquant.tensor import Coded, QuantizedTensor

NEGLIGIBLE = -100.0
"""Natural logarithm of a share of a row that is too small to change a sum in float32."""

OVERFLOW = 118 / LOG2E
"""Natural logarithm of the largest sum, in units of P's codes, that surely does not overflow float32."""

FLOAT64 = 1 + 2.0**-30
"""Factor that covers the rounding of the bound itself, computed in float64, with logits up to a million."""


@dataclass(frozen=True, eq=False)
class Bound:
    """Upper bounds on |attention - exact attention|, the largest over channels: each `[B, H_q, N_q]` float64.

    `total` is at most the sum of the parts. A row that attends to nothing has 0; infinity means that nothing is guaranteed.
    """

    total: Tensor
    q: Tensor
    """The part of rounding Q."""
    k: Tensor
    """The part of rounding K, with Q rounded."""
    p: Tensor
    """The part of rounding the probabilities, including those that round to zero."""
    v: Tensor
    """The part of rounding V."""
    rounding: Tensor
    """The part of float32 arithmetic, in any order of summation, and of rounding to the output's type."""


def error_bound(
    q: Tensor | Coded,
    k: Tensor | Coded,
    v: Tensor | Coded,
    scheme: Scheme,
    *,
    layer: str | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Bias | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scales: LayerScales | None = None,
) -> Bound:
    """Bound the error of `attention` with these arguments against exact attention of q, k and v, row by row.

    For tensors, the error of each rounding is known. For three QuantizedTensors it is not: then the bound holds for all tensors
    with these codes, scales and offsets, each value within half a step of its code, and is a few to many times as large.
    There a code at the end of its range under a static scale may stand for anything, so rows that see one have an infinite
    bound. Rows that see a NaN or an infinity always have one.

    The bound holds for every backend that sums in float32, but not for the shorter accumulators of fp8 tensor cores.

    Args: as for `attention`. It takes the time of a few float64 attentions and the memory of some rows of scores.

    Raises: as `attention`; UnsupportedError for QuantizedTensors in a symmetric precision of more than 8 bits with a scale.
    """
    found = scheme_of(scheme, layer, scales)
    coded = check_operands(q, k, v, found, scales)
    features = features_of(q, k, causal=causal, scale=scale, mask=mask, bias=bias, window=window, softcap=softcap, sinks=sinks)
    parts = coded or operands_of(found, *quantize(q, k, v, found, scales=scales, backend="reference"))  # type: ignore[arg-type]
    if not isinstance(found, HeadSchemes):
        return _bound(parts[0], features, None if coded else (q, k, v))  # type: ignore[arg-type]
    each = [
        _bound(part, features.of_heads(rows), None if coded else (q[:, rows], k[:, heads], v[:, heads]))  # type: ignore[index]
        for part, (rows, heads, _) in zip(parts, ranges(found, q, k), strict=True)  # type: ignore[arg-type]
    ]
    return Bound(**{part.name: torch.cat([getattr(x, part.name) for x in each], dim=1) for part in fields(Bound)})


def _bound(operands: Part, features: Features, tensors: tuple[Tensor, Tensor, Tensor] | None) -> Bound:
    """The bound for heads that share one scheme, from their operands and, if they are known, the original tensors."""
    q, k, v, scheme = operands
    b, heads, n_q = q.shape[:3]
    parts = {each.name: torch.empty(b, heads, n_q, dtype=torch.float64, device=q.device) for each in fields(Bound)}
    with no_autocast(q.device):
        certificate = _Certificate(q, k, v, scheme, features, known(q, k, v, tensors))
        for rows in row_chunks(n_q, b * heads * k.shape[2]):
            for name, part in certificate.rows(rows).items():
                parts[name][:, :, rows] = part
    return Bound(**parts)


class _Certificate:
    """Computes the parts of a bound for some rows at a time. A sink counts as one more key, whose value is 0."""

    def __init__(
        self, q: QuantizedTensor, k: QuantizedTensor, v: QuantizedTensor, scheme: QuantScheme, features: Features, x: Known
    ):
        self.q, self.k, self.v, self.scheme, self.features, self.x = q, k, v, scheme, features, x
        self.values, self.decoded, self.value_error, self.terms = (
            each if features.sinks is None else torch.nn.functional.pad(each, (0, 0, 0, 1))
            for each in (x.v, x.decoded_v, x.v_error, x.v_terms)
        )
        # centred, so that the variance does not cancel where values have a large mean
        self.centred = self.values - _mean(self.values)

    def rows(self, rows: slice) -> dict[str, Tensor]:
        """The parts of these queries."""
        x = self.x
        t = logits(self.q, self.k, self.scheme, self.features, x, rows)
        p = torch.softmax(t.of_codes, dim=-1)
        seen = t.attended.any(dim=2, keepdim=True).mT
        of_q, of_k, of_both = self._of_scores(t, p, seen)
        of_v = matmul_kept(p, self.value_error)
        out = matmul_kept(p, self.decoded)
        drift, lost = self._drift(t, p)
        of_p = self._of_p(t, p, drift, out, seen)
        rounding = self._of_float32(p, drift, lost, out, seen)
        rounding = rounding + float32.cast(out.abs() + of_p + rounding, self.q.dtype)
        parts = {"q": of_q, "k": of_k, "p": of_p, "v": of_v, "rounding": rounding, "total": of_both + of_p + of_v + rounding}
        nothing = ~t.attended[..., : self.k.shape[2]].any(dim=-1)
        parts = {name: FLOAT64 * part.amax(dim=-1) for name, part in parts.items()}
        # a NaN guarantees nothing
        return {name: torch.where(nothing, 0.0, part.nan_to_num(math.inf, posinf=math.inf)) for name, part in parts.items()}

    def _of_scores(self, t: Logits, p: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds on the change of the output by rounding Q, rounding K, and both together, `[B, H_q, rows, D]`.

        For weights p and p' of the same values, |sum (p' - p) v| is at most their total variation times the range of v, and, by
        Cauchy and Schwarz, sqrt(sum (p' - p)^2 / p) times the deviation of v under p.
        """
        spread = _range(self.values, seen)
        square = matmul_kept(p, self.centred.square())
        # increased by what cancellation in float64 may have lost
        square = square * (1 + 2.0**-50 * p.shape[-1]) - matmul_kept(p, self.centred).square()
        deviation = square.clamp_min(0).sqrt()
        if self.x.signed:
            exact, of_q = torch.softmax(t.exact, dim=-1), torch.softmax(t.of_q, dim=-1)
            of_q, of_k, of_both = (_moved(p, change, spread, deviation) for change in (exact - of_q, of_q - p, exact - p))
            return of_q, of_k, torch.minimum(of_both, of_q + of_k)
        error = torch.where(seen & self.value_error.isfinite(), self.value_error, 0.0)
        spread = spread + 2 * error.amax(dim=2, keepdim=True)
        deviation = deviation + matmul_kept(p, self.value_error.square()).sqrt()
        of_k, of_both = (_moved_by(p, error, spread, deviation) for error in (t.k_error, t.k_error + t.q_error))
        return (of_both - of_k).clamp_min(0), of_k, of_both

    def _drift(self, t: Logits, p: Tensor) -> tuple[Tensor, Tensor]:
        """Error of the logarithms of non-negligible weights in float32, and the share of P that underflows or overflows."""
        rank = t.of_codes if self.x.log2_weight is None else t.of_codes.clone()
        if self.x.log2_weight is not None:
            rank[..., : self.k.shape[2]] += self.x.log2_weight / LOG2E
        highest = rank.amax(dim=-1, keepdim=True)
        rank = rank - highest
        counts = (p.log() + t.drift >= NEGLIGIBLE) | (rank + t.drift >= NEGLIGIBLE)
        # the reference is an ulp above the row's maximum: for maxima below -1e9 an ulp exceeds float32's range of exponents
        lost = torch.where(rank - 2.0**-22 * highest.abs() < -120 / LOG2E, p, 0.0).sum(dim=-1, keepdim=True)
        # sums are in units of P's reference, which may follow a tile down by 2^64: if a sink overflows in them, the keys' share
        # is lost; if keys do, as is possible with V per token, the output is NaN
        n_k = self.k.shape[2]
        down = -torch.where(t.attended[..., :n_k], rank[..., :n_k], 0.0).amin(dim=-1, keepdim=True)
        floor = down.clamp(max=64 / LOG2E) if self.scheme.p.granularity.kind == "row_block" else 0.0
        unit = (rank + highest)[..., :n_k].amax(dim=-1, keepdim=True) - floor + OVERFLOW
        if self.features.sinks is not None:
            lost = torch.where(t.of_codes[..., n_k:] > unit, p[..., :n_k].sum(dim=-1, keepdim=True), lost)
        lost = torch.where(t.of_codes[..., :n_k].logsumexp(dim=-1, keepdim=True) > unit, 1.0, lost)
        return torch.where(counts, t.drift, 0.0), lost

    def _of_p(self, t: Logits, p: Tensor, drift: Tensor, out: Tensor, seen: Tensor) -> Tensor:
        """Bound on the change by rounding P, and by its rounded sum where the normalizer is quantized."""
        scheme, n_k, x = self.scheme, self.k.shape[2], self.x
        log2_p = t.of_codes[..., :n_k] * LOG2E
        if self.x.log2_weight is not None:
            log2_p = log2_p + self.x.log2_weight
        largest = drift.amax(dim=-1, keepdim=True)
        stacked = self.v.code_sum is not None
        error, unit = rounding_of_p(log2_p, drift[..., :n_k] + largest, scheme, self.v.dtype, stacked)
        total = t.of_codes.logsumexp(dim=-1, keepdim=True)
        error = error * torch.exp2(unit - total[..., None] * LOG2E) * torch.exp(2 * largest)[..., None]
        error = error.flatten(-2)[..., :n_k]
        if scheme.normalizer == "exact":
            return matmul_kept(error, x.times_p.abs())
        # sum (p + e) v / (1 + sum e) - sum p v = (sum e v - (sum e) out) / (1 + sum e), with any constant taken off v and out
        weight = x.inverse_weight
        centre = _mean(x.times_p) if weight is None else torch.zeros_like(x.v_constant)
        gained = (error if weight is None else error * weight).sum(dim=-1, keepdim=True)
        kept = 1 - gained
        if weight is None:
            # the largest probability never rounds to zero
            kept = torch.maximum(kept, 0.75 * p[..., :n_k].amax(dim=-1, keepdim=True) * torch.exp(-2 * largest))
        moved = matmul_kept(error, (x.times_p - centre).abs()) + gained * (out - x.v_constant - centre).abs()
        moved = torch.where(kept > 0, moved / kept, math.inf)
        if self.v.origin is None or place(self.v.spec) == "output":
            # the output is still a weighted mean of values
            moved = torch.minimum(moved, _range(self.decoded, seen))
        return moved

    def _of_float32(self, p: Tensor, drift: Tensor, lost: Tensor, out: Tensor, seen: Tensor) -> Tensor:
        """Bound on the error of float32 arithmetic, before the output is cast."""
        summed = matmul_kept(p, self.terms)
        largest = torch.where(seen & self.terms.isfinite(), self.terms, 0.0).amax(dim=2, keepdim=True)
        underflow = float32.SMALLEST * largest + float32.FLUSHED * self.k.shape[2]
        if self.v.frame.rotated:
            summed, largest, underflow = (each.norm(dim=-1, keepdim=True) for each in (summed, largest, underflow))
        summed = summed + self.x.v_constant.abs()
        moved = float32.moved(p, drift) + lost / (1 - lost).clamp_min(0)
        sums = float32.sums_of_products(self.scheme, self.k.shape[2]) * summed
        rounding = moved * _range(self.decoded, seen) + sums + underflow
        if self.scheme.p.granularity.kind == "row_block" and place(self.v.spec) not in ("output", "p"):
            # the accumulator of earlier tiles may be rescaled to units 2^64 times smaller
            held = largest * 2.0**65 * (self.scheme.p.format.largest or 1.0)
            rounding = torch.where(held < torch.finfo(torch.float32).max, rounding, math.inf)
        return rounding


def _moved(p: Tensor, change: Tensor, spread: Tensor, deviation: Tensor) -> Tensor:
    """The smaller of both bounds of `_of_scores`, for a known change of the weights."""
    # the sums of gains and of losses are equal, except for rounding of a change beside a weight near 1
    variation = torch.maximum(change.clamp_min(0).sum(dim=-1, keepdim=True), -change.clamp_max(0).sum(dim=-1, keepdim=True))
    # a change of a weight too small for float64 counts as unbounded; no change counts as none
    share = torch.where(change == 0, 0.0, change.square() / torch.where(p < 1e-290, 0.0, p)).sum(dim=-1, keepdim=True).sqrt()
    return _smaller(variation * spread, share, deviation)


def _moved_by(p: Tensor, error: Tensor, spread: Tensor, deviation: Tensor) -> Tensor:
    """The smaller of both bounds for logits off by up to `error`: the total variation is at most tanh of their spread / 4."""
    variation = torch.tanh(error.amax(dim=-1, keepdim=True) / 2)
    share = (p * torch.expm1(error).square()).sum(dim=-1, keepdim=True).sqrt() / (p * torch.exp(-error)).sum(
        dim=-1, keepdim=True
    )
    return _smaller(variation * spread, share, deviation)


def _smaller(by_range: Tensor, share: Tensor, deviation: Tensor) -> Tensor:
    by_deviation = torch.where(share.isfinite(), share * deviation, math.inf)
    # minimum keeps what is not a number
    return torch.minimum(by_range, torch.where(deviation.isnan(), deviation, by_deviation))


def _range(values: Tensor, seen: Tensor) -> Tensor:
    """Range of the finite values that some row attends to, `[B, H, 1, D]`; those that are not finite show in other terms."""
    counted = seen & values.isfinite()
    highest = torch.where(counted, values, -math.inf).amax(dim=2, keepdim=True)
    lowest = torch.where(counted, values, math.inf).amin(dim=2, keepdim=True)
    return (highest - lowest).clamp_min(0)


def _mean(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0).mean(dim=2, keepdim=True)
