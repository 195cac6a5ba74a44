"""Pages reserved ahead of tokens: CUDA graphs append to them and attend, and a cache knows what they did."""

from weakref import WeakKeyDictionary

import pytest
import torch
from graphs import Graph
from plain_cache import SCHEMES, with_cache
from test_kv_cache_walk import SINKS, Walk
from test_transfer import NothingIsRead

import tokquant as tq
from tokquant.reservation import Reservation

HEADS, D = 1, 16
SMALL = with_cache("kv-int8", page=16)
FEATURES = dict(window=(20, 0), softcap=4.0, sinks=SINKS, scale=0.2)


def some(n, heads=HEADS, batch=2):
    return torch.randn(batch, heads, n, D).half()


def cache_of(scheme=SMALL, capacity=16 * 20, **rest):
    return tq.KVCache(scheme, batch=2, kv_heads=HEADS, head_dim=D, capacity=capacity, **{"backend": "triton"} | rest)


def pair(scheme=SMALL, tokens=(40, 9), **rest):
    """Two caches of the same tokens."""
    caches, k, v = (cache_of(scheme, **rest), cache_of(scheme, **rest)), some(max(tokens)), some(max(tokens))
    for cache in caches:
        cache.append(k, v, counts=list(tokens))
    return caches


class Step:
    """A step of decoding, captured."""

    def __init__(self, cache, monkeypatch, n=1, **features):
        self.q, self.k, self.v, self.features = some(n, 4 * HEADS), some(n), some(n), features
        beside = cache_of(cache.scheme)  # as a first step outside of a graph does: what is decided once is decided then
        beside.append(self.k, self.v)
        tq.decode(self.q, beside, **features)
        self.graph = Graph()
        with self.graph.capture(monkeypatch):
            cache.append(self.k, self.v)
            self.made = tq.decode(self.q, cache, return_lse=True, **features)

    def replay(self, beside=None):
        """Once more with other tokens, and the same beside without a graph."""
        for x in (self.q, self.k, self.v):
            x.copy_(torch.randn_like(x) + 0.5)
        self.graph.replay()
        if beside is not None:
            beside.append(self.k, self.v)
            expected = tq.decode(self.q, beside, return_lse=True, **self.features)
            for made, right in zip(self.made, expected, strict=True):
                torch.testing.assert_close(made, right, rtol=1e-3, atol=1e-3)


def assert_same(cache, beside):
    assert cache.lengths == beside.lengths
    for b in range(cache.batch):
        for made, right in zip(cache.codes(b), beside.codes(b), strict=True):
            assert torch.equal(made.codes, right.codes) and torch.equal(made.scale, right.scale)


# ---------------------------------------------------------------------- replays


@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "all"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("scheme", [SMALL, with_cache("kv-int4", page=16)], ids=lambda s: s.name)
def test_each_replay_goes_on_where_the_last_one_ended(scheme, n, features, monkeypatch):
    cache, beside = pair(scheme, tokens=(46, 15))
    cache.reserve(4 * n)
    step = Step(cache, monkeypatch, n, **features)
    assert cache.lengths == [46, 15]  # nothing happened yet
    for _ in range(4):
        step.replay(beside)
    assert_same(cache, beside)


def test_what_is_launched_holds_for_longer_sequences(monkeypatch):
    cache, beside = pair(tokens=(1, 13))
    cache.reserve(1, longest=100)
    step = Step(cache, monkeypatch)
    for count in (1, 2, 30):  # to the end of a page, beyond it, and several
        cache.reserve(count)
        for _ in range(count):
            step.replay(beside)
    assert_same(cache, beside)


def test_the_cache_changes_between_replays_and_the_graph_goes_on(monkeypatch):
    cache, beside = pair()
    cache.reserve(20, longest=90)
    step = Step(cache, monkeypatch)
    k, v = some(30), some(30)
    for change in (
        lambda x: x.truncate([38, 2]),
        lambda x: x.evict(0),
        lambda x: x.append(k, v, counts=[30, 1]),
        lambda x: x.append(k[:, :, :1], v[:, :, :1]),
        lambda x: x.forget(5),
        lambda x: x.fork([1, 1]),
        lambda x: x.append(k, v),
    ):
        for _ in range(2):
            step.replay(beside)
        change(cache), change(beside)
        assert_same(cache, beside)
        cache.reserve(3)
    step.replay(beside)
    assert_same(cache, beside)


