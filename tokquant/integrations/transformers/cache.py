"""TokquantCache: a transformers cache of quantized keys and values, which attention reads as codes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from tokquant.attention import Backend, Scheme
from tokquant.autocast import cast_by_autocast
from tokquant.calibration.scales import Scales
from tokquant.errors import SchemeError, UnsupportedError
from tokquant.integrations.transformers import cache_operator
from tokquant.integrations.transformers.cache_layer import Appended, TokquantLayer
from tokquant.integrations.transformers.settings import IMPLEMENTATIONS, Setting, held_by, own
from tokquant.kv_cache import Memory
from tokquant.schemes import SchemeMap, resolve
from tokquant.schemes.appending import check_append_only

CODED = ("full_attention", "sliding_attention")
"""Types of layers whose keys and values are quantized."""

OTHERS = ("linear_attention", "conv", "dummy")
"""Types of layers that keep no keys and values; they stay as transformers has them."""


class TokquantCache(Cache):
    """A model's quantized keys and values, one `tokquant.KVCache` per layer, for `generate(past_key_values=...)`.

    The model's attention must be tokquant's (`use`, or `attn_implementation="tokquant"`). It reads the codes for prompts and
    generated tokens alike, so that a prompt in one piece, in chunks or token by token gives the same result if the scheme keeps
    no tokens in 16 bits. Padding, on either side, is never stored. Beams share pages; `crop` (assisted decoding) removes the
    newest tokens. Layers with a sliding window free the tokens that it has passed. For a model with cross attention:
    `EncoderDecoderCache(TokquantCache(...), DynamicCache())`.

    Args:
        model: a model, or the config of one.
        scheme: as for `use`; no part of it may depend on later tokens. None for the model's own, with its scales and backend.
        scales: those of a static scheme.
        capacity: tokens that the pages of each layer are made for, once, for all sequences together; they grow where None.
        backend: what keeps the pages: as for `tokquant.KVCache`.

    Raises: SchemeError for a scheme that sees later tokens, ScalesError for missing scales, UnsupportedError for a model that
    attends by something else or has layers of another kind (chunked attention, for one).
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        scheme: Scheme | None = None,
        *,
        scales: Scales | None = None,
        capacity: int | None = None,
        backend: Backend = "auto",
    ):
        if not isinstance(model, PreTrainedModel | PreTrainedConfig):
            raise TypeError(f"model: a {type(model).__name__}; give a transformers model, or its config{held_by(model)}")
        setting = _own(model, scales, backend) if scheme is None else Setting(scheme, scales, backend)
        parts = [each for _, each in setting.scheme.layers] if isinstance(setting.scheme, SchemeMap) else [setting.scheme]
        for each in parts:
            check_append_only(resolve(each))
        if isinstance(model, PreTrainedModel):
            setting.check(model)
            config = model.config.get_text_config(decoder=True)
            if config._attn_implementation not in IMPLEMENTATIONS:
                raise UnsupportedError(
                    f"model: it attends by {config._attn_implementation!r}, which reads no codes; call "
                    "tokquant.integrations.transformers.use(model, scheme), or load it with attn_implementation='tokquant'"
                )
        else:
            config = model.get_text_config(decoder=True)
        layers: list = []
        for kind, options in zip(*get_layer_types_and_kwargs(config), strict=True):
            if kind in OTHERS:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**options))
            elif kind in CODED:
                layers.append(TokquantLayer(setting, capacity))
            else:
                raise UnsupportedError(
                    f"model: layer {len(layers)} is of type {kind!r}, which cannot be kept in codes; known are "
                    f"{', '.join(CODED + OTHERS)}"
                )
        super().__init__(layers=layers)
        self._first = next((i for i, layer in enumerate(layers) if isinstance(layer, TokquantLayer)), None)
        self._before = 0
        """Columns that the first quantized layer held before the current forward pass."""
        self._fetched: list[tuple[Tensor, np.ndarray]] = []
        """Padding masks of that pass, each with its copy on the CPU."""
        self.number = cache_operator.numbered(self)
        """A tensor that stands for this cache in a graph."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As `Cache.update`; for a quantized layer an `Appended`, in place of both keys and values, which attention reads."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"past_key_values: has {len(self.layers)} layers, and the model more; make a cache of this model")
        if not isinstance(self.layers[layer_idx], TokquantLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        both = Appended(self, layer_idx, *cast_by_autocast(key_states, value_states))
        return both, both

    def attend(
        self, index: int, q: Tensor, new: tuple[Tensor, Tensor] | None, name: str, tokens: Tensor | None, **features: Any
    ) -> Tensor:
        """Append `new` keys and values `[B, H_kv, n, D]` to a layer, and attend to all: q `[B, H_q, n, D]` -> `[B, H_q, n, D]`.

        Args:
            name: of the layer's module.
            tokens: `[B, columns]`, False where a column is padding; None where none is.
            features: scale, window, softcap and sinks, as for `tokquant.attention`.

        Raises ValueError where layers do not hold the same tokens, as after a call that ended between them; else as
        `TokquantLayer.append` and `tokquant.decode`. The layer then holds what it held before.
        """
        layer: Any = self.layers[index]
        if new is not None:
            if index == self._first:
                self._before, self._fetched = layer.columns, []
            elif layer.columns != self._before:
                raise ValueError(
                    f"past_key_values: layer {index} holds {layer.columns} tokens where layer {self._first} held "
                    f"{self._before}; an earlier call ended between them: reset() it and give all tokens again"
                )
            behind, _ = features["window"] or (None, None)
            layer.append(name, *new, self._on_host(tokens), behind)
        try:
            return layer.attend(q, **features)
        except BaseException:
            if new is not None:
                layer.crop(-new[0].shape[2])  # or a retry of the same call would append twice
            raise

    def _on_host(self, tokens: Tensor | None) -> np.ndarray | None:
        """`tokens`, copied to the CPU once for all layers; None where none is padding."""
        if tokens is None:
            return None
        found = next((array for seen, array in self._fetched if seen is tokens), None)
        if found is None:
            found = tokens.cpu().numpy()
            self._fetched.append((tokens, found))
        return None if found.all() else found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetched": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.number = cache_operator.numbered(self)  # a copy is another cache

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        # waits for the GPU once, not in every layer
        super().reorder_cache(beam_idx.cpu())  # type: ignore[arg-type]

    @property
    def memory(self) -> Memory:
        """Bytes that all quantized layers take now."""
        parts = [layer.held.memory for layer in self.layers if isinstance(layer, TokquantLayer) and layer.held is not None]
        return Memory(*(sum(getattr(part, name) for part in parts) for name in ("packed", "slack", "windows")))

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and windows."""
        memory = self.memory
        return memory.packed + memory.slack + memory.windows


def _own(model: PreTrainedModel | PreTrainedConfig, scales: Scales | None, backend: Backend) -> Setting:
    """The model's own setting, for a cache that is given no scheme. Raises SchemeError where it has none."""
    found = own(model) if isinstance(model, PreTrainedModel) else None
    if found is None:
        raise SchemeError(
            "scheme: none is given, and the model has none of its own; give one, or call "
            "tokquant.integrations.transformers.use(model, scheme) first"
        )
    for name, given in (("scales", scales is not None), ("backend", backend != "auto")):
        if given:
            raise SchemeError(
                f"{name}: no scheme is given, and that of the model comes with its {name}; leave {name} out, or give a scheme"
            )
    return found
