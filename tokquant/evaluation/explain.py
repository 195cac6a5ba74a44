"""Where a scheme's error comes from: an ablation of Q, K, V and P, and the rows with the largest errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokquant.evaluation.sampling import runs
from tokquant.features import Features
from tokquant.metrics import row_errors
from tokquant.reference import row_chunks, weighted, weights
from tokquant.schemes.placement import place
from tokquant.tensor import Coded, QuantizedHeads, QuantizedTensor

ROWS = 512
"""The most queries of a sequence that the ablation runs on."""

WORST = 3
"""Worst rows that are reported."""
LARGEST = 3
"""Largest weights that are reported of each."""

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class WorstRow:
    """One query of one head whose output has a large error, and what is special about it."""

    batch: int
    head: int
    token: int
    error: float
    """sum |exact - out| of the row, relative to the mean of sum |exact| over the head's rows."""
    usual_error: float
    """The mean of `error` over the head's rows, which is the head's relative L1 error."""
    size: float
    """sum |exact| of the row, relative to its mean over the head's rows."""
    entropy: float
    """Entropy of the row's softmax weights, in bits; 2^entropy is about the number of keys it attends to."""
    usual_entropy: float
    """The mean of `entropy` over the head's rows that the ablation ran on."""
    weights: tuple[tuple[int, float], ...]
    """The largest softmax weights: (key, weight)."""
    parts: Mapping[str, float]
    """`Explanation.parts` of this row alone, in the unit of `error`."""


@dataclass(frozen=True)
class Explanation:
    """Where the error of one scheme on one layer comes from."""

    parts: Mapping[str, float]
    """Relative L1 errors. `q`, `k` and `v`: of exact attention with this operand alone quantized. `p`: of the output against
    exact attention on the codes of all three, which is P's rounding and every other rounding inside a kernel."""
    rows: int
    """Queries of each head that the ablation ran on."""
    worst: tuple[WorstRow, ...]
    """The rows with the largest errors, of all queries; empty where the output is exact."""


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: tuple[Coded, Coded, Coded],
    out: Tensor,
    exact: Tensor,
    features: Features,
) -> Explanation:
    """Explain the error of `out` `[B, H_q, N_q, D]`, attention on `codes` of q, k and v, against the oracle's `exact`."""
    b, heads, n_q = q.shape[:3]
    ablation = _ablation(q, k, v, codes, out, features)
    lost = dict.fromkeys("qkvp", 0.0)
    there, entropies, counted = 0.0, torch.zeros(heads, dtype=torch.float64, device=q.device), 0
    for rows in row_chunks(n_q, b * heads * k.shape[2], runs(n_q, ROWS)):
        parts, p = ablation.rows(rows)
        lost = {role: lost[role] + part.sum().item() for role, part in parts.items()}
        there += exact[:, :, rows].abs().sum().item()
        entropies += _entropy(p).sum(dim=(0, 2))
        counted += rows.stop - rows.start

    errors = row_errors(out, exact)
    sizes = exact.abs().sum(dim=3)
    usual_sizes = sizes.mean(dim=(0, 2)).clamp_min(TINY)
    usual_entropies = entropies / (b * counted)

    def worst(place: int) -> WorstRow:
        batch, head, token = (int(x) for x in torch.unravel_index(torch.tensor(place), errors.shape))
        parts, p = ablation.rows(slice(token, token + 1))
        row = p[batch, head, 0]
        shares, keys = row.topk(min(LARGEST, row.numel()))
        return WorstRow(
            batch=batch,
            head=head,
            token=token,
            error=errors[batch, head, token].item(),
            usual_error=errors[:, head].mean().item(),
            size=(sizes[batch, head, token] / usual_sizes[head]).item(),
            entropy=_entropy(row).item(),
            usual_entropy=usual_entropies[head].item(),
            weights=tuple(zip(keys.tolist(), shares.tolist(), strict=True)),
            parts={role: (part[batch, head, 0] / usual_sizes[head]).item() for role, part in parts.items()},
        )

    places = errors.flatten().topk(min(WORST, errors.numel())).indices.tolist()
    return Explanation(
        parts={role: each / max(there, TINY) for role, each in lost.items()},
        rows=counted,
        worst=tuple(worst(place) for place in places if errors.flatten()[place] != 0),
    )


