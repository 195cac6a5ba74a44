"""The emulation against the float64 oracle on the same codes, and the oracle against torch and a formula written out."""

import math

import pytest
import torch
from factories import (
    CASES,
    PROBABILITY_ROUNDING,
    Largest,
    bounds,
    dense_logits,
    exact_operands,
    integer_scores,
    pairwise,
    qkv,
    scheme,
    some_mask,
)

from tokquant import attention, preset, quantize, reference
from tokquant.activations import Activations, sample
from tokquant.attention import features_of
from tokquant.calibration.scales import needed
from tokquant.features import Features
from tokquant.metrics import errors
from tokquant.schemes import preset_names

INF = math.inf
PRESETS = [name for name in preset_names() if not needed(preset(name))]


def assert_agrees(q, k, v, made, **given):
    features = features_of(q, k, **given)
    operands = quantize(q, k, v, made)
    out, lse = attention(*operands, made, **given, return_lse=True, backend="reference")
    exact, exact_lse = reference.oracle(*exact_operands(*operands), features)
    allowed, allowed_lse = bounds(operands, made, features)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    nothing = exact_lse == -INF
    assert (out[nothing] == 0).all() and (lse[nothing] == -INF).all()
    assert (out.double() - exact).abs().le(allowed)[~nothing].all()
    assert (lse.double() - exact_lse).abs().le(allowed_lse)[~nothing].all()
    return operands, out, lse


QUERIES = ["int8 token", "int8 tensor", "int4 head", "fp8_e4m3 channel", "int8 block:64 scale=fp16", "int8 channel_block:32",
           "fp4_e2m1 group:16 scale=fp8_e4m3", "fp16", "int4 token block_mean", "int8 token scale=fp8_e4m3"]  # fmt: skip
KEYS = ["int8 token mean", "int4 token asymmetric scale=fp16", "int8 head", "int8 channel asymmetric", "int4 channel mean",
        "int8 block:32 mean", "int4 block:64 asymmetric mean", "int2 channel_block:32 asymmetric", "fp8_e4m3 tensor",
        "int4 group:16 mean scale=fp8_e4m3", "fp32 mean", "int8 channel asymmetric mean"]  # fmt: skip
VALUES = ["int8 token", "int4 token asymmetric scale=fp16", "int8 tensor asymmetric", "fp8_e4m3 head", "int8 channel mean",
          "int8 block:128", "int8 channel_block:128 mean", "int4 channel_block:256 asymmetric", "int4 group:16 asymmetric",
          "fp32", "bf16 mean", "fp4_e2m1 token scale=fp8_e4m3", "int8 head asymmetric mean"]  # fmt: skip
PROBABILITIES = ["fp32", "fp32 row_block:64", "uint8 row_block:64", "int8 row_block:128", "int8 unit", "uint8 unit",
                 "fp8_e4m3 unit", "fp8_e4m3 row_block:32", "fp16 unit", "bf16 row_block:128", "fp8_e5m2 unit"]  # fmt: skip


@pytest.mark.parametrize(
    "q, k, v, p, rotate, rotate_v, balance, normalizer, case",
    pairwise(q=QUERIES, k=KEYS, v=VALUES, p=PROBABILITIES, rotate=["none", "hadamard"], rotate_v=["none", "hadamard"],
             balance=["none", "channel", "rope_pairs"], normalizer=["exact", "quantized"], case=list(CASES)),
    ids=str,
)  # fmt: skip
def test_the_emulation_agrees_with_the_oracle(q, k, v, p, rotate, rotate_v, balance, normalizer, case):
    shape, features = CASES[case]
    made = scheme(q, k, v, p, rotate=rotate, rotate_v=rotate_v, balance=balance, normalizer=normalizer)
    assert_agrees(*qkv(*shape), made, **features)


