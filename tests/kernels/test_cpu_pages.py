"""Pages written and read by C++ kernels, against the store in torch and the emulation."""

import math

import pytest
import torch
from factories import nan_filled
from paged import differs, filled, unlike
from plain_cache import SCHEMES as KEPT
from quantized import differences
from test_kv_cache_walk import Walk
from test_pages import BLOCKS, FEATURES, SCHEMES, dtype_of, head_dim_of

import tokquant as tq
from tokquant import kv_cache
from tokquant.features import Features
from tokquant.kernels.cpu import build, pages
from tokquant.kernels.cpu.pages import CpuPages
from tokquant.pages import ReferencePages

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")

# a kernel takes a second to build: tests share them by the head_dim and the type that a scheme is tested with
KIND = dict(kinds=(CpuPages,))


@pytest.fixture(autouse=True)
def kept_by_torch(monkeypatch):
    """Not here."""
    monkeypatch.setitem(kv_cache.STORES, "cpu", CpuPages)


WRITTEN = [pytest.param(name, marks=[] if name.startswith(("kv-", "fireq", "blocks", "static ch")) else pytest.mark.slow)
           for name in SCHEMES]  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_in_steps_is_what_the_definition_makes_of_all(name):
    s = SCHEMES[name]
    lengths, step = ((192, 128), 64) if name in BLOCKS else ((150, 83), 37)
    if name == "one block a tile":
        lengths, step = (256, 128), 128
    ours, theirs = filled(s, lengths, d=head_dim_of(s), dtype=dtype_of(s), step=step, kinds=(CpuPages, ReferencePages))
    assert unlike(ours, theirs) == []


@pytest.mark.parametrize(("name", "bits"), [("kv-int8", 8.125), ("kv-int4", 4.25), ("kv-int4-kivi", 5), ("kv-int2-kivi", 3)])
def test_a_page_takes_the_bits_that_the_scheme_says(name, bits):
    s = SCHEMES[name]
    store = CpuPages(
        s, kv_heads=2, head_dim=128, dtype=torch.float16, device=torch.device("cpu"), pages=3, page=128, scales=None
    )
    assert store.bits_per_value == bits


@pytest.mark.parametrize("name", ["kv-int8", "kv-int4"])
def test_tokens_of_zeros_and_what_is_not_finite_keep_their_weights(name):
    ours, theirs = (filled(SCHEMES[name], (40,), d=80, kv_heads=1, kinds=(kind,)) for kind in (CpuPages, ReferencePages))
    x = torch.randn(1, 1, 3, 80)
    x[0, 0, 0] = 0
    x[0, 0, 1] = 2.5  # one value
    x[0, 0, 2, 5] = math.nan
    for case in (ours, theirs):
        case.store.write(x, x, case.table, torch.tensor([13], dtype=torch.int32))
    one, other = (case.store.read(case.table[0], 40)[1] for case in (ours, theirs))
    assert differences(one, other) == []
    assert one.log2_weight[0, 0, 13] == -32, "next to nothing"
    out, _ = ours.attend(Features(scale=0.2))
    assert bool(out.isnan().all()), "what is not a number reaches the output"


def test_a_scale_that_does_not_fit_its_type_is_an_error():
    case = filled(SCHEMES["kv-int8"], (20,), d=80, kv_heads=1, **KIND)
    x = torch.full((1, 1, 2, 80), 1e8)
    with pytest.raises(ValueError, match=r"k: a scale of .* does not fit scale_dtype fp16"):
        case.store.write(x, x, case.table, torch.tensor([3], dtype=torch.int32))


def test_a_larger_pool_and_a_copied_page_hold_what_they_held():
    case = filled(SCHEMES["kv-int4"], (200,), d=32, kv_heads=1, **KIND)
    before = case.store.read(case.table[0], 200)
    case.store.grow(5)
    case.store.copy(int(case.table[0, 1]), 4)
    after = case.store.read(torch.tensor([int(case.table[0, 0]), 4]), 200)
    for one, other in zip(before, after, strict=True):
        assert differences(one, other) == []


@pytest.mark.parametrize("name", ["kv-int8", "kv-int4", "kv-int4-kivi", "kv-fp8", "a static tensor", "16 bits"])
def test_canonical_codes_are_stored_as_if_they_had_been_written(name):
    s = SCHEMES[name]
    case = filled(s, (96, 64), d=head_dim_of(s), dtype=dtype_of(s), **KIND)
    sizes = dict(kv_heads=2, head_dim=head_dim_of(s), dtype=dtype_of(s), device=torch.device("cpu"), pages=2, page=128)
    other = CpuPages(s, **sizes, scales=case.store.scales)
    for b, tokens in enumerate((96, 64)):
        other.store(case.table[b], 32, *case.store.read(case.table[b], tokens - 32))  # which comes to be overwritten
        other.store(case.table[b], 0, *case.store.read(case.table[b], tokens))
        for one, two in zip(case.store.read(case.table[b], tokens), other.read(case.table[b], tokens), strict=True):
            assert differences(one, two) == []