def _ablation(
    q: Tensor, k: Tensor, v: Tensor, codes: tuple[Coded, Coded, Coded], out: Tensor, features: Features
) -> "_Ablation | _OfRanges":
    if not isinstance(codes[1], QuantizedHeads):
        return _Ablation(q, k, v, codes, out, features)  # type: ignore[arg-type]
    parts, start, shared = [], 0, q.shape[1] // k.shape[1]
    for part in zip(*(x.parts for x in codes), strict=True):  # type: ignore[union-attr]
        heads = slice(start, start + part[1].shape[1])
        of_q = slice(heads.start * shared, heads.stop * shared)
        parts.append(_Ablation(q[:, of_q], k[:, heads], v[:, heads], part, out[:, of_q], features.of_heads(of_q)))
        start = heads.stop
    return _OfRanges(parts)


class _OfRanges:
    """The ablations of ranges of heads, as if they were one."""

    def __init__(self, parts: "list[_Ablation]"):
        self.parts = parts

    def rows(self, rows: slice) -> tuple[dict[str, Tensor], Tensor]:
        """`_Ablation.rows` of each range, joined along the heads."""
        lost, p = zip(*(part.rows(rows) for part in self.parts), strict=True)
        return {role: torch.cat([each[role] for each in lost], dim=1) for role in lost[0]}, torch.cat(p, dim=1)


class _Ablation:
    """Exact attention in float64 where some operands are dequantized and the others are the originals.

    Offsets are left out of Q and K: a constant offset of K does not change the softmax, and Q's block means, which kernels
    multiply with K in 16 bits, become further channels of both.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        codes: tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor],
        out: Tensor,
        features: Features,
    ):
        self.out, self.features = out, features
        qq, kq, vq = codes
        q_codes, k_codes = _without_offset(qq), _without_offset(kq)
        q_exact = q.double() - (qq.dequantize(torch.float64) - q_codes)
        k_exact = k.double() - (kq.dequantize(torch.float64) - k_codes)
        left, right = [[q_exact], [q_codes]], [[k_exact], [k_codes]]
        if kq.companion is not None:
            means = qq.frame.offset_of_tokens(q.shape[2]).double()
            for side, more in ((left[0], means), (left[1], means), (right[0], k_exact), (right[1], kq.companion.double())):
                side.append(more)
        if qq.logit_offset is not None:
            for side in left:
                side.append(qq.logit_offset.double())
            for side in right:
                side.append(torch.ones_like(k_exact[..., :1]))
        self.q, self.q_codes = (torch.cat(side, dim=3) for side in left)
        self.k, self.k_codes = (torch.cat(side, dim=3) for side in right)
        self.v, self.v_codes = v.double(), vq.dequantize(torch.float64)

    def rows(self, rows: slice) -> tuple[dict[str, Tensor], Tensor]:
        """The L1 error `[B, H_q, rows]` that each part adds, and the exact softmax weights `[B, H_q, rows, N_k]`."""
        p = self.weights(self.q, self.k, rows)
        exact = weighted(p, self.v)
        on_codes = weighted(self.weights(self.q_codes, self.k_codes, rows), self.v_codes)
        lost = {
            "q": weighted(self.weights(self.q_codes, self.k, rows), self.v) - exact,
            "k": weighted(self.weights(self.q, self.k_codes, rows), self.v) - exact,
            "v": weighted(p, self.v_codes) - exact,
            "p": self.out[:, :, rows].double() - on_codes,
        }
        return {role: each.abs().sum(dim=3) for role, each in lost.items()}, p

    def weights(self, q: Tensor, k: Tensor, rows: slice) -> Tensor:
        return weights(q, k, self.features, rows)[0]


def _without_offset(x: QuantizedTensor) -> Tensor:
    """The dequantized values, float64, in the original frame but without its offset. K per channel is also taken without its
    zero point, which is an offset to the scores."""
    bare = place(x.spec) == "q" and x.scale is not None
    values = x.stored_values().double() * x.spread(x.scale).double() if bare else x.scaled_values(torch.float64)  # type: ignore[arg-type]
    return replace(x.frame, offset=None).undo(values)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(dim=-1) / math.log(2)
