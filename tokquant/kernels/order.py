"""The order in which programs of causal attention start: the longest first, in groups of heads whose keys fit the L2 cache."""

from functools import lru_cache


@lru_cache(maxsize=4096)
def abreast(heads: int, kv_heads: int, kv_bytes: int, cache_bytes: int) -> int:
    """Heads of a group. A launch starts the first block of queries of every head in a group, then the second of each, and so
    on; then the next group.

    A block of causal attention has more work the later its queries, and the kernel takes the last block first. If a group is
    all heads, the launch ends with short blocks; if it is one head, the longest block of the last head starts when others have
    nothing left to do. But running blocks read the keys and values of their heads, so those of a group should fit half of the
    cache; the other half is for all other traffic, and for lines that both partitions of a cache hold. FlashAttention schedules
    causal tiles like this (`SingleTileLPTScheduler` in its flash_attn/cute/tile_scheduler.py).

    Args:
        heads, kv_heads: heads of Q, and of K and V, in all sequences together; the latter divide the former.
        kv_bytes: bytes of all keys and values.
        cache_bytes: bytes of the L2 cache.

    Returns: a divisor of `heads`, as a grid is a box of three dimensions.
    """
    cached = max(1, cache_bytes // 2 * kv_heads // max(1, kv_bytes))  # heads of K and V
    most = min(heads, cached * (heads // kv_heads))
    return next(number for number in range(most, 0, -1) if heads % number == 0)