@pytest.mark.parametrize("name", WRITTEN)
def test_attention_agrees_with_the_emulation_and_with_float64_on_the_same_codes(name):
    s = SCHEMES[name]
    lengths = ((256, 128) if name == "one block a tile" else (192, 64)) if name in BLOCKS else (200, 131)
    shape = dict(lengths=lengths, d=head_dim_of(s), dtype=dtype_of(s))
    assert not differs(s, Features(scale=0.125, causal=True), **shape, **KIND)


BUILT = ("some queries", "three heads to one", "as many queries as keys", "one key", "more queries than keys", "everything")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BUILT else pytest.mark.slow) for name in FEATURES if name != "small pages"]
)
def test_features_agree(name):
    shape, given = FEATURES[name]
    features = Features(**({"scale": 0.125} | given))
    assert not differs(SCHEMES["kv-int4"], features, **({"lengths": (200, 131), "d": 32} | shape | {"page": 128} | KIND))


@pytest.mark.parametrize("left", [None, 0, 100, 2500, 2**62])
def test_long_sequences_are_read_in_chunks_that_are_merged(left):
    features = Features(scale=0.2, causal=True, window=None if left is None else (left, None))
    assert not differs(SCHEMES["kv-int4"], features, lengths=(4500, 2048), n_q=3, d=32, **KIND)


def test_a_window_in_chunks_is_the_same_bits_in_any_batch():
    case = filled(SCHEMES["kv-int4"], (9000, 4200), n_q=3, d=32, **KIND)
    for left in (3, 2048, 4100):
        features = Features(scale=0.2, causal=True, window=(left, None))
        every, _ = case.attend(features)
        one, _ = case.store.attention(case.q[1:], case.table[1:], case.lengths[1:], features)
        assert torch.equal(every[1:], one)


def test_queries_stand_behind_keys_that_are_elsewhere():
    offset = torch.tensor([0, 40], dtype=torch.int32)
    features = Features(scale=0.2, causal=True, window=(100, None))
    assert not differs(SCHEMES["kv-int4"], features, offset, lengths=(160, 96), n_q=5, d=32, **KIND)


def test_a_sequence_without_keys_gives_zero_and_minus_infinity():
    case = filled(SCHEMES["kv-int4"], (130, 0), d=32, **KIND)
    out, lse = case.attend(Features(scale=0.2, causal=True))
    assert torch.equal(out[1], torch.zeros_like(out[1])) and bool((lse[1] == -math.inf).all())
    assert bool(lse[0].isfinite().all())


def test_garbage_beyond_the_last_key_does_not_show():
    for s in (SCHEMES[name] for name in ("16 bits", "kv-int4", "kv-int4-kivi")):
        case = filled(s, (32,), d=head_dim_of(s), dtype=dtype_of(s), **KIND)
        before = case.attend(Features(scale=0.2, causal=True))
        x = torch.full((1, 2, 32, head_dim_of(s)), math.nan, dtype=case.q.dtype)
        case.store.write(x, x, case.table, torch.tensor([32], dtype=torch.int32))
        assert all(torch.equal(a, b) for a, b in zip(before, case.attend(Features(scale=0.2, causal=True)), strict=True))
        case.lengths += 32
        assert bool(case.attend(Features(scale=0.2, causal=True))[0].isnan().all())


@pytest.mark.parametrize("name", ["kv-int4", "kv-int4-kivi"])
def test_a_cache_on_these_pages_decodes_as_one_in_torch_does(name):
    outs = []
    for backend in ("cpu", "reference"):
        generator = torch.Generator().manual_seed(5)
        cache = tq.KVCache(name, batch=2, kv_heads=1, head_dim=32, backend=backend)
        for n in (170, 1, 9):
            q, k, v = (torch.randn(2, heads, n, 32, generator=generator).half() for heads in (2, 1, 1))
            cache.append(k, v)
        outs.append(tq.decode(q, cache, window=(140, None), sinks=torch.zeros(2)))
    assert (outs[0] - outs[1]).abs().max() < 0.01


