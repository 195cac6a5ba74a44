"""The definition of quantization, in torch. Every quantization kernel must give the same codes."""

from dataclasses import replace

import torch
from torch import Tensor

from tokquant.calibration.scales import LayerScales
from tokquant.errors import SchemeError
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.balance import ChannelBalance, RopePairBalance
from tokquant.schemes.placement import needs_code_sums, needs_query_sums, place
from tokquant.schemes.scheme import SCALE_TYPES
from tokquant.tensor import QuantizedTensor, product_values, spread
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
    """The frames of Q, K and V: the transforms before quantization. Q's frame does not yet hold K's scale per channel."""
    rotated = scheme.rotate == "hadamard"
    k_frame = Frame(offset=_offset(k, scheme.k, scales), rotated=rotated)
    if scheme.balance != "none":
        k_frame = replace(k_frame, balance=_balance(q, k_frame, k, scheme.balance, scales))
    q_frame = frame_of_queries(q, k, k_frame)
    if scheme.q.smooth == "block_mean":
        q_frame = replace(q_frame, offset=mean_over_blocks(q))
    return q_frame, k_frame, Frame(offset=_offset(v, scheme.v, scales), rotated=scheme.rotate_v == "hadamard")


def frame_of_queries(q: Tensor, k: Tensor | QuantizedTensor, frame: Frame) -> Frame:
    """Q's frame for K in `frame`: the balance and rotation that keep Q K^T unchanged."""
    balance = None if frame.balance is None else for_query_heads(1 / frame.balance, q, k)
    return Frame(balance=balance, rotated=frame.rotated)


def quantize_operands(
    q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]:
    """Quantize q `[B, H_q, N_q, D]`, k and v `[B, H_kv, N_k, D]`, into the canonical layout.

    Raises ValueError where a scale does not fit its `scale_dtype`, SchemeError where a granularity does not fit the shape.
    """
    q_frame, k_frame, v_frame = frames(q, k, v, scheme, scales)
    kq = keys(k, k_frame, scheme, scales)
    qq = queries(q, q_frame, kq, scheme, scales)
    vq = values(v, v_frame, scheme, scales)
    return replace(qq, scheme=scheme), replace(kq, scheme=scheme), replace(vq, scheme=scheme)


def keys(k: Tensor, frame: Frame, scheme: QuantScheme, scales: LayerScales | None = None) -> QuantizedTensor:
    """K quantized, with its companion if block means are subtracted from Q."""
    kq = in_frame(k, frame, scheme.k, scales)
    return replace(kq, companion=without_offset(k, frame) if scheme.q.smooth == "block_mean" else None)


def queries(
    q: Tensor, frame: Frame, k: QuantizedTensor, scheme: QuantScheme, scales: LayerScales | None = None
) -> QuantizedTensor:
    """Q quantized for the quantized K `k`, with the `logit_offset` that K needs, and its `code_sum` where K has zeros."""
    frame_with_fold, offset, origin = of_keys(q, frame, k)
    logit_offset = None if offset is None else (q.float() * offset.float()).sum(dim=-1, keepdim=True)
    if origin is not None:
        origin_product = (frame.apply(q) * origin).sum(dim=-1, keepdim=True)
        logit_offset = origin_product if logit_offset is None else logit_offset + origin_product
    qq = replace(in_frame(q, frame_with_fold, scheme.q, scales), logit_offset=logit_offset)
    # S = s_q (c_q . (c_k s_k + origin_k)) needs the sum over channels of c_q
    return replace(qq, code_sum=product_values(qq).sum(dim=-1, keepdim=True)) if needs_query_sums(scheme) else qq


def of_keys(q: Tensor, frame: Frame, k: QuantizedTensor) -> tuple[Frame, Tensor | None, Tensor | None]:
    """What quantizing Q needs of the quantized K, for each head of Q: (frame, offset, origin).

    The frame is Q's with K's scale per channel folded in. Offset and origin are `[B, H_q, 1, D]` or None: K's offset, and K's
    origin per channel. Their products with Q are missing in Q K^T and go into `logit_offset`.
    """
    offset = None if k.offset is None else for_query_heads(k.offset, q, k)
    if place(k.spec) != "q":
        return frame, offset, None
    assert k.scale is not None
    origin = None if k.origin is None else for_query_heads(k.origin, q, k)
    return replace(frame, fold=for_query_heads(k.scale.float(), q, k)), offset, origin


