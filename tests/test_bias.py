"""Attention bias: each kind is what it says, in the oracle, the emulation and kernels, and none falls into its known traps."""

import math
from importlib.metadata import version

import pytest
import torch
from factories import SLOPES, dense_bias, exact_operands, qkv, scheme, some_factors, some_mask, waves

import tokquant as tq
from tokquant import bias
from tokquant.bias.kinds import STEEPEST
from tokquant.inputs import features_of
from tokquant.kernels.plan import plan
from tokquant.metrics import errors
from tokquant.reference import oracle

INF = math.inf
BACKENDS = ["reference", "triton"]
KINDS = {
    "alibi": bias.alibi(SLOPES),
    "alibi of negative slopes": bias.alibi(-SLOPES / 8),
    "key vector": bias.key_vector(some_factors(2, 4, 70)),
    "key vector of all heads": bias.key_vector(some_factors(70)),
    "key vector of a head": bias.key_vector(some_factors(4, 1)),
    "low rank": bias.lowrank(some_factors(2, 4, 50, 5), some_factors(2, 4, 70, 5)),
    "low rank in bf16": bias.lowrank(some_factors(1, 4, 50, 40).bfloat16(), some_factors(2, 1, 70, 40).bfloat16()),
    "dense": bias.dense(some_factors(2, 4, 50, 70)),
    "dense in bf16": bias.dense(waves(50, 70).bfloat16()),
}
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS)
def test_every_kind_is_the_same_as_its_values_in_an_additive_mask(given):
    q, k, v = qkv(50, 70, 32, 4, 2, 2)
    written = dense_bias(given, 50, 70)
    rest = {"causal": True, "softcap": 3.0, "sinks": SLOPES, "window": (60, None)}
    for mask in (None, waves(50, 70).double(), some_mask(2, 1, 50, 70)):
        added = written if mask is None else written + mask if mask.is_floating_point() else written.masked_fill(~mask, -INF)
        biased = oracle(q, k, v, features_of(q, k, bias=given, mask=mask, **rest))
        masked = oracle(q, k, v, features_of(q, k, mask=added, **rest))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(biased, masked, strict=True))
        operands = tq.quantize(q, k, v, "int8-fp16")
        emulated, expected = (
            tq.attention(*operands, "int8-fp16", backend="reference", **rest, **terms)
            for terms in ({"bias": given, "mask": mask}, {"mask": added})
        )
        assert (emulated - expected).abs().max() < 2e-3


@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS)
def test_every_kind_of_a_kernel_is_that_of_the_emulation(given):
    operands = tq.quantize(*qkv(50, 70, 32, 4, 2, 2), "none")
    out, lse = tq.attention(*operands, "none", bias=given, return_lse=True, backend="triton")
    expected, expected_lse = tq.attention(*operands, "none", bias=given, return_lse=True, backend="reference")
    assert torch.allclose(out, expected, atol=2e-5) and torch.allclose(lse, expected_lse, atol=2e-5)


# --------------------------------------------------------------------------- ALiBi


def test_the_slopes_are_those_of_the_paper():
    assert bias.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert bias.alibi_slopes(1).tolist() == [2.0**-8]
    # the authors' get_slopes(12): those of 8 heads, then every other one of 16
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert torch.equal(bias.alibi_slopes(12), torch.tensor(expected))
    assert all(len(bias.alibi_slopes(n).unique()) == n for n in (3, 5, 6, 7, 20, 40, 100))


@both
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_alibi_weighs_a_key_less_for_each_step_from_its_query(backend, causal):
    q, v = torch.zeros(1, 4, 5, 32), torch.eye(7, 32).expand(1, 4, -1, -1)
    weights = tq.attention(q, v, v, "none", bias=bias.alibi(SLOPES), causal=causal, backend=backend)[..., :7]
    for i in range(5):
        own = i + 2
        seen = range(own + 1) if causal else range(7)
        expected = torch.tensor([math.exp(-0.9 * abs(own - j)) if j in seen else 0 for j in range(7)])
        assert torch.allclose(weights[0, 0, i], expected / expected.sum(), atol=1e-6), "minus the slope times the distance"


