"""Pages written and read by generated kernels in the interpreter, against the store in torch and the emulation."""

import math
from itertools import product

import pytest
import torch
from factories import INF, nan_filled, scheme
from paged import differs, filled, unlike, wrong
from quantized import differences

import tokquant as tq
from tokquant import kv_cache
from tokquant.features import Features
from tokquant.kernels import decode_launch as module
from tokquant.kernels import targets
from tokquant.kernels.cpu.pages import CpuPages
from tokquant.kernels.pages import TritonPages
from tokquant.pages import ReferencePages
from tokquant.schemes import preset

FIREQ = preset("fireq").model_copy(update={"balance": "none"})
SCHEMES = {
    **{name: preset(name) for name in ("kv-fp8", "kv-int8", "kv-int4", "kv-int4-kivi", "kv-int2-kivi")},
    "fireq without its balance": FIREQ,
    "fireq, calibrated": tq.QuantScheme(**FIREQ.model_dump() | {"balance": {"rope_pairs": {"scale": "static"}}}),
    "fireq, calibrated, less an offset, rotated": scheme(
        "fp8_e4m3", "int4 static_offset", "int4", "fp8_e4m3",
        rotate="hadamard", balance={"channel": {"scale": "static"}},
    ),
    "unsigned p on values of a token": scheme("int8", "int4", "int4", "uint8 row_block:64"),
    "int2 a token": scheme("int8", "int2 asymmetric", "int2", "int8 row_block:32"),
    "blocks of both with zeros, rotated": scheme(
        "int8", "int8 block:64 asymmetric", "int8 channel_block:64 asymmetric", "int8 row_block:64",
        rotate="hadamard", rotate_v="hadamard",
    ),
    "small blocks of k, unsigned p": scheme("int8", "int8 block:32", "int4 block:64", "uint8 row_block:32"),
    "one block a tile": scheme("int8 head", "int4 block:128 scale=fp8_e4m3", "int8 block:128", "int8 row_block:128"),
    "16 bits": scheme("fp16", "fp16", "fp16", "fp16"),
    "float32": scheme("fp32", "fp32", "fp32", "fp32"),
    "int4 queries, fp8 values": scheme("int4", "int4", "fp8_e4m3", "fp8_e4m3"),
    "groups of q and k, fp4 values": scheme("int4 group:16", "int4 group:16 asymmetric", "fp4_e2m1", "fp8_e4m3"),
    "int2 queries on int4": scheme("int2", "int4", "int8", "int8"),
    "static channels with zeros and offsets": scheme(
        "int8", "int8 channel asymmetric static static_offset", "int4 channel asymmetric static static_offset",
        "int8 row_block:64", rotate_v="hadamard",
    ),
    "static heads with zeros and offsets": scheme(
        "int8", "int8 head asymmetric static static_offset", "int4 asymmetric static_offset", "int8 row_block:64",
        normalizer="quantized",
    ),
    "a static tensor": scheme("int8", "int4 tensor static", "fp8_e4m3 tensor static", "fp8_e5m2"),
}  # fmt: skip
BLOCKS = {name for name, s in SCHEMES.items() if any(x.granularity.kind in ("block", "channel_block") for x in (s.k, s.v))}


def dtype_of(s):
    return torch.float16 if s.q.precision == "fp16" else torch.float32


def head_dim_of(s):
    """No power of two, as far as groups of 32 channels let it."""
    return 96 if s.v.granularity.size == 32 else 80


# ---------------------------------------------------------------------------- what is written


@pytest.mark.ptx
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_in_steps_is_what_the_definition_makes_of_all(name):
    s = SCHEMES[name]
    lengths, step = ((192, 128), 64) if name in BLOCKS else ((150, 83), 53)
    if name == "one block a tile":
        lengths, step = (256, 128), 128
    ours, theirs = filled(s, lengths, d=head_dim_of(s), dtype=dtype_of(s), step=step, kinds=(TritonPages, ReferencePages))
    assert unlike(ours, theirs) == []
    assert ours.store.nbytes == theirs.store.nbytes, "the bits that the scheme says, and no others"


