"""Two implementations of attention in torch: a float64 oracle, and an emulation of what a kernel computes, tile by tile.

The emulation multiplies integers exactly (float32 holds every sum of at most 1040 products of bytes), rounds P where a
kernel does, and keeps nothing of size N x N.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tokquant.autocast import joined, no_autocast
from tokquant.features import Features
from tokquant.schemes import QuantScheme
from tokquant.schemes.placement import place
from tokquant.tensor import QuantizedTensor, product_values
from tokquant.transforms import hadamard

LOG2E = math.log2(math.e)

SCORES_AT_ONCE = 2**19
"""Score elements held at a time: few enough for a cache, enough to be worth a call."""


def oracle(q: Tensor, k: Tensor, v: Tensor, features: Features, only: Sequence[slice] | None = None) -> tuple[Tensor, Tensor]:
    """Attention in float64: q `[B, H_q, N_q, D]`, k, v `[B, H_kv, N_k, D]` -> out `[B, H_q, N_q, D]`, LSE `[B, H_q, N_q]`.

    If `only` is given, for the queries in these slices alone.
    """
    (b, heads, n_q), n_k = q.shape[:3], k.shape[2]
    k, v, parts = k.double(), v.double(), []
    for rows in row_chunks(n_q, b * heads * n_k, only):
        p, lse = weights(q, k, features, rows)
        parts.append((weighted(p, v), lse))
    return _joined(parts)


def weights(q: Tensor, k: Tensor, features: Features, rows: slice) -> tuple[Tensor, Tensor]:
    """Softmax weights of these queries over all keys, float64 `[B, H_q, rows, N_k]`, and their LSE.

    Takes q `[B, H_q, N_q, D]` and float64 k `[B, H_kv, N_k, D]`.
    """
    n_q, every = q.shape[2], slice(0, k.shape[2])
    s = features.scale * _times_k(q[:, :, rows].double(), k)
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
    """P V for weights p `[B, H_q, rows, N_k]` and v `[B, H_kv, N_k, D]`: `[B, H_q, rows, D]`."""
    return matmul_kept(_grouped(p, v.shape[1]), v).reshape(*p.shape[:3], v.shape[3])


def matmul_kept(p: Tensor, v: Tensor) -> Tensor:
    """p @ v, where a weight of zero ignores an infinity or NaN in v."""
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

    If `only` is given, for the queries in these slices alone.
    """
    (b, heads, n_q), n_k = q.shape[:3], k.shape[2]
    parts = []
    with no_autocast(q.device):
        emulation = _Emulation(q, k, v, scheme, features)
        for rows in row_chunks(n_q, b * heads * min(n_k, scheme.key_tile), only):
            out, lse = emulation.rows(rows)
            parts.append((out.to(dtype or q.dtype), lse))
    return _joined(parts)