@pytest.mark.parametrize("k", KEYS)
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["no softcap", "softcap"])
@pytest.mark.parametrize("rotate", ["none", "hadamard"])
def test_with_exact_queries_the_dequantized_keys_are_all_that_matters(k, softcap, rotate):
    q, k_in, v = qkv(20, 100, 32, heads=4, kv_heads=2)
    given = {"sinks": torch.tensor([0.0, 2.0, 5.0, -1.0]), "softcap": softcap}
    made = scheme(k=k, rotate=rotate)
    operands = quantize(q, k_in + 2, v, made)
    out, lse = attention(*operands, made, **given, return_lse=True, backend="reference")
    exact, exact_lse = reference.oracle(q, operands[1].dequantize(torch.float64), v, features_of(q, k_in, **given))
    assert (out.double() - exact).abs().max() < 2e-5
    assert (lse.double() - exact_lse).abs().max() < 2e-5


@pytest.mark.parametrize("exponent", [12, 40, 62])
@pytest.mark.parametrize("p", ["int8 row_block:64", "uint8 row_block:64", "fp8_e4m3 row_block:64"])
def test_a_tile_far_below_the_largest_logit_keeps_its_precision(p, exponent):
    q, k, v = qkv(8, 192, 32)
    q[..., 0], k[..., 0] = 32**0.5, 0
    # what the second tile lacks in weight it has in value
    k[:, :, 64:128, 0] = -exponent * math.log(2)
    v[:, :, 64:128] *= 2.0**exponent
    assert_agrees(q, k, v, scheme("fp32", "fp32", "int8 block:64", p))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("case, dtype", pairwise(case=list(CASES), dtype=[torch.float16, torch.bfloat16]), ids=str)
def test_presets_agree_with_the_oracle(name, case, dtype):
    (n_q, n_k, d, *heads), features = CASES[case]
    d = 64 if "kivi" in name else d
    assert_agrees(*qkv(n_q, n_k, d, *heads, dtype=dtype), preset(name), **features)