def values(v: Tensor, frame: Frame, scheme: QuantScheme, scales: LayerScales | None = None) -> QuantizedTensor:
    """V quantized, with the fields that `with_sums` adds."""
    return with_sums(in_frame(v, frame, scheme.v, scales), scheme)


def with_sums(vq: QuantizedTensor, scheme: QuantScheme) -> QuantizedTensor:
    """V with `code_sum`, its sums over each key tile, if P is unsigned, and with `log2_weight` if V is scaled per token."""
    code_sum = tile_sums(vq.stored_values(), scheme.key_tile) if needs_code_sums(scheme) else None
    if place(scheme.v) == "p":
        assert vq.scale is not None
        # a token with NaN has zero codes too, but its scale is NaN
        weightless = (vq.code_values() == 0).all(dim=-1, keepdim=True) & vq.scale.float().isfinite()
        return replace(vq, code_sum=code_sum, log2_weight=log2_weight(vq.scale, weightless))
    return replace(vq, code_sum=code_sum)


def in_frame(x: Tensor, frame: Frame, spec: Operand, scales: LayerScales | None = None) -> QuantizedTensor:
    """Quantize one operand `[B, H, N, D]` in this frame."""
    # unscaled floats without a transform stay the tensor itself
    unchanged = not spec.scaled and not frame.changes
    return replace(encode(x if unchanged else frame.apply(x), x.dtype, spec, scales), frame=frame)


def encode(x: Tensor, dtype: torch.dtype, spec: Operand, scales: LayerScales | None = None) -> QuantizedTensor:
    """Quantize float32 `x` `[B, H, N, D]`, originally of type `dtype`, by the rule below; floats without a scale are cast.

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
    """Codes of float32 values, not packed; float32 scales and zeros broadcast to the values."""
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
    scale_type = SCALE_TYPES[spec.scale_dtype]
    # some casts saturate, so values that the type cannot hold become NaN first
    zero = torch.where(lowest.abs() > torch.finfo(scale_type).max, float("nan"), lowest).to(scale_type)
    _check_holds(zero, lowest, spec, "zero")
    span = highest - zero.float()
    if bool((span.isinf() & highest.isfinite()).any()):
        raise ValueError(f"{spec.role}: values from {lowest.min():.4g} to {highest.max():.4g} span more than float32 holds")
    scale = _divided(span, spec.format.levels)
    # a group of one value, or with a zero rounded past the maximum, gets the smallest scale, so its codes add almost nothing
    return _rounded(torch.where(scale < 0, 0.0, scale), spec), zero


def _divided(x: Tensor, divisor: float | None) -> Tensor:
    assert divisor is not None
    # a tensor as divisor: on a GPU torch multiplies by the reciprocal of a Python number, which rounds twice. It is filled on
    # the GPU: copying a number there waits for the GPU, and breaks the capture of a CUDA graph
    return x / x.new_full((), divisor)


def reduce_groups(x: Tensor, spec: Operand, reduce) -> Tensor:
    """`torch.amax` or `torch.amin` of `[B, H, N, D]` over the values that share a scale."""
    if spec.granularity.kind == "tensor":
        return reduce(x).reshape(1, 1, 1, 1)
    n, d = x.shape[2:]
    tokens, channels = spec.granularity.cover(n, d)
    if (missing := -n % tokens) and tokens < n:
        # pad with the last token, which changes neither minimum nor maximum
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
    tokens = min(tokens, x.shape[2])
    return reduce(x.unflatten(3, (-1, channels)).unflatten(2, (-1, tokens)), dim=(3, 5))


def _rounded(scale: Tensor, spec: Operand) -> Tensor:
    scale_type = SCALE_TYPES[spec.scale_dtype]
    smallest = torch.finfo(scale_type).smallest_normal
    stored = scale.to(scale_type).float()
    if scale_type == torch.float8_e4m3fn:
        # whether the cast saturates depends on torch's version; a scale above the largest becomes NaN
        stored = torch.where(scale > torch.finfo(scale_type).max, float("nan"), scale.clamp(max=448).to(scale_type).float())
        if spec.format.kind == "int" and spec.format.bits == 8:
            # a scale rounded down by up to 1/16 would clip eight of the 127 levels: take the next one up
            above = (stored.to(scale_type).view(torch.uint8) + 1).view(scale_type).float()
            stored = torch.where(stored < scale, above, stored)
    _check_holds(stored, scale, spec, "scale")
    return stored.clamp_min(smallest).to(scale_type)


def _check_holds(stored: Tensor, exact: Tensor, spec: Operand, name: str) -> None:
    if spec.scale_dtype == "fp32":
        return  # `exact` is fp32 itself; returning here also avoids waiting for the GPU
    lost = exact.isfinite() & ~stored.float().isfinite()
    if lost.any():
        raise ValueError(
            f"{spec.role}: a {name} of {exact[lost].abs().max():.4g} does not fit scale_dtype {spec.scale_dtype} "
            f"(at most {torch.finfo(SCALE_TYPES[spec.scale_dtype]).max:g}); use scale_dtype: fp32"
        )


def _as_float(x: Tensor, dtype: torch.dtype, spec: Operand) -> Tensor:
    """`x` in the caller's 16-bit type, or, if that was float32, in the type that the precision names."""
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
    """K's factors, computed from K without its offset."""
    if rule.scale == "static":
        assert scales is not None
        return scales.balance(k)
    check_balance(rule, k.shape[3])
    centred = k if frame.offset is None else Frame(offset=frame.offset).apply(k)
    if isinstance(rule, ChannelBalance):
        return channel_factors(query_maxima(q, k.shape[1]), key_maxima(centred), rule.alpha)
    return rope_pair_factors(pair_norms(centred), key_maxima(centred), rule.alpha, rule.beta, rule.top_k)


