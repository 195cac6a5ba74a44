"""Masks of transformers: which of them are the order of tokens and padding alone, so that no pair has to be written out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.masking_utils import prepare_padding_mask, sdpa_mask

from tokquant.operators import tracing

PROPERTIES = (
    "shape",
    "ndim",
    "dtype",
    "device",
    "layout",
    "requires_grad",
    "is_leaf",
    "grad",
    "grad_fn",
    "is_sparse",
    "is_cuda",
    "is_mkldnn",
    "is_nested",
    "is_quantized",
    "_base",
    "_version",
)
METHODS = (
    "size",
    "dim",
    "stride",
    "storage_offset",
    "untyped_storage",
    "is_contiguous",
    "is_floating_point",
    "is_conj",
    "is_neg",
    "is_inference",
    "_is_view",
    "numel",
)
ASKED = {getattr(Tensor, name).__get__ for name in PROPERTIES} | {getattr(Tensor, name) for name in METHODS}
"""What is asked of a mask without looking into it, by models and by what compiles them; a graph that is guarded by
what the mask written out answers, which is another tensor, would not fit the one that it is given."""


class Ordered(Tensor):
    """A boolean mask `[B, 1, N_q, N_k]` that says no more than causality, a window, and which keys are tokens.

    Attention reads `window` and `tokens`. For whoever else computes with it, it is the mask written out.
    """

    window: int | None
    """Keys that a query sees, itself included; None for all before it."""
    tokens: Tensor | None
    """`[B, N_k]` boolean, False where a key is padding; None where none is."""
    whole: Callable[[], Tensor]
    """The mask written out."""

    @classmethod
    def of(cls, shape: tuple[int, ...], window: int | None, tokens: Tensor | None, whole: Callable, device: Any) -> "Ordered":
        """A mask of this shape; nothing is kept but one element."""
        made = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(cls)
        made.window, made.tokens, made.whole = window, tokens, whole
        return made

    def moved(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Tensor.to`: the same mask on another device, written out for another type."""
        like = torch.empty(0, dtype=torch.bool, device=self.device).to(*args, **kwargs)
        if like.dtype != torch.bool:
            return self.whole().to(*args, **kwargs)
        tokens = None if self.tokens is None else self.tokens.to(like.device)
        return Ordered.of(tuple(self.shape), self.window, tokens, lambda: self.whole().to(like.device), like.device)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in ASKED:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.to and isinstance(args[0], Ordered):  # layers of one model may be on several devices
            return args[0].moved(*args[1:], **(kwargs or {}))
        args, kwargs = tree_map(lambda x: x.whole() if isinstance(x, Ordered) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> Tensor | None:
    """transformers' mask interface: None for causality alone, an Ordered, or a boolean mask (True = attend).

    A query stands at the key of its own place, counted from the last of both; where it does not (a static cache), and for
    every other pattern (chunks, packed sequences, overlays), all pairs are written out.
    """

    def whole() -> Tensor | None:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            device=device,
            **rest,
        )

    window = getattr(config, "sliding_window", None)
    slides = local_size is None or (local_size == window and window != getattr(config, "attention_chunk_size", None))
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if not (allow_is_causal_skip and slides and aligned):
        return whole()
    padded = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    tokens = None if padded is None else padded[:, kv_offset : kv_offset + kv_length]
    # a graph does not look: attention to all tokens is the same with a mask
    if tokens is not None and not tracing() and bool(tokens.all()):
        tokens = None
    window = local_size if local_size is not None and local_size < kv_length else None
    if tokens is None and window is None:
        return None
    if tracing() and not torch.compiler.is_dynamo_compiling():
        return whole()  # torch.export without Dynamo traces no class of tensors but its own
    return Ordered.of((batch_size, 1, q_length, kv_length), window, tokens, whole, device)
