"""transformers' mask interface: a mask of causality, windows and padding alone is described, not stored as `[N_q, N_k]`."""

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
"""Properties and methods that models and torch.compile read without the mask's contents. An Ordered answers these itself:
answered by the dense mask, which is another tensor, they would become guards that the Ordered does not pass."""


class Ordered(Tensor):
    """A boolean mask `[B, 1, N_q, N_k]` that consists of causality, a window and padding, and is not stored.

    Attention reads `window` and `tokens`. Any other computation with it uses the dense mask, which is then made.
    """

    window: int | None
    """Keys that a query sees, itself included; None for all before it."""
    tokens: Tensor | None
    """`[B, N_k]` boolean, False where a key is padding; None where none is."""
    whole: Callable[[], Tensor]
    """Makes the dense mask."""

    @classmethod
    def of(cls, shape: tuple[int, ...], window: int | None, tokens: Tensor | None, whole: Callable, device: Any) -> "Ordered":
        """A mask of this shape, which takes the memory of one element."""
        made = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(cls)
        made.window, made.tokens, made.whole = window, tokens, whole
        return made

    def moved(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Tensor.to`: an Ordered on another device, but the dense mask if it is converted to another type."""
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

    An Ordered assumes that the last query is at the last key. Where it is not (a static cache), and for every other pattern
    (chunks, packed sequences, overlays), the mask is dense.
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
    # a graph must not read values; if all are tokens, the result with the mask is the same
    if tokens is not None and not tracing() and bool(tokens.all()):
        tokens = None
    window = local_size if local_size is not None and local_size < kv_length else None
    if tokens is None and window is None:
        return None
    if tracing() and not torch.compiler.is_dynamo_compiling():
        return whole()  # torch.export without Dynamo traces no class of tensors but its own
    return Ordered.of((batch_size, 1, q_length, kv_length), window, tokens, whole, device)
