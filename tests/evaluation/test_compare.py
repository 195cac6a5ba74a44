"""compare: what it measures is what attention gives."""

import pytest
import torch

import tokquant as tq
from tokquant import metrics
from tokquant.evaluation.peers import sdpa
from tokquant.features import Features
from tokquant.reference import oracle
from tokquant.timing import interleaved, interleaved_medians


def test_errors_bits_and_times_of_each_scheme_in_order():
    q, k, v = torch.randn(1, 4, 64, 64), torch.randn(1, 2, 80, 64), torch.randn(1, 2, 80, 64)
    results = tq.compare(q, k, v, schemes=["int8", "int-flash"], causal=True, softcap=20.0, repeats=2)
    assert [r.scheme.name for r in results] == ["int8", "int-flash"]
    exact, _ = oracle(q, k, v, Features(scale=0.125, causal=True, softcap=20.0))
    for result in results:
        out = tq.attention(q, k, v, result.scheme, causal=True, softcap=20.0)
        assert result.errors == metrics.errors(out, exact)
        assert min(result.ms, result.quantize_ms, result.sdpa_ms) > 0
        assert result.bits["q"] == 8.5


def test_on_a_cpu_the_peer_is_torchs_attention_in_the_faster_of_float32_and_bfloat16(monkeypatch):
    timed = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def took(functions, *_):
        for function in functions:
            function()
        return [1.0, 2.0, 4.0, 3.0]

    monkeypatch.setattr("tokquant.evaluation.compare.interleaved_medians", took)
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *given, **rest: (timed.append(q.dtype), attend(q, *given, **rest)),
    )
    [found] = tq.compare(*(torch.randn(1, 2, 40, 32).half() for _ in range(3)), schemes=["int8"])
    assert timed == [torch.float32, torch.bfloat16] and (found.ms, found.quantize_ms, found.sdpa_ms) == (1, 2, 3)


@pytest.mark.parametrize("n_k", [64, 100])
def test_the_peer_computes_the_same_attention(n_k):
    q, k, v = torch.randn(1, 4, 64, 32), torch.randn(1, 2, n_k, 32), torch.randn(1, 2, n_k, 32)
    mask = torch.rand(1, 4, 64, n_k) > 0.2
    both = [Features(scale=0.3, causal=True, mask=m) for m in (mask, torch.randn(1, 4, 64, n_k))]
    alibi, dense = tq.bias.alibi(tq.bias.alibi_slopes(4)), tq.bias.dense(torch.randn(1, 4, 64, n_k))
    biased = [Features(scale=0.3, causal=True, bias=alibi), Features(scale=0.3, bias=alibi)]
    biased += [Features(scale=0.3, mask=m, bias=dense) for m in (mask, torch.randn(4, 64, n_k)[None])]
    for features in (Features(scale=0.3), Features(scale=0.3, causal=True), Features(scale=0.3, mask=mask), *both, *biased):
        assert torch.allclose(sdpa(q, k, v, features)().double(), oracle(q, k, v, features)[0], atol=1e-5)


def test_a_bias_is_in_the_errors_and_in_the_oracle_alike():
    q, k, v = torch.randn(1, 4, 64, 64), torch.randn(1, 2, 80, 64), torch.randn(1, 2, 80, 64)
    bias = tq.bias.alibi(tq.bias.alibi_slopes(4))
    [biased] = tq.compare(q, k, v, schemes=["int8"], bias=bias, repeats=1)
    assert biased.errors.rel_l1 < 0.03
    exact, _ = oracle(q, k, v, Features(scale=0.125, bias=bias))
    assert biased.errors == metrics.errors(tq.attention(q, k, v, "int8", bias=bias), exact)


def test_functions_are_timed_in_turn():
    order = []
    interleaved_medians([lambda: order.append("a"), lambda: order.append("b")], 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4
    order.clear()
    interleaved([lambda: order.append("a")], 2, torch.device("cpu"), before=[lambda: order.append("-")])
    assert order == ["a", "-", "a", "-", "a"]


def test_what_attention_refuses_compare_refuses():
    q = torch.randn(1, 1, 8, 32)
    with pytest.raises(ValueError, match="softcap: -1"):
        tq.compare(q, q, q, schemes=["int8"], softcap=-1)
    with pytest.raises(tq.SchemeError, match="no preset 'int9'"):
        tq.compare(q, q, q, schemes=["int9"])
    with pytest.raises(TypeError, match="schemes: 'int8' alone; give a list"):
        tq.compare(q, q, q, schemes="int8")
    with pytest.raises(ValueError, match="repeats: '5' is not a whole number from 1"):
        tq.compare(q, q, q, schemes=["int8"], repeats="5")
    with pytest.raises(TypeError, match="bound: 'no' is not a bool"):
        tq.compare(q, q, q, schemes=["int8"], bound="no")
    with pytest.raises(ValueError, match="v: shape"):
        tq.compare(q, q, q[:, :, :4], schemes=["int8"])
    with pytest.raises(ValueError, match="scales: 2 of them for 1 schemes"):
        tq.compare(q, q, q, schemes=["int8"], scales=[None, None])
    scales = tq.Scales(tq.preset("kv-fp8"), {"a": {f"{role}_scale": torch.ones(1, 1, 1) for role in "kv"}})
    with pytest.raises(TypeError, match=r"scales: these are of 1 layers; give one, such as scales\['a'\]"):
        tq.compare(q, q, q, schemes=["kv-fp8"], scales=scales)
    with pytest.raises(TypeError, match=r"scales: a int; give one layer of load_scales"):
        tq.compare(q, q, q, schemes=["kv-fp8"], scales=1)


def test_scales_go_to_the_schemes_that_need_them():
    q = torch.randn(1, 1, 50, 32)
    calibrator = tq.Calibrator("kv-fp8")
    calibrator.observe("a", q, q, q)
    [static, dynamic] = tq.compare(q, q, q, schemes=["kv-fp8", "int8"], scales=calibrator.scales()["a"], repeats=1)
    assert static.errors.rel_l1 < 0.1 and dynamic.errors.rel_l1 < 0.03
    assert "fp8_e4m3 head static" in repr(static)


def test_a_certificate_is_that_of_error_bound():
    q, k, v = torch.randn(1, 4, 40, 64), torch.randn(1, 2, 60, 64), torch.randn(1, 2, 60, 64)
    [result] = tq.compare(q, k, v, schemes=["int8"], causal=True, repeats=1, bound=True)
    assert result.bound.total.equal(tq.error_bound(q, k, v, "int8", causal=True).total)
    assert result.row_errors.max() == result.errors.max_abs
    assert result.tightness.equal(result.row_errors / result.bound.total) and 0.05 < result.tightness.max() <= 1
    [plain] = tq.compare(q, k, v, schemes=["int8"], causal=True, repeats=1)
    assert plain.bound is None and plain.tightness is None
