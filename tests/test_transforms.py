"""Transforms of Q, K and V change nothing of exact attention, whatever else it does."""

import math
from dataclasses import replace

import pytest
import torch
from factories import pairwise, qkv, scheme
from torch.utils._python_dispatch import TorchDispatchMode

from tokquant import attention, quantize, reference, transforms
from tokquant.attention import features_of
from tokquant.calibration.scales import LayerScales, needed
from tokquant.quantize import frames
from tokquant.transforms import (
    Frame,
    channel_factors,
    hadamard,
    key_maxima,
    mean_over_blocks,
    mean_over_tokens,
    pair_norms,
    query_maxima,
    rope_pair_factors,
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
    "channel balance that levels K alone": {"balance": {"channel": {"alpha": 0}}},
    "rope pairs balance": {"balance": "rope_pairs"},
    "rope pairs balance, largest channels apart": {"balance": {"rope_pairs": {"alpha": 2, "top_k": 5}}},
    "static balance": {"balance": {"rope_pairs": {"scale": "static"}}},
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


def calibrated(made, k):
    """Any offsets and factors will do."""
    shape = (k.shape[1], 1, k.shape[3])
    kept = {name: torch.randn(shape) if name.endswith("_offset") else 0.1 + 5 * torch.rand(shape) for name in needed(made)}
    return LayerScales("layer", kept, made) if kept else None


def channel_balance(q, k, alpha=0.5):
    return channel_factors(query_maxima(q, k.shape[1]), key_maxima(k), alpha)


def rope_pair_balance(k, *parameters):
    return rope_pair_factors(pair_norms(k), key_maxima(k), *parameters)


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
        fold=torch.rand(2, 3, 1, 48) + 0.5,
    )
    there = frame.apply(x)
    assert (frame.undo(there) - x).abs().max() < 3e-6
    assert not torch.allclose(there, x, rtol=1e-2)
    exact = x.double()
    if frame.offset is not None:
        exact = exact - frame.offset_of_tokens(n).double()
    exact = exact if frame.balance is None else exact * frame.balance.double()
    exact = exact @ dense_hadamard(48) if rotated else exact
    assert torch.allclose(there.double(), exact * frame.fold.double(), rtol=0, atol=1e-5), "offset, balance, rotation, fold"


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
def test_channel_balance_shares_the_outliers_between_both(alpha):
    q, k, _ = qkv(20, heads=4, kv_heads=2)
    factor = channel_balance(q, k, alpha)
    q_raw, k_raw = q.reshape(1, 2, 40, 32).abs().amax(dim=2, keepdim=True), k.abs().amax(dim=2, keepdim=True)
    assert torch.allclose(q_raw / factor, (q_raw * k_raw) ** (1 - alpha), rtol=1e-5), "what is left in Q"
    assert torch.allclose(k_raw * factor, (q_raw * k_raw) ** alpha, rtol=1e-5), "and in K"


@pytest.mark.parametrize("alpha", [8.0, 0.5])
def test_rope_pairs_get_one_factor_and_one_largest_norm(alpha):
    _, k, _ = qkv(20)
    factor = rope_pair_balance(k, alpha)
    assert factor[..., :16].equal(factor[..., 16:])
    norms = torch.hypot(*(k * factor).chunk(2, dim=-1)).amax(dim=2)
    assert torch.allclose(norms, torch.full_like(norms, alpha), rtol=1e-6)


def test_the_largest_channels_and_their_partners_get_factors_of_their_own():
    _, k, _ = qkv(20)
    k[0, 0, :, 3] *= 50  # and so its partner is 19
    k[0, 1, :, 4] *= 50
    k[0, 1, :, 20] *= 40
    factor = rope_pair_balance(k, 2.0, 6.0, 2)
    for head, largest in enumerate(k.abs().amax(dim=2)[0]):
        chosen = {c % 16 for c in largest.topk(2).indices.tolist()}
        assert len(chosen) == 2 - head, "in the second head they are a pair"
        for c in range(32):
            if c % 16 in chosen:
                assert factor[0, head, 0, c] * largest[c] == pytest.approx(6)
            else:
                assert factor[0, head, 0, c] == rope_pair_balance(k, 2.0)[0, head, 0, c]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf], ids=str)
def test_a_channel_that_cannot_be_balanced_keeps_its_scale(bad):
    q, k, _ = qkv(20)
    k[0, 1, :, 3], k[0, 1, :, 19] = bad, bad
    for factor in (channel_balance(q, k), rope_pair_balance(k), rope_pair_balance(k, 8.0, 8.0, 2)):
        assert factor[0, 1, 0, 3] == factor[0, 1, 0, 19] == 1
        assert factor.isfinite().all() and (factor > 0).all()


