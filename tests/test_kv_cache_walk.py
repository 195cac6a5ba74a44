"""Whatever happens to a cache, in whatever order, it stays equal to one that keeps plain floats."""

import pickle
import random

import numpy as np
import pytest
import torch
from plain_cache import SCHEMES, PlainCache, features, scales_for

import tokquant as tq

HEADS, D = 2, 16
SINKS = torch.tensor([-2.0, 0.0, 1.0, 4.0])
FEATURES = [
    {},
    {"window": (9, None)},
    {"window": (40, 0), "softcap": 2.0},
    {"scale": 0.7, "sinks": SINKS},
    {"softcap": 5.0, "sinks": SINKS, "window": (0, 3)},
]


class Walk:
    """Caches beside the plain ones that they must equal; all of them share one pool until one is loaded."""

    tolerance = 1e-5
    backend = "auto"
    features = FEATURES

    def __init__(self, s, seed, path):
        self.chance, self.path, self.scheme, self.scales = random.Random(seed), path, s, scales_for(s)
        self.capacity = 600
        sizes = dict(batch=2, kv_heads=HEADS, head_dim=D, dtype=torch.float32, capacity=self.capacity)
        cache = tq.KVCache(s, **sizes, scales=self.scales, backend=self.backend)
        self.pairs = [(cache, PlainCache(s, self.scales, 2))]
        self.refused = 0

    def step(self):
        at = self.chance.randrange(len(self.pairs))
        others = [self.truncate, self.evict, self.fork, self.leave, self.forget, self.save, self.send, self.decode]
        action = self.chance.choice([self.append, self.speak] * 3 + others)
        action(at, *self.pairs[at])

    def append(self, at, cache, plain):
        n = self.chance.choice([1, 2, 17, 70])
        counts = [self.chance.randint(0, n) for _ in range(cache.batch)] if self.chance.random() < 0.5 else None
        self.add(cache, plain, n, counts)
        self.decode(at, cache, plain, max(counts or [n]), counts)

    def speak(self, at, cache, plain):
        for _ in range(self.chance.randint(1, 40)):
            self.add(cache, plain, 1, None)
        self.decode(at, cache, plain)

    def add(self, cache, plain, n, counts):
        k, v = (torch.randn(cache.batch, HEADS, n, D) + 0.5 for _ in range(2))
        for b, own in enumerate(counts or []):
            k[b, :, own:] = torch.inf  # nobody looks at what only fills up
        try:
            cache.append(k, v, counts=counts, positions=cache.lengths)
        except tq.CacheFullError:
            self.refused += 1
        else:
            plain.append(k, v, counts or [n] * cache.batch)

    def truncate(self, at, cache, plain):
        lengths = [self.chance.randint(max(0, n - 50), n) for n in cache.lengths]
        cache.truncate(lengths)
        plain.truncate(lengths)

    def evict(self, at, cache, plain):
        b = self.chance.randrange(cache.batch)
        cache.evict(b)
        plain.truncate([0 if i == b else n for i, n in enumerate(cache.lengths)])

    def fork(self, at, cache, plain):
        chosen = [self.chance.randrange(cache.batch) for _ in range(self.chance.randint(1, 3))]
        self.pairs.append((cache.fork(chosen), plain.fork(chosen)))

    def leave(self, at, cache, plain):
        if len(self.pairs) > 1:
            del self.pairs[at]

    def forget(self, at, cache, plain):
        keep = self.chance.randint(0, 2 * cache.page)
        assert cache.forget(keep) == plain.forget(keep, cache.page)

    def save(self, at, cache, plain):
        cache.save(self.path)
        # sequences that shared pages do no more, so they may need more of them
        self.pairs[at] = tq.KVCache.load(self.path, backend=self.backend), plain

    def send(self, at, cache, plain):
        self.pairs[at] = pickle.loads(pickle.dumps(cache)), plain

    def decode(self, at, cache, plain, n_q=1, counts=None):
        counts = [min(n_q, n, own) for n, own in zip(counts or [n_q] * cache.batch, cache.lengths, strict=True)]
        n_q, given = max(*counts, 1), self.chance.choice(self.features)
        q = torch.randn(cache.batch, 2 * HEADS, n_q, D)
        for b, n in enumerate(counts):
            q[b, :, n:] = torch.nan
        sinks = given.get("sinks")
        out, lse = tq.decode(q, cache, counts=counts, return_lse=True, **given)
        for b, n in enumerate(counts):
            assert not out[b, :, n:].any() and bool((lse[b, :, n:] == -torch.inf).all())
            if n:
                asked = features(**{name: value for name, value in given.items() if name != "sinks"})
                expected, expected_lse = plain.decode(b, q[b : b + 1, :, :n], asked, sinks)
                torch.testing.assert_close(out[b, :, :n].double(), expected[0], rtol=self.tolerance, atol=self.tolerance)
                torch.testing.assert_close(lse[b, :, :n].double(), expected_lse[0].double(), rtol=1e-5, atol=1e-5)

    def pages(self, cache, packed):
        """What sequences of so many packed tokens hold."""
        return [-(-tokens // cache.page) for tokens in packed]

    def check(self):
        """Codes and windows are those of quantizing all at once, bit for bit, and pages are held as often as counted."""
        for cache, plain in self.pairs:
            assert cache.lengths == [len(own) for own in plain.sequences]
            assert cache._sequences.table.page_counts.tolist() == self.pages(cache, [own.packed for own in plain.sequences])
            for b, own in enumerate(plain.sequences):
                for found, expected in zip(cache.windows(b), plain.ends(b), strict=True):
                    assert torch.equal(found, expected)
                if own.packed:
                    for found, expected in zip(cache.codes(b), plain.codes(b), strict=True):
                        assert found.shape == expected.shape
                        for part in ("codes", "scale", "zero", "code_sum", "log2_weight"):
                            one, other = getattr(found, part), getattr(expected, part)
                            assert (one is None and other is None) or torch.equal(one, other), part
        for pool in {cache._sequences.table.pool for cache, _ in self.pairs}:
            tables = [cache._sequences.table for cache, _ in self.pairs if cache._sequences.table.pool is pool]
            rows = [row[:held] for table in tables for row, held in zip(table.pages, table.page_counts, strict=True)]
            spare = [] if pool._spare is None else [np.array([pool._spare])]
            counted = np.bincount(np.concatenate([*rows, *spare]), minlength=len(pool.holders))
            assert counted.tolist() == pool.holders.tolist() and sorted(pool.free) == np.nonzero(counted == 0)[0].tolist()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_a_cache_equals_a_plain_one(s, seed, tmp_path):
    walk = Walk(s, seed, tmp_path / "cache.safetensors")
    for _ in range(60):
        walk.step()
        walk.check()
