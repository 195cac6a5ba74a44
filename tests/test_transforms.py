"""Transforms of Q, K and V change nothing of exact attention, whatever else it does."""

import math
from dataclasses import replace

import pytest
import torch
from factories import qkv, scheme

from tokquant import attention, quantize, reference
from tokquant.attention import features_of
from tokquant.calibration.scales import LayerScales
from tokquant.transforms import (
    ROPE_PAIR_LARGEST,
    Frame,
    channel_balance,
    hadamard,
    mean_over_blocks,
    mean_over_tokens,
    rope_pair_balance,
)

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "everything": {
        "causal": True,
        "softcap": 3.0,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
        "window": (20, None),
        "scale": 0.3,
        "mask": torch.linspace(-2, 2, 37),
    },
}

TRANSFORMS = {
    "mean of k": {"k": "fp32 mean"},
    "static offset of k": {"k": "fp32 static_offset"},
    "block means of q": {"q": "fp32 block_mean"},
    "channel balance": {"balance": "channel"},
    "rope pairs balance": {"balance": "rope_pairs"},
    "q and k rotated": {"rotate": "hadamard"},
    "v rotated": {"rotate_v": "hadamard"},
    "mean of v": {"v": "fp32 mean"},
    "static offset of v": {"v": "fp32 static_offset"},
    "all at once": {
        "q": "fp32 block_mean",
        "k": "fp32 mean",
        "v": "fp32 mean",
        "balance": "channel",
        "rotate": "hadamard",
        "rotate_v": "hadamard",
    },
}


def offsets(made, k):
    named = {"k_offset": made.k, "v_offset": made.v}
    kept = {name: torch.randn(k.shape[1], 1, k.shape[3]) for name, spec in named.items() if spec.smooth == "static"}
    return LayerScales("layer", kept) if kept else None


