"""backend='auto' where torch's attention in 16 bits was faster than to quantize: taken, said, and taken by nothing else."""

import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from factories import qkv, scheme
from torch._subclasses.fake_tensor import FakeTensorMode

import tokquant as tq
from tokquant import reference
from tokquant.evaluation import bench, costs
from tokquant.inputs import features_of
from tokquant.kernels import sixteen_bit, tuned
from tokquant.kernels.candidates import Config
from tokquant.metrics import errors
from tokquant.schemes import preset

ATTENTION = import_module("tokquant.attention")
"""The module; in the package, its name is the function's."""
FUSED = sixteen_bit.fused
SIZES = dict(n_q=40, d=32, dtype=torch.float16)
FASTER = [2.0, 1.0]
"""Milliseconds with quantization, and torch's."""


@pytest.fixture(autouse=True)
def a_gpu(code, gpu, monkeypatch):
    """A CPU that passes for a GPU, where torch has a fused kernel for whatever is given."""
    choose = ATTENTION.choose_backend
    monkeypatch.setattr(
        ATTENTION, "choose_backend", lambda backend, device: "triton" if backend == "auto" else choose(backend, device)
    )
    monkeypatch.setattr(sixteen_bit, "fused", lambda q, k, v, causal: True)
    sixteen_bit._say.cache_clear()


@pytest.fixture
def always(monkeypatch):
    """Every kernel and shape was tuned, and torch's attention found faster."""
    key = tuned.Key(kernel="attention", device="NVIDIA H100", triton="3.9.0", batch_heads=2, n_q=128, n_k=128)
    found = tuned.Entry(key=key, config=Config(64, 128, 4, 2), ms=1.0, default_ms=1.0, whole_ms=2.0, sdpa_ms=1.0)
    monkeypatch.setattr(tuned, "same", lambda *call: found)


def torchs(q, k, v, **given):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **given)


def quantized(q, k, v, scheme="int8-fast", **given):
    return tq.attention(q, k, v, scheme, backend="triton", **given)


@pytest.mark.parametrize("causal", [False, True])
def test_where_tuning_found_torchs_faster_auto_takes_it_and_says_so_once(clock, causal):
    operands = qkv(**SIZES, heads=4, kv_heads=2)
    assert torch.equal(tq.attention(*operands, "int8-fast", causal=causal), quantized(*operands, causal=causal))
    clock[:] = FASTER
    found = tq.tune(*operands, "int8-fast", causal=causal, keep=1, repeats=1)
    assert (found.entry.whole_ms, found.entry.sdpa_ms, found.entry.sixteen_bit) == (2.0, 1.0, True)
    assert list(tuned.entries()) == [found.entry]
    said = r"attention is torch's in fp16 here, not quantized by 'int8-fast': .* 1\.0000 ms, and 2\.0000 .* backend='triton'"
    with pytest.warns(UserWarning, match=said) as caught:
        out = tq.attention(*operands, "int8-fast", causal=causal, scale=0.2)
        again = tq.attention(*operands, "int8-fast", causal=causal, scale=0.2)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert torch.equal(out, torchs(*operands, is_causal=causal, scale=0.2)) and torch.equal(out, again)
    assert out.is_contiguous() and out.dtype == torch.float16
    assert not torch.equal(out, quantized(*operands, causal=causal, scale=0.2))


@pytest.mark.parametrize("times", [[1.0, 1.0], [1.05, 1.01], [1.0, 2.0]], ids=["equal", "within noise", "slower"])
def test_where_torchs_is_not_clearly_faster_auto_quantizes(clock, times):
    operands = qkv(**SIZES)
    clock[:] = times
    entry = tq.tune(*operands, "int8-fast", keep=1, repeats=1).entry
    assert [entry.whole_ms, entry.sdpa_ms] == times and not entry.sixteen_bit
    assert torch.equal(tq.attention(*operands, "int8-fast"), quantized(*operands))


@pytest.mark.parametrize("n", [32, 65])
def test_a_shape_of_other_powers_of_two_is_quantized(clock, n):
    clock[:] = FASTER
    tq.tune(*qkv(**SIZES), "int8-fast", keep=1, repeats=1)
    operands = qkv(**{**SIZES, "n_q": n})
    assert torch.equal(tq.attention(*operands, "int8-fast"), quantized(*operands))


def test_an_entry_without_these_times_quantizes_and_an_old_file_is_one(clock):
    operands = qkv(**SIZES)
    clock[:] = FASTER
    entry = tq.tune(*operands, "int8-fast", keep=1, repeats=1).entry
    path = tuned.record(entry)
    path.write_text(entry.model_dump_json(exclude={"whole_ms", "sdpa_ms"}))
    assert list(tuned.entries()) == [entry.model_copy(update={"whole_ms": None, "sdpa_ms": None})]
    assert torch.equal(tq.attention(*operands, "int8-fast"), quantized(*operands))
    # one that names no launch of this program is none, whatever its times say
    tuned.record(entry.model_copy(update={"config": replace(entry.config, num_warps=32)}))
    assert torch.equal(tq.attention(*operands, "int8-fast"), quantized(*operands))


ASKED = {
    "deterministic": {"deterministic": True},
    "the LSE": {"return_lse": True},
    "a window": {"window": (9, None)},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.tensor([0.0, 1.0])},
    "a mask": {"mask": torch.ones(40, 40).tril() > 0},
    "a bias": {"bias": tq.bias.alibi(torch.tensor([0.5, 0.1]))},
}