@pytest.mark.parametrize("name", [name for name in PRESETS if "kivi" not in name and name != "fireq"])
def test_an_odd_head_dim_agrees_with_the_oracle(name):
    assert_agrees(*qkv(30, 45, 33, heads=4, kv_heads=2), preset(name), causal=True)


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_of_one_key_gives_that_value_back(name):
    q, k, v = qkv(8, 1, 32, heads=2)
    made = preset(name)
    _, _, vq = operands = quantize(q, k * 10, v, made)
    out, lse = attention(*operands, made, return_lse=True, backend="reference")
    # the reference of P lies an ulp above the logit
    assert (out - vq.dequantize()).abs().max() <= 2.0**-22 * (4 + lse.abs().max()) * v.abs().max()
    left, right, _ = exact_operands(*operands)
    assert torch.allclose(lse.double(), (left @ right.mT).squeeze(-1) * 32**-0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_equal_logits_give_the_mean_of_the_values(name):
    q, k, v = qkv(4, 200, 32)
    made = preset(name)
    operands = quantize(torch.zeros_like(q), k, v, made)
    out = attention(*operands, made, backend="reference")
    mean = operands[2].dequantize(torch.float64).mean(dim=2, keepdim=True)
    allowed, _ = bounds(operands, made, features_of(q, k))
    assert ((out - mean).abs() <= allowed).all()


@pytest.mark.parametrize("name", PRESETS)
def test_the_indicator_of_half_the_keys_gives_their_mass(name):
    q, k, v = qkv(16, 512, 64)
    v = (torch.arange(512) % 2 == 0).float()[:, None].expand_as(v)
    made = preset(name)
    made = made.model_copy(update={"v": made.v.model_copy(update={"smooth": "none"})})
    operands = quantize(q, k, v, made)
    out = attention(*operands, made, backend="reference").double()
    left, right, _ = exact_operands(*operands)
    p = torch.softmax(dense_logits(left, right, features_of(q, k)), dim=-1)
    mass = p[..., ::2].sum(dim=-1, keepdim=True)
    # half a step of the largest p for each of the 256 keys, or P's relative error; V is exact up to its scale
    relative, least = PROBABILITY_ROUNDING[made.p.precision]
    step = max(relative, least / (made.p.format.largest or 1))
    allowed = torch.maximum(256 * step * p.amax(dim=-1, keepdim=True) * (made.p.format.kind == "int"), mass * relative)
    allowed = (2 if made.normalizer == "quantized" else 1) * allowed + 2.0**-10
    assert ((out - mass).abs() <= allowed).all()
    assert allowed.max() < 0.2


@pytest.mark.parametrize("p", ["uint8 row_block:64", "int8 row_block:64", "fp8_e4m3 row_block:64"])
def test_a_hot_key_does_not_swallow_the_tail_of_other_tiles(p):
    # one key 2^9 times as heavy as each of 1023 others, which hold two thirds of the mass and are 1/4 of a step of 1/127
    q, k = torch.ones(1, 1, 4, 16), torch.zeros(1, 1, 1024, 16)
    k[:, :, 5] = 9 * math.log(2) / 4
    v = torch.ones(1, 1, 1024, 16)
    v[:, :, 5] = 0
    for words, kept in ((p, True), (p.split()[0] + " unit", p.startswith("fp8"))):
        out = attention(q, k, v, scheme(v="int8 head", p=words), backend="reference")
        lost = (1023 / (1023 + 512) - out).abs().max()
        assert (lost < 64 / (1023 + 512)) == kept, "at most the tile of the hot key"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("magnitude", [1e5, -1e5], ids=str)
def test_extreme_logits_are_right(name, magnitude):
    q, k, v = qkv(6, 200, 32)
    q = torch.zeros_like(q)
    q[..., 0] = 2 * math.sqrt(32)
    k = torch.zeros_like(k)
    k[:, :, 150, 0] = magnitude / 2
    made = preset(name)
    operands = quantize(q, k, v, made)
    out, lse = attention(*operands, made, return_lse=True, backend="reference")
    left, right, values = exact_operands(*operands)
    exact, exact_lse = reference.oracle(left, right, values, features_of(q, k))
    allowed, _ = bounds(operands, made, features_of(q, k))
    assert out.isfinite().all() and lse.isfinite().all()
    # logits of 1e5 have steps of 2^-7 in float32
    assert ((out - exact).abs() <= allowed + 2.0**-6 * values.abs().max()).all()
    assert torch.allclose(lse.double(), exact_lse, rtol=2.0**-20, atol=0.02)


@pytest.mark.parametrize("name", ["int8", "int8-fast", "int-flash", "kv-int4", "int4", "fp8-rotated", "kv-int4-kivi"])
@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -2.0])], ids=["no sinks", "sinks"])
def test_a_row_with_nothing_to_attend_is_zero(name, sinks):
    q, k, v = qkv(40, 300, 32)
    mask = torch.ones(40, 300, dtype=torch.bool)
    mask[3], mask[7, :260], mask[9, 20:] = False, False, False
    given = {"mask": mask, "sinks": sinks}
    _, out, lse = assert_agrees(q, k, v + 3, preset(name), **given)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -INF).all()
    assert lse[:, :, [2, 7, 9]].isfinite().all() and (out[:, :, [2, 7, 9]] != 0).all()
    additive = torch.zeros(40, 300).masked_fill(~mask, -INF)
    again, again_lse = attention(q, k, v + 3, name, mask=additive, sinks=sinks, return_lse=True, backend="reference")
    assert torch.allclose(again, out, atol=1e-1) and (again[:, :, 3] == 0).all() and (again_lse[:, :, 3] == -INF).all()


@pytest.mark.parametrize("name", ["int-flash", "int-flash-half", "kv-int8", "kv-int4", "fireq", "none"])
def test_the_order_of_the_keys_does_not_matter_to_schemes_per_token(name):
    q, k, v = qkv(30, 100, 64, dtype=torch.float32)
    order, made = torch.randperm(100), preset(name)
    first, second = (quantize(q, *each, made, backend="reference") for each in ((k, v), (k[:, :, order], v[:, :, order])))
    assert second[1].codes.equal(first[1].codes[:, :, order]) and second[2].codes.equal(first[2].codes[:, :, order])
    a, b = (attention(*operands, made, backend="reference") for operands in (first, second))
    assert (a - b).abs().max() < 2.0**-9 * v.abs().max() if made.p.format.bits == 8 else 1e-5