@both
def test_alibi_without_causality_is_symmetric(backend):
    q, k, v = qkv(150, 150, 32, 4)
    turned = [x.flip(2) for x in (q, k, v)]
    out, other = (tq.attention(*x, "none", bias=bias.alibi(SLOPES), backend=backend) for x in ((q, k, v), turned))
    assert torch.allclose(out, other.flip(2), atol=1e-5)


@both
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_the_last_queries_alone_stand_where_they_stood(backend, causal):
    q, k, v = qkv(170, 170, 32, 4)
    given = {"bias": bias.alibi(SLOPES), "causal": causal, "return_lse": True, "backend": backend}
    out, lse = tq.attention(q, k, v, "none", **given)
    last, last_lse = tq.attention(q[:, :, -21:], k, v, "none", **given)
    assert torch.allclose(last, out[:, :, -21:], atol=1e-5) and torch.allclose(last_lse, lse[:, :, -21:], atol=2e-5)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_positions_that_16_bits_cannot_hold_are_exact(backend, dtype, causal):
    n, left = 9001, 40
    if backend == "triton" and dtype == torch.bfloat16:
        s = scheme("int8", "int8", "int8 head", "int8 row_block:128")  # the interpreter has no bf16 products
    else:
        s = tq.preset("int8-fp16")
    q, k, v = qkv(64, n, 32, 4, 1, dtype=dtype)
    operands = tq.quantize(q, k, v, s)
    given = {"causal": causal, "window": (left, left), "return_lse": True}
    alibi = bias.alibi(SLOPES)
    _, lse = tq.attention(*operands, s, bias=alibi, backend=backend, **given)
    i, j = torch.arange(64) + n - 64, torch.arange(n)

    def expected(positions):
        values = -alibi.slopes.double()[:, None, None] * (positions(i)[:, None] - positions(j)).abs()
        features = features_of(*operands[:2], mask=values, causal=causal, window=(left, left))
        return oracle(*exact_operands(*operands), features)[1]

    assert (lse - expected(lambda x: x.double())).abs().max() < 1e-4
    assert (lse - expected(lambda x: x.to(dtype).double())).abs().max() > 0.1, "16-bit positions would show"


@both
def test_steep_slopes_leave_a_query_its_own_key(backend):
    q, k, v = qkv(140, 140, 32, 2)
    steep = bias.alibi(torch.full((2,), STEEPEST))
    out, lse = tq.attention(q, k, v, "none", bias=steep, causal=True, return_lse=True, backend=backend)
    assert torch.allclose(out, v, atol=1e-5)
    assert torch.allclose(lse, (q * k).sum(-1) * 32**-0.5, atol=2e-3)


# --------------------------------------------------------------------------- key vectors and dense values


@both
def test_a_key_of_minus_infinity_is_masked(backend):
    q, k, v = qkv(40, 150, 32)
    values = torch.randn(150)
    gone = some_mask(1, 1, 1, 150)[0, 0, 0]
    out, lse = tq.attention(
        q, k, v, "none", bias=bias.key_vector(values.masked_fill(~gone, -INF)), return_lse=True, backend=backend
    )
    expected, expected_lse = tq.attention(
        q, k, v, "none", bias=bias.key_vector(values), mask=gone, return_lse=True, backend=backend
    )
    assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(lse, expected_lse, atol=1e-5)
    out, lse = tq.attention(q, k, v, "none", bias=bias.key_vector(torch.full((150,), -INF)), return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -INF).all()


