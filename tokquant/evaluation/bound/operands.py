"""Q, K and V prepared for a certificate: float64 matrices whose products are logits and the errors of logits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokquant.evaluation.bound.half_steps import decoded, half_steps, rounding_of
from tokquant.quantize import for_query_heads
from tokquant.schemes.placement import place
from tokquant.tensor import QuantizedTensor

Product = tuple[Tensor, Tensor]
"""`[B, H_q, N_q, E]` and `[B, H_q, N_k, E]`, factors of a matrix over pairs, which is computed for some rows at a time."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """The operands of one attention: float64, with Q's heads, in the units of the original tensors."""

    logits: Product
    """Scores of the codes, before `scale`, without the contribution of K's offset, which is constant along a row."""
    q_error: Product
    """Change of the scores by rounding Q; its largest magnitude where not `signed`."""
    k_error: Product
    """Change of the scores by rounding K, with Q rounded; its largest magnitude where not `signed`."""
    signed: bool
    """Whether the tensors are known; else only their codes are."""
    lowered: Tensor | None
    """Contribution of K's offset to the scores of a row `[B, H_q, N_q, 1]`, before `scale`, as a kernel adds it back."""
    lowered_exactly: Tensor | None
    """The same from the exact queries, where they are known."""
    lowered_terms: Tensor | None
    """Bound on the magnitudes of the terms that `lowered` is summed from."""
    norms: Product
    """`[B, H_q, N_q, 1]`, `[B, H_q, N_k, 1]`: their product is at least the sum of the magnitudes of a score's terms."""
    v: Tensor
    """`[B, H_q, N_k, D]`: the tensor, or the values of its codes."""
    decoded_v: Tensor
    """The values of V's codes."""
    v_error: Tensor
    """|decoded_v - v|, or its largest value where the tensor is not known."""
    times_p: Tensor
    """The factor of P in the output, in the output's frame, by which an error of P is multiplied."""
    v_terms: Tensor
    """Magnitudes of the factors of P in a kernel's sums, in the frame that was quantized."""
    v_constant: Tensor
    """The part of V that is the same for all tokens, added to the output times the sum of P: `[B, H_q, 1, D]`."""
    log2_weight: Tensor | None
    """V per token: log2 of the weight that P is multiplied by before it is rounded, `[B, H_q, 1, N_k]`."""
    inverse_weight: Tensor | None
    """V per token: the inverse of that weight."""


def known(q: QuantizedTensor, k: QuantizedTensor, v: QuantizedTensor, tensors: tuple[Tensor, Tensor, Tensor] | None) -> Known:
    """Prepare the operands from their codes and, if they are known, the original tensors."""
    folded = place(k.spec) == "q"
    q_turned = decoded(q)
    k_turned = k.stored_values().double() if folded else decoded(k)
    k_norm = k_turned.norm(dim=-1, keepdim=True)
    if k.origin is not None and place(k.spec) == "scores":
        # codes and origins are two products
        origin = k.spread(k.origin).double()
        k_norm = (k_turned - origin).norm(dim=-1, keepdim=True) + k.shape[3] ** 0.5 * k.spread(_origin_terms(k)).double()
    means = None
    if k.companion is not None:
        means = q.frame.offset_of_tokens(q.shape[2]).double()
        k_norm = torch.hypot(k_norm, k.companion.double().norm(dim=-1, keepdim=True))
    left, right = _beside(q_turned, means), _beside(k_turned, None if k.companion is None else k.companion.double())
    q_norm = left.norm(dim=-1, keepdim=True)
    constant = _constant(k)
    lowered_exactly = q.logit_offset
    if tensors is not None:
        exact_q, exact_k = (x.double() for x in tensors[:2])
        centred = exact_k if constant is None else exact_k - constant
        plain_q = replace(q.frame, offset=None).undo(q_turned)
        k_values = k.stored_values().double() * k.spread(k.scale).double() if folded else k_turned  # type: ignore[arg-type]
        plain_k = replace(k.frame, offset=None).undo(k_values)
        q_error = (plain_q - exact_q if means is None else plain_q + means - exact_q, centred)
        lost = None if k.companion is None else k.companion.double() - centred
        # in the tensors' own frame logits minus errors are exact; rounded factors of a balance would cancel only nearly
        left, right = _beside(plain_q, means), _beside(plain_k, None if k.companion is None else k.companion.double())
        k_error = (left, _beside(plain_k - centred, lost))
        if constant is not None:
            lowered_exactly = (exact_q * for_query_heads(constant, q, k)).sum(dim=-1, keepdim=True)
    else:
        k_steps = half_steps(k) if not folded else half_steps(k) / k.spread(k.scale).double()  # type: ignore[arg-type]
        q_error = (half_steps(q), k_turned.abs() + k_steps)
        lost = None if k.companion is None else rounding_of(k.companion.double(), k.dtype)
        k_error = (_beside(q_turned.abs(), None if means is None else means.abs()), _beside(k_steps, lost))

    def of_heads(x: Tensor) -> Tensor:
        return for_query_heads(x, q, k)

    whole = v.frame.undo(decoded(v))
    times_p, v_terms, v_constant = _with_p(v)
    return Known(
        logits=(left, of_heads(right)),
        q_error=(q_error[0], of_heads(q_error[1])),
        k_error=(k_error[0], of_heads(k_error[1])),
        signed=tensors is not None,
        lowered=q.logit_offset,
        lowered_exactly=lowered_exactly,
        lowered_terms=None if q.logit_offset is None else _lowered_terms(q, q_turned, k),
        norms=(q_norm, of_heads(k_norm)),
        v=of_heads(whole if tensors is None else tensors[2].double()),
        decoded_v=of_heads(whole),
        v_error=of_heads(_in_output(half_steps(v), v) if tensors is None else (whole - tensors[2].double()).abs()),
        times_p=of_heads(times_p),
        v_terms=of_heads(v_terms),
        v_constant=of_heads(v_constant),
        log2_weight=None if v.log2_weight is None else of_heads(v.log2_weight.double()).mT,
        inverse_weight=None if v.inverse_weight is None else of_heads(v.inverse_weight.double()).mT,
    )