@pytest.mark.parametrize("name", ["int-flash-half", "kv-int8", "kv-int4", "fireq", "kv-int4-kivi", "none"])
def test_later_keys_leave_the_rows_before_them_alone(name):
    q, k, v = qkv(160, 160, 64)
    balance = {"balance": "none"}  # a factor over all tokens would see them
    made = preset(name).model_copy(update=balance)
    whole = attention(q, k, v, made, causal=True, backend="reference")
    k[:, :, 96:], v[:, :, 96:] = k[:, :, 96:] * 3 + 1, v[:, :, 96:] * 5 - 2
    other = attention(q, k, v, made, causal=True, backend="reference")
    assert other[:, :, :96].equal(whole[:, :, :96])
    assert not other[:, :, 96:].equal(whole[:, :, 96:])


@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_row_alone_has_the_same_codes_and_output(name):
    q, k, v = qkv(70, 200, 64, heads=4, kv_heads=2, batch=3)
    out, lse = attention(q, k, v, name, causal=True, return_lse=True, backend="reference")
    operands = quantize(q, k, v, name)
    for i in range(3):
        alone = quantize(*(x[i : i + 1] for x in (q, k, v)), name)
        assert all(one.codes.equal(all_.codes[i : i + 1]) for one, all_ in zip(alone, operands, strict=True))
        assert all(
            one.scale is None or one.scale.equal(all_.scale[i : i + 1]) for one, all_ in zip(alone, operands, strict=True)
        )
        one, one_lse = attention(*alone, name, causal=True, return_lse=True, backend="reference")
        # torch's products and sums in float32 differ by an ulp with the number of matrices
        assert torch.allclose(one, out[i : i + 1], rtol=0, atol=4e-6)
        assert torch.allclose(one_lse, lse[i : i + 1], rtol=0, atol=4e-6)


REACH = {
    "int8 token, P against a running maximum": scheme("int8 token", "int8 token", "int8 token", "int8 unit"),
    "fp8 token": scheme("fp8_e4m3 token", "fp8_e4m3 token", "fp8_e4m3 token", "fp8_e4m3 unit"),
    "asymmetric token": scheme("int8 token", "int4 token asymmetric", "int4 token asymmetric", "uint8 row_block:64"),
    "16 bits": scheme("fp16", "bf16", "fp16", "fp16"),
    "float32": scheme(),
    "V per block": scheme("int8 token", "int8 block:64", "int8 block:64", "int8 row_block:64"),
    "V per channel and block": scheme("int8 token", "int8 token", "int8 channel_block:64", "uint8 row_block:64"),
    "asymmetric V per block": scheme("int8 token", "int8 token", "int8 block:64 asymmetric", "int8 row_block:64"),
    "KIVI": scheme("fp16", "int4 channel_block:64 asymmetric", "int4 group:16 asymmetric", "fp16"),
}


