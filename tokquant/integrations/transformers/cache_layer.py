"""One layer of a TokquantCache, and the object that attention gets in place of its keys and values."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tokquant.decode import decode
from tokquant.errors import UnsupportedError
from tokquant.integrations.transformers import cache_operator
from tokquant.integrations.transformers.settings import Setting
from tokquant.kv_cache import KVCache
from tokquant.operators import tracing
from tokquant.transfer import to_device

DRAFT = 128
"""Tokens that are kept beyond a window, so that `crop` can remove as many of the newest."""


class TokquantLayer(CacheLayerMixin):
    """A KVCache of each sequence's tokens without padding, and which of the model's columns are tokens."""

    is_croppable = True
    is_sliding = False  # columns are counted from the first token, so all layers are masked alike
    supports_early_init = False

    def __init__(self, setting: Setting, capacity: int | None):
        super().__init__()
        self.setting, self.capacity = setting, capacity
        self._empty()

    def _empty(self) -> None:
        self.held: KVCache | None = None
        self.columns, self.is_initialized = 0, False
        self.tokens: np.ndarray | None = None
        """`[B, columns]`, False where a column is padding; None where none is."""
        self.behind = 0
        self.forgotten = np.zeros(0, bool)
        """`[B]`, whether tokens of a sequence were freed, which no query sees as they are more than `behind` before it."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Never called: `TokquantCache.update` returns an `Appended`, which attention appends."""
        raise NotImplementedError("a layer of a TokquantCache is appended to by attention; call update of the cache")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the first `append` creates the cache, as only then the module's name is known."""

    def append(self, name: str, k: Tensor, v: Tensor, tokens: np.ndarray | None, behind: int | None) -> None:
        """Append columns `[B, H_kv, n, D]` without padding.

        Args:
            tokens: `[B, columns + n]`, False where a column is padding; None where none is.
            behind: tokens that a query sees before it; None for all.

        Raises ValueError for another number of sequences, or for `tokens` that differ from earlier calls in earlier columns,
        else as `KVCache`; the layer is then as it was.
        """
        (batch, heads, new, d), before, held = k.shape, self.columns, self.held
        if held is not None and held.batch != batch:
            raise ValueError(f"past_key_values: holds {held.batch} sequences, and {batch} come; reset() it, or make another")
        earlier = True if self.tokens is None else self.tokens
        if not np.all((True if tokens is None else tokens[:, :before]) == earlier):
            raise ValueError(
                "attention_mask: it masks other columns than when their keys came; keep it, and add ones to its end"
            )
        if held is None:
            scheme, scales = self.setting.of(name)
            made = dict(batch=batch, kv_heads=heads, head_dim=d, dtype=k.dtype, device=k.device, capacity=self.capacity)
            held = KVCache(scheme, scales=scales, backend=self.setting.backend, **made)  # type: ignore[arg-type]
        order, counts = _packed(tokens, new, k.device)
        if self.held is None:
            self.forgotten = np.zeros(batch, bool)
        if behind is not None:
            self.behind, self.forgotten = behind, self.forgotten | (np.array(held.forget(behind + DRAFT)) > 0)
        if order is None:
            held.append(k, v)
        else:
            held.append(_rows(k, order), _rows(v, order), counts=counts)
        self.held, self.columns, self.tokens, self.is_initialized = held, before + new, tokens, True

    def attend(self, q: Tensor, **features: Any) -> Tensor:
        """Attention of the newest columns' queries `[B, H_q, n, D]`; 0 where a column is padding."""
        assert self.held is not None
        order, counts = _packed(self.tokens, q.shape[2], q.device)
        if order is None:
            return decode(q, self.held, **features)  # type: ignore[return-value]
        return _rows(decode(_rows(q, order), self.held, counts=counts, **features), order.argsort(dim=1))  # type: ignore[arg-type]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Empty the layer; any number of sequences may follow."""
        self._empty()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns. Raises ValueError for more than there are, or a number above zero."""
        if not -self.columns <= tokens_to_remove <= 0:
            raise ValueError(f"crop: {tokens_to_remove} of {self.columns} columns; give minus the number to remove")
        if self.held is None or tokens_to_remove == 0:
            return
        kept = self.columns + tokens_to_remove
        removed = -tokens_to_remove if self.tokens is None else self.tokens[:, kept:].sum(axis=1)
        left = np.array(self.held.lengths) - removed
        if (self.forgotten & (left < self.behind)).any():
            raise ValueError(f"crop: {tokens_to_remove}; a layer with a window keeps {DRAFT} tokens to take back, and no more")
        self.held.truncate(left.tolist())
        self.columns, self.tokens = kept, None if self.tokens is None else self.tokens[:, :kept]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace the sequences by those of these indices, which share pages where they are copies."""
        if self.held is not None:
            chosen = indices.tolist()
            self.held = self.held.fork(chosen)
            self.tokens = None if self.tokens is None else self.tokens[chosen]
            self.forgotten = self.forgotten[chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each sequence by `repeats` copies."""
        if self.held is not None:
            self.batch_select_indices(torch.arange(self.held.batch, device="cpu").repeat_interleave(repeats))

    def __repr__(self) -> str:
        return f"TokquantLayer({self.held or self.setting.scheme.name})"


class Appended:
    """Stands for the keys and for the values of a layer: those that it holds, and new ones to append.

    These are appended when they are first attended to, because only then it is known which of them are padding.
    """

    def __init__(self, cache: Any, index: int, k: Tensor, v: Tensor):
        self._cache, self._index, self._sizes = cache, index, k.shape
        self._new: tuple[Tensor, Tensor] | None = k, v

    @property
    def shape(self) -> torch.Size:
        """`[B, H_kv, columns, D]`, the new ones included."""
        batch, heads, new, d = self._sizes
        return torch.Size((batch, heads, self._layer.columns + (new if self._new else 0), d))

    @property
    def by_name(self) -> bool:
        """Whether the layer's setting depends on its name."""
        return self._layer.setting.by_name

    @property
    def _layer(self) -> TokquantLayer:
        return self._cache.layers[self._index]

    def attend(self, q: Tensor, name: str, tokens: Tensor | None, **features: Any) -> Tensor:
        """Append, once, and attend, as `TokquantCache.attend`."""
        new, self._new = self._new, None
        if tracing():
            return cache_operator.attend(self._cache.number, self._index, q, new, name, tokens, **features)
        return self._cache.attend(self._index, q, new, name, tokens, **features)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise _unread()

    def __getitem__(self, index: Any) -> Any:
        raise _unread()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else _unread()


def _unread() -> UnsupportedError:
    return UnsupportedError(
        "a TokquantCache gives codes, which only tokquant's attention reads: call "
        "tokquant.integrations.transformers.use(model, scheme), or load the model with attn_implementation='tokquant'; a model "
        "that computes with what it cached before it attends (DeepSeek's latent attention) needs a DynamicCache"
    )


def _packed(tokens: np.ndarray | None, new: int, device: torch.device) -> tuple[Tensor | None, list[int]]:
    """The order `[B, new]` that puts tokens before padding in each sequence's newest columns, and each one's number of tokens.

    None where there is no padding.
    """
    if tokens is None or tokens[:, -new:].all():
        return None, []
    newest = tokens[:, -new:]
    order = np.argsort(~newest, axis=1, kind="stable")
    return to_device(order, device), newest.sum(axis=1).tolist()


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """`[B, H, n, D]` with the tokens of each sequence in another order `[B, n]`."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
