"""Certificates hold: no error of any backend is above its bound, whatever the scheme, the features and the numbers are."""

import math
import random

import pytest
import torch
from factories import INF, SLOPES, scheme

import tokquant as tq
from tokquant import bias
from tokquant.calibration.scales import needed
from tokquant.inputs import features_of
from tokquant.reference import oracle

QUERIES = ["int8", "int8 tensor", "int4 head", "fp8_e4m3 channel", "int8 block:16 scale=fp16", "int8 channel_block:32", "fp16",
           "fp4_e2m1 group:16 scale=fp8_e4m3", "int4 block_mean", "int8 scale=fp8_e4m3", "fp32", "int2", "int8 head static",
           "fp8_e4m3 tensor static", "fp8_e5m2"]  # fmt: skip
KEYS = ["int8 mean", "int4 asymmetric scale=fp16", "int8 head", "int8 channel asymmetric", "int4 channel mean", "int8",
        "int8 block:32 mean", "int4 block:64 asymmetric mean", "int2 channel_block:32 asymmetric", "fp8_e4m3 tensor",
        "int4 group:16 mean scale=fp8_e4m3", "fp32 mean", "fp16", "int2", "int8 head static", "int4 channel static asymmetric",
        "fp8_e4m3 tensor static", "fp4_e2m1", "int8 asymmetric scale=fp8_e4m3"]  # fmt: skip
VALUES = ["int8", "int4 asymmetric scale=fp16", "int8 tensor asymmetric", "fp8_e4m3 head", "int8 channel mean",
          "int8 block:128", "int8 channel_block:128 mean", "int4 channel_block:256 asymmetric", "int4 group:16 asymmetric",
          "fp32", "bf16 mean", "fp4_e2m1 scale=fp8_e4m3", "int8 head asymmetric mean", "int2", "int2 group:16 asymmetric",
          "int8 head static", "int8 channel static asymmetric", "fp8_e4m3 head static", "fp8_e5m2 channel"]  # fmt: skip
PROBABILITIES = ["fp32", "fp32 row_block:64", "uint8 row_block:64", "int8 row_block:128", "int8 unit", "uint8 unit",
                 "fp8_e4m3 unit", "fp8_e4m3 row_block:32", "fp16 unit", "bf16 row_block:128", "fp8_e5m2 unit"]  # fmt: skip


def some_scheme(chance: random.Random) -> tq.QuantScheme:
    """Any scheme that the grammar accepts."""
    while True:
        try:
            return scheme(
                *map(chance.choice, (QUERIES, KEYS, VALUES, PROBABILITIES)),
                rotate=chance.choice(["none", "none", "hadamard"]), rotate_v=chance.choice(["none", "none", "hadamard"]),
                balance=chance.choice(["none", "none", "channel", "rope_pairs"]),
                normalizer=chance.choice(["exact", "exact", "quantized"]),
            )  # fmt: skip
        except tq.SchemeError:
            continue


def some_tensors(chance: random.Random, q, k, v):
    """Normal ones, made hard in one or two ways."""
    n, middle = k.shape[2], k.shape[2] // 2
    for _ in range(chance.choice([0, 1, 1, 2])):
        match chance.randrange(13):
            case 0:  # outliers: a channel, as of real keys
                q[..., 1] *= 8
                k[..., 1] += 30
            case 1:  # a token
                k[:, :, middle] *= 20
                v[:, :, middle] *= 40
            case 2:  # tiny scales
                q, k, v = q * 1e-3, k * 1e-3, v * 1e-4
            case 3:  # near-ties
                k = k[:, :, :1] + 1e-3 * k
            case 4:  # exact ties
                k = k[:, :, :1].expand_as(k).clone()
            case 5:  # one hot key and a long tail that has all the values
                k[:, :, 0] = q.mean(dim=(1, 2))[:, None] * 40
                v[:, :, 0] = 0
            case 6:
                v = torch.full_like(v, 1.7)
            case 7:  # huge logits
                q, k = q * chance.choice([5, 30]), k * chance.choice([1, 10])
            case 8:  # the indicator of half the keys
                v = (torch.arange(n)[:, None] < middle).to(v.dtype).expand_as(v).clone()
            case 9:
                q, k, v = q * 0, k, v
            case 10:  # tokens of all magnitudes
                v = v * torch.exp(2 * torch.randn(*v.shape[:3], 1))
                k = k * torch.exp(torch.randn(*k.shape[:3], 1))
            case 11:  # a tail whose values make up for its weights
                q[..., 0], k[..., 0] = q.shape[3] ** 0.5, 0
                k[:, :, middle:, 0] = -8
                v[:, :, middle:] *= math.exp(8)
            case 12:
                v[:, :, ::3] = 0
    return q, k, v