def _constant(k: QuantizedTensor) -> Tensor | None:
    """The vector subtracted from every key, which lowers all scores of a query alike: `[B, H_kv, 1, D]`; None without."""
    constant = None if k.offset is None else k.offset.double()
    if place(k.spec) == "q" and k.origin is not None:
        origin = replace(k.frame, offset=None).undo(k.origin.double())
        constant = origin if constant is None else constant + origin
    return constant


def _lowered_terms(q: QuantizedTensor, turned: Tensor, k: QuantizedTensor) -> Tensor:
    """Bound, by norms, on the magnitudes of the terms of `logit_offset`, from K's offset and its origin: `[B, H_q, N_q, 1]`."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        return left.norm(dim=-1, keepdim=True) * for_query_heads(right.double().norm(dim=-1, keepdim=True), turned, k)

    terms = torch.zeros_like(turned[..., :1])
    if k.offset is not None:
        terms = product(q.frame.undo(turned), k.offset)
    if place(k.spec) == "q" and k.origin is not None:
        terms = terms + product(turned / q.frame.fold.double(), _origin_terms(k))  # type: ignore[union-attr]
    return terms


def _origin_terms(x: QuantizedTensor) -> Tensor:
    """The magnitudes that an origin is summed from, and rounded by: its zero and a multiple of its step, which may cancel."""
    assert x.zero is not None and x.origin is not None
    zero = x.zero.float()
    return zero.abs() + (x.origin - zero).abs()


def _with_p(v: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """`times_p`, `v_terms` and `v_constant` of `Known`."""
    where, stored = place(v.spec), v.stored_values().double()
    origin = None if v.origin is None or where == "operand" else v.spread(v.origin).double()
    if where in ("none", "operand"):
        met = decoded(v)
    elif where == "p":
        met = stored  # P is rounded with its weight
    else:
        met = stored * v.spread(v.scale).double()  # type: ignore[arg-type]
    terms = (met if v.log2_weight is None else met * v.log2_weight.double().exp2()).abs()
    constant = torch.zeros_like(met[:, :, :1])
    if origin is not None:
        terms = terms + v.spread(_origin_terms(v)).double()
        constant = constant + origin if where == "output" else constant
    return replace(v.frame, offset=None).undo(met), terms, v.frame.undo(constant)


def _in_output(steps: Tensor, v: QuantizedTensor) -> Tensor:
    """Bounds of each channel after V's rotation is undone: butterflies with magnitudes, so sums."""
    if not v.frame.rotated:
        return steps
    order = v.shape[3] & -v.shape[3]
    return (steps.unflatten(3, (-1, order)).sum(dim=-1, keepdim=True) * order**-0.5).expand(-1, -1, -1, -1, order).flatten(3)


def _beside(x: Tensor, more: Tensor | None) -> Tensor:
    return x if more is None else torch.cat([x, more], dim=3)