@pytest.mark.parametrize(("name", "page"), [("kv-int8", 16), ("kv-int4", 32), ("kv-int4", 256)])
def test_tokens_are_appended_anywhere_in_a_page_of_any_size(name, page):
    ours, theirs = filled(SCHEMES[name], (45, 33, 1), step=13, page=page, d=32, kinds=(TritonPages, ReferencePages))
    assert unlike(ours, theirs) == []


def test_a_sequence_that_gets_nothing_keeps_what_it_has():
    case = filled(SCHEMES["kv-int4"], (37, 20), d=32, kv_heads=1)
    before = [x.codes.clone() for x in case.store.read(case.table[1], 20)]
    x = torch.randn(2, 1, 20, 32)
    counts = torch.tensor([20, 0], dtype=torch.int32)
    case.store.write(x, x, case.table, torch.tensor([37, 0], dtype=torch.int32), counts)
    assert all(torch.equal(x.codes, y) for x, y in zip(case.store.read(case.table[1], 20), before, strict=True))
    assert case.store.read(case.table[0], 57)[0].dequantize()[:, :, 37:].sub(x[:1]).abs().max() < 0.6


@pytest.mark.parametrize("name", ["kv-int8", "kv-int4", "fireq without its balance"])
def test_tokens_of_zeros_and_what_is_not_finite_keep_their_weights(name):
    stores = [filled(SCHEMES[name], (40,), d=32, kv_heads=1, kinds=(kind,)) for kind in (TritonPages, ReferencePages)]
    x = torch.randn(1, 1, 3, 32)
    x[0, 0, 0] = 0
    x[0, 0, 1] = 2.5  # one value
    x[0, 0, 2, 5] = math.nan
    for case in stores:
        case.store.write(x, x, case.table, torch.tensor([13], dtype=torch.int32))
    one, other = (case.store.read(case.table[0], 40)[1] for case in stores)
    assert differences(one, other) == []
    assert one.log2_weight[0, 0, 13] == -32, "next to nothing"
    out, _ = stores[0].attend(Features(scale=0.2))
    # the interpreter reads a NaN in fp8 as a number
    assert bool(out.isnan().all()) or one.spec.scale_dtype == "fp8_e4m3", "what is not a number reaches the output"
    out, _ = stores[0].attend(Features(scale=0.2, causal=True, window=(40 - 17, None)))
    assert bool(out.isfinite().all()), "nor those of queries that see only what comes after"


def test_a_scale_that_does_not_fit_its_type_is_an_error():
    case = filled(SCHEMES["kv-int8"], (20,), d=32, kv_heads=1)
    x = torch.full((1, 1, 2, 32), 1e8)
    with pytest.raises(ValueError, match=r"too large for scale_dtype.*k's fp16"):
        case.store.write(x, x, case.table, torch.tensor([3], dtype=torch.int32))
    case.store.check()


def test_a_larger_pool_and_a_copied_page_hold_what_they_held():
    case = filled(SCHEMES["kv-int4"], (100,), page=64, d=32, kv_heads=1)
    before = case.store.read(case.table[0], 100)
    case.store.grow(5)
    case.store.copy(int(case.table[0, 1]), 4)
    after = case.store.read(torch.tensor([int(case.table[0, 0]), 4]), 100)
    for one, other in zip(before, after, strict=True):
        assert differences(one, other) == []


@pytest.mark.parametrize("name", ["kv-int8", "kv-int4", "kv-int4-kivi", "kv-fp8", "a static tensor", "16 bits"])
def test_canonical_codes_are_stored_as_if_they_had_been_written(name):
    s = SCHEMES[name]
    case = filled(s, (96, 64), d=32, dtype=dtype_of(s))
    other = TritonPages(
        s, kv_heads=2, head_dim=32, dtype=dtype_of(s), device=torch.device("cpu"), pages=2, page=128, scales=case.store.scales
    )
    for b, tokens in enumerate((96, 64)):
        other.store(case.table[b], 32, *case.store.read(case.table[b], tokens - 32))  # which comes to be overwritten
        other.store(case.table[b], 0, *case.store.read(case.table[b], tokens))
        for one, two in zip(case.store.read(case.table[b], tokens), other.read(case.table[b], tokens), strict=True):
            assert differences(one, two) == []


