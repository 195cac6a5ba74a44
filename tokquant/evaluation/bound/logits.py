"""Natural logits of the codes and of the tensors, and the error of float32 logits, for some rows and all keys."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokquant.evaluation.bound import float32
from tokquant.evaluation.bound.operands import Known, Product
from tokquant.features import Features
from tokquant.schemes import QuantScheme
from tokquant.schemes.placement import as_bytes
from tokquant.tensor import QuantizedTensor

MASKED = -2.3e38
"""Values of an additive mask below this count as masked."""


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Logits and their errors for some rows, each `[B, H_q, rows, N_k]` float64, with one more column for a sink."""

    of_codes: Tensor
    exact: Tensor
    """Logits of the tensors; those of the codes where the tensors are not known."""
    of_q: Tensor
    """Logits of quantized queries and exact keys; those of the codes where the tensors are not known."""
    q_error: Tensor
    """Largest change by rounding Q, where the tensors are not known."""
    k_error: Tensor
    """Largest change by rounding K, where the tensors are not known."""
    drift: Tensor
    """Largest error of the logarithm of a weight in float32."""
    attended: Tensor
    """Whether the query attends to the key, bool."""


def logits(q: QuantizedTensor, k: QuantizedTensor, scheme: QuantScheme, features: Features, x: Known, rows: slice) -> Logits:
    """The logits of these rows."""
    n_q, n_k = q.shape[2], k.shape[2]
    keys = slice(0, n_k)
    scale, softcap = features.scale, features.softcap

    def product(pair: Product) -> Tensor:
        return scale * (pair[0][:, :, rows] @ pair[1].mT)

    s, of_k, of_q = product(x.logits), product(x.k_error), product(x.q_error)
    lowerings = [None if each is None else scale * each[:, :, rows].double() for each in (x.lowered, *[x.lowered_exactly] * 2)]
    lowered_terms = 0.0 if x.lowered_terms is None else abs(scale) * q.shape[3] * x.lowered_terms[:, :, rows]
    q_norm, k_norm = (each + float32.NORM for each in x.norms)
    terms = abs(scale) * (q_norm[:, :, rows] @ k_norm.mT)
    others = torch.zeros_like(s[..., :1])
    variants = [s, s - of_k, s - of_k - of_q] if x.signed else [s]
    if softcap is not None:
        variants = [each if less is None else each + less for each, less in zip(variants, lowerings, strict=False)]
        others = others + lowered_terms
        variants = [softcap * torch.tanh(each / softcap) for each in variants]
    errors = [s.new_zeros(())] * 2 if x.signed else [of_q.abs(), of_k.abs()]
    if softcap is not None:
        errors = [each.clamp(max=2 * softcap) for each in errors]

    kept = features.kept(rows, keys, n_q, n_k, s.device)
    attended = torch.ones_like(s, dtype=torch.bool) if kept is None else kept.expand_as(s)
    if features.bias is not None:
        variants = [each + features.bias.block(rows, keys, n_q, n_k, torch.float64) for each in variants]
        others = others + features.bias.terms(rows, keys, n_q, n_k)
    if features.mask is not None and features.mask.dtype != torch.bool:
        mask = features.mask[:, :, rows].double()
        attended = attended & ~(mask < MASKED)
        variants = [each + mask for each in variants]
        others = others + mask.abs()
    variants = [each.masked_fill(~attended, -math.inf) for each in variants]
    exact_scores = as_bytes(scheme, "k") and k.companion is None and k.shape[3] <= 1024
    if features.sinks is not None:
        sink = features.sinks.double()[:, None, None].expand_as(s[..., :1])
        less = [None if softcap is not None else each for each in lowerings[: len(variants)]]
        variants = [torch.cat([t, sink if c is None else sink - c], dim=-1) for t, c in zip(variants, less, strict=True)]
        errors = [torch.nn.functional.pad(each.expand_as(s), (0, 1)) for each in errors]
        attended = torch.nn.functional.pad(attended, (0, 1), value=True)
        others = torch.cat([others.expand_as(s), sink.abs() + lowered_terms], dim=-1)
        terms = torch.nn.functional.pad(terms, (0, 1))
    errors = [torch.where(attended, each, 0.0) for each in errors]
    t = variants[0]
    reach = torch.where(attended, t, 0.0).abs()
    reach = reach + t.amax(dim=-1, keepdim=True).abs()
    if x.log2_weight is not None:
        reach[..., :n_k] += x.log2_weight.abs() + x.log2_weight.abs().amax()
    columns = x.logits[0].shape[3]
    drift = float32.score_rounding(terms, others, reach, exact_scores, columns, float32.tiles(scheme, n_k))
    return Logits(
        of_codes=t,
        exact=variants[-1],
        of_q=variants[min(1, len(variants) - 1)],
        q_error=errors[0],
        k_error=errors[1],
        drift=torch.where(attended, drift, 0.0),
        attended=attended,
    )