@pytest.mark.parametrize("given", ASKED.values(), ids=ASKED)
def test_what_torch_does_not_do_is_quantized(always, given):
    operands = qkv(**SIZES)
    found = (tq.attention(*operands, "int8-fast", backend=backend, **given) for backend in ("auto", "triton"))
    out, own = (each[0] if "return_lse" in given else each for each in found)
    assert torch.equal(out, own)


OPERANDS = {
    "float32": ({"dtype": torch.float32}, {}, "int8-fast"),
    "more keys than queries, causal": ({"n_k": 50}, {"causal": True}, "int8-fast"),
    "a scheme with P in 32 bits": ({}, {}, scheme("int8", "int8", "int8", "fp32", name="exact-p")),
}


@pytest.mark.parametrize(("sizes", "given", "by"), OPERANDS.values(), ids=OPERANDS)
def test_operands_that_torch_would_treat_otherwise_are_quantized(always, sizes, given, by):
    operands = qkv(**{**SIZES, **sizes})
    assert torch.equal(tq.attention(*operands, by, **given), quantized(*operands, by, **given))


def test_codes_and_static_scales_stay_what_they_are(always):
    q, k, v = qkv(**SIZES)
    codes = tq.quantize(q, k, v, "int8-fast")
    assert torch.equal(tq.attention(*codes, "int8-fast"), quantized(*codes))
    calibrator = tq.Calibrator(s := scheme("int8", "int8 head static", "int8 head static", "int8", name="calibrated"))
    calibrator.observe("layer", q, k, v)
    scales = calibrator.scales()["layer"]
    assert torch.equal(tq.attention(q, k, v, s, scales=scales), quantized(q, k, v, s, scales=scales))
    with pytest.raises(tq.ScalesError, match="is static and needs k_scale, v_scale"):
        tq.attention(q, k, v, s)


def test_within_autocast_and_without_a_fused_kernel_it_is_quantized(always, monkeypatch):
    operands = qkv(**SIZES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tq.attention(*operands, "int8-fast"), quantized(*operands))
    monkeypatch.setattr(sixteen_bit, "fused", FUSED)
    assert torch.equal(tq.attention(*operands, "int8-fast"), quantized(*operands)), "none of a GPU's takes tensors of a CPU"


@pytest.mark.filterwarnings("ignore:attention is torch's")
def test_a_graph_and_blocks_that_replace_torchs_attention_take_the_same(always):
    q, k, v = qkv(**SIZES)
    expected = torchs(q, k, v, is_causal=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: tq.attention(q, k, v, "int8-fast", causal=True), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q), expected)
    with tq.quantized_sdpa("int4"):
        assert torch.equal(tq.attention(q, k, v, "int8-fast", causal=True), expected)


def test_what_measures_a_scheme_quantizes(always):
    operands = qkv(**SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [found] = tq.compare(*operands, ["int8-fast"], repeats=1)
    exact, _ = reference.oracle(*operands, features_of(*operands[:2]))
    assert found.errors == errors(quantized(*operands), exact)


@pytest.fixture
def asked(monkeypatch):
    """The backends that callers name for tensors of a GPU that is not there."""
    backends = []

    def attention(q, k, v, scheme, *, backend="auto", **given):
        backends.append(backend)
        return torch.empty(q.shape, device="cpu")

    for module in (
        "tokquant.sdpa",
        "tokquant.evaluation.costs",
        "tokquant.integrations.diffusers.attention",
        "tokquant.integrations.transformers.attention",
    ):
        monkeypatch.setattr(import_module(module), "attention", attention)
    monkeypatch.setattr(bench, "attend", attention)
    return backends


@pytest.fixture
def on_gpu():
    with FakeTensorMode():
        yield [torch.empty(1, 2, 16, 32, dtype=torch.float16, device="cuda") for _ in range(3)]


def test_models_name_a_backend_that_quantizes(asked, on_gpu):
    from tokquant.integrations.diffusers.attention import function_of
    from tokquant.integrations.transformers.attention import attend
    from tokquant.integrations.transformers.settings import Setting

    tq.scaled_dot_product_attention(*on_gpu)
    with tq.quantized_sdpa("int8"):
        torchs(*on_gpu)
    function_of(preset("int8"), None, "auto")(*on_gpu)
    attend(Setting("int8", None, "auto"), True, torch.nn.Module(), *on_gpu, None)
    assert asked == ["triton"] * 4
    tq.scaled_dot_product_attention(*on_gpu, backend="reference")
    assert asked.pop() == "reference"


def test_searches_and_benchmarks_name_a_backend_that_quantizes(asked, on_gpu, monkeypatch):
    monkeypatch.setattr(costs, "interleaved_medians", lambda functions, *rest: [functions[0]() is None])
    costs._measured_ms(*on_gpu, preset("int8"), {})
    assert asked == ["triton"]
    monkeypatch.setattr(bench, "_random_tensors", lambda shape, device: on_gpu)
    monkeypatch.setattr(bench, "quantize", lambda q, k, v, *rest, **given: (q, k, v))
    monkeypatch.setattr(bench.peers, "attention", lambda *call: {})
    monkeypatch.setattr(bench, "_timed", lambda workload, shape, unit, found, *rest: found)
    found = bench.attention(bench.Shape(1, 2, 2, 16, 16, 32, False), ["int8"], device=torch.device("cuda"))
    for name, backend in (("int8, with quantization", "triton"), ("int8, auto", "auto")):
        found[name].call()
        assert asked[-1] == backend