# ---------------------------------------------------------------------------- attention


@pytest.mark.ptx
@pytest.mark.parametrize("name", SCHEMES)
def test_attention_agrees_with_the_emulation_and_with_float64_on_the_same_codes(name, monkeypatch):
    s = SCHEMES[name]
    lengths = ((256, 128) if name == "one block a tile" else (192, 64)) if name in BLOCKS else (200, 131)
    monkeypatch.setattr(module.torch, "empty", nan_filled)
    assert not differs(s, Features(scale=0.125, causal=True), lengths=lengths, dtype=dtype_of(s))


FEATURES = {
    "some queries": (dict(n_q=5), dict(causal=True)),
    "a chunk of queries": (dict(n_q=40), dict(causal=True)),
    "three heads to one": (dict(n_q=11, shared=3), dict(causal=True)),
    "as many queries as keys": (dict(n_q=70, lengths=(140, 70)), dict(causal=True)),
    "a window": (dict(n_q=5), dict(causal=True, window=(70, None))),
    "a window to both sides": (dict(n_q=14), dict(window=(20, 9))),
    "all keys": (dict(n_q=3), dict()),
    "softcap and scale": (dict(n_q=2), dict(causal=True, softcap=2.0, scale=0.4)),
    "a short window": (dict(n_q=2, lengths=(600, 131)), dict(causal=True, window=(9, None))),
    "a window of runs": (dict(n_q=3, lengths=(700, 131)), dict(causal=True, window=(300, None))),
    "everything": (dict(n_q=21, page=32), dict(causal=True, window=(120, None), softcap=3.0)),
    "small pages": (dict(page=16), dict(causal=True)),
    "large pages": (dict(page=256), dict(causal=True)),
    "head_dim 80": (dict(d=80), dict(causal=True)),
    "head_dim 33": (dict(d=33, n_q=2, page=64), dict(causal=True)),
    "one key": (dict(lengths=(1, 3)), dict(causal=True)),
    "more queries than keys": (dict(lengths=(3, 150), n_q=7), dict(causal=True)),
}  # fmt: skip


@pytest.mark.ptx
@pytest.mark.parametrize("name", FEATURES)
def test_features_agree_in_one_run_of_keys_and_in_several(name, monkeypatch):
    monkeypatch.setattr(module, "RUN", 128)
    shape, given = FEATURES[name]
    case = filled(SCHEMES["kv-int4" if len(name) % 2 else "kv-int8"], **{"lengths": (200, 131), "d": 32, **shape})
    for deterministic in (False, True):
        assert not wrong(case, Features(**({"scale": 0.125} | given)), deterministic=deterministic)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("name", ["kv-int4-kivi", "kv-fp8", "unsigned p on values of a token"])
def test_tiles_span_small_pages_whatever_the_product(name, page):
    s = SCHEMES[name]
    if name == "kv-int4-kivi":
        page = max(page, 32)
    lengths = (160, 96) if name in BLOCKS else (150, 83)
    assert not differs(s, Features(scale=0.2, causal=True), lengths=lengths, page=page, d=32, dtype=dtype_of(s))


@pytest.mark.parametrize("name", ["kv-int8", "kv-int4-kivi"])
def test_queries_stand_behind_keys_that_are_elsewhere(name):
    offset = torch.tensor([0, 40], dtype=torch.int32)
    features = Features(scale=0.2, causal=True, window=(100, None))
    assert not differs(SCHEMES[name], features, offset, lengths=(160, 96), n_q=5, d=32, dtype=dtype_of(SCHEMES[name]))