def some_features(chance: random.Random, heads: int, n_q: int, n_k: int) -> dict:
    """Each of them now and then."""
    given: dict = {}
    if chance.random() < 0.3:
        given["causal"] = True
    if chance.random() < 0.2:
        given["window"] = chance.choice([(9, 0), (40, 11), (None, 3), (5, None)])
    if chance.random() < 0.25:
        kept = torch.rand(n_q, n_k) > 0.4
        floats = torch.where(kept, 2 * torch.randn(n_q, n_k), chance.choice([-INF, -1e4, -1e9]))
        given["mask"] = kept if chance.random() < 0.5 else floats
    if chance.random() < 0.2:
        given["softcap"] = chance.choice([0.5, 5.0, 30.0])
    if chance.random() < 0.25:
        given["sinks"] = torch.randn(heads) * chance.choice([1, 6])
    if chance.random() < 0.2:
        given["scale"] = chance.choice([0.01, 0.5, -0.2, 1.0])
    if chance.random() < 0.2:
        given["bias"] = chance.choice([
            lambda: bias.alibi(SLOPES[:heads]),
            lambda: bias.key_vector(torch.randn(n_k)),
            lambda: bias.lowrank(torch.randn(1, 1, n_q, 5).half(), torch.randn(1, heads, n_k, 5).half()),
            lambda: bias.dense(3 * torch.randn(n_q, n_k)),
        ])()  # fmt: skip
    return given


def some_case(seed: int):
    """Tensors, a scheme, its scales and features. Scales are of other tensors, so that static ones clip."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    made = some_scheme(chance)
    d, n_q, n_k = chance.choice([16, 32, 64]), chance.choice([1, 7, 20]), chance.choice([1, 17, 60, 140, 200])
    dtype = chance.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    q, k, v = torch.randn(1, 2, n_q, d), *(torch.randn(1, 1, n_k, d) + torch.randn(d) for _ in range(2))
    calibrator = tq.Calibrator(made) if needed(made) else None
    if calibrator is not None:
        calibrator.observe("layer", q * chance.choice([0.4, 1, 3]), k, v * chance.choice([0.3, 1]))
    q, k, v = (x.to(dtype) for x in some_tensors(chance, q, k, v))
    scales = calibrator.scales()["layer"] if calibrator else None
    return q, k, v, made, scales, some_features(chance, 2, n_q, n_k)


def errors_over_bounds(seed: int, backend: str = "reference") -> torch.Tensor | None:
    """Errors of each row over the bounds of tensors and of codes `[2, B, H, N]`, 0 where nothing is off or nothing
    is guaranteed; None for a refused case."""
    q, k, v, made, scales, given = some_case(seed)
    try:
        codes = tq.quantize(q, k, v, made, scales=scales, backend=backend)
    except ValueError:
        return None  # what does not fit a type of scales
    out = tq.attention(*codes, made, **given, backend=backend).double()
    exact, _ = oracle(q, k, v, features_of(q, k, **given))
    error = (out - exact).abs().amax(dim=-1)
    bounds = [tq.error_bound(q, k, v, made, **given, scales=scales), tq.error_bound(*codes, made, **given)]
    for bound in bounds:
        parts = torch.stack([bound.q, bound.k, bound.p, bound.v, bound.rounding])
        assert not parts.isnan().any() and (parts >= 0).all(), seed
        assert (bound.total <= parts.sum(dim=0) * (1 + 1e-9)).all(), seed
    return torch.stack([torch.where((error == 0) | bound.total.isinf(), 0.0, error / bound.total) for bound in bounds])


def assert_no_violation(seeds) -> None:
    judged = 0
    for seed in seeds:
        ratio = errors_over_bounds(seed)
        if ratio is not None:
            judged += 1
            assert (ratio[0] <= 1).all() and (ratio[1] <= 1).all(), (seed, some_case(seed)[3:], ratio.amax(dim=(1, 2, 3)))
    assert judged > 0.9 * len(seeds)


def test_no_error_is_above_its_bound():
    assert_no_violation(range(300))


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(20))
def test_no_error_of_20000_is_above_its_bound(thousand):
    assert_no_violation(range(1000 * thousand, 1000 * (thousand + 1)))
