"""Attention beside its peers: who is in the table, and that its figures are those of one run."""

import warnings

import pytest
import torch
from factories import qkv

import tokquant as tq
from tokquant.evaluation import bench, peers
from tokquant.evaluation.bench import COPY, MEMORY, PRODUCTS, Shape
from tokquant.kernels.cpu import build

CPU = torch.device("cpu")
SHAPE = Shape(1, 4, 4, 64, 64, 32, True)
GROUPED = Shape(1, 4, 2, 1, 96, 32, False)

needs_compiler = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    monkeypatch.setattr(bench, "SCRATCH_BYTES", 2**20)


def rows(table):
    return {row.provider: row for row in table.rows}


def test_attention_has_its_peers_and_schemes_with_and_without_quantization():
    table = bench.attention(SHAPE, ["int8", "kv-fp8"], device=CPU, repeats=1)
    names = ["SDPA fp32", "SDPA bf16", "torchao int8", "int8", "int8, with quantization", "kv-fp8", "kv-fp8, with quantization"]
    assert list(rows(table))[:7] == names
    assert all((row.ms or 0) > 0 for row in table.rows if not row.note) and not rows(table)["kv-fp8"].note


def test_no_scheme_takes_the_place_of_another_of_its_name():
    other = tq.preset("int4").model_copy(update={"name": "int8"})
    with pytest.raises(ValueError, match="schemes: two are called 'int8'; give each a name of its own"):
        bench.attention(SHAPE, ["int8", other], device=CPU, repeats=1)
    with pytest.raises(TypeError, match="schemes: 'int8' alone; give a list of them"):
        bench.attention(SHAPE, "int8", device=CPU, repeats=1)


@needs_compiler
def test_ratios_rates_and_shares_are_those_of_the_same_medians():
    table = bench.attention(SHAPE, ["int8", "int8-fp16", "int8-fp8", "none"], device=CPU, repeats=2)
    found = rows(table)
    assert table.peer == min(("SDPA fp32", "SDPA bf16"), key=lambda name: found[name].ms)
    for row in table.rows:
        if row.provider in PRODUCTS.values():
            assert row.ratio is None and row.share is None
        elif not row.note:
            assert row.ratio == pytest.approx(found[table.peer].ms / row.ms)
            assert row.rate == pytest.approx(SHAPE.operations / row.ms / 1e6) and table.unit == "GOPS"
    assert found["int8, with quantization"].share is found["SDPA fp32"].share is None
    integers, bfloats, floats = (found[name].rate if name in found else None for name in PRODUCTS.values())
    assert found["none"].share == pytest.approx(found["none"].rate / floats)
    if integers:
        assert found["int8"].share == pytest.approx(found["int8"].rate / integers)
        # half of its operations at each of two speeds
        for name, speed in (("int8-fp16", floats), ("int8-fp8", bfloats or floats)):
            half = found[name].rate / 2
            assert found[name].share == pytest.approx(half / integers + half / speed)


def test_quantization_counts_the_bytes_it_reads_and_writes():
    table = bench.quantization(SHAPE, ["int8", "kv-int4-kivi", "kv-fp8"], device=CPU, repeats=2)
    found = rows(table)
    assert table.unit == "GB/s" and table.peer is None
    q, k, v = qkv(64, 64, 32, heads=4)
    moved = 3 * q.nbytes + sum(x.nbytes for x in tq.quantize(q, k, v, "int8"))
    assert found["int8"].rate == pytest.approx(moved / found["int8"].ms / 1e6)
    assert found["int8"].share == pytest.approx(found["int8"].rate / found[COPY].rate)
    assert found["int8, attention"].ms > 0 and found["int8, attention"].rate is None
    assert found[COPY].rate == pytest.approx(2**20 / found[COPY].ms / 1e6)


def test_a_scheme_that_does_not_fit_the_shape_is_in_nobodys_way():
    shape = Shape(1, 2, 2, 32, 32, 48, False)
    for workload in (bench.attention, bench.decode, bench.quantization):
        found = rows(workload(shape, ["kv-int4-kivi", "int8"], device=CPU, repeats=1))
        assert "48" in found["kv-int4-kivi"].note and found["int8"].ms > 0


