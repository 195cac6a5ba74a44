"""Sequences of their own lengths: each comes out as if it were alone."""

from itertools import accumulate, pairwise

import pytest
import torch
from factories import scheme

import tokquant as tq
from tokquant.metrics import errors
from tokquant.schemes import preset, preset_names
from tokquant.schemes.placement import place

QUERIES, KEYS = [5, 0, 130, 9], [37, 10, 130, 0]
SCHEMES = {name: preset(name) for name in preset_names() if preset(name).k.scale == "dynamic"} | {
    "2-bit keys, small blocks, sums of tiles": scheme("int8 block:16", "int2 block:32", "int4 block:64", "uint8 row_block:64"),
    "zeros a channel": scheme("int8", "int8 channel asymmetric mean", "int4 channel_block:64 asymmetric", "int8 row_block:32"),
    "queries in 16 bits, keys less their mean": scheme("fp16", "int8 mean", "int8 channel", "int8"),
    "one scale for all": scheme("int8 tensor", "int8 tensor mean", "int8 tensor", "uint8"),
}  # fmt: skip
FEATURES = {
    "causal": dict(causal=True),
    "ALiBi, causal": dict(causal=True, bias=tq.bias.alibi(torch.tensor([0.9, 0.1]))),
    "a bias of keys": dict(bias=tq.bias.key_vector(torch.linspace(-2, 2, sum(KEYS)))),
    "low rank": dict(bias=tq.bias.lowrank(torch.randn(1, 2, sum(QUERIES), 3).half(), torch.randn(1, 1, sum(KEYS), 3).half())),
    "window, softcap and sinks": dict(window=(30, 4), softcap=3.0, sinks=torch.tensor([0.0, 5.0])),
}