def test_eager_steps_go_on_with_replays(monkeypatch):
    cache, beside = pair()
    cache.reserve(8)
    step = Step(cache, monkeypatch)
    for _ in range(4):
        step.replay(beside)
        k, v, q = some(1), some(1), some(1, 4 * HEADS)
        made, right = ((x.append(k, v, positions=x.lengths), tq.decode(q, x))[1] for x in (cache, beside))
        torch.testing.assert_close(made, right, rtol=1e-3, atol=1e-3)
    assert_same(cache, beside)
    assert torch.equal(tq.decode(q, cache, backend="reference"), tq.decode(q, beside, backend="reference"))


def test_replays_beyond_the_room_are_told_once_and_harm_nobody(monkeypatch):
    cache, beside = pair(tokens=(10, 3))
    fork = beside.fork([0, 1])
    cache.reserve(4)
    step = Step(cache, monkeypatch, 5)
    step.replay(beside), step.replay(), step.replay(), step.replay()
    with pytest.raises(tq.CacheFullError, match=r"appended more to sequence 0 than was reserved; it has its first 16 tokens"):
        cache.lengths  # noqa: B018
    assert cache.lengths == [16, 16] and cache.free_pages == 17
    cache.truncate([15, 8])
    assert_same(cache, beside)
    cache.reserve(40, longest=80)  # of which the graph knows nothing
    step.replay()
    with pytest.raises(tq.CacheFullError, match=r"before reserve\(\) got another longest"):
        cache.codes(0)
    assert_same(cache, beside)
    assert fork.lengths == [10, 3]


def test_a_replay_after_something_else_is_told(monkeypatch):
    cache, beside = pair()
    cache.reserve(4)
    step = Step(cache, monkeypatch)
    step.replay(beside)
    for each in (cache, beside):
        each.truncate([30, 9])
    step.replay()
    with pytest.raises(tq.CacheFullError, match=r"it has its first 30 tokens\. .* again after anything else"):
        cache.truncate([1, 1])
    assert_same(cache, beside)


def test_a_graph_from_before_another_longest_is_told_apart(monkeypatch):
    cache, _ = pair()
    cache.reserve(4, longest=64)
    former = Step(cache, monkeypatch)
    cache.reserve(4, longest=80)
    step = Step(cache, monkeypatch)
    former.replay(), step.replay()
    with pytest.raises(tq.CacheFullError, match=r"captured before reserve.* got another longest was replayed"):
        cache.lengths  # noqa: B018
    assert cache.lengths == [41, 10]


def test_a_step_without_room_waits_as_often_as_it_must(monkeypatch):
    cache, beside = pair()
    cache.reserve(4)
    Step(cache, monkeypatch)
    for each in (cache, beside):
        each.truncate([20, 5])
    read_lengths, waits = Reservation.read_lengths, []
    monkeypatch.setattr(Reservation, "read_lengths", lambda self: waits.append(self) or read_lengths(self))
    k, v, q = some(1), some(1), some(1, 4 * HEADS)
    cache.append(k, v), beside.append(k, v)
    assert not waits
    torch.testing.assert_close(tq.decode(q, cache), tq.decode(q, beside), rtol=1e-3, atol=1e-3)
    assert len(waits) == 2


def test_scales_that_do_not_fit_are_told_where_lengths_are(monkeypatch):
    cache, graph, x = cache_of(dtype=torch.float32), Graph(), torch.randn(2, HEADS, 1, D)
    cache.append(x, x)
    cache.reserve(4)
    with graph.capture(monkeypatch):
        cache.append(x, x)
    graph.replay()
    assert cache.lengths == [2, 2]
    x.fill_(1e8)  # a scale of which is more than float16 holds
    graph.replay()
    with pytest.raises(ValueError, match="a value that was appended is too large for scale_dtype"):
        cache.lengths  # noqa: B018
    assert cache.lengths == [3, 3]


# ---------------------------------------------------------------------- without a graph