@pytest.mark.parametrize(
    "name, dtype, d",
    [("kv-int8", torch.float16, 80), ("kv-int4-kivi", torch.float16, 64), ("kv-int4-kivi", torch.float32, 64)],
)
def test_steps_of_decoding_go_on_where_pages_moved_and_features_or_instructions_changed(name, dtype, d, monkeypatch):
    """What a step keeps for the next is asked of another store, and of one that never kept anything."""
    sizes = dict(batch=2, kv_heads=1, head_dim=d, dtype=dtype)
    ours, theirs = (tq.KVCache(name, **sizes, backend=backend) for backend in ("cpu", "reference"))
    for step, n in enumerate((100, 1, 1, 200, 1, 1, 1)):  # pages are full, and move, in the fourth and the last
        q, k, v = (torch.randn(2, heads, n, d, dtype=dtype) for heads in (2, 1, 1))
        for cache in (ours, theirs):
            cache.append(k, v)
        if step == 5:
            monkeypatch.setenv(build.CHOICE, "portable")
        for given in ({}, {"window": (50, None)}, {"scale": 0.3}, {"softcap": 5.0}, {}):
            out, expected = (tq.decode(q[:, :, -1:], cache, **given) for cache in (ours, theirs))
            assert (out - expected).abs().max() < 0.01, (step, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["kv-int4", "kv-int4-kivi"])
def test_a_step_like_the_last_one_prepares_only_its_queries(name, dtype, monkeypatch):
    cache = tq.KVCache(name, batch=1, kv_heads=2, head_dim=64, dtype=dtype, backend="cpu")
    cache.append(*(torch.randn(1, 2, 200, 64, dtype=dtype) for _ in "kv"))
    q = torch.randn(1, 4, 1, 64, dtype=dtype)
    kept, expected = q.clone(), tq.decode(2 * q, cache)
    tq.decode(q, cache)
    monkeypatch.setattr(pages, "queries", None)  # which quantizes Q where nothing was kept
    assert torch.equal(tq.decode(2 * q, cache), expected) and torch.equal(q, kept)


@pytest.mark.parametrize("elsewhere", [torch.float64, torch.bfloat16, "meta"], ids=str)
@pytest.mark.parametrize("name", ["kv-int4", "kv-int4-kivi"])
def test_a_default_type_or_device_of_torch_changes_nothing(name, elsewhere, tmp_path):
    """Kernels write float32 to where they are told: less room than that would be written over."""
    tensors = [torch.randn(2, heads, n, 32).half() for n in (170, 90, 1) for heads in (4, 2, 2)]

    def decoded():
        cache = tq.KVCache(name, batch=2, kv_heads=2, head_dim=32, backend="cpu")
        yield from tq.decode(tensors[0], cache, counts=0, return_lse=True)
        for q, k, v in zip(*[iter(tensors)] * 3, strict=True):
            cache.append(k, v)
            yield from tq.decode(q, cache, return_lse=True)
        cache.truncate(150)
        cache.save(tmp_path / "cache")
        yield from tq.decode(q, tq.KVCache.load(tmp_path / "cache", backend="cpu"), counts=[1, 0], return_lse=True)
        yield from tq.decode(q, cache.fork([1, 0]), return_lse=True, backend="reference")

    expected = list(decoded())
    try:
        torch.set_default_device("meta") if elsewhere == "meta" else torch.set_default_dtype(elsewhere)
        found = list(decoded())
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_sequences_of_which_none_has_a_token_come_out_as_nothing(monkeypatch):
    case = filled(SCHEMES["kv-int8"], (20, 20), d=80, **KIND)
    case.lengths.zero_()
    monkeypatch.setattr(torch, "empty", nan_filled)  # what is not written would show
    out, lse = case.attend(Features(scale=1.0))
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())


def test_pages_of_fewer_tokens_than_a_tile_are_refused_and_auto_takes_the_reference_with_a_warning():
    s = tq.QuantScheme(**SCHEMES["kv-int4"].model_dump(exclude={"cache"}), cache={"page": 64})
    with pytest.raises(tq.UnsupportedError, match=r"cache\.page: 64 tokens .* use page: 128"):
        tq.KVCache(s, batch=1, kv_heads=1, head_dim=32, backend="cpu")
    with pytest.warns(UserWarning, match=r"by the reference, many times slower: .*use page: 128") as caught:
        assert tq.KVCache(s, batch=1, kv_heads=1, head_dim=32).backend == "reference"
    assert caught[0].filename == __file__
    case = filled(SCHEMES["kv-int8"], (20,), d=80, **KIND)
    for given in ({"mask": torch.ones(1, 4, 1, 20, dtype=torch.bool)}, {"sinks": torch.zeros(4)}):
        with pytest.raises(tq.UnsupportedError, match="mask, bias, sinks"):
            case.attend(Features(scale=1.0, **given))


class WalkOnCpu(Walk):
    tolerance = 0.03  # a code of P may fall on the other side of a tie
    backend = "cpu"
    features = Walk.features[:1]  # each makes two kernels


@pytest.mark.parametrize("name", ["kv-int4", "KIVI in 2 bits, no windows", "FireQ's precisions"])
def test_whatever_happens_to_a_cache_on_these_pages_it_equals_a_plain_one(name, tmp_path):
    walk = WalkOnCpu(KEPT[name], 0, tmp_path / "cache.safetensors")
    for _ in range(40):
        walk.step()
        walk.check()
