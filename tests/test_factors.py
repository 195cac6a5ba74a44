"""Low-rank bias: beside quantized scores, by singular values, and of distances in space."""

import math

import pytest
import torch
from factories import dense_bias, qkv, some_factors

import tokquant as tq
from tokquant import bias
from tokquant.inputs import features_of
from tokquant.metrics import errors
from tokquant.reference import oracle

both = pytest.mark.parametrize("backend", ["reference", "triton"])


@both
@pytest.mark.parametrize("name", ["int-flash", "int8", "int8-fast"])
def test_a_large_bias_leaves_the_errors_of_an_integer_scheme_alone(backend, name):
    """Under a scale of Q and K these columns would take every level: their products are a thousand times the scores."""
    n = 256
    q, k, v = qkv(n, n, 64, 2)
    i = torch.arange(n).half()[:, None]
    wave = i.float().sin().half()

    def columns(*pairs):
        return bias.lowrank(*(torch.cat(side, dim=1)[None, None] for side in zip(*pairs, strict=True)))

    biases = {
        "none": None,
        "waves": bias.key_vector(wave[:, 0]),
        "waves and what is one for all keys of a query": columns((i**0, wave), (-4 * i, i**0)),
        "alibi": bias.alibi(torch.tensor([0.25, 0.25])),
        "alibi in columns": columns((i**0 / 4, i), (-i / 4, i**0)),
    }
    found = {}
    for case, given in biases.items():
        exact, _ = oracle(q, k, v, features_of(q, k, causal=True, bias=given))
        found[case] = errors(tq.attention(q, k, v, name, causal=True, bias=given, backend=backend), exact).rel_l1
    assert found["waves and what is one for all keys of a query"] == pytest.approx(found["waves"], rel=0.02)
    assert found["alibi in columns"] == pytest.approx(found["alibi"], rel=0.02)
    assert found["waves"] < 1.5 * found["none"] and found["alibi"] < 2.5 * found["none"], "ALiBi averages over fewer keys"


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 64, 100, 256])
def test_any_rank_to_256_runs_in_a_kernel(rank):
    operands = tq.quantize(*qkv(20, 140, 32), "int8-fp16")
    given = bias.lowrank(some_factors(1, 2, 20, rank) / rank**0.5, some_factors(1, 1, 140, rank))
    out, expected = (tq.attention(*operands, "int8-fp16", bias=given, backend=backend) for backend in ("triton", "reference"))
    assert (out - expected).abs().max() < 2e-3


def test_a_rank_beyond_a_kernel_is_refused_and_emulated():
    q, k, v = qkv(20, 20, 32)
    given = bias.lowrank(some_factors(1, 2, 20, 257), some_factors(1, 1, 20, 257))
    with pytest.raises(tq.UnsupportedError, match=r"bias: rank 257 .*at most 256, a dense bias, or backend='reference'"):
        tq.attention(q, k, v, "int8", bias=given, backend="triton")
    assert tq.attention(q, k, v, "int8", bias=given, backend="reference").isfinite().all()


# --------------------------------------------------------------------------- svd


