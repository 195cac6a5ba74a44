"""A quantized replacement of torch's scaled_dot_product_attention, with its argument names, shapes and causality."""

import torch
from torch import Tensor

from tokquant.attention import Backend, Scheme, attention, quantizing_backend
from tokquant.autocast import cast_by_autocast
from tokquant.calibration.scales import LayerScales
from tokquant.errors import UnsupportedError, quote
from tokquant.inputs import check_flags, check_no_grad


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    scheme: Scheme = "int8",
    layer: str | None = None,
    scales: LayerScales | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` in a scheme's precisions.

    Args:
        query: `[..., H_q, L, E]`, or `[H, L, E]` or `[L, E]`. Dimensions before the last two broadcast.
        key: `[..., H, S, E]`. value: `[..., H, S, E_v]`. If E_v is not E, the narrower operands are padded with channels of
            zeros, which are quantized too.
        attn_mask: broadcastable to `[..., H_q, L, S]`: boolean, True where a pair attends, or floats that are added.
        dropout_p: 0.0.
        is_causal: query i sees keys up to i, whatever L and S are (top left; `tokquant.attention` has bottom right). Keys that
            no query sees are not quantized. May be combined with a mask, which torch 2.15 refuses.
        scale: factor of the scores; E**-0.5 if None.
        enable_gqa: heads of query may be a multiple of those of key and value.
        scheme, layer, scales, backend: as for `tokquant.attention`, except that `auto` always quantizes.

    Returns: `[..., H_q, L, E_v]` in query's type; within torch.autocast all three take that block's type first, as in torch.
    A query that attends to nothing gets 0, as in torch. So does one whose mask is all below -2.3e38
    (`torch.finfo(torch.float32).min`, say), where torch gives the mean of value.

    Raises: as `tokquant.attention`; UnsupportedError for dropout.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: a {type(x).__name__}; give a torch.Tensor [..., heads, tokens, channels]")
        if x.ndim < 2:
            raise ValueError(f"{name}: shape {list(x.shape)}; give [..., heads, tokens, channels]")
        check_no_grad(name, x)
    if dropout_p:
        raise UnsupportedError(
            f"dropout_p: {quote(dropout_p)}; quantized attention has no dropout: give 0.0, or call model.eval()"
        )
    check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
    query, key, value = cast_by_autocast(query, key, value)
    headless = query.ndim == key.ndim == value.ndim == 2
    q, k, v = (x[None] if x.ndim == 2 else x for x in (query, key, value))
    n_q, n_k, d, d_v = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    if k.shape[-1] != d:
        raise ValueError(f"key: {k.shape[-1]} channels, and query has {d}")
    if v.shape[-2] != n_k:
        raise ValueError(f"value: {v.shape[-2]} tokens, and key has {n_k}")
    leading = _broadcast(*(x.shape[:-3] for x in (q, k, v)))
    heads = max(x.shape[-3] for x in (q, k, v))
    if not enable_gqa:
        for name, x in (("query", q), ("key", k), ("value", v)):
            if x.shape[-3] not in (1, heads):
                raise ValueError(f"{name}: {x.shape[-3]} heads, and others have {heads}; give enable_gqa=True if they share")
        q = q.expand(*q.shape[:-3], heads, -1, -1)
    kv_heads = max(k.shape[-3], v.shape[-3])
    if {k.shape[-3], v.shape[-3]} - {1, kv_heads}:
        raise ValueError(f"value: {v.shape[-3]} heads, and key has {k.shape[-3]}; give as many")
    if q.shape[-3] % kv_heads:
        raise ValueError(f"key: {kv_heads} heads do not divide the {q.shape[-3]} of query")
    shape = (*leading, heads, n_q, d_v)[headless:]
    if attn_mask is not None:
        _check_mask(attn_mask, (*leading, heads, n_q, n_k))
    if 0 in (*shape, n_k):
        return query.new_zeros(shape)
    if attn_mask is not None:
        attn_mask = _mask(attn_mask, leading, n_k)
    window = None
    if is_causal:
        # aligned top left: no query sees keys from N_q on. The window aligns query i with key i, where causal=True would not
        n_k = min(n_k, n_q)
        k, v = k[..., :n_k, :], v[..., :n_k, :]
        if attn_mask is not None:
            attn_mask = attn_mask[..., :n_k]
        window = (None, n_q - n_k)
    width = max(d, d_v)
    k, v = (x.expand(*x.shape[:-3], kv_heads, -1, -1) for x in (k, v))
    q, k, v = (_batched(x, leading) for x in (q, k, v))
    q, k, v = (x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    scale = d**-0.5 if scale is None else scale
    chosen = quantizing_backend(backend, q.device)
    out = attention(q, k, v, scheme, layer=layer, scale=scale, mask=attn_mask, window=window, scales=scales, backend=chosen)
    return out[..., :d_v].reshape(shape)  # type: ignore[call-overload]


def _broadcast(*shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        given = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"query, key, value: dimensions before heads, {given}, do not broadcast to one another") from None


def _batched(x: Tensor, leading: torch.Size) -> Tensor:
    """`[..., H, N, D] -> [B, H, N, D]`."""
    return x.expand(*leading, *x.shape[-3:]).reshape(-1, *x.shape[-3:])


def _check_mask(mask: object, wanted: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: a {type(mask).__name__}; give a boolean tensor (True = attend) or floats to add")
    try:
        mask.expand(wanted)
    except RuntimeError:
        raise ValueError(f"attn_mask: shape {list(mask.shape)} does not broadcast to {list(wanted)}") from None


def _mask(mask: Tensor, leading: torch.Size, n_k: int) -> Tensor:
    """A mask with four dimensions, copied only if it has leading dimensions larger than 1."""
    mask = mask.expand(*mask.shape[:-1], n_k)
    mask = mask[(None,) * max(0, 3 - mask.ndim)]
    mask_leading = mask.shape[:-3]
    return mask.reshape(1, *mask.shape[-3:]) if all(size == 1 for size in mask_leading) else _batched(mask, leading)