@pytest.mark.parametrize("window", [None, (95, None)], ids=["all keys", "a window"])
def test_runs_are_the_same_bits_for_a_sequence_in_any_batch_beside_any_other_queries(window, monkeypatch):
    monkeypatch.setattr(module, "RUN", 32)
    monkeypatch.setattr(module, "TOGETHER", 4)
    # the window of 60 queries begins in the sixth run, that of 5 in the eighth: four at once are the same four
    case = filled(SCHEMES["int2 a token"], (380, 330), d=32, n_q=60, kv_heads=1, shared=1)
    features = Features(scale=0.2, causal=True, window=window)
    every, every_lse = case.attend(features, deterministic=True)
    for queries in (60, 5):
        q, rest = case.q[1:, :, -queries:], dict(longest=330, deterministic=True)
        one, lse = case.store.attention(q, case.table[1:], case.lengths[1:], features, **rest)
        assert torch.equal(every[1:, :, -queries:], one) and torch.equal(every_lse[1:, :, -queries:], lse)


def test_a_run_is_whole_tiles_and_few_keys_where_a_gpu_waits_for_work():
    target = targets.DEFAULT

    def run(longest, programs, split):
        return module.Runs.of(longest, longest, programs, 128, target, split).keys

    assert run(131072, 8, None) == run(4096, 512, None) == 512
    long, short = run(131072, 8, 4), run(1000, 8, 4)
    assert long % 128 == short % 128 == 0 and 256 <= short < long and 8 * 131072 / long >= 4 * target.multiprocessors / 2
    assert run(131072, 10**6, 4) == 131072
    assert run(131072, 8, 8) < long < run(131072, 8, 1), "more programs have fewer keys each"


