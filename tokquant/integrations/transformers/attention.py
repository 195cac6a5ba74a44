"""transformers' attention interface: what a model asks for, in the words of `tokquant.attention`."""

from typing import Any

import torch
from torch import Tensor, nn

from tokquant import bias
from tokquant.attention import attention
from tokquant.errors import UnsupportedError
from tokquant.integrations.transformers.cache_layer import Appended
from tokquant.integrations.transformers.masks import Ordered
from tokquant.integrations.transformers.settings import Setting, place_of

REFUSED = {
    "cache": "continuous batching keeps 16-bit pages of its own; use generate() with a TokquantCache",
    "output_attentions": "probabilities are never written out; use attn_implementation='eager' to look at them",
    "indices": "attention to chosen keys is not computed here; use attn_implementation='eager'",
    "block_indices": "attention to chosen blocks of keys is not computed here; use attn_implementation='eager'",
    "sinks": "sinks of this form are not known here; use attn_implementation='eager'",
}
"""Arguments that would change the result, and are not taken."""


@torch.compiler.disable
def attend(
    registered: Setting | None,
    yields: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor | Appended,
    value: Tensor | Appended,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of `module`: query `[B, H_q, N_q, D]`, key and value `[B, H_kv, N_k, D]` -> `[B, N_q, H_q, D]`, and no weights.

    `registered` is what the implementation was registered with; it yields to a model's own setting, or does not.

    Raises, with the module's name in front: UnsupportedError for what is not computed here, else as `tokquant.attention`.
    """
    name, setting = place_of(module, registered, yields, by_name=isinstance(key, Appended) and key.by_name)
    try:
        for argument, reason in REFUSED.items():
            if rest.get(argument) is not None and rest[argument] is not False:
                raise UnsupportedError(f"{argument}: {reason}")
        if dropout:
            raise UnsupportedError(f"dropout: {dropout} of the probabilities is for training; call model.eval()")
        if key.shape[-1] != value.shape[-1] or query.shape[-1] != key.shape[-1]:
            sizes = ", ".join(str(x.shape[-1]) for x in (query, key, value))
            raise UnsupportedError(f"head_dim: that of query, key and value is {sizes}; tokquant takes one size for all three")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        window = sliding_window if causal and attention_mask is None else None
        mask = attention_mask
        if isinstance(mask, Ordered):
            causal, window = True, mask.window
            mask = None if mask.tokens is None or isinstance(key, Appended) else mask.tokens[:, None, None]
        elif mask is not None:
            causal = False
        features: dict[str, Any] = dict(scale=scaling, softcap=softcap, sinks=s_aux)
        features["window"] = None if window is None else (window - 1, 0)
        if isinstance(key, Appended):
            if position_bias is not None:
                raise UnsupportedError("position_bias: decoding on codes adds no bias; leave the TokquantCache out")
            if not causal:
                raise UnsupportedError(
                    "attention_mask: a TokquantCache is attended causally, within windows and without padding, and by nothing "
                    "else; leave it out (for cross attention: EncoderDecoderCache(TokquantCache(...), DynamicCache()))"
                )
            tokens = attention_mask.on_host() if isinstance(attention_mask, Ordered) else None
            out = key.attend(query, name, tokens, **features)
        else:
            if setting.observe is not None:
                setting.observe(name, *(x.detach() for x in (query, key, value)))
            if position_bias is not None:
                features["bias"] = bias.dense(position_bias[..., : key.shape[2]])
            scheme, scales = setting.of(name)
            out = attention(
                query, key, value, scheme, causal=causal, mask=mask, scales=scales, backend=setting.backend, **features
            )  # type: ignore[assignment]
    except (ValueError, TypeError, RuntimeError) as error:
        raise _named(error, name) from None
    return out.transpose(1, 2).contiguous(), None


def _named(error: Exception, name: str) -> Exception:
    """The same error, saying which module."""
    error.args = (f"{name}: {error}",)
    return error