def row_chunks(n: int, a_row: int, only: Sequence[slice] | None = None) -> Iterator[slice]:
    """Split n rows, or the slices in `only`, into chunks of about SCORES_AT_ONCE elements, with `a_row` elements in a row."""
    step = max(16, min(n, SCORES_AT_ONCE // max(a_row, 1)))
    for rows in only or [slice(0, n)]:
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outs, sums = zip(*parts, strict=True)
    return joined(outs, dim=2), joined(sums, dim=2)


class _Emulation:
    """Holds what all rows share, and runs the loop over key tiles for a chunk of rows.

    `q_values`, `k_values` and `v_values` are float32 `[B, H, N, D]`, as they enter the products. Scales broadcast to what they
    multiply.
    """

    def __init__(self, q: QuantizedTensor, k: QuantizedTensor, v: QuantizedTensor, scheme: QuantScheme, features: Features):
        self.q, self.k, self.v, self.scheme, self.features = q, k, v, scheme, features
        self.q_values, self.k_values, self.v_values = product_values(q), product_values(k), product_values(v)
        self.q_scale = None
        if q.scale is not None and place(scheme.q) == "scores":
            self.q_scale = q.spread(q.scale).expand(-1, -1, q.shape[2], -1)
        self.k_scale, self.k_origin = _spread(k) if place(scheme.k) == "scores" else (None, None)
        self.v_scale, self.v_origin = _spread(v) if place(scheme.v) != "operand" else (None, None)
        # an origin that all tokens share is multiplied with the sum of P, which the normalizer has
        self.shared_v_origin = self.v_origin if place(scheme.v) == "output" else None
        self.v_origin = None if place(scheme.v) == "output" else self.v_origin
        self.p_weighted = place(scheme.v) == "p"
        # without softcap, bias or additive mask, log2(e) is part of the scale and logits are in base 2 at no cost
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
            weight = None if not self.p_weighted else self._over_keys(self.v.log2_weight, keys)  # [B, H, 1, keys]
            if weight is not None:
                t = t + weight
            kept = features.kept(rows, keys, n_q, n_k, t.device)
            if kept is not None:
                t = t.masked_fill(~kept, -math.inf)

            largest = t.amax(dim=-1, keepdim=True)
            m = torch.maximum(m, largest)
            reference = m if scheme.p.granularity.kind == "unit" else torch.maximum(largest, m - 64)
            # up by an ulp, so that rounding never gives a code above the largest; a fully masked tile leaves the reference
            reference = torch.where(largest == -math.inf, r, reference + reference.abs() * 2**-23)
            # r falls by at most 64, so the clamp acts only while l and acc are still zero
            alpha = torch.exp2((r - reference).clamp(max=65))
            r = reference
            p = torch.exp2(t - r + math.log2(self.largest))
            # p is in units of its codes; round it as P's precision does
            codes = self.p_format.decode(self.p_format.encode(p))

            # integer codes cannot hold NaN, so p - p adds it
            counted = p if scheme.normalizer == "exact" else codes + (p - p)
            if weight is not None:
                inverse = self._over_keys(self.v.inverse_weight, keys)
                p, counted = p * inverse, counted * inverse
            l = l * alpha + counted.sum(dim=-1, keepdim=True)  # noqa: E741
            product = self._times_v(codes, keys)
            if place(scheme.v) == "tile":
                scale = self.v_scale.expand(-1, -1, n_k, -1)[:, :, keys.start : keys.start + 1]  # type: ignore[union-attr]
                product = torch.where(largest == -math.inf, 0.0, product * self._for_heads(scale))
            acc = acc * alpha + product
            if self.v_origin is not None:
                zero = self.v_origin.expand(-1, -1, n_k, -1)[:, :, keys]
                zeros = zeros * alpha + matmul_kept(p, self._for_heads(zero))
        return self.finish(rows, acc, zeros, r, l)

    def logits(self, rows: slice, keys: slice) -> Tensor:
        """Base-2 logits `[B, H_q, rows, keys]`, before pairs are masked out."""
        features = self.features
        s = _times_k(self.q_values[:, :, rows], self.k_values[:, :, keys])
        if self.k_scale is not None:
            s = s * self._over_keys(self.k_scale, keys)
        if self.k_origin is not None:
            assert self.q.code_sum is not None
            s = s + self.q.code_sum[:, :, rows] * self._over_keys(self.k_origin, keys)
        factor = features.scale * (1.0 if self.natural else LOG2E)
        s = s * (factor if self.q_scale is None else self.q_scale[:, :, rows] * factor)
        if self.k.companion is not None:
            means = self.q.frame.offset_of_tokens(self.q.shape[2])[:, :, rows]
            s = s + _times_k(means, self.k.companion[:, :, keys].float()) * factor
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
        """Output and natural LSE from the accumulators."""
        features, largest = self.features, self.largest
        lse = (r + l.log2() - math.log2(largest)) / LOG2E
        lse_shift = torch.zeros_like(l)
        if self.q.logit_offset is not None and features.softcap is None:
            lse_shift = torch.where(l == 0, 0.0, self.q.logit_offset[:, :, rows] * features.scale)
        total = l
        if features.sinks is not None:
            sink = features.sinks.float()[:, None, None] - lse_shift
            total = l + torch.exp2(sink * LOG2E - r + math.log2(largest))
        out = acc / total
        if place(self.scheme.v) == "output":
            out = out * self._for_heads(self.v_scale)  # type: ignore[arg-type]
        out = out + zeros / total
        if self.shared_v_origin is not None:
            out = out + self._for_heads(self.shared_v_origin) * (l / total)
        if self.v.frame.rotated:
            out = hadamard(out)
        if self.v.offset is not None:
            out = out + self._for_heads(self.v.offset.float()) * (l / total)
        return torch.where(l == 0, 0.0, out), (lse + lse_shift).squeeze(-1)

    def _times_v(self, p: Tensor, keys: slice) -> Tensor:
        v = self.v_values[:, :, keys]
        # float32 holds every sum of 256 products of unsigned bytes
        exact = torch.float32 if v.shape[2] <= 256 else torch.float64
        product = matmul_kept(_grouped(p, v.shape[1]).to(exact), v.to(exact))
        return product.float().reshape(*p.shape[:3], v.shape[3])

    def _over_keys(self, x: Tensor | None, keys: slice) -> Tensor:
        """`[B | 1, H_kv | 1, N | 1, 1] -> [B, H_q, 1, keys]`."""
        assert x is not None
        x = x.expand(self.k.shape[0], self.k.shape[1], self.k.shape[2], 1)[:, :, keys]
        return self._for_heads(x).mT

    def _for_heads(self, x: Tensor) -> Tensor:
        """Repeat each head of K and V for the heads of Q that share it."""
        return x if x.shape[1] == 1 else x.repeat_interleave(self.q.shape[1] // x.shape[1], dim=1)


def _times_k(q: Tensor, k: Tensor) -> Tensor:
    # queries of heads that share a head of K are rows of one product: [B, H_kv, G * rows, D] @ [B, H_kv, D, keys]
    return (_grouped(q, k.shape[1]) @ k.mT).reshape(*q.shape[:3], k.shape[2])


def _grouped(x: Tensor, heads: int) -> Tensor:
    """`[B, H_q, N, D] -> [B, heads, H_q / heads * N, D]`."""
    return x.reshape(x.shape[0], heads, -1, x.shape[3])


def _spread(x: QuantizedTensor) -> tuple[Tensor | None, Tensor | None]:
    """Scale and origin, broadcastable to the operand's shape."""
    return tuple(None if part is None else x.spread(part) for part in (x.scale, x.origin))  # type: ignore[return-value]
