"""Attention to a TokquantCache as torch.compile sees it: one custom operator, to which a number stands for the cache.

The cache's lengths change only inside the operator, so a graph depends on none of them but the length that a model asks for.
"""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tokquant.inputs import check_no_grad
from tokquant.operators import LIBRARY, begin_with

LIBRARY.define(
    "cached_attention(Tensor q, Tensor? k, Tensor? v, Tensor(a!) cache, int index, str name, Tensor? tokens, *, "
    "float? scale, SymInt? behind, float? softcap, Tensor? sinks) -> Tensor",
    # lengths and pages are counted on the CPU
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)

_caches: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def numbered(cache: Any) -> Tensor:
    """A number, as a tensor, that stands for a TokquantCache in a graph as long as the cache lives."""
    number = next(_numbers)
    _caches[number] = cache
    with torch.inference_mode(False):  # a graph may run in that mode or outside of it, wherever the cache was made
        return torch.tensor(number, device="cpu")  # whatever device is torch's default


def attend(
    cache: Tensor,
    index: int,
    q: Tensor,
    new: tuple[Tensor, Tensor] | None,
    name: str,
    tokens: Tensor | None,
    *,
    window: tuple[int, int] | None,
    **features: Any,
) -> Tensor:
    """`TokquantCache.attend` as an operator in a graph; `cache` is the tensor that `numbered` returned."""
    k, v = new or (None, None)
    behind = None if window is None else window[0]
    return torch.ops.tokquant.cached_attention(q, k, v, cache, index, name, tokens, behind=behind, **features)


def _run(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: Tensor,
    index: int,
    name: str,
    tokens: Tensor | None,
    *,
    behind: int | None,
    **features: Any,
) -> Tensor:
    new, window = None if k is None else (k, v), None if behind is None else (behind, 0)
    try:
        found = _caches.get(int(cache))
        if found is None:
            raise RuntimeError("cache: the TokquantCache of this number is gone; keep it as long as graphs run with it")
        return found.attend(index, q, new, name, tokens, window=window, **features).contiguous()
    except (ValueError, TypeError, RuntimeError) as error:
        begin_with(name, error)
        raise


def _shaped(q: Tensor, k: Tensor | None, v: Tensor | None, *_: Any, sinks: Tensor | None, **__: Any) -> Tensor:
    for role, x in dict(q=q, k=k, v=v, sinks=sinks).items():
        check_no_grad(role, x)
    return q.new_empty(q.shape)


LIBRARY.impl("cached_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("tokquant::cached_attention", _shaped, lib=LIBRARY)
