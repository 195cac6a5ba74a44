"""transformers' attention interface: translates a model's arguments to those of `tokquant.attention`."""

from typing import Any

from torch import Tensor, nn

from tokquant import bias, operators
from tokquant.attention import attention, quantizing_backend
from tokquant.autocast import cast_by_autocast
from tokquant.errors import UnsupportedError
from tokquant.integrations.transformers.cache_layer import Appended
from tokquant.integrations.transformers.masks import Ordered
from tokquant.integrations.transformers.settings import Place, Setting, place_of
from tokquant.operators import begin_with
from tokquant.schemes import SchemeMap

REFUSED = {
    "cache": "continuous batching keeps 16-bit pages of its own; use generate() with a TokquantCache",
    "output_attentions": "probabilities are never written out; use attn_implementation='eager' to look at them",
    "indices": "attention to chosen keys is not computed here; use attn_implementation='eager'",
    "block_indices": "attention to chosen blocks of keys is not computed here; use attn_implementation='eager'",
    "sinks": "sinks of this form are not known here; use attn_implementation='eager'",
}
"""Arguments that would change the result and are not supported, with the reason."""


def attend(
    registered: Setting | None,
    yields: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor | Appended,
    value: Tensor | Appended,
    attention_mask: Tensor | None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Attention of `module`: query `[B, H_q, N_q, D]`, key and value `[B, H_kv, N_k, D]` -> `[B, N_q, H_q, D]`, and no weights.

    `registered` is the setting that the implementation was registered with; if it `yields`, a model's own setting replaces it.

    Raises, with the module's name in front: UnsupportedError for arguments that are not supported, else as
    `tokquant.attention`.
    """
    place, setting = place_of(module, registered, yields, by_name=isinstance(key, Appended) and key.by_name)
    traced = setting.observe is None and not (operators.OLD and isinstance(setting.scheme, SchemeMap))
    run = _attend if traced else _attend_untraced
    return run(place, setting, module, query, key, value, attention_mask, **given)


def _attend(
    place: Place,
    setting: Setting,
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
    try:
        for argument, reason in REFUSED.items():
            if rest.get(argument) is not None and rest[argument] is not False:
                raise UnsupportedError(f"{argument}: {reason}")
        if rest.get("cu_seq_lens_q") is not None and attention_mask is None:
            raise UnsupportedError("cu_seq_lens_q: packed sequences are told by position_ids that begin anew; give those too")
        if dropout:  # in a graph this is a symbol where layers differ, hence float()
            raise UnsupportedError(f"dropout: {float(dropout)} of the probabilities is for training; call model.eval()")
        # a dense mask already includes causality and windows
        causal, window, tokens = False, None, None
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            window = sliding_window if causal else None
        elif isinstance(attention_mask, Ordered):
            causal, window, tokens = True, attention_mask.window, attention_mask.tokens
        features: dict[str, Any] = dict(scale=scaling, softcap=softcap, sinks=s_aux)
        features["window"] = None if window is None else (window - 1, 0)
        if isinstance(key, Appended):
            if setting.observe is not None:
                raise UnsupportedError("past_key_values: a TokquantCache attends to codes, not exactly; observe without it")
            if position_bias is not None:
                raise UnsupportedError("position_bias: decoding on codes adds no bias; leave the TokquantCache out")
            if not causal:
                raise UnsupportedError(
                    "attention_mask: a TokquantCache is attended to causally, within windows and without padding, and by "
                    "nothing else; leave it out (for cross attention: EncoderDecoderCache(TokquantCache(...), DynamicCache()))"
                )
            (query,) = cast_by_autocast(query)
            out = key.attend(query, place.name, tokens, **features)
        else:
            assert not isinstance(value, Appended)
            if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
                sizes = ", ".join(str(x.shape[-1]) for x in (query, key, value))
                raise UnsupportedError(
                    f"head_dim: that of query, key and value is {sizes}; tokquant takes one size for all three"
                )
            query, key, value = cast_by_autocast(query, key, value)
            if setting.observe is not None:
                setting.observe(place.name, query.detach(), key.detach(), value.detach())
            if position_bias is not None:
                features["bias"] = bias.dense(position_bias[..., : key.shape[2]])
            mask = attention_mask if not causal else None if tokens is None else tokens[:, None, None]
            scales = None if setting.scales is None else setting.scales.get(place.name)
            features |= dict(causal=causal, mask=mask, scales=scales, backend=quantizing_backend(setting.backend, query.device))
            # layers that differ only in their names share one compiled graph
            layer = place.name if setting.by_name else None
            out = attention(query, key, value, setting.scheme, layer=layer, **features)  # type: ignore[assignment]
    except (ValueError, TypeError, RuntimeError) as error:
        begin_with(place.name, error)
        raise
    return out.transpose(1, 2).contiguous(), None


_attend_untraced = operators.untraced("attention that is observed, or before torch 2.12 by a map of schemes,")(_attend)