@pytest.mark.parametrize("value", [math.nan, INF], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("made", REACH.values(), ids=REACH)
def test_what_is_not_finite_reaches_the_rows_that_attend_to_it_and_no_others(made, where, value):
    tensors = dict(zip("qkv", qkv(160, d=32), strict=True))
    clean = attention(**tensors, scheme=made, causal=True, backend="reference")
    tensors[where][0, 1, 140, 3] = value
    out = attention(**tensors, scheme=made, causal=True, backend="reference")
    blocked = where != "q" and getattr(made, where).granularity.size == 64
    first, last = (128, 140) if blocked else (140, 140)  # rows between share a scale with it
    finite = out.isfinite().all(dim=-1)
    assert out[0, 0].equal(clean[0, 0]), "another head"
    assert finite[0, 1, :first].all()
    assert torch.allclose(out[0, 1, :first], clean[0, 1, :first], rtol=1e-5, atol=1e-5)
    if where == "q":
        assert not finite[0, 1, 140] and finite[0, 1, 141:].all()
    elif where == "k" and value == INF:
        assert not finite[0, 1, last:].all(), "a logit of -inf is one, and takes no weight"
    else:
        assert not finite[0, 1, last:].any()


@pytest.mark.parametrize("name", PRESETS)
def test_how_many_rows_are_held_at_once_does_not_matter(name, monkeypatch):
    q, k, v = qkv(150, 300, 64, heads=4, kv_heads=2)
    given = {"causal": True, "window": (100, None), "return_lse": True, "backend": "reference"}
    out, lse = attention(q, k, v, name, **given)
    exact = reference.oracle(q, k, v, features_of(q, k, causal=True, window=(100, None)))
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 1)
    chunks = list(reference.row_chunks(150, 10**9))
    assert len(chunks) == 10 and chunks[-1] == slice(144, 150)
    again, again_lse = attention(q, k, v, name, **given)
    # a code of P may fall to the other side of a tie
    tie = 0.01 if preset(name).p.format.bits < 32 else 1e-5
    assert torch.allclose(again, out, rtol=0, atol=tie) and torch.allclose(again_lse, lse, rtol=0, atol=tie)
    for one, other in zip(reference.oracle(q, k, v, features_of(q, k, causal=True, window=(100, None))), exact, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("n_k", [100, 128, 150])
@pytest.mark.parametrize("v", ["int8 block:256", "int8 channel_block:128", "int4 channel_block:256 asymmetric"])
def test_a_block_of_v_may_be_longer_than_the_sequence_and_than_a_tile(v, n_k, tile):
    assert_agrees(*qkv(20, n_k), scheme("int8 token", "int8 block:256", v, f"int8 row_block:{tile}"))


@pytest.mark.parametrize("n_q, n_k", [(40, 40), (33, 100), (100, 33)])
@pytest.mark.parametrize(
    "given", [(True, None), (True, (5, None)), (False, (20, 3)), (False, (None, 9)), (False, (7, None))], ids=str
)
def test_the_tiles_of_some_rows_are_those_that_one_of_them_attends_in(n_q, n_k, given):
    features = Features(scale=1.0, causal=given[0], window=given[1])
    kept = features.kept(slice(0, n_q), slice(0, n_k), n_q, n_k, torch.device("cpu"))
    tiles = [slice(start, min(start + 16, n_k)) for start in range(0, n_k, 16)]
    for start in range(0, n_q, 8):
        rows = slice(start, min(start + 8, n_q))
        assert list(features.spans(rows, n_q, n_k, 16)) == [tile for tile in tiles if kept[rows, tile].any()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_mask_of_floats_may_be_of_any_type(dtype):
    q, k, v = qkv(20, 150)
    mask = torch.randn(20, 150).to(dtype)
    given = dict(return_lse=True, backend="reference")
    out, lse = attention(q, k, v, "int8", mask=mask, **given)
    same, same_lse = attention(q, k, v, "int8", mask=mask.float(), **given)
    assert out.equal(same) and lse.equal(same_lse)


@pytest.mark.parametrize("n_q", [100, 128, 200])
def test_block_means_of_queries_go_with_their_rows(n_q, monkeypatch):
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 1)
    assert_agrees(*qkv(n_q, 60), scheme("int4 token block_mean", "int8 token mean"))


def test_a_token_of_zeros_in_v_does_not_coarsen_the_others():
    q, k, v = qkv(20, 64, 32)
    v[:, :, 10] = 0
    operands = quantize(q, k, v, "kv-int8")
    out = attention(*operands, "kv-int8", backend="reference")
    exact, _ = reference.oracle(*exact_operands(*operands), features_of(q, k))
    assert errors(out, exact).rel_l1 < 0.01


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("exponent", [-60, -20, 20], ids=str)
def test_values_times_a_power_of_two_give_the_output_times_it(name, exponent):
    made = preset(name)
    kept = {"v": made.v.model_copy(update={"scale_dtype": "fp32"} | ({"precision": "bf16"} if not made.v.scaled else {}))}
    made = made.model_copy(update=kept)
    q, k, v = qkv(150, 300, 64)
    out, lse = attention(q, k, v, made, causal=True, return_lse=True, backend="reference")
    other, other_lse = attention(q, k, v * 2.0**exponent, made, causal=True, return_lse=True, backend="reference")
    assert torch.allclose(other_lse, lse, rtol=0, atol=1e-5 if made.normalizer == "exact" else 1e-2)
    assert torch.allclose(other * 2.0**-exponent, out, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", [x for x in PRESETS if preset(x).q.format.kind == preset(x).k.format.kind == "int"])
def test_integer_scores_are_exact(name):
    q, k, v = qkv(40, 70, 64, heads=4, kv_heads=2)
    qq, kq, _ = quantize(q * 5, k * 5, v, name)
    expected = qq.stored_values().long() @ kq.stored_values().long().repeat_interleave(2, dim=1).mT
    assert integer_scores(qq, kq).dtype == torch.int32
    assert integer_scores(qq, kq).long().equal(expected)


def test_the_oracle_is_torchs_attention():
    for shape, given in (((40, 40, 32, 4, 2, 2), {"causal": True}), ((20, 33, 48, 4, 1, 1), {"mask": some_mask(1, 4, 20, 33)}),
                         ((20, 33, 48, 2, 2, 2), {"mask": torch.randn(20, 33).double(), "scale": 0.3})):  # fmt: skip
        q, k, v = (x.double() for x in qkv(*shape))
        exact, _ = reference.oracle(q, k, v, features_of(q, k, **given))
        theirs = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, given.get("mask"), is_causal=given.get("causal", False), scale=given.get("scale"), enable_gqa=True
        )
        assert torch.allclose(exact, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_is_the_formula(case):
    shape, given = CASES[case]
    q, k, v = qkv(*shape)
    features = features_of(q, k, **given)
    out, lse = reference.oracle(q, k, v, features)
    s = dense_logits(q, k, features)
    weights, total = s.exp(), s.exp().sum(dim=-1, keepdim=True)
    if features.sinks is not None:
        total = total + features.sinks.double().exp()[:, None, None]
    expected = weights @ v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1) / total
    assert torch.allclose(out, expected.nan_to_num(0), rtol=0, atol=1e-12)
    assert torch.allclose(lse, weights.sum(dim=-1).log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["int8", "none"])
def test_nothing_as_large_as_all_scores_is_held(name):
    n = 2048
    q, k, v = qkv(n, d=64, heads=2, dtype=torch.float16)
    with Largest() as largest:
        attention(q, k, v, name, causal=True, backend="reference")
    assert q.numel() <= largest.elements <= reference.SCORES_AT_ONCE < n * n
    with Largest() as largest:
        reference.oracle(q, k, v, features_of(q, k))
    assert largest.elements <= reference.SCORES_AT_ONCE


def test_int8_is_accurate_on_the_activations_that_ship():
    means = {}
    for name in ("int8", "int-flash"):
        found = []
        for q, k, v in Activations(sample()).values():
            exact, _ = reference.oracle(q, k, v, features_of(q, k))
            found.append(errors(attention(q, k, v, name, backend="reference"), exact).rel_l1)
        assert len(found) == 6
        assert name != "int8" or max(found) <= 0.0125
        means[name] = sum(found) / 6
    assert means["int-flash"] >= 3 * means["int8"]


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_values_of_nothing_overflow_no_sum_where_tiles_lie_far_apart(backend):
    """V per token, all zero, has the smallest weight there is; the second tile's reference then lies as far down as it goes."""
    q = torch.ones(1, 1, 3, 32)
    level = torch.tensor([0.0, -200.0, 250.0]).repeat_interleave(128)
    k = level[None, None, :, None] / 32**0.5 + torch.zeros(1, 1, 384, 32)
    out, lse = attention(q, k, torch.zeros_like(k), "kv-int8", return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 250 + math.log(128)), rtol=1e-3, atol=0)
