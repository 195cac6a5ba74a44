"""Which programs of attention start first: those with most to do, of as many heads as a cache keeps the keys of."""

from functools import lru_cache


@lru_cache(maxsize=4096)
def abreast(heads: int, kv_heads: int, kv_bytes: int, cache_bytes: int) -> int:
    """How many heads start side by side: a launch takes the first block of queries of each, then the next of each, and when
    all blocks of these heads have started, as many other heads.

    Blocks of a causal head have more to do the later their queries, and the kernel takes the last ones first. With the longest
    of all heads in front a launch ends with short ones, where head after head would have the longest of the last one begin when
    others have nothing left. But what runs reads the keys and values of its head, so those of heads side by side are to stay in
    half of the cache; the other half has all else that moves, and what two parts of a cache hold twice. FlashAttention has this
    order for causal tiles (`SingleTileLPTScheduler` in its flash_attn/cute/tile_scheduler.py).

    Args:
        heads, kv_heads: of Q, and of K and V, in all sequences together; the latter divide the former.
        kv_bytes: of all their keys and values.
        cache_bytes: of the cache that multiprocessors share.

    Returns: a divisor of `heads`, as programs are numbered in three dimensions.
    """
    kept = max(1, cache_bytes // 2 * kv_heads // max(1, kv_bytes))  # heads of K and V
    most = min(heads, kept * (heads // kv_heads))
    return next(number for number in range(most, 0, -1) if heads % number == 0)