def smooth(heads, n_q, n_k, rank):
    """A bias whose singular values fall by halves and end after `rank`, as learned relative positions nearly do."""
    u, _ = torch.linalg.qr(torch.randn(heads, n_q, rank, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(heads, n_k, rank, dtype=torch.float64))
    return 40 * (u * 2.0 ** -torch.arange(rank, dtype=torch.float64)) @ v.mT


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_svd_keeps_the_energy_it_is_asked_for(kind):
    values = smooth(3, 100, 120, 30).to(kind)
    squares = torch.linalg.svdvals(values.double()).square()
    share = squares.cumsum(-1) / squares.sum(-1, keepdim=True)
    for energy, largest in ((0.9, 32), (0.995, 32), (0.995, 5), (1 - 1e-8, 32)):
        made = bias.svd(values, energy=energy, largest_rank=largest)
        assert isinstance(made, bias.LowRank) and made.q_factors.shape == (1, 3, 100, made.rank)
        needed = int((share < energy).sum(-1).max()) + 1
        assert needed <= made.rank == min(largest, 16 if needed <= 16 else 32)
        assert torch.allclose(made.energy, share[:, made.rank - 1], rtol=0, atol=1e-6) and (made.energy >= energy - 1e-7).all()
        lost = (dense_bias(made, 100, 120)[0] - values).square().sum((1, 2)) / squares.sum(-1)
        assert (lost <= 1 - share[:, made.rank - 1] + 1e-6).all()
        sizes = [x.double().square().sum(2) for x in (made.q_factors, made.k_factors)]
        assert torch.allclose(*sizes, rtol=1e-2, atol=1e-5), "the singular values are in both factors evenly"


def test_svd_falls_to_dense_where_factors_do_not_pay():
    noise = torch.randn(2, 200, 200)
    assert isinstance(bias.svd(noise), bias.Dense) and bias.svd(noise).values is noise
    assert isinstance(bias.svd(smooth(2, 200, 200, 30), energy=1 - 1e-15, largest_rank=20), bias.Dense)
    assert isinstance(bias.svd(torch.ones(2, 32, 32)), bias.Dense), "64 x 16 numbers are no fewer than 32 x 32"
    assert isinstance(bias.svd(torch.ones(2, 49, 49)), bias.LowRank)


def test_svd_takes_batches_and_zeros():
    values = torch.stack([smooth(2, 60, 50, 4), torch.zeros(2, 60, 50).double()])
    made = bias.svd(values)
    assert made.energy.shape == (2, 2) and (made.energy[1] == 1).all()
    assert (dense_bias(made, 60, 50) - values).abs().max() < 2e-2 and (dense_bias(made, 60, 50)[1] == 0).all()


@both
def test_attention_with_factors_is_that_with_the_bias_they_came_from(backend):
    q, k, v = qkv(100, 120, 32, 2)
    values = smooth(2, 100, 120, 8)
    out = tq.attention(q, k, v, "none", bias=bias.svd(values, energy=1 - 1e-6), backend=backend)
    exact, _ = oracle(q, k, v, features_of(q, k, mask=values))
    assert errors(out, exact).rel_l1 < 1e-2


# --------------------------------------------------------------------------- squared distance


def distances(x, y):
    return -(x.double()[:, None, :, None] - y.double()[:, None, None]).square().sum(-1)


@pytest.mark.parametrize("shift", [0.0, 10.0, 100.0, -3000.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2.0**-18), (torch.bfloat16, 2.0**-13)], ids=str)
def test_squared_distances_do_not_cancel_wherever_the_points_lie(shift, dtype, bound):
    for span, weight in ((1.0, 1.0), (60.0, 1.0), (60.0, 0.37), (7.0, 5.3), (1.0, 1e-5), (2.0, -1000.0)):
        x, y = (span * torch.rand(2, n, 3, dtype=torch.float64) + shift for n in (70, 90))
        made = bias.squared_distance(x, y, weight=weight, dtype=dtype)
        assert made.rank == 16 and made.q_factors.dtype == made.k_factors.dtype == dtype
        every = slice(0, 90)
        found = made.block(slice(0, 70), every, 70, 90, torch.float32)
        s = 2.0 ** math.ceil(math.log2(span / 2))
        assert (found - weight * distances(x, y)).abs().max() <= bound * max(abs(weight) * s**2, 1)


def test_five_columns_of_16_bits_do_cancel():
    """The trap that `squared_distance` is there to avoid: what the bound above would be without it."""
    x = torch.rand(1, 70, 3) + 100
    norm = -x.square().sum(-1, keepdim=True)
    plain = bias.lowrank(
        torch.cat([2 * x, norm, norm**0], -1)[:, None].half(), torch.cat([x, norm**0, norm], -1)[:, None].half()
    )
    lost, kept = (
        (made.block(slice(0, 70), slice(0, 70), 70, 70, torch.float32) - distances(x, x)).abs().max()
        for made in (plain, bias.squared_distance(x))
    )
    assert lost > 1 and kept < 1e-6


@both
def test_attention_by_distance_is_that_of_float64(backend):
    x, y = (8 * torch.rand(2, n, 3) + 100 for n in (50, 140))
    weight = torch.tensor([0.0, 0.05, 1.0, 7.0])
    q, k, v = qkv(50, 140, 32, 4, 2, 2)
    made = bias.squared_distance(x, y, weight=weight)
    assert made.q_factors.shape == (2, 4, 50, 16) and made.k_factors.shape == (2, 1, 140, 16), "heads share the keys' factors"
    exact, exact_lse = oracle(q, k, v, features_of(q, k, mask=weight[:, None, None] * distances(x, y)))
    out, lse = tq.attention(q, k, v, "none", bias=made, return_lse=True, backend=backend)
    assert (lse - exact_lse).abs().max() < 2e-3 and (out - exact).abs().max() < 2e-3 * v.abs().max()


def test_points_without_a_batch_and_points_that_coincide():
    x = torch.rand(30, 3)
    made = bias.squared_distance(x)
    assert made.q_factors.shape == made.k_factors.shape == (1, 1, 30, 16)
    assert (dense_bias(made, 30, 30)[0, 0] - distances(x[None], x[None])[0, 0]).abs().max() < 1e-6
    assert (dense_bias(bias.squared_distance(torch.full((4, 3), 1e6)), 4, 4) == 0).all()
