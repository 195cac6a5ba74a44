"""The function that diffusers calls: translates its arguments to those of `tokquant.attention`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokquant.attention import Backend, attention, check_backend, check_heads, check_scales, quantizing_backend
from tokquant.autocast import cast_by_autocast
from tokquant.calibration.scales import LayerScales
from tokquant.errors import UnsupportedError, quote
from tokquant.schemes import HeadSchemes, LayerScheme


def function_of(scheme: LayerScheme, scales: LayerScales | None, backend: Backend) -> Callable:
    """Attention by a scheme, with the signature of a diffusers backend.

    Raises SchemeError, ScalesError, TypeError or ValueError for arguments that do not fit, before any call.
    """
    check_backend(backend)
    if isinstance(scheme, HeadSchemes):
        check_heads(scheme, scheme.heads, scales)
    else:
        check_scales(scheme, scales)

    # the parameters have diffusers' names: it passes a backend those that its signature has, and drops others silently
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: object = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """query `[B, N_q, H_q, D]`, key and value `[B, N_k, H_kv, D]` -> `[B, N_q, H_q, D]`, and the LSE `[B, H_q, N_q]`."""
        if _parallel_config is not None:
            raise UnsupportedError(
                "parallel_config: quantized attention is not split over devices; take another backend for it"
            )
        if dropout_p:
            raise UnsupportedError(f"dropout_p: {quote(dropout_p)}; quantized attention has no dropout: call model.eval()")
        if is_causal and query.shape[1] != key.shape[1]:
            raise UnsupportedError(
                f"is_causal: of {query.shape[1]} queries and {key.shape[1]} keys diffusers' own backends align either the "
                "first or the last; give attn_mask"
            )
        if not enable_gqa and query.shape[2] != key.shape[2]:
            raise ValueError(f"key: {key.shape[2]} heads, and query has {query.shape[2]}; give enable_gqa=True if they share")
        q, k, v = (x.transpose(1, 2) for x in cast_by_autocast(query, key, value))
        mask = _mask(attn_mask, q.shape[0], k.shape[2])
        own = quantizing_backend(backend, q.device)
        features: dict[str, Any] = dict(causal=is_causal, scale=scale, mask=mask, scales=scales, backend=own)
        if return_lse:
            out, lse = attention(q, k, v, scheme, return_lse=True, **features)
            return out.transpose(1, 2), lse
        return attention(q, k, v, scheme, **features).transpose(1, 2)  # type: ignore[union-attr]

    return attend


def _mask(mask: object, batch: int, n_k: int) -> Tensor | None:
    """A mask that broadcasts to `[B, H, N_q, N_k]`. A shape of `[B, N_k]` masks keys, as in diffusers' own backends."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise UnsupportedError(f"attn_mask: a {type(mask).__name__} is for another backend; give a tensor")
    if mask.shape == (batch, n_k):
        return mask[:, None, None, :]
    if mask.ndim == 3 and mask.shape[0] > 1:
        raise UnsupportedError(
            f"attn_mask: shape {list(mask.shape)} leaves open what its {mask.shape[0]} are of; give [B, H, N_q, N_k]"
        )
    return mask