def test_decoding_counts_the_bytes_of_keys_and_values():
    table = bench.decode(GROUPED, ["kv-int4", "kv-fp8"], device=CPU, repeats=2)
    found = rows(table)
    torches = [f"SDPA {kind} {form}" for kind in ("fp32", "bf16") for form in ("gqa", "folded")]
    ours = [f"{name}{what}" for name in ("kv-int4", "kv-fp8") for what in ("", ", KVCache", ", one token appended")]
    assert list(found) == [*torches, *ours, MEMORY] and table.peer in torches
    assert found["kv-int4, KVCache"].ratio and found["kv-int4, one token appended"].ratio is None
    _, k, v = tq.quantize(*qkv(1, 96, 32, heads=4, kv_heads=2), "kv-int4")
    sizes = {"SDPA fp32 gqa": 2 * 2 * 96 * 32 * 4, "SDPA bf16 folded": 2 * 2 * 96 * 32 * 2, "kv-int4": k.nbytes + v.nbytes}
    for name, size in sizes.items():
        assert found[name].rate == pytest.approx(size / found[name].ms / 1e6) and table.unit == "GB/s"
        assert found[name].share == pytest.approx(found[name].rate / found[MEMORY].rate)
    assert found[MEMORY].rate == pytest.approx(2**20 / found[MEMORY].ms / 1e6)


def test_decoding_finds_caches_cold_or_warm(monkeypatch):
    asked = []

    def timed(calls, repeats, device, before):
        asked.append((calls, before))
        return [[1.0]] * len(calls)

    monkeypatch.setattr(bench, "interleaved", timed)
    read = []
    monkeypatch.setattr(
        torch.Tensor, "sum", lambda x, *rest, total=torch.Tensor.sum, **more: read.append(x.numel()) or total(x, *rest, **more)
    )
    for cold in (True, False):
        bench.decode(GROUPED, ["int8"], device=CPU, cold=cold)
        calls, before = asked.pop()
        assert len(calls) == len(before)
        read.clear()
        before[0]()
        assert (2**20 // 8 in read) == cold
    bench.attention(SHAPE, ["int8"], device=CPU)
    assert asked.pop()[1] is None


@pytest.mark.parametrize(("n_q", "n_k", "causal"), [(5, 5, True), (3, 7, True), (7, 3, True), (3, 7, False)])
def test_operations_are_those_of_pairs_that_are_attended(n_q, n_k, causal):
    seen = torch.ones(n_q, n_k).tril(n_k - n_q if causal else n_k)
    assert Shape(2, 4, 2, n_q, n_k, 16, causal).operations == 2 * 4 * seen.sum().item() * 2 * (16 + 16)


def test_what_does_not_run_is_a_row_that_says_why(monkeypatch):
    def fails():
        warnings.warn("Kernel not used because:", stacklevel=1)
        warnings.warn("head_dim 32 is odd (Triggered internally at x.cpp:3.)", stacklevel=1)
        raise RuntimeError("No available kernel.\nat b.cpp")

    monkeypatch.setattr(peers, "attention", lambda *given: {"SDPA a": fails, "b": "not installed"})
    table = bench.attention(SHAPE, ["int8"], device=CPU, repeats=1)
    assert table.rows[0].note == "No available kernel.; head_dim 32 is odd" and table.rows[1].note == "not installed"
    assert table.peer is None and table.rows[0].ms is None and table.rows[2].ratio is None and table.rows[2].ms > 0


def test_a_table_says_what_it_was_measured_on():
    found = bench.decode(GROUPED, [], device=CPU, repeats=1).machine
    assert found["torch"] == torch.__version__ and found["threads"] == str(torch.get_num_threads()) and found["device"]
    if found["backend"] == "cpu":
        assert found["instructions"] in build.INSTRUCTIONS and found["compiler"] == build.compiler().version


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("workload", [bench.attention, bench.decode])
def test_a_gpu_has_peers_that_run(workload):
    table = workload(Shape(1, 4, 2, 64, 64, 64, False), ["int8"], device=torch.device("cuda"), repeats=2)
    assert table.peer and table.machine["backend"] == "triton" and rows(table)["int8"].ms > 0


def test_schemes_are_read_before_anything_runs():
    with pytest.raises(tq.SchemeError, match="no preset 'int9'"):
        bench.attention(Shape(1, 1, 1, 10**15, 10**15, 64, False), ["int9"], device=CPU)
    with pytest.raises(ValueError, match=r"shape: batch 1, 1 heads, 1 x 10{15} tokens, head_dim 64 cannot be had on cpu"):
        bench.decode(Shape(1, 1, 1, 1, 10**15, 64, False), ["int8"], device=CPU)