@pytest.mark.parametrize("split", [None, 1, 4, 8])
@pytest.mark.parametrize("programs", [1, 8, 10**4])
def test_runs_reach_from_wherever_a_window_begins_to_the_last_key_and_no_further_than_one_more(programs, split):
    for tile, seen in product((32, 128), (1, 255, 256, 1024, 4097, 10**5)):
        for longest in (max(seen, 10**4), 10**5):
            runs = module.Runs.of(longest, seen, programs, tile, targets.DEFAULT, split)
            for length in (longest, longest - 1, longest - tile // 2):
                first = max(0, length - seen) // runs.step * runs.step
                assert first + runs.count * runs.keys >= length, "all keys of the window are in a run"
            assert runs.keys % tile == runs.step % tile == 0
            assert (runs.count - 1) * runs.keys < seen + runs.step, "and one more at most has none"
            assert programs < 10**4 or split is None or runs.count == 1


def parts(monkeypatch):
    """Shapes of what is made for results from now on."""
    shapes, empty = [], torch.empty

    def noted(*size, **options):
        shapes.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(module.torch, "empty", noted)
    return shapes


@pytest.mark.parametrize(("deterministic", "most"), [(False, 1), (True, 2 + 4)], ids=["tuned", "deterministic"])
def test_a_window_of_a_long_cache_takes_the_programs_and_the_memory_of_a_short_one(deterministic, most, monkeypatch):
    monkeypatch.setattr(module, "RUN", 128)
    monkeypatch.setattr(module, "TOGETHER", 4)
    case = filled(SCHEMES["kv-int8"], (3000, 300), d=32, kv_heads=1, shared=1)
    whole, short = (Features(scale=0.2, causal=True, window=window) for window in (None, (200, None)))
    counts = {}
    for name, features in (("whole", whole), ("short", short)):
        made = case.store.prepare(case.q, case.table, case.lengths, features, longest=3000, deterministic=deterministic)
        counts[name] = made.runs.count
    assert counts["short"] <= most and counts["whole"] >= 8
    shapes = parts(monkeypatch)
    out, lse = case.attend(short, longest=3000, deterministic=deterministic)
    assert shapes[0] == (counts["short"], *case.q.shape), "parts are as many as runs"
    expected, expected_lse = case.emulated(short)
    assert (out - expected).abs().max() < 0.02 * expected.abs().max() and torch.allclose(lse, expected_lse, atol=1e-4)


def test_a_sequence_without_keys_gives_zero_and_minus_infinity():
    case = filled(SCHEMES["kv-int4"], (130, 0), d=32)
    for deterministic in (False, True):
        out, lse = case.attend(Features(scale=0.2, causal=True), deterministic=deterministic)
        assert torch.equal(out[1], torch.zeros_like(out[1])) and bool((lse[1] == -INF).all())
        assert bool(lse[0].isfinite().all())


def test_garbage_beyond_the_last_key_does_not_show():
    for name in ("16 bits", "kv-int4", "kv-int4-kivi"):
        case = filled(SCHEMES[name], (32,), d=32, dtype=dtype_of(SCHEMES[name]))
        before = case.attend(Features(scale=0.2, causal=True))
        x = torch.full((1, 2, 32, 32), math.nan, dtype=case.q.dtype)
        case.store.write(x, x, case.table, torch.tensor([32], dtype=torch.int32))
        assert all(torch.equal(a, b) for a, b in zip(before, case.attend(Features(scale=0.2, causal=True)), strict=True))
        case.lengths += 32
        assert bool(case.attend(Features(scale=0.2, causal=True))[0].isnan().all())


def test_mass_on_half_of_the_keys_is_kept_within_the_step_of_p():
    s = SCHEMES["kv-int8"]
    case = filled(s, (256,), kv_heads=1, shared=1, n_q=16)
    v = torch.zeros(1, 1, 256, 64)
    v[:, :, torch.randperm(256)[:128]] = 1
    case.store.write(torch.randn(1, 1, 256, 64), v, case.table, torch.tensor([0], dtype=torch.int32))
    q, k, _ = case.operands(0)
    p = (q.dequantize() @ k.dequantize().mT / 8).softmax(-1)
    out, _ = case.attend(Features(scale=0.125))
    most = 0.5 / 127 * p.amax(-1, keepdim=True) * 256 + 1e-3
    assert bool(((out - p @ v).abs() <= most).all())


# ---------------------------------------------------------------------------- the cache, and what is refused


@pytest.mark.parametrize("name", ["kv-int4", "kv-int4-kivi"])
def test_a_cache_on_these_pages_decodes_as_one_in_torch_does(name, monkeypatch):
    monkeypatch.setitem(kv_cache.STORES, "triton", TritonPages)
    outs = []
    for backend in ("triton", "reference"):
        generator = torch.Generator().manual_seed(5)
        cache = tq.KVCache(name, batch=2, kv_heads=1, head_dim=32, backend=backend)
        for n in (170, 1, 9):
            q, k, v = (torch.randn(2, heads, n, 32, generator=generator).half() for heads in (2, 1, 1))
            cache.append(k, v)
        outs.append(tq.decode(q, cache, window=(140, None), sinks=torch.zeros(2)))
    assert (outs[0] - outs[1]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (TritonPages, "backend: 'triton' needs a GPU, and the cache is on meta"),
        (CpuPages, "backend: 'cpu' keeps pages in memory, not on meta"),
    ],
)
def test_a_device_that_runs_no_kernel_is_refused_when_the_cache_is_made(store, said):
    options = dict(kv_heads=1, head_dim=32, dtype=torch.float16, device=torch.device("meta"), pages=1, page=128)
    with pytest.raises(tq.UnsupportedError, match=said):
        store(SCHEMES["kv-int8"], **options)


def test_what_no_kernel_appends_or_reads_is_said():
    options = dict(kv_heads=1, head_dim=32, dtype=torch.float32, device=torch.device("cpu"), pages=1)
    with pytest.raises(tq.SchemeError, match=r"k\.smooth"):
        TritonPages(preset("int8"), page=128, **options)
    with pytest.raises(tq.UnsupportedError, match="channel_block 256 is more than a kernel appends at once"):
        TritonPages(scheme("fp16", "int4 channel_block:256", "int4", "fp16", cache={"page": 256}), page=256, **options)
    case = filled(SCHEMES["kv-int8"], (20,), d=32)
    with pytest.raises(tq.UnsupportedError, match="mask, bias"):
        case.attend(Features(scale=1.0, mask=torch.ones(1, 4, 1, 20, dtype=torch.bool)))
    with pytest.raises(tq.UnsupportedError, match="sinks: kernels that read pages take none"):
        case.attend(Features(scale=1.0, sinks=torch.zeros(4)))
    with pytest.raises(tq.UnsupportedError, match="interpreter multiplies bf16 wrongly"):
        TritonPages(SCHEMES["16 bits"], page=128, **{**options, "dtype": torch.bfloat16})
