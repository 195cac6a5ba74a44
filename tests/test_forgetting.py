"""Tokens behind a window are let go of, and nobody notices."""

import pytest
import torch
from factories import qkv

import tokquant as tq

WINDOW = (40, 0)


def filled(scheme="kv-int4", tokens=(300, 170), **options):
    cache = tq.KVCache(scheme, batch=2, kv_heads=2, head_dim=32, dtype=torch.float32, backend="reference", **options)
    q, k, v = qkv(max(tokens), heads=4, kv_heads=2, batch=2)
    cache.append(k, v, counts=list(tokens))
    return cache, q[:, :, :1].contiguous()


def test_attention_within_the_window_is_the_same_bit_for_bit():
    cache, q = filled()
    exact = tq.decode(q, cache, window=WINDOW)
    assert cache.forget(41) == [256, 128] and cache.lengths == [44, 42] and cache.free_pages >= 3
    assert torch.equal(tq.decode(q, cache, window=WINDOW), exact)
    assert cache.forget(41) == [0, 0]


def test_pages_are_taken_again_and_memory_stays_as_large_as_the_window():
    cache, _ = filled(tokens=(1, 1), capacity=2 * 384)
    whole, _ = filled(tokens=(1, 1))
    for seed in range(9):
        q, k, v = qkv(100, heads=4, kv_heads=2, batch=2, seed=seed)
        for each in (cache, whole):
            each.append(k, v)
        cache.forget(41 + 99)
        assert torch.equal(tq.decode(q, cache, window=WINDOW), tq.decode(q, whole, window=WINDOW))
    assert whole.lengths == [901, 901] and max(cache.lengths) < 141 + 128


def test_a_fork_keeps_what_its_origin_forgets():
    cache, q = filled()
    fork = cache.fork([0, 1, 1])
    exact = tq.decode(q[[0, 1, 1]], fork)
    cache.forget(0)
    assert cache.lengths == [44, 42] and fork.lengths == [300, 170, 170]
    cache.append(*(torch.randn(2, 2, 50, 32) for _ in range(2)))
    assert torch.equal(tq.decode(q[[0, 1, 1]], fork), exact)


def test_where_tokens_are_kept_in_16_bits_nothing_is_forgotten():
    cache, _ = filled("kv-int4-kivi", tokens=(600, 500))
    assert cache.forget(10) == [0, 0] and cache.lengths == [600, 500]


def test_more_than_any_sequence_has_is_all_of_it():
    cache, _ = filled(tokens=(300, 170))
    assert cache.forget(2**40) == [0, 0] and cache.lengths == [300, 170]


@pytest.mark.parametrize("keep", [-1, 2.0, True, "all"])
def test_what_is_no_number_of_tokens_is_refused(keep):
    cache, _ = filled(tokens=(2, 2))
    with pytest.raises(ValueError, match=r"keep: .* is not a whole number from 0"):
        cache.forget(keep)