def strided(x):
    """The same values, with gaps between them."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


STRIDED = {
    "key vector": (bias.key_vector, [torch.randn(1, 4, 150)]),
    "low rank": (bias.lowrank, [some_factors(2, 4, 40, 16), some_factors(1, 4, 150, 16)]),
    "dense": (bias.dense, [torch.randn(2, 4, 40, 150)]),
}


@pytest.mark.parametrize(("make", "tensors"), STRIDED.values(), ids=STRIDED)
def test_tensors_that_are_not_contiguous_are_read_right(make, tensors):
    operands = tq.quantize(*qkv(40, 150, 32, 4, 2, 2), "int8-fp16", backend="triton")
    turned = [x.mT.contiguous().mT for x in tensors]
    shared = [x[:, :1].expand(-1, 4, *x.shape[2:]) for x in tensors]
    whole = [x.contiguous() for x in shared]
    for some, same in ((tensors, [strided(x) for x in tensors]), (tensors, turned), (whole, shared)):
        one, other = (tq.attention(*operands, "int8-fp16", bias=make(*x), backend="triton") for x in (some, same))
        assert torch.equal(one, other)


# --------------------------------------------------------------------------- low rank


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


# --------------------------------------------------------------------------- what is refused, and what it costs

x16 = some_factors(1, 2, 20, 4)
REFUSED = {
    "a list of slopes": (TypeError, lambda: bias.alibi([0.5]), "slopes: a list; give a floating-point tensor"),
    "slopes of integers": (TypeError, lambda: bias.alibi(torch.ones(2).int()), "slopes: torch.int32"),
    "slopes of two dimensions": (ValueError, lambda: bias.alibi(torch.ones(2, 2)), "slopes: shape [2, 2]; give [H_q]"),
    "a slope that is not a number": (ValueError, lambda: bias.alibi(torch.tensor([0.5, math.nan])), "slopes: [0.5, nan]"),
    "a steep slope": (ValueError, lambda: bias.alibi(torch.tensor([65.0])), "at most 64 in magnitude"),
    "no heads": (ValueError, lambda: bias.alibi_slopes(0), "heads: 0 is not a whole number from 1"),
    "a key vector of truths": (TypeError, lambda: bias.key_vector(torch.ones(5) > 0), "values: torch.bool"),
    "a dense list": (TypeError, lambda: bias.dense([[0.0]]), "values: a list"),
    "float32 factors": (TypeError, lambda: bias.lowrank(x16.float(), x16), "q_factors: torch.float32", "a high and a low"),
    "svd to float32": (TypeError, lambda: bias.svd(torch.ones(1, 9, 9), dtype=torch.float32), "dtype: torch.float32 is not"),
    "distances in float32": (TypeError, lambda: bias.squared_distance(torch.eye(3), dtype=torch.float32), "dtype: torch"),
    "text as weight": (TypeError, lambda: bias.squared_distance(torch.eye(3), weight="1"), "weight: '1'; give a number"),
    "text as energy": (ValueError, lambda: bias.svd(torch.ones(1, 5, 5), energy="0.9"), "energy: '0.9' is no share"),
    "factors of two types": (TypeError, lambda: bias.lowrank(x16, x16.bfloat16()), "types torch.float16 and torch.bfloat16"),
    "factors of two ranks": (ValueError, lambda: bias.lowrank(x16, x16[..., :3]), "k_factors: rank 3 is not that of"),
    "factors of three dimensions": (ValueError, lambda: bias.lowrank(x16, x16[0]), "k_factors: shape [2, 20, 4]; give [batch"),
    "factors of no columns": (ValueError, lambda: bias.lowrank(x16[..., :0], x16[..., :0]), "q_factors: shape [1, 2, 20, 0]"),
    "svd of a matrix": (ValueError, lambda: bias.svd(torch.ones(5, 5)), "values: shape [5, 5]; give [heads, N_q, N_k]"),
    "svd of minus infinity": (ValueError, lambda: bias.svd(torch.full((1, 5, 5), -INF)), "give what is masked as mask"),
    "an energy of 2": (ValueError, lambda: bias.svd(torch.ones(1, 5, 5), energy=2), "energy: 2 is no share"),
    "a rank of 0": (ValueError, lambda: bias.svd(torch.ones(1, 5, 5), largest_rank=0), "largest_rank: 0"),
    "svd past float16": (ValueError, lambda: bias.svd(1e12 * torch.ones(1, 90, 90)), "float16; use dtype=torch.bfloat16"),
    "points in a plane": (ValueError, lambda: bias.squared_distance(torch.ones(5, 2)), "x: shape [5, 2]; give points"),
    "points of infinity": (ValueError, lambda: bias.squared_distance(torch.ones(5, 3), torch.full((4, 3), INF)), "y: not all"),
    "a weight of NaN": (ValueError, lambda: bias.squared_distance(torch.ones(5, 3), weight=math.nan), "weight: nan"),
    "weights of pairs": (ValueError, lambda: bias.squared_distance(torch.ones(5, 3), weight=torch.ones(2, 2)), "weight: "),
    "a weight past float16": (ValueError, lambda: bias.squared_distance(torch.eye(3), weight=1e12), "weight: with points"),
    "another kind": (ValueError, lambda: tq.compile("int8", head_dim=64, bias="alibis"), "bias: 'alibis' is none; use none"),
    "half a rank": (ValueError, lambda: tq.compile("int8", head_dim=64, bias_rank=0.5), "bias_rank: 0.5 is not a whole"),
}  # fmt: skip


@pytest.mark.parametrize(("error", "call", "parts"), [(e, c, p) for e, c, *p in REFUSED.values()], ids=REFUSED)
def test_what_cannot_be_a_bias_is_refused(error, call, parts):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error and all(part in str(raised.value) for part in parts), str(raised.value)


def test_the_tensors_of_a_bias_are_never_changed_and_may_need_a_gradient_elsewhere():
    values = torch.randn(20, 20, requires_grad=True)
    q, k, v = qkv(20, 20, 32)
    for backend in BACKENDS:
        with torch.no_grad():
            before = values.clone()
            tq.attention(q, k, v, "int8", bias=bias.dense(values), softcap=5.0, backend=backend)
            assert torch.equal(values, before) and values.grad is None


def test_a_kernels_title_says_which_bias_it_has():
    for kind, words in {"alibi": "alibi bias", "lowrank": "lowrank bias of rank 24", "key_vector": "key vector bias"}.items():
        assert words in tq.compile("int8", head_dim=64, bias=kind, bias_rank=24).source
    assert "bias" not in repr(plan(tq.preset("int8"), head_dim=64, dtype=torch.float16))


# instructions a score in the loop over whole tiles of int8-fast; sm_90, head_dim 128, Triton 3.9; 11.1 without a bias
BUDGETS = {
    "alibi, causal": ({"bias": "alibi", "causal": True}, 14.0),
    "alibi": ({"bias": "alibi"}, 15.1),
    "key vector": ({"bias": "key_vector"}, 12.9),
    "low rank": ({"bias": "lowrank"}, 12.9),
}


@pytest.mark.compiled
@pytest.mark.parametrize(("given", "budget"), BUDGETS.values(), ids=BUDGETS)
def test_a_bias_is_cheap_and_spills_nothing(given, budget):
    kernel = tq.compile("int8-fast", head_dim=128, return_lse=True, **given)
    assert kernel.resources.spill_bytes == 0
    if version("triton").startswith("3.9."):
        assert kernel.resources.instructions_per_score <= budget
    unwanted = {"F2I", "LDL", "STL", "SEL", "ISETP", "I2F"} & {k for k, count in kernel.resources.loop.items() if count > 2}
    assert not unwanted, "whole tiles have no masks and no spills"


COMPILED = {
    "alibi": ("int8", torch.bfloat16, "sm_80"),
    "key_vector": ("kv-int4-kivi", torch.float16, "sm_90"),
    "lowrank": ("none", torch.float32, "sm_90"),
    "dense": ("int8-fp16", torch.bfloat16, "sm_80"),
}


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["alibi", "key_vector", "lowrank"])
def test_a_bias_spills_nothing_in_narrow_heads_either(kind):
    assert tq.compile("int8-fp16", head_dim=64, return_lse=True, bias=kind).resources.spill_bytes == 0


@pytest.mark.compiled
@pytest.mark.parametrize("kind", COMPILED)
def test_every_kind_compiles_with_every_feature(kind):
    name, dtype, target = COMPILED[kind]
    features = dict(mask="additive", softcap=True, sinks=True, return_lse=True, shared_heads=4, bias_rank=24, window=True)
    assert tq.compile(name, head_dim=32, bias=kind, dtype=dtype, target=target, **features).asm["cubin"]
