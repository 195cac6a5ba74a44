"""Attention two ways in torch: the float64 oracle, and the emulation of what a kernel computes, tile by tile.

The emulation multiplies integers exactly (float32 holds every sum of at most 1040 products of bytes), rounds P where a
kernel does, and keeps nothing of size N x N.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tokquant.autocast import in_their_types, joined
from tokquant.features import Features
from tokquant.schemes import QuantScheme
from tokquant.schemes.placement import place
from tokquant.tensor import QuantizedTensor, met
from tokquant.transforms import hadamard

LOG2E = math.log2(math.e)

SCORES_AT_ONCE = 2**19
"""Score elements held at a time: few enough for a cache, enough to be worth a call."""


def oracle(q: Tensor, k: Tensor, v: Tensor, features: Features, only: Sequence[slice] | None = None) -> tuple[Tensor, Tensor]:
    """Attention in float64: q `[B, H_q, N_q, D]`, k, v `[B, H_kv, N_k, D]` -> out `[B, H_q, N_q, D]`, LSE `[B, H_q, N_q]`.

    Of the queries in `only`, where it is given.
    """
    (b, heads, n_q), n_k = q.shape[:3], k.shape[2]
    k, v, parts = k.double(), v.double(), []
    for rows in row_chunks(n_q, b * heads * n_k, only):
        p, lse = weights(q, k, features, rows)
        parts.append((weighted(p, v), lse))
    return _joined(parts)


def weights(q: Tensor, k: Tensor, features: Features, rows: slice) -> tuple[Tensor, Tensor]:
    """What these queries weigh each key by, float64 `[B, H_q, rows, N_k]`, and their LSE: q `[B, H_q, N_q, D]`, float64 k
    `[B, H_kv, N_k, D]`."""
    n_q, every = q.shape[2], slice(0, k.shape[2])
    s = features.scale * _by_keys(q[:, :, rows].double(), k)
    if features.softcap is not None:
        s = features.softcap * torch.tanh(s / features.softcap)
    if features.bias is not None:
        s = s + features.bias.block(rows, every, n_q, every.stop, torch.float64)
    if features.mask is not None and features.mask.dtype != torch.bool:
        s = s + features.mask[:, :, rows].double()
    kept = features.kept(rows, every, n_q, every.stop, q.device)
    if kept is not None:
        s = s.masked_fill(~kept, -math.inf)
    lse = total = s.logsumexp(dim=-1)
    if features.sinks is not None:
        total = torch.logaddexp(total, features.sinks.double()[:, None])
    return torch.exp(s - total.masked_fill(lse == -math.inf, 0.0)[..., None]), lse


def weighted(p: Tensor, v: Tensor) -> Tensor:
    """The sums of v `[B, H_kv, N_k, D]` that p `[B, H_q, rows, N_k]` weighs: `[B, H_q, rows, D]`."""
    return matmul_kept(_grouped(p, v.shape[1]), v).reshape(*p.shape[:3], v.shape[3])


def matmul_kept(p: Tensor, v: Tensor) -> Tensor:
    """p @ v where a weight of zero takes nothing of v, be it infinite or not a number."""
    product = p @ v
    if bool(product.isfinite().all()):
        return product
    finite = v.isfinite()
    reached = (p != 0).to(v.dtype) @ (~finite).to(v.dtype) > 0
    return torch.where(reached, float("nan"), p @ torch.where(finite, v, 0.0))


def attention(
    q: QuantizedTensor,
    k: QuantizedTensor,
    v: QuantizedTensor,
    scheme: QuantScheme,
    features: Features,
    dtype: torch.dtype | None = None,
    only: Sequence[slice] | None = None,
) -> tuple[Tensor, Tensor]:
    """The emulation: out `[B, H_q, N_q, D]` in `dtype` (q's where None), LSE `[B, H_q, N_q]` float32.

    Of the queries in `only`, where it is given.
    """
    (b, heads, n_q), n_k = q.shape[:3], k.shape[2]
    parts = []
    with in_their_types(q.device):
        emulation = _Emulation(q, k, v, scheme, features)
        for rows in row_chunks(n_q, b * heads * min(n_k, scheme.key_tile), only):
            out, lse = emulation.rows(rows)
            parts.append((out.to(dtype or q.dtype), lse))
    return _joined(parts)


def row_chunks(n: int, a_row: int, only: Sequence[slice] | None = None) -> Iterator[slice]:
    """n rows, or those of `only`, in runs that hold about SCORES_AT_ONCE elements, at `a_row` elements each."""
    step = max(16, min(n, SCORES_AT_ONCE // max(a_row, 1)))
    for rows in only or [slice(0, n)]:
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outs, sums = zip(*parts, strict=True)
    return joined(outs, dim=2), joined(sums, dim=2)


class _Emulation:
    """Everything about the keys that the rows share, and the loop over key tiles for some rows.

    Values are float32 `[B, H, N, D]` as the products meet them; scales are broadcastable to what they multiply.
    """

    def __init__(self, q: QuantizedTensor, k: QuantizedTensor, v: QuantizedTensor, scheme: QuantScheme, features: Features):
        self.q, self.k, self.v, self.scheme, self.features = q, k, v, scheme, features
        self.q_values, self.k_values, self.v_values = met(q), met(k), met(v)
        self.q_scale = None
        if q.scale is not None and place(scheme.q) == "scores":
            self.q_scale = q.spread(q.scale).expand(-1, -1, q.shape[2], -1)
        self.k_scale, self.k_origin = _spread(k) if place(scheme.k) == "scores" else (None, None)
        self.v_scale, self.v_origin = _spread(v) if place(scheme.v) != "operand" else (None, None)
        # where one origin serves all tokens, what it takes of them is the normalizer's own sum
        self.v_origin_of_all = self.v_origin if place(scheme.v) == "output" else None
        self.v_origin = None if place(scheme.v) == "output" else self.v_origin
        self.folded = place(scheme.v) == "p"
        # logits in base 2 come for free where nothing has to happen to natural ones
        added = features.mask is not None and features.mask.dtype != torch.bool
        self.natural = features.softcap is not None or features.bias is not None or added
        self.p_format = scheme.p.format.of(v.dtype)
        self.largest = self.p_format.largest or 1.0

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Output and LSE of these queries."""
        scheme, features, n_k = self.scheme, self.features, self.k.shape[2]
        b, heads, n_q = self.q.shape[:3]
        shape = (b, heads, rows.stop - rows.start, 1)
        m = self.q_values.new_full(shape, -math.inf)
        r, l = torch.zeros_like(m), torch.zeros_like(m)  # noqa: E741 - the papers' name
        acc = self.q_values.new_zeros(*shape[:3], self.v_values.shape[3])
        zeros = torch.zeros_like(l) if self.v_origin is None else torch.zeros_like(acc)
        for keys in features.spans(rows, n_q, n_k, scheme.key_tile):
            t = self.logits(rows, keys)
            weight = None if not self.folded else self._of_keys(self.v.log2_weight, keys)  # [B, H, 1, keys]
            if weight is not None:
                t = t + weight
            kept = features.kept(rows, keys, n_q, n_k, t.device)
            if kept is not None:
                t = t.masked_fill(~kept, -math.inf)

            largest = t.amax(dim=-1, keepdim=True)
            m = torch.maximum(m, largest)
            reference = m if scheme.p.granularity.kind == "unit" else torch.maximum(largest, m - 64)
            # up by an ulp, so that no rounding gives a code beyond the largest; a tile with nothing in it moves nothing
            reference = torch.where(largest == -math.inf, r, reference + reference.abs() * 2**-23)
            # r falls by at most 64; the bound matters only while there is nothing to rescale
            alpha = torch.exp2((r - reference).clamp(max=65))
            r = reference
            p = torch.exp2(t - r + math.log2(self.largest))
            # in units of its codes, rounded as P's precision does
            codes = self.p_format.decode(self.p_format.encode(p))

            # integer codes cannot hold NaN, p - p can
            counted = p if scheme.normalizer == "exact" else codes + (p - p)
            if weight is not None:
                inverse = self._of_keys(self.v.inverse_weight, keys)
                p, counted = p * inverse, counted * inverse
            l = l * alpha + counted.sum(dim=-1, keepdim=True)  # noqa: E741
            product = self._by_values(codes, keys)
            if place(scheme.v) == "tile":
                scale = self.v_scale.expand(-1, -1, n_k, -1)[:, :, keys.start : keys.start + 1]  # type: ignore[union-attr]
                product = torch.where(largest == -math.inf, 0.0, product * self._for_heads(scale))
            acc = acc * alpha + product
            if self.v_origin is not None:
                zero = self.v_origin.expand(-1, -1, n_k, -1)[:, :, keys]
                zeros = zeros * alpha + matmul_kept(p, self._for_heads(zero))
        return self.finish(rows, acc, zeros, r, l)

    def logits(self, rows: slice, keys: slice) -> Tensor:
        """Base-2 logits `[B, H_q, rows, keys]` before any selection."""
        features = self.features
        s = _by_keys(self.q_values[:, :, rows], self.k_values[:, :, keys])
        if self.k_scale is not None:
            s = s * self._of_keys(self.k_scale, keys)
        if self.k_origin is not None:
            assert self.q.code_sum is not None
            s = s + self.q.code_sum[:, :, rows] * self._of_keys(self.k_origin, keys)
        factor = features.scale * (1.0 if self.natural else LOG2E)
        s = s * (factor if self.q_scale is None else self.q_scale[:, :, rows] * factor)
        if self.k.companion is not None:
            means = self.q.frame.offset_of_tokens(self.q.shape[2])[:, :, rows]
            s = s + _by_keys(means, self.k.companion[:, :, keys].float()) * factor
        if features.softcap is not None:
            if self.q.logit_offset is not None:
                s = s + self.q.logit_offset[:, :, rows] * features.scale
            s = features.softcap * torch.tanh(s / features.softcap)
        if features.bias is not None:
            s = s + features.bias.block(rows, keys, self.q.shape[2], self.k.shape[2], torch.float32)
        if self.natural:
            if features.mask is not None and features.mask.dtype != torch.bool:
                s = s + features.mask[:, :, rows, keys].float()
            s = s * LOG2E
        return s

    def finish(self, rows: slice, acc: Tensor, zeros: Tensor, r: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        """Accumulators -> output and natural LSE."""
        features, largest = self.features, self.largest
        lse = (r + l.log2() - math.log2(largest)) / LOG2E
        lowered = torch.zeros_like(l)
        if self.q.logit_offset is not None and features.softcap is None:
            lowered = torch.where(l == 0, 0.0, self.q.logit_offset[:, :, rows] * features.scale)
        total = l
        if features.sinks is not None:
            sink = features.sinks.float()[:, None, None] - lowered
            total = l + torch.exp2(sink * LOG2E - r + math.log2(largest))
        out = acc / total
        if place(self.scheme.v) == "output":
            out = out * self._for_heads(self.v_scale)  # type: ignore[arg-type]
        out = out + zeros / total
        if self.v_origin_of_all is not None:
            out = out + self._for_heads(self.v_origin_of_all) * (l / total)
        if self.v.frame.rotated:
            out = hadamard(out)
        if self.v.offset is not None:
            out = out + self._for_heads(self.v.offset.float()) * (l / total)
        return torch.where(l == 0, 0.0, out), (lse + lowered).squeeze(-1)

    def _by_values(self, p: Tensor, keys: slice) -> Tensor:
        v = self.v_values[:, :, keys]
        # float32 holds every sum of 256 products of unsigned bytes
        exact = torch.float32 if v.shape[2] <= 256 else torch.float64
        product = matmul_kept(_grouped(p, v.shape[1]).to(exact), v.to(exact))
        return product.float().reshape(*p.shape[:3], v.shape[3])

    def _of_keys(self, x: Tensor | None, keys: slice) -> Tensor:
        """`[B | 1, H_kv | 1, N | 1, 1] -> [B, H_q, 1, keys]`."""
        assert x is not None
        x = x.expand(self.k.shape[0], self.k.shape[1], self.k.shape[2], 1)[:, :, keys]
        return self._for_heads(x).mT

    def _for_heads(self, x: Tensor) -> Tensor:
        """What belongs to a head of K and V, for each head of Q that shares it."""
        return x if x.shape[1] == 1 else x.repeat_interleave(self.q.shape[1] // x.shape[1], dim=1)


def _by_keys(q: Tensor, k: Tensor) -> Tensor:
    # the queries that share a head of K as rows of one product: [B, H_kv, G * rows, D] @ [B, H_kv, D, keys]
    return (_grouped(q, k.shape[1]) @ k.mT).reshape(*q.shape[:3], k.shape[2])


def _grouped(x: Tensor, heads: int) -> Tensor:
    """`[B, H_q, N, D] -> [B, heads, H_q / heads * N, D]`."""
    return x.reshape(x.shape[0], heads, -1, x.shape[3])


def _spread(x: QuantizedTensor) -> tuple[Tensor | None, Tensor | None]:
    """Scale and origin, broadcastable to the operand's shape."""
    return tuple(None if each is None else x.spread(each) for each in (x.scale, x.origin))  # type: ignore[return-value]
