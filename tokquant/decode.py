"""The public door for attention to a KV cache: it checks, asks for the parts, and merges them."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokquant.errors import quote
from tokquant.inputs import check_beside_cache, check_flags, features_of
from tokquant.kv_cache import KVCache
from tokquant.operators import untraced
from tokquant.transfer import capturing, to_device
from tokquant.whole_numbers import Numbers, whole_numbers


@untraced("decode")
def decode(
    q: Tensor,
    cache: KVCache,
    *,
    counts: Numbers | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the newest tokens' queries to everything in a cache, on its codes.

    For chunked prefill, append a chunk's keys and values first, then pass all its queries: each sees the cache and the tokens
    before it in the chunk.

    Args:
        q: `[B, H_q, n_q, D]` in the cache's type, H_q a multiple of its heads. The last query belongs to the last token.
        counts: how many of the n_q queries each sequence has, its first ones, as in `append`; all if None. The rest is ignored.
            Blocks of queries that share a scale are counted in n_q, so there a sequence's codes depend on how much is ignored.
        scale, softcap, sinks: as for `attention`.
        window: (left, right) as for `attention`; no query sees later keys.
        return_lse: also return the natural log of the sum of exp(scores), without sinks.
        backend: `auto` or the cache's own; or `reference`, the emulation on the same codes, to check it.
        deterministic: split packed keys the same way in every batch and on every GPU, and ignore what tuning has learned, so
            that the bits of their part depend only on the sequence. On a CPU this always holds.

    Returns: `[B, H_q, n_q, D]` in q's type; with `return_lse` also `[B, H_q, n_q]` float32. The packed tokens and the 16-bit
    windows are attended to separately and merged in float32. A query beyond `counts` gets 0 and an LSE of -inf.

    Raises: TypeError, ValueError and RuntimeError for what does not fit; UnsupportedError where the backend lacks a feature.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: a {type(cache).__name__}; give a tokquant.KVCache")
    check_flags(return_lse=return_lse, deterministic=deterministic)
    check_beside_cache("q", q, (cache.batch, cache.kv_heads, cache.head_dim), cache.dtype, cache.device, queries=True)
    b, n_q = q.shape[0], q.shape[2]
    if backend not in ("auto", "reference", cache.backend):
        raise ValueError(f"backend: {quote(backend)}; the cache is kept by {cache.backend}: use auto, that, or reference")
    features = features_of(q, q, causal=True, scale=scale, window=window, softcap=softcap, sinks=sinks)
    given = [n_q] * b if counts is None else whole_numbers("counts", counts, b, n_q).tolist()
    # a graph's replays are told no lengths: queries before the first token attend to nothing there
    lengths = given if capturing(q.device) else cache.lengths
    for sequence, (queries, tokens) in enumerate(zip(given, lengths, strict=True)):
        if queries > tokens:
            text = f"q: {queries} queries for sequence {sequence}, which has {tokens} tokens"
            raise ValueError(f"{text}; append their keys first, or say how many are queries with counts")

    none = turns = None
    if min(given) < n_q:
        # the last query belongs to the last token: turned so that what is none comes first
        missing = n_q - np.array(given)[:, None]
        turns = to_device((np.arange(n_q) - missing) % n_q, q.device)
        none = to_device(np.arange(n_q) < missing, q.device)[:, None]
        q = _turned(q, turns).masked_fill(none[..., None], 0)
    own = cache.backend if backend == "auto" else backend
    without_sinks = features if sinks is None else replace(features, sinks=None)
    out, lse = cache.attention(q, without_sinks, own, deterministic)
    if sinks is not None:
        # they take their part of the softmax once, and a row that attends to nothing stays so
        kept = torch.where(lse == -torch.inf, 0.0, torch.sigmoid(lse - sinks.float()[:, None]))
        out = out * kept[..., None]
    if turns is not None and none is not None:
        out, lse = out.masked_fill(none[..., None], 0.0), lse.masked_fill(none, -torch.inf)
        back = turns.argsort(dim=1)
        out, lse = _turned(out, back), _turned(lse, back)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _turned(x: Tensor, order: Tensor) -> Tensor:
    """`[B, H, n, ...]` with the rows of each sequence in another order `[B, n]`."""
    return x[torch.arange(len(x), device=x.device)[:, None], :, order].transpose(1, 2)
