"""The definition of quantization, in torch: what every kernel that quantizes must equal code for code."""

from dataclasses import replace

import torch
from torch import Tensor

from tokquant.calibration.scales import LayerScales
from tokquant.errors import SchemeError
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.balance import ChannelBalance, RopePairBalance
from tokquant.schemes.placement import needs_code_sums, needs_query_sums, place
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import QuantizedTensor, met, spread
from tokquant.transforms import (
    Frame,
    channel_factors,
    key_maxima,
    mean_over_blocks,
    mean_over_tokens,
    pair_norms,
    query_maxima,
    rope_pair_factors,
)


def frames(
    q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> tuple[Frame, Frame, Frame]:
    """What is done to `[B, H, N, D]` tensors before their codes are taken. K's scale per channel is not in Q's frame yet."""
    rotated = scheme.rotate == "hadamard"
    k_frame = Frame(offset=_offset(k, scheme.k, scales), rotated=rotated)
    if scheme.balance != "none":
        k_frame = replace(k_frame, balance=_balance(q, k_frame, k, scheme.balance, scales))
    q_frame = frame_of_queries(q, k, k_frame)
    if scheme.q.smooth == "block_mean":
        q_frame = replace(q_frame, offset=mean_over_blocks(q))
    return q_frame, k_frame, Frame(offset=_offset(v, scheme.v, scales), rotated=scheme.rotate_v == "hadamard")


def frame_of_queries(q: Tensor, k: Tensor | QuantizedTensor, frame: Frame) -> Frame:
    """What Q takes so that its products with K, which is in `frame`, stay what they were."""
    balance = None if frame.balance is None else for_query_heads(1 / frame.balance, q, k)
    return Frame(balance=balance, rotated=frame.rotated)


def quantize_operands(
    q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]:
    """Codes of q `[B, H_q, N_q, D]`, k and v `[B, H_kv, N_k, D]`, in the canonical layout.

    Raises ValueError where a scale does not fit its `scale_dtype`, SchemeError where a granularity does not fit the shape.
    """
    q_frame, k_frame, v_frame = frames(q, k, v, scheme, scales)
    kq = keys(k, k_frame, scheme, scales)
    qq = queries(q, q_frame, kq, scheme, scales)
    vq = values(v, v_frame, scheme, scales)
    return replace(qq, scheme=scheme), replace(kq, scheme=scheme), replace(vq, scheme=scheme)


def keys(k: Tensor, frame: Frame, scheme: QuantScheme, scales: LayerScales | None = None) -> QuantizedTensor:
    """K in codes, with its companion where Q loses block means."""
    kq = in_frame(k, frame, scheme.k, scales)
    return replace(kq, companion=less_offset(k, frame) if scheme.q.smooth == "block_mean" else None)


def queries(
    q: Tensor, frame: Frame, k: QuantizedTensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> QuantizedTensor:
    """Q in codes, with what its logits lack of those of K `k`, and the sum of its codes where K has zeros."""
    turned, offset, origin = of_keys(q, frame, k)
    logit_offset = None if offset is None else (q.float() * offset.float()).sum(dim=-1, keepdim=True)
    if origin is not None:
        of_origin = (frame.apply(q) * origin).sum(dim=-1, keepdim=True)
        logit_offset = of_origin if logit_offset is None else logit_offset + of_origin
    qq = replace(in_frame(q, turned, scheme.q, scales), logit_offset=logit_offset)
    # S = s_q (c_q . (c_k s_k + origin_k)) takes the sum of Q's values as the product meets them
    return replace(qq, code_sum=met(qq).sum(dim=-1, keepdim=True)) if needs_query_sums(scheme) else qq


def of_keys(q: Tensor, frame: Frame, k: QuantizedTensor) -> tuple[Frame, Tensor | None, Tensor | None]:
    """What Q takes over from K, for each of its heads: its frame with K's scale per channel in it, and what its logits lack the
    products with, `[B, H_q, 1, D]`: K's offset, and what K's codes of 0 stand for where channels have zeros."""
    offset = None if k.offset is None else for_query_heads(k.offset, q, k)
    if place(k.spec) != "q":
        return frame, offset, None
    assert k.scale is not None
    origin = None if k.origin is None else for_query_heads(k.origin, q, k)
    return replace(frame, fold=for_query_heads(k.scale.float(), q, k)), offset, origin


def values(v: Tensor, frame: Frame, scheme: QuantScheme, scales: LayerScales | None = None) -> QuantizedTensor:
    """V in codes, with what `with_sums` adds."""
    return with_sums(in_frame(v, frame, scheme.v, scales), scheme)


def with_sums(vq: QuantizedTensor, scheme: QuantScheme) -> QuantizedTensor:
    """V's codes with their sums in each key tile where P is unsigned, and P's weights where V is scaled per token."""
    code_sum = tile_sums(vq.stored_values(), scheme.key_tile) if needs_code_sums(scheme) else None
    if place(scheme.v) == "p":
        assert vq.scale is not None
        # a token that is not a number has codes of zero too, and its scale to say so
        weightless = (vq.code_values() == 0).all(dim=-1, keepdim=True) & vq.scale.float().isfinite()
        return replace(vq, code_sum=code_sum, log2_weight=log2_weight(vq.scale, weightless))
    return replace(vq, code_sum=code_sum)


def in_frame(x: Tensor, frame: Frame, spec: Operand, scales: LayerScales | None = None) -> QuantizedTensor:
    """Codes of `x` `[B, H, N, D]` alone, taken in this frame."""
    # floats that nothing is done to stay the tensor that they are in
    untouched = not spec.scaled and not frame.turns
    return replace(encode(x if untouched else frame.apply(x), x.dtype, spec, scales), frame=frame)


def encode(x: Tensor, dtype: torch.dtype, spec: Operand, scales: LayerScales | None = None) -> QuantizedTensor:
    """Codes of float32 `x` `[B, H, N, D]`, which was of type `dtype`, by the rule below; floats without a scale are cast.

    symmetric   s = max |x| / R, code = clamp(round_half_even(x / s), -R, R); a group of zeros has s = 1
    asymmetric  z = min x, s = (max x - z) / (2^bits - 1),
                code = clamp(round_half_even((x - z) / s), 0, 2^bits - 1) - 2^(bits - 1)

    s and z are rounded to `scale_dtype` before they are used, and s is at least its smallest normal number.
    """
    precision = spec.format
    if not spec.scaled:
        codes = _as_float(x, dtype, spec)
        return QuantizedTensor(codes=codes, scale=None, spec=spec, shape=x.shape, dtype=dtype)
    check_groups(spec, x.shape[3])
    n, d = x.shape[2:]
    if spec.scale == "static":
        assert scales is not None
        scale, zero = scales.scale(spec, x), scales.zero(spec, x)
    else:
        scale, zero = scale_of(x, spec)
    s = spread(scale, spec.granularity, n, d).float()
    z = None if zero is None else spread(zero, spec.granularity, n, d).float()
    codes = precision.pack(codes_of(x, s, z, spec))
    return QuantizedTensor(codes=codes, scale=scale, zero=zero, spec=spec, shape=x.shape, dtype=dtype)


def codes_of(x: Tensor, scale: Tensor, zero: Tensor | None, spec: Operand) -> Tensor:
    """Codes of float32 values, one an element, by scales and zeros that broadcast to them, float32."""
    precision = spec.format
    if zero is None:
        assert precision.largest is not None
        return precision.encode((x / scale).clamp(-precision.largest, precision.largest))
    return precision.encode(((x - zero) / scale).round().clamp(0, precision.levels) - 2 ** (precision.bits - 1))


def check_groups(spec: Operand, head_dim: int) -> None:
    """Raise SchemeError where the operand's granularity does not fit head_dim."""
    try:
        spec.granularity.cover(1, head_dim)
    except SchemeError as error:
        raise SchemeError([(f"{spec.role}.granularity", str(error))]) from None


def scale_of(x: Tensor, spec: Operand) -> tuple[Tensor, Tensor | None]:
    """The dynamic scales and zeros of `x`, in `scale_dtype`."""
    if spec.symmetric:
        largest = reduce_groups(x.abs(), spec, torch.amax)
        return symmetric_scale(largest, spec), None
    return asymmetric_scale(reduce_groups(x, spec, torch.amin), reduce_groups(x, spec, torch.amax), spec)


def symmetric_scale(largest: Tensor, spec: Operand) -> Tensor:
    """max |x| of each group -> its scale."""
    return _rounded(torch.where(largest == 0, 1.0, _divided(largest, spec.format.largest)), spec)


def asymmetric_scale(lowest: Tensor, highest: Tensor, spec: Operand) -> tuple[Tensor, Tensor]:
    """min and max of each group -> its scale and zero."""
    kind = SCALE_TYPES[spec.scale_dtype]
    # some casts saturate: what the type cannot hold is not a number
    zero = torch.where(lowest.abs() > torch.finfo(kind).max, float("nan"), lowest).to(kind)
    _check_holds(zero, lowest, spec, "zero")
    span = highest - zero.float()
    if bool((span.isinf() & highest.isfinite()).any()):
        raise ValueError(f"{spec.role}: values from {lowest.min():.4g} to {highest.max():.4g} span more than float32 holds")
    step = _divided(span, spec.format.levels)
    # a group of one value, or a zero rounded past the maximum, takes the smallest scale: its codes then weigh nothing
    return _rounded(torch.where(step < 0, 0.0, step), spec), zero


def _divided(x: Tensor, divisor: float | None) -> Tensor:
    assert divisor is not None
    # by a tensor: on a GPU torch multiplies by the reciprocal of a Python number, which rounds twice. One that is filled
    # there: to copy a number waits for the GPU, and ends the capture of a CUDA graph
    return x / x.new_full((), divisor)


def reduce_groups(x: Tensor, spec: Operand, reduce) -> Tensor:
    """`torch.amax` or `torch.amin` of `[B, H, N, D]` over what each scale covers."""
    if spec.granularity.kind == "tensor":
        return reduce(x).reshape(1, 1, 1, 1)
    n, d = x.shape[2:]
    tokens, channels = spec.granularity.cover(n, d)
    if (missing := -n % tokens) and tokens < n:
        # the last token again: it changes neither minimum nor maximum
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
    tokens = min(tokens, x.shape[2])
    return reduce(x.unflatten(3, (-1, channels)).unflatten(2, (-1, tokens)), dim=(3, 5))


def _rounded(scale: Tensor, spec: Operand) -> Tensor:
    kind = SCALE_TYPES[spec.scale_dtype]
    smallest = torch.finfo(kind).smallest_normal
    stored = scale.to(kind).float()
    if kind == torch.float8_e4m3fn:
        # the cast saturates or not depending on torch's version; past the largest there is no scale
        stored = torch.where(scale > torch.finfo(kind).max, float("nan"), scale.clamp(max=448).to(kind).float())
        if spec.format.kind == "int" and spec.format.bits == 8:
            # a scale rounded down by up to 1/16 would clip eight of the 127 levels: take the next one up
            above = (stored.to(kind).view(torch.uint8) + 1).view(kind).float()
            stored = torch.where(stored < scale, above, stored)
    _check_holds(stored, scale, spec, "scale")
    return stored.clamp_min(smallest).to(kind)


def _check_holds(stored: Tensor, exact: Tensor, spec: Operand, what: str) -> None:
    if spec.scale_dtype == "fp32":
        return  # which is what the exact one is in; and a GPU need not be waited for
    lost = exact.isfinite() & ~stored.float().isfinite()
    if lost.any():
        raise ValueError(
            f"{spec.role}: a {what} of {exact[lost].abs().max():.4g} does not fit scale_dtype {spec.scale_dtype} "
            f"(at most {torch.finfo(SCALE_TYPES[spec.scale_dtype]).max:g}); use scale_dtype: fp32"
        )


def _as_float(x: Tensor, dtype: torch.dtype, spec: Operand) -> Tensor:
    """`x` in the 16-bit type that the caller's tensor already has; a float32 tensor takes the one its precision names."""
    stored = spec.format.of(dtype).encode(x)
    if stored is not x and stored.dtype == torch.float16 and bool((stored.isinf() & x.isfinite()).any()):
        raise ValueError(
            f"{spec.role}: a value of {x[x.isfinite()].abs().max():.4g} does not fit fp16; use "
            + ("bfloat16 tensors, or leave out balance and rotate" if dtype == stored.dtype else "precision: bf16")
        )
    return stored


def _offset(x: Tensor, spec: Operand, scales: LayerScales | None) -> Tensor | None:
    if spec.smooth == "mean":
        return mean_over_tokens(x)
    if spec.smooth == "static":
        assert scales is not None
        return scales.offset(spec, x)
    return None


def _balance(q: Tensor, frame: Frame, k: Tensor, rule: ChannelBalance | RopePairBalance, scales: LayerScales | None) -> Tensor:
    """The factors of K, made of K less its offset."""
    if rule.scale == "static":
        assert scales is not None
        return scales.balance(k)
    check_balance(rule, k.shape[3])
    centred = k if frame.offset is None else Frame(offset=frame.offset).apply(k)
    if isinstance(rule, ChannelBalance):
        return channel_factors(query_maxima(q, k.shape[1]), key_maxima(centred), rule.alpha)
    return rope_pair_factors(pair_norms(centred), key_maxima(centred), rule.alpha, rule.beta, rule.top_k)


def check_balance(rule: ChannelBalance | RopePairBalance, head_dim: int) -> None:
    """Raise SchemeError where pairs, or `top_k` channels, do not fit a head."""
    if isinstance(rule, RopePairBalance):
        if head_dim % 2:
            raise SchemeError([("balance", f"rope_pairs needs an even head_dim, not {head_dim}")])
        if rule.top_k > head_dim:
            raise SchemeError([("balance.rope_pairs.top_k", f"{rule.top_k} is more than the {head_dim} channels of a head")])


def for_query_heads(x: Tensor, q: Tensor | QuantizedTensor, k: Tensor | QuantizedTensor) -> Tensor:
    """`[B, H_kv, 1, D] -> [B, H_q, 1, D]`: what belongs to a head of K, for each head of Q that shares it."""
    shared = q.shape[1] // k.shape[1]
    return x if shared == 1 else x.repeat_interleave(shared, dim=1)


def less_offset(k: Tensor, frame: Frame) -> Tensor:
    """K as block means of Q meet it: less its offset, in its own type."""
    return (k if frame.offset is None else k - frame.offset).to(k.dtype).contiguous()


def log2_weight(scale: Tensor, weightless: Tensor) -> Tensor:
    """log2 of what P is multiplied by, for V per token, from its scale and whether that is of zeros alone `[B, H, N, 1]`."""
    # small beside scales, and large enough that the normalizer, which takes it out again, holds it times 2^64
    return scale.float().log2().masked_fill_(weightless, -32.0)


def tile_sums(values: Tensor, tile: int) -> Tensor:
    """`[B, H, N, D] -> [B, H, ceil(N / tile), D]` int32: the sum of V's codes in each key tile."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[2] % tile))
    return padded.unflatten(2, (-1, tile)).sum(dim=3).to(torch.int32)