def test_eager_steps_read_nothing_back_and_give_what_they_do_without_room():
    cache, beside = pair()
    free = cache.free_pages
    cache.reserve(6)
    for i in range(12):  # beyond the room as well
        k, v, q = some(1), some(1), some(1, 4 * HEADS)
        beside.append(k, v)
        if 0 < i < 6:
            with NothingIsRead(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(cache._sequences.store), "check", lambda self: None)  # on a GPU only of more tokens
                cache.append(k, v)
        else:
            cache.append(k, v)
        torch.testing.assert_close(tq.decode(q, cache), tq.decode(q, beside), rtol=1e-3, atol=1e-3)
    assert_same(cache, beside)
    assert cache.free_pages == beside.free_pages - 1 < free


def test_room_is_given_back_and_memory_counts_it_as_slack():
    cache, beside = pair()
    packed, free = cache.memory.packed, cache.free_pages
    cache.reserve(50)
    # of 90 and 59 tokens, and one for what is appended beyond
    assert cache.memory.packed == packed and cache.free_pages == 20 - 6 - 4 - 1
    cache.reserve(3)
    assert cache.free_pages == 20 - 6 - 4 - 1
    fork = cache.fork([1])
    assert cache.free_pages == free - 1 and fork.lengths == [9]
    cache.evict([0, 1])
    del fork
    assert cache.free_pages == 19 and beside.lengths == [40, 9]


def test_where_there_are_no_graphs_pages_are_held():
    cache = cache_of("kv-int8", backend="reference", capacity=128 * 6)
    cache.reserve(200)
    assert cache.free_pages == 2
    k, v = some(100), some(100)
    for _ in range(3):
        cache.append(k, v)
    assert cache.lengths == [300, 300] and cache.free_pages == 0
    with pytest.raises(tq.CacheFullError):
        cache.reserve(100)


def test_without_graphs_too_what_else_changes_the_cache_gives_pages_back():
    cache = cache_of("kv-int8", backend="reference", capacity=128 * 6)
    k, v = some(200), some(200)
    cache.reserve(300)
    assert cache.free_pages == 0
    cache.evict([0, 1])  # of which nothing was appended yet
    assert cache.free_pages == 6
    cache.reserve(300)
    fork = cache.fork([0])  # which shares no page that is empty
    assert cache.free_pages == 6
    cache.append(k, v), fork.append(k[:1], v[:1])
    assert cache.free_pages == 0 and cache.lengths == [200, 200] and fork.lengths == [200]


# ---------------------------------------------------------------------- what is refused


def test_what_cannot_be_captured_says_so_and_nothing_changes(monkeypatch):
    cache, beside = pair()
    x, empty = some(1), cache_of()
    for call in (lambda: cache.append(x, x), lambda: tq.decode(some(1, 4), empty)):
        with Graph().capture(monkeypatch), pytest.raises(tq.UnsupportedError, match=r"reserve\(\) has left no room"):
            call()
    cache.reserve(4)
    # before anything was captured, too: lengths would be looked at once
    with Graph().capture(monkeypatch), pytest.raises(tq.UnsupportedError, match="at every replay of a CUDA graph"):
        cache.append(x, x, positions=[40, 9])
    Step(cache, monkeypatch)
    for call in (
        lambda: cache.append(x, x, positions=[40, 9]),
        lambda: cache.append(x, x, counts=[1, 0]),
        lambda: cache.append(*[some(17)] * 2),
        lambda: cache.lengths,
        lambda: cache.reserve(1),
        lambda: cache.truncate(3),
        lambda: tq.decode(some(2, 4), cache, counts=[1, 2]),
    ):
        with Graph().capture(monkeypatch), pytest.raises(tq.UnsupportedError, match="at every replay of a CUDA graph"):
            call()
    assert_same(cache, beside)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (dict(tokens=0), ValueError, "tokens: 0 is not a whole number from 1 to 320"),
        (dict(tokens=10**9), ValueError, "tokens: 1000000000 is not a whole number from 1 to 320"),
        (dict(tokens=1, longest=40), ValueError, "longest: 40, and with tokens=1 a sequence may have 41"),
        (dict(tokens=1, longest=321), ValueError, "longest: 321 is not a whole number from 1 to 320"),
        (dict(tokens=200), tq.CacheFullError, "25 more pages of 16 tokens are needed, and 15 of 20 are free"),
    ],
)
def test_what_cannot_be_reserved_is_refused_and_nothing_changes(given, error, text):
    cache, beside = pair()
    cache.reserve(3)
    free = cache.free_pages
    with pytest.raises(error, match=text):
        cache.reserve(**given)
    assert cache.free_pages == free and cache._sequences._reserved
    assert_same(cache, beside)