def check_balance(rule: ChannelBalance | RopePairBalance, head_dim: int) -> None:
    """Raise SchemeError where the rule's pairs or `top_k` do not fit head_dim."""
    if isinstance(rule, RopePairBalance):
        if head_dim % 2:
            raise SchemeError([("balance", f"rope_pairs needs an even head_dim, not {head_dim}")])
        if rule.top_k > head_dim:
            raise SchemeError([("balance.rope_pairs.top_k", f"{rule.top_k} is more than the {head_dim} channels of a head")])


def for_query_heads(x: Tensor, q: Tensor | QuantizedTensor, k: Tensor | QuantizedTensor) -> Tensor:
    """`[B, H_kv, 1, D] -> [B, H_q, 1, D]`: repeat each head of K for the heads of Q that share it."""
    shared = q.shape[1] // k.shape[1]
    return x if shared == 1 else x.repeat_interleave(shared, dim=1)


def without_offset(k: Tensor, frame: Frame) -> Tensor:
    """K minus its offset, in its own type: the operand that the block means of Q are multiplied with."""
    return (k if frame.offset is None else k - frame.offset).to(k.dtype).contiguous()


def log2_weight(scale: Tensor, weightless: Tensor) -> Tensor:
    """log2 of P's weight, for V scaled per token, from V's scale and a mask of all-zero tokens `[B, H, N, 1]`."""
    # 2^-32: far below usual scales, while its inverse, which the normalizer multiplies by, still fits float32 times 2^64
    return scale.float().log2().masked_fill_(weightless, -32.0)


def tile_sums(values: Tensor, tile: int) -> Tensor:
    """`[B, H, N, D] -> [B, H, ceil(N / tile), D]` int32: the sum of V's codes in each key tile."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[2] % tile))
    return padded.unflatten(2, (-1, tile)).sum(dim=3).to(torch.int32)
