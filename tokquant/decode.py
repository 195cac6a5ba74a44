"""`decode`, attention to a KV cache: checks arguments, calls the cache, and applies attention sinks."""

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
    """Causal attention of the newest tokens' queries to all tokens of a cache, computed on its codes.

    For chunked prefill, append a chunk's keys and values first, then pass all its queries: each sees the cache and the tokens
    before it in the chunk.

    Args:
        q: `[B, H_q, n_q, D]` in the cache's type, H_q a multiple of its heads. The last query belongs to the last token.
        counts: how many of its n_q queries each sequence has, its first ones, as in `append`; all if None. The rest is ignored.
            Blocks of queries that share a scale span all n_q, so there a sequence's codes depend on how many are ignored.
        scale, softcap, sinks: as for `attention`.
        window: (left, right) as for `attention`; no query sees later keys.
        return_lse: also return the natural log of the sum of exp(scores), without sinks.
        backend: `auto` or the cache's own; or `reference`, the emulation on the same codes, to check it.
        deterministic: split packed keys the same way in every batch and on every GPU, and ignore tuning, so that the bits of
            the packed tokens' part of the result depend only on the sequence. On a CPU this always holds.

    Returns: `[B, H_q, n_q, D]` in q's type; with `return_lse` also `[B, H_q, n_q]` float32. The packed tokens and the 16-bit
    windows are attended to separately and merged in float32. A query beyond `counts` gets 0 and an LSE of -inf.

    Raises: TypeError, ValueError and RuntimeError for arguments that do not fit; UnsupportedError for a feature
    that the backend lacks.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: a {type(cache).__name__}; give a tokquant.KVCache")
    check_flags(return_lse=return_lse, deterministic=deterministic)
    check_beside_cache("q", q, (cache.batch, cache.kv_heads, cache.head_dim), cache.dtype, cache.device, queries=True)
    b, n_q = q.shape[0], q.shape[2]
    if backend not in ("auto", "reference", cache.backend):
        raise ValueError(f"backend: {quote(backend)}; the cache is kept by {cache.backend}: use auto, that, or reference")
    features = features_of(q, q, causal=True, scale=scale, window=window, softcap=softcap, sinks=sinks)
    query_counts = [n_q] * b if counts is None else whole_numbers("counts", counts, b, n_q).tolist()
    # lengths at a replay are not known during capture; there, queries before the first token see no key
    lengths = query_counts if capturing(q.device) else cache.lengths
    for sequence, (queries, tokens) in enumerate(zip(query_counts, lengths, strict=True)):
        if queries > tokens:
            text = f"q: {queries} queries for sequence {sequence}, which has {tokens} tokens"
            raise ValueError(f"{text}; append their keys first, or say how many are queries with counts")

    ignored = order = None
    if min(query_counts) < n_q:
        # the last query belongs to the last token, so rows are rotated to put the ignored ones first
        missing = n_q - np.array(query_counts)[:, None]
        order = to_device((np.arange(n_q) - missing) % n_q, q.device)
        ignored = to_device(np.arange(n_q) < missing, q.device)[:, None]
        q = _reordered(q, order).masked_fill(ignored[..., None], 0)
    chosen = cache.backend if backend == "auto" else backend
    without_sinks = features if sinks is None else replace(features, sinks=None)
    out, lse = cache.attention(q, without_sinks, chosen, deterministic)
    if sinks is not None:
        # the share of the softmax that keys have beside the sinks; the output of a query that sees no key stays 0
        share = torch.where(lse == -torch.inf, 0.0, torch.sigmoid(lse - sinks.float()[:, None]))
        out = out * share[..., None]
    if order is not None and ignored is not None:
        out, lse = out.masked_fill(ignored[..., None], 0.0), lse.masked_fill(ignored, -torch.inf)
        inverse = order.argsort(dim=1)
        out, lse = _reordered(out, inverse), _reordered(lse, inverse)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """`[B, H, n, ...]` with the n rows of each sequence in the order `[B, n]`."""
    return x[torch.arange(len(x), device=x.device)[:, None], :, order].transpose(1, 2)
