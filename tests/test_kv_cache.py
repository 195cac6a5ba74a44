"""A KV cache: the codes of quantizing all at once, the bits it says, and errors that leave it as it was."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.multiprocessing  # its ForkingPickler shares tensors
from factories import qkv, scheme
from plain_cache import SCHEMES, scales_for, with_cache

import tokquant as tq
from tokquant import kv_cache
from tokquant.pages import ReferencePages
from tokquant.quantize import quantize_operands
from tokquant.schemes import preset
from tokquant.schemes.appending import check_append_only, unit

H, D = 2, 32


def cache_of(s="kv-int4", batch=1, dtype=torch.float32, **rest):
    return tq.KVCache(s, batch=batch, kv_heads=H, head_dim=D, dtype=dtype, **rest)


def tokens(n, batch=1, dtype=torch.float32):
    return tuple((torch.randn(batch, H, n, D) + 0.5).to(dtype) for _ in range(2))


def append_in(cache, k, v, chunks):
    first = 0
    for n in chunks:
        cache.append(k[:, :, first : first + n], v[:, :, first : first + n], positions=first)
        first += n
    assert first == k.shape[2]


def state(cache):
    """All that can be told of a cache."""
    known = [cache.lengths, cache.free_pages, cache.memory]
    for b in range(cache.batch):
        known += [x.tolist() for x in cache.windows(b)]
        known += [codes.dequantize().tolist() for codes in cache.codes(b)] if cache._sequences.packed[b] else []
    return known


# ---------------------------------------------------------------------- codes and attention


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["kv-int8", "kv-int4", "FireQ's precisions", "none", "V in blocks under unsigned P"])
def test_decoding_is_attention_on_the_codes_of_quantizing_all_at_once(name, dtype):
    s = SCHEMES.get(name) or preset(name)
    s = tq.QuantScheme(**s.model_dump(exclude={"cache"}))
    q, k, v = (x.to(dtype) for x in qkv(320, heads=2 * H, kv_heads=H, d=D))
    cache = cache_of(s, dtype=dtype)
    append_in(cache, k, v, [70, 1, 1, 1, 55, 128, 64])
    for given in ({}, {"window": (100, 0)}, {"softcap": 3.0, "scale": 0.3}):
        expected = tq.attention(q, k, v, s, causal=True, backend="reference", return_lse=True, **given)
        for found, right in zip(tq.decode(q, cache, return_lse=True, **given), expected, strict=True):
            assert torch.equal(found, right)


@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_a_chunk_sees_the_cache_and_itself_as_one_prefill_does(s):
    scales = scales_for(s, H, D)
    q, k, v = qkv(150, heads=2 * H, kv_heads=H, d=D)
    whole, chunked = cache_of(s, scales=scales), cache_of(s, scales=scales)
    whole.append(k, v)
    expected = tq.decode(q, whole)
    for rows in (slice(0, 150 - 64), slice(150 - 64, 150)):
        chunked.append(k[:, :, rows], v[:, :, rows])
    found = tq.decode(q[:, :, rows], chunked)
    torch.testing.assert_close(found, expected[:, :, rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", [16, 128, 1024])
def test_the_page_changes_no_number(page):
    q, k, v = qkv(200, heads=H, d=D)
    cache, other = (cache_of(with_cache("kv-int4", page=size)) for size in (page, 64))
    for each in (cache, other):
        append_in(each, k, v, [31, 1, 100, 68])
    assert torch.equal(tq.decode(q, cache), tq.decode(q, other))


@pytest.mark.parametrize("s", [preset("kv-int4"), SCHEMES["KIVI in small blocks"]], ids=["kv-int4", "KIVI"])
def test_strides_and_later_changes_of_the_callers_tensors_do_not_matter(s):
    k, v = tokens(70, batch=2)
    plain, cache = cache_of(s, batch=2), cache_of(s, batch=2)
    plain.append(k, v)
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    cache.append(*given)
    for x in given:
        x.zero_()
    assert state(cache) == state(plain)


@pytest.mark.parametrize("name", ["kv-int4", "kv-int4-kivi"])
def test_a_hundred_thousand_tokens_in_mixed_chunks_are_those_of_one_shot(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    n, written, grown = 100_000, [], []
    write, grow = ReferencePages.write, ReferencePages.grow
    monkeypatch.setattr(ReferencePages, "write", lambda *a: (written.append(a[1].shape[2]), write(*a)))
    monkeypatch.setattr(ReferencePages, "grow", lambda *a: (grown.append(a[1]), grow(*a)))
    k, v = (torch.randn(1, 1, n, 32, generator=generator, dtype=torch.float32).half() for _ in range(2))
    cache = tq.KVCache(name, batch=1, kv_heads=1, head_dim=32)
    chunks = []
    while sum(chunks) < n:
        size = [1, 1, 2, 7, 33, 250, 1500][int(torch.randint(7, (), generator=generator))]
        chunks.append(min(size, n - sum(chunks)))
    append_in(cache, k, v, chunks)
    packed = int(cache._sequences.packed[0])
    expected = quantize_operands(k[:, :, :packed], k[:, :, :packed], v[:, :, :packed], cache.scheme)[1:]
    for found, right in zip(cache.codes(0), expected, strict=True):
        for part in ("codes", "scale", "zero"):
            assert torch.equal(getattr(found, part), getattr(right, part))
    # no token is packed twice, and the pool is copied as often as it doubles: the time of a token does not depend on how many
    assert sum(written) == packed and len(grown) <= 11
    q = torch.randn(1, 1, 1, 32, generator=generator).half()
    whole = tq.KVCache(name, batch=1, kv_heads=1, head_dim=32)
    whole.append(k, v)
    assert torch.equal(tq.decode(q, cache), tq.decode(q, whole))


@pytest.mark.parametrize("s", ["kv-int4", "kv-int2-kivi"])
def test_autocast_changes_no_number(s):
    k, v = tokens(300)
    q = torch.randn(1, 2 * H, 3, D)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            cache = cache_of(s)
            cache.append(k, v)
            found.append([*tq.decode(q, cache, return_lse=True), cache.codes(0)[0].codes])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_torchs_default_device_is_of_no_account(s):
    (k, v), q, scales, found = tokens(300), torch.randn(1, 2 * H, 3, D), scales_for(s, H, D), []
    for default in ("cpu", "meta"):
        with torch.device(default):
            cache = cache_of(s, scales=scales)
            cache.append(k, v)
            found.append(tq.decode(q, cache))
    assert torch.equal(*found)


@pytest.mark.parametrize("s", ["kv-int4", "kv-int2-kivi"])
def test_a_cache_that_was_made_or_grew_in_inference_mode_goes_on_outside_of_it(s):
    with torch.inference_mode():
        made, origin = cache_of(s), cache_of(s)
        for cache in (made, origin):
            cache.append(*tokens(300))
        forked = origin.fork([0, 0])
    for cache in (made, forked):
        for n in (20, 1, 200):
            cache.append(*tokens(n, cache.batch))
        cache.truncate(130)
    assert (made.lengths, forked.lengths) == ([130], [130, 130])


def test_sequences_of_a_batch_do_not_see_each_other():
    k, v = tokens(60, batch=3)
    together, q = cache_of(batch=3), torch.randn(3, H, 1, D)
    together.append(k, v, counts=[60, 0, 21])
    together.append(k[:, :, :1], v[:, :, :1], counts=[1, 1, 0])
    out = tq.decode(q, together)
    for b, (n, more) in enumerate([(60, 1), (0, 1), (21, 0)]):
        alone = cache_of()
        for count in filter(None, (n, more)):
            alone.append(k[b : b + 1, :, :count], v[b : b + 1, :, :count])
        assert torch.equal(tq.decode(q[b : b + 1], alone), out[b : b + 1])


@pytest.mark.parametrize("name", ["kv-int4 with windows", "kv-int4 with a sink", "KIVI in small blocks"])
def test_sequences_that_are_not_as_long_fill_windows_of_their_own(name):
    together, alone = cache_of(SCHEMES[name], batch=3), [cache_of(SCHEMES[name]) for _ in range(3)]
    for n, counts in ((2, [2, 0, 0]), (40, [40, 40, 40]), (1, [1, 0, 1]), (30, [30, 7, 0])):
        k, v = tokens(n, batch=3)
        together.append(k, v, counts=counts)
        for b, count in enumerate(counts):
            if count:
                alone[b].append(k[b : b + 1, :, :count], v[b : b + 1, :, :count])
        assert together.lengths == [each.lengths[0] for each in alone]
        q, held = torch.randn(3, H, 1, D), [min(length, 1) for length in together.lengths]
        out = tq.decode(q, together, counts=held)
        for b in filter(held.__getitem__, range(3)):
            torch.testing.assert_close(out[b : b + 1], tq.decode(q[b : b + 1], alone[b]), rtol=1e-5, atol=1e-5)


def test_a_block_that_is_cut_goes_back_to_16_bits_from_the_page_that_it_is_in():
    cache = cache_of(SCHEMES["KIVI in small blocks"])
    cache.append(*tokens(120))
    before = [x.dequantize() for x in cache.codes(0)]
    cache.truncate(75)  # 3 of the sink, 64 packed in 4 pages, and 8
    for kept, codes in zip(cache.windows(0), before, strict=True):
        assert torch.equal(kept[:, :, 3:], codes[:, :, 64:72])


def test_what_follows_a_cut_has_a_page_of_its_own():
    cache = cache_of(capacity=4 * 128)
    cache.append(*tokens(130))
    cache.truncate(100)
    cache.append(*tokens(50))
    assert cache.free_pages == 2


def test_a_nan_stays_in_its_sequence_and_leaves_with_it():
    k, v = tokens(30, batch=2)
    v[0, 0, 7, 3] = torch.nan
    for s in ("kv-int4", SCHEMES["KIVI in small blocks"]):
        cache, q = cache_of(s, batch=2), torch.randn(2, H, 1, D)
        cache.append(k, v)
        out = tq.decode(q, cache)
        assert out[0, 0].isnan().any() and out[0, 1].isfinite().all() and out[1].isfinite().all()
        cache.truncate([7, 30])
        assert tq.decode(q, cache).isfinite().all()


def test_the_reference_reads_what_another_backend_keeps(monkeypatch):
    class Reversed(ReferencePages):
        """Pages in an order of their own."""

        def attention(self, q, table, lengths, features, *, offset=None, longest=None, deterministic=False):
            out, lse = super().attention(q, table, lengths, features, offset=offset)
            return out + 1, lse

    monkeypatch.setitem(kv_cache.STORES, "cpu", Reversed)
    k, v = tokens(40)
    q = torch.randn(1, H, 1, D)
    cache, reference = cache_of(backend="cpu"), cache_of(backend="reference")
    for each in (cache, reference):
        each.append(k, v)
    assert cache.backend == "cpu"
    assert torch.equal(tq.decode(q, cache, backend="reference"), tq.decode(q, reference))
    assert torch.equal(tq.decode(q, cache), tq.decode(q, reference) + 1)
    assert torch.equal(tq.decode(q, cache, backend="cpu"), tq.decode(q, cache))


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("s", "bits"),
    [("kv-fp8", 8), ("kv-int8", 8.125), ("kv-int4", 4.25), ("kv-int4-kivi", 5), ("kv-int2-kivi", 3),
     ("int-flash-half", 12.125), (SCHEMES["FireQ's precisions"], 4.0625)],
    ids=str,
)  # fmt: skip
def test_a_token_takes_the_bits_that_the_scheme_says(s, bits):
    made = tq.schemes.resolve(s)
    cache = tq.KVCache(made, batch=1, kv_heads=2, head_dim=128, scales=scales_for(made, 2, 128))
    assert cache.bits_per_value == bits == pytest.approx(sum(made.bits_per_value(128)[role] for role in "kv") / 2)
    n = 10 * cache.page + windows_of(cache)
    cache.append(*(torch.randn(1, 2, n, 128).half() for _ in range(2)))
    memory = cache.memory
    assert memory.packed == 10 * cache.page * 2 * 2 * 128 * bits / 8
    assert memory.packed + memory.slack + memory.windows == cache.nbytes
    assert memory.windows == 2 * 2 * 2 * 128 * cache._sequences.windows.slot_count


def windows_of(cache):
    return cache._sequences.windows.sink + cache._sequences.windows.recent


def test_slack_is_what_pages_have_room_for():
    cache = cache_of(capacity=1024)
    assert cache.memory.packed == 0 and cache.memory.slack == cache.nbytes
    cache.append(*tokens(128))
    assert cache.memory.packed == cache.memory.slack / 7
    twice = cache.fork([0, 0])
    assert twice.memory == cache.memory


def test_a_shared_page_is_copied_once_and_only_when_written():
    cache = cache_of(capacity=5 * 128)
    cache.append(*tokens(300))
    assert cache.free_pages == 2
    forked = cache.fork([0, 0])
    assert cache.free_pages == 2
    before = tq.decode(torch.ones(1, H, 1, D), cache)
    forked.append(*tokens(1, batch=2))
    assert cache.free_pages == 0
    assert torch.equal(tq.decode(torch.ones(1, H, 1, D), cache), before)
    with pytest.raises(tq.CacheFullError):
        forked.append(*tokens(100, batch=2))
    del forked
    assert cache.free_pages == 2


def test_a_page_in_use_by_both_is_never_written(monkeypatch):
    """Beam search: what one beam appends, the other does not see."""
    cache = cache_of()
    cache.append(*tokens(5))
    beams = cache.fork([0, 0])
    k, v = tokens(1, batch=2)
    beams.append(k, v)
    again = beams.fork([1, 1])
    again.append(*tokens(1, batch=2))
    values = beams.codes(0)[0].dequantize(), beams.codes(1)[0].dequantize()
    assert torch.equal(values[0][:, :, :5], values[1][:, :, :5]) and not torch.equal(values[0], values[1])
    assert torch.equal(again.codes(0)[0].dequantize()[:, :, :6], values[1])


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("s", "parts"),
    [
        ("int8", ["k.smooth: mean is over all tokens, later ones included", "a cache takes static", "v.smooth: mean"]),
        ("fp8", ["k.granularity: a dynamic scale a head covers later tokens too; use scale: static, or", "v.granularity"]),
        ("fireq", ["balance: rope_pairs takes its factors from all keys", "{rope_pairs: {scale: static}}", "'fireq'"]),
        ("int4", ["q.smooth: block_mean multiplies K in 16 bits"]),
        (
            scheme("int8", "int8", "int8", "int8", balance="channel"),
            ["balance: channel takes its factors", "{channel: {scale:"],
        ),
        (scheme("int8", "int8 channel", "int8", "int8"), ["k.granularity: a dynamic scale a channel", "channel_block"]),
        (scheme("int8", "int8 tensor", "int8", "int8"), ["k.granularity: a dynamic scale a tensor", "token, group or block ("]),
        (scheme("int8 tensor", "int8", "int8", "int8"), ["q.granularity: tensor spans the sequences of a batch"]),
        (scheme("int8", "int8 block:256", "int8", "int8"), ["cache.page: a page of 128 tokens", "use page: 256"]),
        (scheme("int8", "int8 block:1024", "int8", "int8"), ["cache.page: a page of 128 tokens", "use page: 1024"]),
        (
            scheme("int8", "int8 block:4096", "int8", "int8"),
            ["cache.page: a block of 4096 tokens does not fit a page; at most"],
        ),
        (scheme("int8", "int8", "int8 group:64", "fp16"), ["v.granularity: a group of 64 channels", "head_dim 32"]),
    ],
    ids=[
        "mean",
        "head",
        "rope_pairs",
        "block_mean",
        "channel balance",
        "channel",
        "tensor",
        "q a tensor",
        "page",
        "largest block",
        "block",
        "group",
    ],
)
def test_a_scheme_that_sees_later_tokens_is_refused_with_what_works(s, parts):
    with pytest.raises(tq.SchemeError) as error:
        cache_of(s)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    "s",
    [scheme("fp16 tensor", "fp16 head", "bf16 channel", "fp16"),
     scheme("int8 tensor static", "int8 head static", "int8 channel static", "int8")],
    ids=["floats", "static"],
)  # fmt: skip
def test_a_scheme_without_dynamic_scales_sees_no_later_tokens(s):
    check_append_only(s)


@pytest.mark.parametrize(
    ("k", "v", "together"),
    [("int8", "int4 group:16", 1), ("int8", "int8 channel static", 1), ("fp16 block:64", "int8", 1),
     ("int8 block:64", "fp16", 64), ("int4 channel_block:32", "int4 block:64", 64)],
)  # fmt: skip
def test_tokens_under_one_scale_are_packed_together(k, v, together):
    assert unit(scheme("int8", k, v, "int8")) == together


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(batch=0), ValueError, "batch: 0 is not a whole number from 1"),
        (dict(kv_heads=2.0), ValueError, "kv_heads: 2.0 is not"),
        (dict(head_dim=True), ValueError, "head_dim: True is not"),
        (dict(capacity=0), ValueError, "capacity: 0 is not"),
        (dict(dtype=torch.int8), TypeError, "dtype: .*torch.float16, torch.bfloat16 or torch.float32"),
        (dict(backend="gpu"), ValueError, "backend: 'gpu' is not valid"),
        (dict(device="gpu"), ValueError, "device: 'gpu' is none that torch has here"),
        (dict(device="xla"), ValueError, "device: 'xla' is none that torch has here"),
        (dict(device="meta"), ValueError, "device: 'meta' keeps no numbers"),
        (dict(scheme="kv-fp8"), tq.ScalesError, "scales: scheme 'kv-fp8' is static and needs k_scale, v_scale"),
        (dict(scheme="kv-int3"), tq.SchemeError, "no preset 'kv-int3'.*did you mean"),
    ],
)
def test_a_cache_that_cannot_be_made_says_why(changes, error, message):
    given = dict(scheme="kv-int4", batch=1, kv_heads=H, head_dim=D) | changes
    with pytest.raises(error, match=message):
        tq.KVCache(given.pop("scheme"), **given)


def test_sizes_are_whole_numbers_of_any_type():
    cache = tq.KVCache("kv-int4", batch=np.int64(2), kv_heads=torch.tensor(H), head_dim=np.int32(D), capacity=np.int64(500))
    assert cache.batch == 2 and type(cache.batch) is int and cache.forget(np.int64(3)) == [0, 0]


def test_a_backend_that_keeps_no_pages_is_refused(monkeypatch):
    monkeypatch.delitem(kv_cache.STORES, "triton", raising=False)
    with pytest.raises(tq.UnsupportedError, match=r"backend: 'triton' keeps no pages; use auto or one of .*reference"):
        cache_of(backend="triton")


def test_scales_of_other_heads_are_refused():
    s = preset("kv-fp8")
    with pytest.raises(tq.ScalesError, match=r"layer\.k_scale: shape \[3, 1, 1\] does not fit k"):
        cache_of(s, scales=scales_for(s, 3, D))


WRONG = {
    "another batch": (dict(k=tokens(3, 2)[0]), ValueError, r"k: shape \[2, 2, 3, 32\] does not fit.*; give \[3, 2, tok"),
    "heads": (dict(v=torch.ones(3, 1, 3, D)), ValueError, r"v: shape \[3, 1, 3, 32\] does not fit the cache"),
    "head_dim": (dict(k=torch.ones(3, H, 3, 16)), ValueError, r"k: shape \[3, 2, 3, 16\] does not fit"),
    "no tokens": (dict(k=torch.ones(3, H, 0, D)), ValueError, r"k: shape \[3, 2, 0, 32\] is empty"),
    "k and v": (dict(v=torch.ones(3, H, 4, D)), ValueError, r"v: shape \[3, 2, 4, 32\] is not that of k"),
    "three dimensions": (dict(k=torch.ones(3, H, D)), ValueError, "k: shape .* has 3 dimensions"),
    "a type": (dict(k=torch.ones(3, H, 3, D).half()), TypeError, "k: torch.float16, and the cache is of torch.float32"),
    "a device": (dict(v=torch.ones(3, H, 3, D, device="meta")), ValueError, "v: on meta, and the cache on cpu"),
    "a list": (dict(k=[1.0]), TypeError, "k: a list; give a torch.Tensor"),
    "a gradient": (dict(v=torch.ones(3, H, 3, D).requires_grad_()), RuntimeError, "v: requires grad"),
    "a position too far": (dict(positions=21), ValueError, "positions: 21 for sequence 0, whose next token is at 20"),
    "a position again": (dict(positions=[20, 19, 20]), ValueError, "positions: 19 for sequence 1, whose next token is at 20"),
    "two positions": (dict(positions=[20, 20]), ValueError, r"positions: \[20, 20\]; give a whole number, or 3, one for each"),
    "more than there are": (dict(counts=[1, 4, 1]), ValueError, "counts: 4 for sequence 1; give 0 to 3"),
    "a negative count": (dict(counts=-1), ValueError, "counts: -1 for sequence 0; give 0 to 3"),
    "half a token": (dict(counts=[1, 0.5, 1]), ValueError, "counts: .*; give a whole number"),
    "truths": (dict(counts=[True, True, False]), ValueError, "counts: .*; give a whole number"),
    "counts without numbers": (dict(counts=torch.ones(3, device="meta")), ValueError, "counts: a Tensor; give a whole number"),
    "words": (dict(counts="all"), ValueError, "counts: 'all'; give a whole number"),
    "more than fits": (dict(k=torch.ones(3, H, 300, D), v=torch.ones(3, H, 300, D)), tq.CacheFullError, "full: 27 more"),
    "a scale that does not fit": (dict(k=torch.full((3, H, 3, D), 1e9)), ValueError, "k: a scale of 3.771e.08 does not fit"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_an_append_that_is_refused_changes_nothing(changes, error, message):
    cache = cache_of(with_cache("kv-int4", sink=4, page=32), batch=3, capacity=200)
    cache.append(*tokens(20, batch=3))
    before, (k, v) = state(cache), tokens(3, batch=3)
    with pytest.raises(error, match=message):
        cache.append(**dict(k=k, v=v) | changes)
    assert state(cache) == before
    cache.append(k, v, positions=20)
    assert cache.lengths == [23, 23, 23]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.truncate(21), "lengths: 21 for sequence 0; give 0 to 20"),
        (lambda c: c.truncate([5, -1]), "lengths: -1 for sequence 1; give 0 to 20"),
        (lambda c: c.truncate([5]), r"lengths: \[5\]; give a whole number, or 2"),
        (lambda c: c.fork([2]), r"sequences: \[2\]; there are sequences 0 to 1"),
        (lambda c: c.fork([]), r"sequences: \[\]; give numbers"),
        (lambda c: c.fork([0.0]), r"sequences: \[0.0\]; give numbers"),
        (lambda c: c.evict(-1), "sequences: -1; there are"),
        (lambda c: c.evict(torch.tensor([[0]])), "sequences: a Tensor; give numbers"),
        (lambda c: c.codes(2), "sequences: 2; there are sequences 0 to 1"),
        (lambda c: c.windows([0, 1]), r"sequence: \[0, 1\]; give the number of one sequence"),
    ],
)
def test_what_no_sequence_has_is_refused_and_changes_nothing(call, message):
    cache = cache_of(batch=2)
    cache.append(*tokens(20, batch=2))
    before = state(cache)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert state(cache) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(cache="kv-int4"), TypeError, "cache: a str; give a tokquant.KVCache"),
        (dict(q=[1]), TypeError, "q: a list"),
        (dict(q=torch.ones(1, H, 1, D)), ValueError, r"q: shape \[1, 2, 1, 32\] .*give \[2, a multiple of 2, tokens, 32\]"),
        (dict(q=torch.ones(2, 3, 1, D)), ValueError, r"q: shape \[2, 3, 1, 32\]"),
        (dict(q=torch.ones(2, H, 1, D).half()), TypeError, "q: torch.float16, and the cache is of torch.float32"),
        (dict(q=torch.ones(2, H, 1, D, device="meta")), ValueError, "q: on meta"),
        (
            dict(q=torch.ones(2, H, 4, D)),
            ValueError,
            "q: 4 queries for sequence 1, which has 3 tokens; append their keys first",
        ),
        (dict(counts=[1, 2]), ValueError, "counts: 2 for sequence 1; give 0 to 1"),
        (dict(backend="triton"), ValueError, "backend: 'triton'; the cache is kept by reference"),
        (dict(scale=torch.inf), ValueError, "scale: inf is not finite"),
        (dict(window=3), ValueError, "window: 3 is not"),
        (dict(softcap=-1.0), ValueError, "softcap: -1.0"),
        (dict(sinks=torch.zeros(3)), ValueError, r"sinks: shape \[3\] is not \[2\]"),
    ],
)
def test_a_decode_that_cannot_be_is_refused(changes, error, message):
    cache = cache_of(batch=2, backend="reference")
    cache.append(*tokens(20, batch=2), counts=[20, 3])
    with pytest.raises(error, match=message):
        tq.decode(**dict(q=torch.ones(2, H, 1, D), cache=cache) | changes)


def test_a_sequence_of_nothing_gives_zero():
    cache, q = cache_of(batch=2), torch.randn(2, H, 1, D)
    with pytest.raises(ValueError, match="q: 1 queries for sequence 0, which has 0 tokens"):
        tq.decode(q, cache)
    out, lse = tq.decode(q, cache, counts=0, return_lse=True, sinks=torch.zeros(H))
    assert not out.any() and bool((lse == -torch.inf).all())


def test_what_is_kept_can_be_read():
    text = repr(cache_of(batch=2))
    assert text == "KVCache('kv-int4', 2 sequences, 0 tokens of 2 heads of 32 channels, 5 bits a value, reference on cpu)"


AGAIN = {
    "copy": copy.copy,
    "deep": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "queue": lambda x: pickle.loads(ForkingPickler.dumps(x)),
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
@pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES)
def test_a_copy_goes_on_by_itself(s, again):
    cache, q = cache_of(s, batch=3, scales=scales_for(s, H, D)), torch.randn(3, 2 * H, 1, D)
    cache.append(*tokens(300, batch=3), counts=[300, 0, 7])
    copied, before = again(cache), tq.decode(q, cache, counts=[1, 0, 1])
    cache.append(*tokens(3, batch=3))
    assert copied.lengths == [300, 0, 7] and copied.backend == cache.backend
    assert torch.equal(tq.decode(q, copied, counts=[1, 0, 1]), before)
    copied.append(*tokens(70, batch=3))
    assert copied.lengths == [370, 70, 77] and cache.lengths == [303, 3, 10]


def test_a_pickled_cache_has_the_same_capacity_or_room_for_the_pages_that_it_shared():
    cache = cache_of(capacity=256, backend="reference")
    cache.append(*tokens(200))
    again = pickle.loads(pickle.dumps(cache))
    assert (again.backend, again.free_pages, again.memory) == ("reference", cache.free_pages, cache.memory)
    forks = pickle.loads(pickle.dumps(cache.fork([0, 0])))
    assert forks.lengths == [200, 200] and forks.free_pages == 0
    with pytest.raises(tq.CacheFullError):
        forks.append(*tokens(100, batch=2))
