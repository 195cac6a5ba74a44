"""Factors folded into the weights of Q and K: through an actual RoPE, no score changes."""

import pytest
import torch
from factories import scheme

import tokquant as tq
from tokquant.folding import fold, split
from tokquant.transforms import key_maxima, pair_norms, rope_pair_factors

HIDDEN, HEADS, KV_HEADS, D = 40, 6, 2, 16
PAIRS = {"half": [(f, f + D // 2) for f in range(D // 2)], "interleaved": [(2 * f, 2 * f + 1) for f in range(D // 2)]}


def weights(dtype=torch.float64, d=D):
    generator = torch.Generator().manual_seed(0)
    sizes = [(HEADS * d, HIDDEN), (KV_HEADS * d, HIDDEN), (HEADS * d,), (KV_HEADS * d,)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def folded(given, factors, **rest):
    q_weight, k_weight, q_bias, k_bias = given
    return fold(q_weight, k_weight, factors, q_bias=q_bias, k_bias=k_bias, **rest)


def rope(x, pairs):
    """Rotary embedding of [B, H, N, D], written out pair by pair."""
    position, turned = torch.arange(x.shape[2], dtype=torch.float64), x.clone()
    for index, (one, other) in enumerate(pairs):
        angle = position * 10_000.0 ** (-index / len(pairs))
        turned[..., one] = x[..., one] * angle.cos() - x[..., other] * angle.sin()
        turned[..., other] = x[..., one] * angle.sin() + x[..., other] * angle.cos()
    return turned


def queries_and_keys(x, given, pairs, d=D):
    """Of hidden states [B, N, hidden], as an attention layer of transformers makes them."""
    made = []
    for weight, bias, heads in ((given[0], given[2], HEADS), (given[1], given[3], KV_HEADS)):
        projected = torch.nn.functional.linear(x, weight, bias)
        made.append(rope(projected.unflatten(-1, (heads, d)).transpose(1, 2), pairs))
    return made


def logits(q, k):
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT


def pair_equal(pairs):
    factors = 0.05 + 4 * torch.rand(KV_HEADS, 1, D)
    for one, other in pairs:
        factors[..., other] = factors[..., one]
    return factors


@pytest.mark.parametrize("kind", PAIRS)
def test_no_score_changes_and_keys_are_multiplied(kind):
    x, given, pairs = torch.randn(2, 23, HIDDEN, dtype=torch.float64), weights(), PAIRS[kind]
    kept, factors = [each.clone() for each in given], pair_equal(pairs)
    q, k = queries_and_keys(x, given, pairs)
    new_q, new_k = queries_and_keys(x, folded(given, factors, rope=kind), pairs)
    assert torch.allclose(new_k, k * factors.double(), rtol=1e-12), "as if multiplied after RoPE"
    assert (logits(new_q, new_k) - logits(q, k)).abs().max() < 1e-12 * logits(q, k).abs().max()
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True)), "the caller's weights are as they were"


def test_factors_of_the_other_pairs_would_change_scores():
    """What `fold` refuses is not kept by RoPE."""
    x, given, factors = torch.randn(2, 23, HIDDEN, dtype=torch.float64), weights(), pair_equal(PAIRS["interleaved"])
    wrong = folded(given, factors, rope="none")
    before, after = (logits(*queries_and_keys(x, each, PAIRS["half"])) for each in (given, wrong))
    assert (before - after).abs().max() > 0.1 * before.abs().max()
    with pytest.raises(ValueError, match="RoPE turns them together"):
        folded(given, factors)


def test_without_rope_any_factors_fold():
    x, given, factors = torch.randn(2, 23, HIDDEN, dtype=torch.float64), weights(), 0.05 + torch.rand(KV_HEADS, 1, D)
    before, after = (logits(*queries_and_keys(x, each, [])) for each in (given, folded(given, factors, rope="none")))
    assert (before - after).abs().max() < 1e-12 * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_keep_their_type_and_are_rounded_once(dtype):
    given, factors = weights(dtype), pair_equal(PAIRS["half"])
    q_weight, k_weight, q_bias, k_bias = folded(given, factors)
    by_row = factors.double().flatten()
    by_query_row = factors.double().repeat_interleave(HEADS // KV_HEADS, dim=0).flatten()
    assert torch.equal(k_weight, (given[1].double() * by_row[:, None]).to(dtype))
    assert torch.equal(k_bias, (given[3].double() * by_row).to(dtype))
    eps = torch.finfo(dtype).eps
    for found, exact in ((q_weight, given[0].double() / by_query_row[:, None]), (q_bias, given[2].double() / by_query_row)):
        assert found.dtype == dtype and torch.allclose(found.double(), exact, rtol=eps, atol=1e-6)


def test_parameters_of_a_layer_are_taken_and_biases_may_be_missing():
    layer = torch.nn.Linear(HIDDEN, KV_HEADS * D, bias=False)
    found = fold(torch.nn.Linear(HIDDEN, HEADS * D).weight, layer.weight, pair_equal(PAIRS["half"]))
    assert found.q_bias is found.k_bias is None and not found.k_weight.requires_grad


def test_calibrated_pairs_are_folded_and_the_channels_apart_stay_for_attention():
    """FireQ as a whole: the layer with folded weights and what is left as `k_balance` has the codes of all at once."""
    made = scheme("int8", "int4", balance={"rope_pairs": {"top_k": 2, "scale": "static"}})
    x, given, pairs = torch.randn(1, 60, HIDDEN, dtype=torch.float64), weights(), PAIRS["half"]
    given[3][5] += 30  # an outlier channel of K's bias
    q, k = queries_and_keys(x, given, pairs)
    calibrator = tq.Calibrator(made)
    calibrator.observe("layer", q.float(), k.float(), k.float())
    factors = calibrator.scales()["layer"].tensors["k_balance"]
    before, after = split(factors)
    assert torch.equal(before * after, factors) and not torch.equal(before, factors)
    assert int((after != 1).sum()) <= 2 * 2 * KV_HEADS and after[0, 0, 5] != 1 and after[0, 0, 5 + D // 2] != 1
    new_q, new_k = queries_and_keys(x, folded(given, before), pairs)
    assert (logits(new_q, new_k) - logits(q, k)).abs().max() < 1e-12 * logits(q, k).abs().max()
    whole = tq.quantize(q.float(), k.float(), k.float(), made, scales=calibrator.scales()["layer"], backend="reference")
    left = tq.LayerScales("layer", {"k_balance": after}, made)
    parts = tq.quantize(new_q.float(), new_k.float(), k.float(), made, scales=left, backend="reference")
    for one, other in zip(whole[:2], parts[:2], strict=True):
        values = one.scaled_values(), other.scaled_values()
        assert (values[0] - values[1]).norm() < 1e-3 * values[0].norm(), "but for codes beside a tie"


def test_the_keys_of_folded_weights_have_norms_of_alpha_before_and_after_rope():
    x, given = torch.randn(1, 60, HIDDEN, dtype=torch.float64), weights()
    for pairs in (PAIRS["half"], []):
        _, k = queries_and_keys(x, given, pairs)
        factors = rope_pair_factors(pair_norms(k), key_maxima(k), 3.0)[0]
        _, new_k = queries_and_keys(x, folded(given, factors), pairs)
        assert torch.allclose(pair_norms(new_k), torch.full((1, KV_HEADS, 1, D // 2), 3.0, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize("kind", ["half", "interleaved", "none"])
def test_split_gives_all_that_rope_keeps_to_the_first_part(kind):
    factors = pair_equal(PAIRS.get(kind, []))
    assert all(torch.equal(*pair) for pair in zip(split(factors, kind), (factors, torch.ones_like(factors)), strict=True))
    factors[1, 0, 3] = 7
    before, after = split(factors, kind)
    changed = {"half": [3, 11], "interleaved": [2, 3], "none": []}[kind]
    assert (after != 1).nonzero()[:, 2].tolist() == (before != factors).nonzero()[:, 2].tolist() == changed


def test_factors_that_a_pair_does_not_share_are_refused_with_its_channels():
    factors = torch.ones(KV_HEADS, 1, D)
    factors[1, 0, 3], factors[1, 0, 11] = 0.5, 0.25
    with pytest.raises(ValueError, match=r"factors: channels 3 and 11 of head 1 have 0\.5 and 0\.25, .*1 such pairs.*split"):
        folded(weights(), factors)


ONES = torch.ones(KV_HEADS, 1, D)
WRONG = {
    "factors in two dimensions": (dict(factors=ONES[:, 0]), r"factors: shape \[2, 16\] is not \[H_kv, 1, D\]"),
    "an odd head_dim": (dict(factors=ONES[..., :15]), r"factors: shape \[2, 1, 15\] .* D even under RoPE"),
    "a factor of zero": (dict(factors=ONES * 0), "factors: holds a value that is not finite and above zero"),
    "a factor that is no number": (dict(factors=ONES * torch.nan), "factors: holds a value that is not finite"),
    "keys of other heads": (dict(k_weight=torch.ones(48, 8)), r"k_weight: shape \[48, 8\] .* 32"),
    "queries of other heads": (dict(q_weight=torch.ones(80, 8)), r"q_weight: shape \[80, 8\] .* a multiple of 32"),
    "a weight without rows": (dict(k_weight=torch.ones(32)), r"k_weight: shape \[32\]"),
    "a weight of no dimensions": (dict(q_weight=torch.tensor(1.0)), r"q_weight: shape \[\] has not a multiple of 32"),
    "no factors": (dict(factors=ONES[:0]), r"factors: shape \[0, 1, 16\] is not \[H_kv, 1, D\]"),
    "a bias of other rows": (dict(k_bias=torch.ones(16)), r"k_bias: shape \[16\] is not that of the weight's rows, \[32\]"),
    "an unknown RoPE": (dict(rope="neox"), "rope: 'neox' is not valid; use half, interleaved or none"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(changes, message):
    given = dict(q_weight=torch.ones(96, 8), k_weight=torch.ones(32, 8), factors=ONES) | changes
    with pytest.raises(ValueError, match=message):
        fold(**given)


@pytest.mark.parametrize("name", ["q_weight", "k_weight", "q_bias", "factors"])
@pytest.mark.parametrize("given", [[1.0, 2.0], torch.ones(64, 8, dtype=torch.int8)], ids=["a list", "codes"])
def test_what_are_no_weights_is_named(name, given):
    arguments = {"q_weight": torch.ones(64, 8), "k_weight": torch.ones(64, 8), "factors": torch.ones(2, 1, 32)}
    with pytest.raises((TypeError, ValueError), match=f"{name}: "):
        fold(**(arguments | {name: given}))