def dense_hadamard(d):
    """The natural-order matrix by Kronecker products, block-diagonal where d is no power of two."""
    order = 1
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while d % (2 * order) == 0:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
        order *= 2
    return torch.kron(torch.eye(d // order, dtype=torch.float64), matrix / math.sqrt(order))


def float32_rounding(q, k, v):
    """What rounding of float32 may change: logits by some ulps of |q| |k|, outputs by that share of the largest value."""
    logit = (q.norm(dim=-1).amax() * k.norm(dim=-1).amax()).item() * q.shape[-1] ** -0.5
    return 2.0**-24 * (16 + 4 * logit) * v.abs().max().item()


@pytest.mark.parametrize("d", [16, 32, 64, 80, 96, 128, 33])
def test_hadamard_is_the_dense_matrix_and_its_own_inverse(d):
    matrix = dense_hadamard(d)
    x = torch.randn(2, 3, 5, d, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(d, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(hadamard(x), x @ matrix, rtol=0, atol=1e-13)
    assert torch.allclose(hadamard(hadamard(x)), x, rtol=0, atol=1e-13)
    assert torch.allclose(hadamard(x.float()).double(), x @ matrix, rtol=0, atol=1e-5)
    assert d == 33 or not torch.allclose(hadamard(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_hadamard_of_sixteen_bits_is_computed_in_float32(dtype):
    x = torch.randn(1, 1, 4, 64).to(dtype)
    assert hadamard(x).dtype == torch.float32
    assert hadamard(x).equal(hadamard(x.float()))


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("offset", ["none", "mean", "block means"])
@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("rotated", [False, True], ids=["straight", "rotated"])
def test_undoing_a_frame_gives_the_tensor_back(n, offset, balanced, rotated):
    x = torch.randn(2, 3, n, 48) + 3
    frame = Frame(
        offset={"none": None, "mean": mean_over_tokens(x), "block means": mean_over_blocks(x)}[offset],
        balance=torch.rand(2, 3, 1, 48) + 0.5 if balanced else None,
        rotated=rotated,
    ).with_fold(torch.rand(2, 3, 1, 48) + 0.5)
    there = frame.apply(x)
    assert (frame.undo(there) - x).abs().max() < 3e-6
    assert not torch.allclose(there, x, rtol=1e-2)
    exact = x.double()
    if frame.offset is not None:
        exact = exact - frame.offset_of_tokens(n).double()
    exact = exact if frame.balance is None else exact * frame.balance.double()
    exact = exact @ dense_hadamard(48) if rotated else exact
    assert torch.allclose(there.double(), exact * frame.fold.double(), rtol=0, atol=1e-5), "offset, balance, rotation, fold"


def test_channel_balance_levels_the_channels_of_both():
    q, k, _ = qkv(20, heads=4, kv_heads=2)
    factor = channel_balance(q, k)
    q_largest = q.reshape(1, 2, 40, 32).abs().amax(dim=2, keepdim=True) / factor
    assert torch.allclose(q_largest, k.abs().amax(dim=2, keepdim=True) * factor, rtol=1e-6)


def test_rope_pairs_get_one_factor_and_one_largest_norm():
    _, k, _ = qkv(20)
    factor = rope_pair_balance(k)
    assert factor[..., :16].equal(factor[..., 16:])
    norms = torch.hypot(*(k * factor).chunk(2, dim=-1)).amax(dim=2)
    assert torch.allclose(norms, torch.full_like(norms, ROPE_PAIR_LARGEST), rtol=1e-6)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf], ids=str)
def test_a_channel_that_cannot_be_balanced_keeps_its_scale(bad):
    q, k, _ = qkv(20)
    k[0, 1, :, 3], k[0, 1, :, 19] = bad, bad
    for factor in (channel_balance(q, k), rope_pair_balance(k)):
        assert factor[0, 1, 0, 3] == factor[0, 1, 0, 19] == 1
        assert factor.isfinite().all() and (factor > 0).all()


@pytest.mark.parametrize("made", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("n_q, n_k", [(37, 37), (5, 37), (150, 37)], ids=["square", "few queries", "many queries"])
def test_attention_is_what_it_was(made, features, n_q, n_k):
    q, k, v = qkv(n_q, n_k, 32, heads=4, kv_heads=2, batch=2)
    made = scheme(**made)
    out, lse = attention(
        q, k, v, made, **features, scales=offsets(made, k), return_lse=True, backend="reference"
    )  # fmt: skip
    exact, exact_lse = reference.oracle(q, k, v, features_of(q, k, **features))
    bound = float32_rounding(q, k, v)
    assert (out.double() - exact).abs().max() < bound < 1e-4
    attended = exact_lse > -math.inf
    assert (lse.double() - exact_lse)[attended].abs().max() < bound
    assert (lse[~attended] == -math.inf).all() and (out[~attended] == 0).all()


@pytest.mark.parametrize("features", [FEATURES["softcap"], FEATURES["sinks"]], ids=["softcap", "sinks"])
def test_the_offset_of_k_is_given_back_where_the_row_sees_it(features):
    q, k, v = qkv(20, 37, 32, heads=4, kv_heads=2)
    k = k + 20
    made = scheme(k="fp32 mean")
    qq, kq, vq = quantize(q, k, v, made)
    exact, exact_lse = reference.oracle(q, k, v, features_of(q, k, **features))
    out, lse = attention(qq, kq, vq, made, **features, return_lse=True, backend="reference")
    bound = float32_rounding(q, k, v)
    assert (out.double() - exact).abs().max() < bound
    assert (lse.double() - exact_lse).abs().max() < bound
    forgotten, forgotten_lse = attention(
        replace(qq, logit_offset=None), kq, vq, made, **features, return_lse=True, backend="reference"
    )
    assert (forgotten.double() - exact).abs().max() > 0.1 > 100 * bound
    assert (forgotten_lse.double() - exact_lse).abs().max() > 1


def test_plain_softmax_does_not_see_the_offset_of_k():
    q, k, v = qkv(20, 37, 32)
    made = scheme(k="fp32 mean")
    qq, kq, vq = quantize(q, k + 20, v, made)
    out, lse = attention(qq, kq, vq, made, return_lse=True, backend="reference")
    forgotten, forgotten_lse = attention(replace(qq, logit_offset=None), kq, vq, made, return_lse=True, backend="reference")
    assert out.equal(forgotten)
    assert (lse - forgotten_lse).abs().max() > 1, "but its normalizer does"


def test_the_mean_of_v_is_weighted_with_what_the_sink_leaves():
    q, k, v = qkv(20, 37, 32)
    made, sinks = scheme(v="fp32 mean"), torch.tensor([5.0, 6.0])
    exact, _ = reference.oracle(q, k, v + 20, features_of(q, k, sinks=sinks))
    out = attention(q, k, v + 20, made, sinks=sinks, backend="reference")
    assert (out.double() - exact).abs().max() < float32_rounding(q, k, v + 20)
    assert exact.mean() < 15, "the sinks take a part that shows"


class TestAlgebra:
    """The same in float64, with the factors that the package computes: equal to within 1e-12."""

    def given(self):
        q, k, v = (x.double() for x in qkv(21, 37, 48, heads=4, kv_heads=2, batch=2))
        return q, k, v, lambda x: x.repeat_interleave(2, dim=1)

    def output(self, s, v, softcap=None):
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        return torch.softmax(s, dim=-1) @ v

    def test_offset_balance_and_rotation_leave_the_scores(self):
        q, k, _, shared = self.given()
        c = mean_over_tokens(k.float()).double()
        for factor in (channel_balance(q, k - c).double(), rope_pair_balance(k - c).double()):
            left, right = hadamard(q / shared(factor)), shared(hadamard((k - c) * factor))
            scores = left @ right.mT + q @ shared(c).mT
            assert torch.allclose(scores, q @ shared(k).mT, rtol=0, atol=1e-12)

    def test_the_offset_leaves_softmax_but_not_a_softcap(self):
        q, k, v, shared = self.given()
        c = mean_over_tokens(k.float() + 5).double()
        s, lowered = q @ shared(k).mT, q @ shared(k - c).mT
        assert torch.allclose(self.output(lowered, shared(v)), self.output(s, shared(v)), rtol=0, atol=1e-12)
        assert not torch.allclose(self.output(lowered, shared(v), 10), self.output(s, shared(v), 10), atol=1e-2)
        given_back = lowered + q @ shared(c).mT
        assert torch.allclose(self.output(given_back, shared(v), 10), self.output(s, shared(v), 10), rtol=0, atol=1e-12)

    def test_block_means_are_added_back_by_their_product_with_the_centred_keys(self):
        q, k, _, shared = self.given()
        mean, c = q.mean(dim=2, keepdim=True), k.mean(dim=2, keepdim=True)
        scores = (q - mean) @ shared(k - c).mT + mean @ shared(k - c).mT + q @ shared(c).mT
        assert torch.allclose(scores, q @ shared(k).mT, rtol=0, atol=1e-12)

    def test_the_mean_and_rotation_of_v_are_undone_on_the_output(self):
        q, k, v, shared = self.given()
        s, mean = q @ shared(k).mT, v.mean(dim=2, keepdim=True)
        turned = hadamard(self.output(s, shared(hadamard(v - mean)))) + shared(mean)
        assert torch.allclose(turned, self.output(s, shared(v)), rtol=0, atol=1e-12)