@pytest.mark.parametrize(("tokens", "wanted"), [(200, 25), (130, 1)], ids=["too many", "all but the one that stays aside"])
def test_a_first_reserve_that_is_refused_takes_no_page(tokens, wanted):
    cache, beside = pair()
    with pytest.raises(tq.CacheFullError, match=f"{wanted} more page"):
        cache.reserve(tokens)
    assert cache.free_pages == beside.free_pages
    assert_same(cache, beside)


def test_a_captured_graph_is_not_silently_for_shorter_sequences(monkeypatch):
    cache, beside = pair()
    cache.reserve(8)
    step = Step(cache, monkeypatch)
    with pytest.raises(ValueError, match="9, so a sequence may have 49, and a CUDA graph was captured for 48; truncate or"):
        cache.reserve(9)
    step.replay(beside)
    assert_same(cache, beside)


def test_what_has_no_room_ahead_says_so():
    with pytest.raises(tq.UnsupportedError, match="capacity: None, so pages move as they grow; make the cache with capacity="):
        cache_of(capacity=None).reserve(1)
    with pytest.raises(tq.UnsupportedError, match="scheme 'kv-int4': it keeps tokens in 16 bits"):
        cache_of(SCHEMES["kv-int4 with a sink"]).reserve(1)


# ---------------------------------------------------------------------- in any order


class WalkWithRoom(Walk):
    """With graphs, of different numbers of tokens, that are replayed in any order as often as there is room, and more often."""

    backend = "triton"
    features = Walk.features[:2]

    def __init__(self, s, seed, path, monkeypatch):
        super().__init__(s, seed, path)
        self.monkeypatch, self.graphs, self.replays = monkeypatch, WeakKeyDictionary(), 0

    def step(self):
        super().step()
        at = self.chance.randrange(len(self.pairs))
        self.replay(*self.pairs[at])

    def pages(self, cache, packed):
        least, held = super().pages(cache, packed), cache._sequences.table.page_counts.tolist()
        return held if cache._sequences._reserved and held >= least else least

    def replay(self, cache, plain):
        tokens, beyond = self.chance.randint(1, 20), self.chance.random() < 0.3
        longest = None if cache in self.graphs else self.capacity // cache.page * cache.page
        try:
            cache.reserve(tokens, longest=longest)
        except (tq.CacheFullError, tq.UnsupportedError):  # loaded without a capacity
            return
        graphs, room = self.graphs.setdefault(cache, []), cache._sequences._reservation._capacity
        if len(graphs) < 3:
            x = torch.zeros(cache.batch, 2, self.chance.choice([1, 1, 3]), 16)
            graph = Graph()
            with graph.capture(self.monkeypatch):
                cache.append(x, x)
            graphs.append((x, graph))
        left = (room - cache.lengths).min()
        for _ in range(tokens):
            x, graph = self.chance.choice(graphs)
            n = x.shape[2]
            if n > left and not beyond:
                break
            left -= n
            x.copy_(torch.randn_like(x))
            graph.replay()
            self.replays += 1
            lengths = [len(own) for own in plain.sequences]
            plain.append(x, x, [min(n, int(most) - held) for held, most in zip(lengths, room, strict=True)])
        if left < 0:
            with pytest.raises(tq.CacheFullError):
                cache.lengths  # noqa: B018


WALKS = [("kv-int8, small pages", seed) for seed in range(4)] + [
    ("K per channel with zeros, static", seed) for seed in range(4)
]


@pytest.mark.parametrize(("name", "seed"), [WALKS[0], *(pytest.param(*walk, marks=pytest.mark.slow) for walk in WALKS[1:])])
def test_a_cache_with_graphs_equals_a_plain_one(name, seed, tmp_path, monkeypatch):
    walk = WalkWithRoom(SCHEMES[name], seed, tmp_path / "cache.safetensors", monkeypatch)
    for _ in range(12):
        walk.step()
        walk.check()
    assert walk.replays > 5