@pytest.mark.parametrize("made", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("n_q, n_k", [(37, 37), (5, 37), (150, 37)], ids=["square", "few queries", "many queries"])
def test_attention_is_what_it_was(made, features, n_q, n_k):
    q, k, v = qkv(n_q, n_k, 32, heads=4, kv_heads=2, batch=2)
    made = scheme(**made)
    out, lse = attention(
        q, k, v, made, **features, scales=calibrated(made, k), return_lse=True, backend="reference"
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


CHOICES = pairwise(
    q_smooth=["", "block_mean"],
    k_smooth=["", "mean", "static_offset"],
    v_smooth=["", "mean", "static_offset"],
    balance=["none", "channel", {"channel": {"alpha": 0.2}}, "rope_pairs", {"rope_pairs": {"beta": 3, "top_k": 4}},
             {"channel": {"scale": "static"}}, {"rope_pairs": {"scale": "static"}}],
    rotate=["none", "hadamard"],
    rotate_v=["none", "hadamard"],
    shape=[(21, 37, 48, 4, 2), (1, 1, 6, 3, 1), (150, 33, 80, 2, 2), (5, 131, 64, 4, 1), (9, 14, 33, 2, 1)],
)  # fmt: skip


class TestAlgebra:
    """The same in float64, with the factors that the package computes: equal to within 1e-12."""

    def given(self):
        q, k, v = (x.double() for x in qkv(21, 37, 48, heads=4, kv_heads=2, batch=2))
        return q, k, v, lambda x: x.repeat_interleave(2, dim=1)

    def output(self, s, v, softcap=None):
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        return torch.softmax(s, dim=-1) @ v

    @pytest.mark.parametrize("q_smooth, k_smooth, v_smooth, balance, rotate, rotate_v, shape", CHOICES, ids=str)
    def test_all_that_a_scheme_does_leaves_the_output(self, q_smooth, k_smooth, v_smooth, balance, rotate, rotate_v, shape):
        n_q, n_k, d, heads, kv_heads = shape
        if d % 2 and "rope_pairs" in balance:
            balance = "channel"
        q, k, v = (x.double() for x in qkv(*shape, batch=2))
        made = scheme(
            f"fp32 {q_smooth}", f"fp32 {k_smooth}", f"fp32 {v_smooth}", balance=balance, rotate=rotate, rotate_v=rotate_v
        )
        q_frame, k_frame, v_frame = frames(q, k, v, made, calibrated(made, k))

        def shared(x):
            return x.repeat_interleave(heads // kv_heads, dim=1)

        s = q_frame.apply(q) @ shared(k_frame.apply(k)).mT
        lost = torch.zeros(1) if k_frame.offset is None else shared(k_frame.offset_of_tokens(n_k)).double()
        if q_frame.offset is not None:
            s = s + q_frame.offset_of_tokens(n_q).double() @ (shared(k) - lost).mT
        if k_frame.offset is not None:
            s = s + q @ lost.mT
        scale = d**-0.5
        out = self.output(scale * s, shared(v_frame.apply(v)))
        out = hadamard(out) if v_frame.rotated else out
        out = out if v_frame.offset is None else out + shared(v_frame.offset.float())
        exact = self.output(scale * q @ shared(k).mT, shared(v))
        # a float32 factor and its inverse, or block means in float32, leave some of its rounding
        assert (out - exact).abs().max() < 1e-6 * exact.abs().max()

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


@pytest.mark.parametrize("shape", [(3, 5, 130, 8), (1, 3, 300, 16), (40, 2, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduced", [mean_over_tokens, mean_over_blocks, key_maxima, pair_norms], ids=lambda f: f.__name__)
def test_some_heads_at_a_time_give_what_all_at_once_do(reduced, dtype, shape, monkeypatch):
    x = torch.randn(shape).to(dtype)
    for each in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        whole = reduced(each)
        for piece in (1, each[0].numel(), 2 * each[0, :2].numel()):
            monkeypatch.setattr(transforms, "PIECE", piece)
            assert torch.equal(reduced(each), whole)


def test_a_mean_of_many_tokens_copies_few_of_them_to_float32(monkeypatch):
    x, sizes = torch.randn(1, 8, 65536, 8).half(), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.extend([args[0].numel()] if function is torch.ops.aten.mean.dim else [])
            return found

    with Sizes():
        mean_over_tokens(x)
    assert sum(sizes) == x.numel() and max(sizes) <= 2 * transforms.PIECE