def starts(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed(queries=QUERIES, keys=KEYS, heads=2, kv_heads=1, d=32):
    q = torch.randn(sum(queries), heads, d)
    k, v = (torch.randn(sum(keys), kv_heads, d) + torch.randn(1, kv_heads, d) for _ in range(2))
    return (q, k, v), dict(cu_seqlens_q=starts(queries), cu_seqlens_k=starts(keys))


def each(tensors, lengths):
    """The sequences alone, as `attention` takes them; None where there are no queries or keys."""
    q, k, v = tensors
    for (q_first, q_end), (k_first, k_end) in zip(
        pairwise(lengths["cu_seqlens_q"].tolist()), pairwise(lengths["cu_seqlens_k"].tolist()), strict=True
    ):
        own = q[q_first:q_end], k[k_first:k_end], v[k_first:k_end]
        empty = q_first == q_end or k_first == k_end
        yield slice(q_first, q_end), slice(k_first, k_end), None if empty else [x.transpose(0, 1)[None] for x in own]


# each backend meets each scheme with one of the features; with all where slow tests run
CROSS = [
    pytest.param(s, given, backend, id=f"{name} | {what} | {backend}", marks=[] if number % 5 == turn else pytest.mark.slow)
    for number, (name, s) in enumerate(SCHEMES.items())
    for turn, (what, given) in enumerate(FEATURES.items())
    for backend in ("triton", "reference")
]


@pytest.mark.parametrize(("s", "given", "backend"), CROSS)
def test_a_sequence_among_others_is_what_it_is_alone_bit_for_bit(s, given, backend):
    tensors, lengths = packed()
    out, lse = tq.attention_varlen(*tensors, s, **lengths, **given, return_lse=True, backend=backend)
    assert out.shape == tensors[0].shape and lse.shape == tensors[0].shape[:2]
    for rows, keys, alone in each(tensors, lengths):
        if alone is None:
            assert not out[rows].any() and bool((lse[rows] == -torch.inf).all())
            continue
        own = dict(given, bias=given["bias"].of_sequence(rows, keys)) if "bias" in given else given
        expected, expected_lse = tq.attention(*alone, s, **own, return_lse=True, backend=backend)
        # V's weights per token are powers of two, which torch rounds on a CPU by where in its tensor they stand
        error = 1e-6 if place(s.v) == "p" and backend == "triton" else 0.0
        torch.testing.assert_close(out[rows], expected[0].transpose(0, 1), rtol=error, atol=error)
        torch.testing.assert_close(lse[rows], expected_lse[0].transpose(0, 1), rtol=error, atol=error)


@pytest.mark.parametrize("s", [preset("int8"), SCHEMES["one scale for all"]], ids=["at once", "one by one"])
def test_nothing_grows_with_the_longest_sequence(s, monkeypatch):
    """A long one among short ones is not padded for."""
    from tokquant.kernels import varlen

    largest, attend = [], varlen.attention
    monkeypatch.setattr(varlen, "attention", lambda given, *x: (largest.extend(given.operands), attend(given, *x))[1])
    (q, k, v), lengths = packed([1] * 12 + [300], [2] * 12 + [600])
    tq.attention_varlen(q, k, v, s, **lengths, backend="triton")
    given = [x.numel() for x in (q, k, v)]
    held = [sum(t.numel() * t.element_size() for t in made if isinstance(t, torch.Tensor)) for made in largest]
    assert len(held) == 3 and all(size < 3 * values for size, values in zip(held, given, strict=True))


@pytest.fixture
def poisoned():
    """What torch gives is filled with NaN, or the largest integers, before anybody writes to it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.ptx
@pytest.mark.parametrize("name", ["int8", "int8-token", "int8-fp8", "fp8", "kv-int4"])
def test_what_lies_between_sequences_is_not_read(name, poisoned):
    queries, keys = [5, 70, 130], [37, 300, 130]
    (q, k, v), lengths = packed(queries, keys)
    tensors = q.half(), k.half(), v.half()
    out = tq.attention_varlen(*tensors, name, **lengths, causal=True, backend="triton")
    expected = tq.attention_varlen(*tensors, name, **lengths, causal=True, backend="reference")
    assert errors(out, expected).rel_l1 < 2e-3


def test_all_sequences_are_quantized_at_once(monkeypatch):
    from tokquant.kernels import quantize

    started = []
    launch = quantize._launch
    monkeypatch.setattr(quantize, "_launch", lambda plan, *rest: (started.append(plan.name), launch(plan, *rest)))
    tensors, lengths = packed([3, 5, 7], [3, 5, 7])
    tq.attention_varlen(*tensors, "fp8", **lengths, backend="triton")
    assert len(started) == 9, "extremes, scales and codes of three operands"


def test_more_sequences_than_a_launch_of_quantization_takes_are_quantized_one_by_one(monkeypatch):
    from tokquant.kernels import launch

    tensors, lengths = packed([3, 5, 7], [3, 5, 7])
    expected = tq.attention_varlen(*tensors, "int8", **lengths, causal=True, backend="triton")
    monkeypatch.setattr(launch, "MOST", 2)
    assert torch.equal(tq.attention_varlen(*tensors, "int8", **lengths, causal=True, backend="triton"), expected)


def test_a_scale_that_is_static_serves_every_sequence():
    (q, k, v), lengths = packed()
    calibrator = tq.Calibrator("kv-fp8")
    calibrator.observe("layer", *(x.transpose(0, 1)[None] for x in (q, k, v)))
    scales = calibrator.scales()["layer"]
    out = tq.attention_varlen(q, k, v, scales.scheme, **lengths, scales=scales, backend="triton")
    for rows, _, alone in each((q, k, v), lengths):
        if alone is not None:
            expected = tq.attention(*alone, scales.scheme, scales=scales, backend="triton")
            assert torch.equal(out[rows], expected[0].transpose(0, 1))


def test_sequences_of_nothing_are_zero():
    (q, k, v), lengths = packed([3, 0], [0, 4])
    for backend in ("triton", "reference"):
        out, lse = tq.attention_varlen(q, k, v, "int8", **lengths, return_lse=True, backend=backend)
        assert not out.any() and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("name", ["int8", "fp8", "int8-fp16", "kv-int8"])
def test_a_batch_of_any_size_has_the_same_bits(name):
    q, k, v = (torch.randn(3, 2, 150, 64) for _ in range(3))
    together = tq.attention(q, k, v, name, causal=True, backend="triton", deterministic=True)
    for index in range(3):
        own = (x[index : index + 1] for x in (q, k, v))
        alone = tq.attention(*own, name, causal=True, backend="triton", deterministic=True)
        assert torch.equal(together[index : index + 1], alone)


WRONG = {
    "four dimensions": (dict(q=torch.randn(1, 144, 2, 32)), ValueError, r"q: shape \[1, 144, 2, 32\] has 4 dimensions"),
    "no tokens": (dict(q=torch.randn(0, 2, 32)), ValueError, r"q: shape \[0, 2, 32\] is empty; give at least one of tokens"),
    "v shorter than k": (dict(v=torch.randn(170, 1, 32)), ValueError, r"v: shape \[170, 1, 32\] is not that of k, \[177, 1"),
    "a list": (dict(q=[1, 2]), TypeError, r"q: a list; give a torch.Tensor \[tokens, heads, head_dim\]"),
    "starts that are a list": (dict(cu_seqlens_q=[0, 144]), TypeError, "cu_seqlens_q: a list; give a torch.int32 tensor"),
    "starts of floats": (dict(cu_seqlens_k=torch.tensor([0.0, 177.0])), TypeError, "cu_seqlens_k: torch.float32"),
    "starts that end early": (dict(cu_seqlens_q=torch.tensor([0, 5, 5, 135, 143])), ValueError, "to the 144 tokens"),
    "starts that fall": (dict(cu_seqlens_q=torch.tensor([0, 9, 5, 135, 144])), ValueError, "does not rise from 0"),
    "another batch": (dict(cu_seqlens_k=torch.tensor([0, 177])), ValueError, "k: 1 sequences, and cu_seqlens_q has 4"),
    "a longest that is not": (dict(max_seqlen_q=100), ValueError, "max_seqlen_q: 100 is less than the longest sequence, 130"),
    "a dense bias": (dict(bias=tq.bias.dense(torch.zeros(144, 177))), ValueError, "bias: a dense one would be mostly"),
    "a bias of other sizes": (dict(bias=tq.bias.key_vector(torch.zeros(99))), ValueError, "bias: values of shape"),
    "a longest that is text": (dict(max_seqlen_k="130"), ValueError, "max_seqlen_k: '130' is not a whole number"),
    "a longest below zero": (dict(max_seqlen_k=-1), ValueError, "max_seqlen_k: -1 is not a whole number"),
    "starts of two dimensions": (dict(cu_seqlens_q=torch.tensor([[0], [144]])), ValueError, r"cu_seqlens_q: shape \[2, 1\]"),
    "starts that begin late": (dict(cu_seqlens_q=torch.tensor([1, 5, 5, 135, 144])), ValueError, "does not rise from 0"),
    "no scales": (dict(scheme="kv-fp8"), tq.ScalesError, "scales: scheme 'kv-fp8' is static and needs k_scale, v_scale"),
    "ranges of other heads": (
        dict(scheme=tq.HeadSchemes(((5, tq.preset("int8")),))), tq.SchemeError, "its ranges are of 5 heads .*, and k has 1"
    ),
    "no sequences": (dict(cu_seqlens_q=torch.tensor([0])), ValueError, r"cu_seqlens_q: shape \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(wrong, kind, message):
    (q, k, v), lengths = packed()
    with pytest.raises(kind, match=message):
        tq.attention_varlen(**{"q": q, "k": k, "v": v, "scheme": "int8", **lengths, **wrong})


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["int8", "kv-int4", "int4", "fp8"])
def test_a_kernel_of_sequences_compiles_and_its_loop_is_that_of_others(name):
    alone, together = (tq.compile(name, head_dim=64, causal=True, varlen=varlen) for varlen in (False, True))
    assert "q_starts" in together.source and "F.q_starts" not in alone.source
    counts = [kernel.resources.instructions_per_score for kernel in (alone, together)]
    assert counts[1] < 1.1 * counts[0]
