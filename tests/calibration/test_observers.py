"""Observers: ranges are those of the values themselves, and no order or grouping of what is seen changes them."""

import random

import pytest
import torch
from factories import pairwise, scheme

import tokquant as tq
from tokquant import precisions
from tokquant.calibration.histogram import BINS, Histogram, window
from tokquant.calibration.observers import Ema, Percentile, parse
from tokquant.quantize import quantize_operands

OBSERVERS = ["amax", "percentile:99", "mse", "ema:0.9"]
EXACT = OBSERVERS[:3]
"""Those that do not depend on order."""


def batch(n=50, heads=2, d=32, b=2, spread=1.0):
    q, k, v = (torch.randn(b, h, n, d) + 0.5 for h in (2 * heads, heads, heads))
    return q * spread, k * spread * torch.logspace(-1, 1, d), v * spread


def seen_by(observer, s, *batches):
    calibrator = tq.Calibrator(s, observer)
    for operands in batches:
        calibrator.observe("a", *operands)
    return calibrator


def range_of(observer, x, words):
    """Scale and zero that V gets, float64, of values `[B, H, N, D]`."""
    s = scheme(v=f"{words} static")
    tensors = seen_by(observer, s, (x, x, x)).scales()["a"].tensors
    return tensors["v_scale"].double(), tensors.get("v_zero")


def equal(one, other):
    found = other.scales()["a"].tensors
    return all(torch.equal(value, found[name]) for name, value in one.scales()["a"].tensors.items())


ROWS = pairwise(
    observer=OBSERVERS,
    granularity=["tensor", "head", "channel"],
    symmetric=["", "asymmetric"],
    smooth=["", "mean", "static_offset"],
    rotate=["none", "hadamard"],
    precision=["int8", "int4"],
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row))
def test_every_observer_serves_every_static_scheme(row):
    observer, granularity, symmetric, smooth, rotate, precision = row
    words = f"{precision} {granularity} {symmetric} {smooth} static"
    s = scheme(q="int8", k=words, v=words, rotate=rotate, rotate_v=rotate)
    batches = [batch(), batch(n=33, b=1)]
    scales = seen_by(observer, s, *batches).scales()["a"]
    for operands in batches:
        for x, codes in list(zip(operands, quantize_operands(*operands, s, scales), strict=True))[1:]:
            error = (x - codes.dequantize()).square().mean().sqrt() / x.square().mean().sqrt()
            assert error < (0.12 if precision == "int8" else 0.25)


@pytest.mark.parametrize("observer", EXACT)
@pytest.mark.parametrize("words", ["int8 head", "int8 channel asymmetric", "fp8_e4m3 tensor"])
def test_neither_order_nor_merging_changes_a_bit(observer, words):
    s = scheme(q="int8", k=f"{words} static", v=f"{words} static", rotate="hadamard")
    # extremes that grow and shrink, so that bins are joined now and then
    batches = [batch(n=n, d=8, spread=spread) for n, spread in ((9, 1e-3), (70, 3.0), (20, 0.2), (1, 900.0), (31, 1.0))]
    whole = seen_by(observer, s, *batches)
    shuffled = random.Random(0).sample(batches, len(batches))
    merged = seen_by(observer, s, *shuffled[:2])
    merged.merge(seen_by(observer, s, *shuffled[2:]))
    merged_into_nothing = tq.Calibrator(s, observer)
    merged_into_nothing.merge(merged)
    for other in (seen_by(observer, s, *shuffled), merged, merged_into_nothing):
        assert equal(whole, other)
        for name, part in whole.layers["a"].parts.items():
            for kept, value in part.tensors().items():
                assert torch.equal(value, other.layers["a"].parts[name].tensors()[kept]), (name, kept)


def test_one_batch_or_its_tokens_one_by_one_are_the_same():
    x = batch(n=40, b=1)
    s = scheme(v="int8 channel static")
    x = tuple(part[..., :4] for part in x)
    tokens = zip(*(part.split(1, dim=2) for part in x), strict=True)
    assert equal(seen_by("mse", s, x), seen_by("mse", s, *tokens))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_a_moving_average_is_that_of_the_extremes_of_batches_in_their_order(decay):
    batches = [batch(spread=spread) for spread in (1.0, 5.0, 2.0, 0.1)]
    s = scheme(v="int8 channel static")
    whole = seen_by(Ema(decay), s, *batches)
    # 0.0 ** 0 is 1: the last batch alone
    weights = torch.tensor([decay**age for age in (3, 2, 1, 0)], dtype=torch.float64)
    extremes = torch.stack([v.abs().amax(dim=(0, 2)) for _, _, v in batches]).double()
    low, high = (torch.stack([e(v, dim=(0, 2)) for _, _, v in batches]).double() for e in (torch.amin, torch.amax))
    low, high = ((weights[:, None, None] * x).sum(0) / weights.sum() for x in (low, high))
    expected = torch.maximum(low.abs(), high.abs()) / 127
    found = whole.scales()["a"].tensors["v_scale"].squeeze(1).double()
    assert torch.allclose(found, expected, rtol=1e-6) and bool((expected <= extremes.amax(0) / 127).all())
    first = seen_by(Ema(decay), s, *batches[:1])
    first.merge(seen_by(Ema(decay), s, *batches[1:]))
    merged, parts = first.layers["a"].parts["v_scale"], whole.layers["a"].parts["v_scale"]
    assert torch.allclose(merged.low, parts.low, rtol=1e-14) and torch.allclose(merged.high, parts.high, rtol=1e-14)
    assert merged.batches == parts.batches == 4


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("symmetric", ["", "asymmetric"], ids=["symmetric", "asymmetric"])
def test_percentiles_are_those_of_the_values(percent, granularity, symmetric):
    x = (torch.randn(2, 2, 4000, 8) + 0.3) * torch.tensor([1.0, 7.0])[:, None, None]
    scale, zero = range_of(Percentile(percent), x, f"int8 {granularity} {symmetric}")
    values = x.transpose(0, 1).flatten(1, 2).double()  # [H, tokens, D]
    values = {"tensor": values.reshape(1, -1), "head": values.flatten(1), "channel": values.transpose(1, 2).flatten(0, 1)}[
        granularity
    ]
    # a quantile is known to a bin, at most 1/256 of a channel's range, and there to the next value
    bin_width, one = (values.amax(1) - values.amin(1)) / 256, 1 / values.shape[1]

    def is_quantile(found, values, share):
        least, most = (values.quantile(min(max(share + step, 0), 1), dim=1) for step in (-one, one))
        return bool(((least - bin_width <= found) & (found <= most + bin_width)).all())

    if zero is None:
        assert is_quantile(scale.flatten() * 127, values.abs(), percent / 100)
    else:
        assert is_quantile(zero.flatten(), values, (100 - percent) / 200)
        assert is_quantile(zero.flatten() + scale.flatten() * 255, values, (100 + percent) / 200)


@pytest.mark.parametrize("observer", EXACT)
@pytest.mark.parametrize("words", ["int8 head", "int4 head asymmetric"])
def test_a_head_has_the_range_that_it_has_alone(observer, words):
    x = torch.randn(1, 2, 500, 8) * torch.tensor([1.0, 30.0])[:, None, None] + torch.tensor([0.0, 100.0])[:, None, None]
    scale, zero = range_of(observer, x, words)
    for head in range(2):
        alone, its_zero = range_of(observer, x[:, head : head + 1], words)
        assert torch.equal(scale[head], alone[0]) and (zero is None or torch.equal(zero[head], its_zero[0]))


@pytest.mark.parametrize("words", ["int8 tensor", "int8 head asymmetric", "fp8_e4m3 channel", "int4 channel asymmetric"])
def test_every_value_is_in_the_range_of_a_hundred_percent(words):
    x = torch.randn(1, 3, 500, 16) * 3 - 1
    for one, other in zip(range_of("percentile:100", x, words), range_of("amax", x, words), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("largest", [1e3, 1e6])
def test_a_percentile_clips_an_outlier_that_amax_follows(largest):
    x = torch.randn(1, 2, 4000, 32)
    x[0, 0, 7, 3] = largest
    usual = torch.randn(100000).abs().quantile(0.99).item() / 448
    found = {name: range_of(name, x, "fp8_e4m3 head")[0].flatten() for name in ("amax", "percentile:99")}
    assert found["amax"][0].item() == pytest.approx(largest / 448)
    # a channel of 32 has bins as wide as its outlier
    assert found["percentile:99"][0].item() < (1.2 * usual if largest == 1e3 else largest / 448 / 100)
    assert found["percentile:99"][1].item() == pytest.approx(usual, rel=0.05)


def squared_error(x, words, scale, zero):
    operand = scheme(v=words).v
    precision = operand.format
    if zero is None:
        values = precision.decode(precision.encode((x / scale).clamp(-precision.largest, precision.largest)))
        return (values * scale - x).square().mean().item()
    steps = ((x - zero) / scale).round().clamp(0, precision.levels)
    return (steps * scale + zero - x).square().mean().item()


@pytest.fixture
def odd_precision(monkeypatch):
    """A precision as a user may bring one: seven numbers, not evenly spaced."""
    numbers = torch.tensor([-10.0, -4, -1, 0, 1, 4, 10])
    precision = precisions.Precision(
        name="odd",
        bits=8,
        kind="float",
        largest=10,
        stored=torch.int8,
        encode=lambda x: torch.bucketize(x, (numbers[1:] + numbers[:-1]) / 2).to(torch.int8),
        decode=lambda codes: numbers[codes.long()],
        compute="tl.float16",
        triton_decode=None,
    )
    monkeypatch.setitem(precisions.PRECISIONS, "odd", precision)


@pytest.mark.usefixtures("odd_precision")
@pytest.mark.parametrize(
    "words", ["int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "odd", "int4 asymmetric", "int2 asymmetric"]
)
@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_the_range_of_least_error_is_near_the_best_of_all(words, tail):
    x = torch.randn(1, 1, 8000, 1) if tail == "normal" else torch.distributions.StudentT(3.0).sample((1, 1, 8000, 1))
    x = x + 0.2
    found = squared_error(x, words, *(part if part is None else part.float() for part in range_of("mse", x, f"{words} head")))
    scale, zero = (part if part is None else part.float() for part in range_of("amax", x, f"{words} head"))
    assert found <= squared_error(x, words, scale, zero) * 1.001
    if zero is None:
        best = min(squared_error(x, words, scale * share, None) for share in torch.logspace(-2, 0, 400))
        assert found <= 1.06 * best
    else:
        levels = scheme(v=words).v.format.levels
        low, high = zero, zero + scale * levels
        shares = torch.logspace(-2, 0, 40)
        best = min(squared_error(x, words, (b * high - a * low) / levels, a * low) for a in shares for b in shares)
        assert found <= 1.06 * best


@pytest.mark.parametrize("words", ["int8", "fp8_e4m3"])
def test_the_range_of_least_error_is_as_near_where_many_channels_share_it(words):
    """The values between two codes of 8 bits fill but two cells of the observer's."""
    over = []
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.distributions.StudentT(4.0).sample((1, 1, 1200, 32))
        found, widest = (range_of(observer, x, f"{words} head")[0].float() for observer in ("mse", "amax"))
        best = min(squared_error(x, words, widest * share, None) for share in torch.logspace(-1, 0, 60))
        over.append(squared_error(x, words, found, None) / best)
    assert sum(over) / len(over) < 1.01 and max(over) < 1.08


@pytest.mark.parametrize("observer", ["percentile:99", "mse", "ema", "amax"])
def test_static_q_has_the_range_of_q_with_k_per_channel_folded_in(observer):
    s = scheme(q="int8 head static", k="int8 channel static")
    q, k, v = batch(n=500, b=1, d=16)
    scales = seen_by(observer, s, (q, k, v)).scales()["a"].tensors
    folded = q * scales["k_scale"].repeat_interleave(2, dim=0)
    expected, _ = range_of(observer, folded, "int8 head")
    assert torch.allclose(scales["q_scale"].double(), expected, rtol=0.08 if observer == "mse" else 0.01)


@pytest.mark.parametrize("observer", ["percentile:99", "mse"])
@pytest.mark.parametrize("rotate", ["none", "hadamard"])
def test_a_static_offset_is_taken_off_what_was_counted(observer, rotate):
    q, k, v = batch(n=2000, b=1)
    k = k + 20 * torch.randn(32)
    scales = seen_by(observer, scheme(k="int8 head static_offset static", rotate=rotate), (q, k, v)).scales()["a"].tensors
    less = k - scales["k_offset"].float()
    expected = seen_by(observer, scheme(k="int8 head static", rotate=rotate), (q, less, v)).scales()["a"].tensors["k_scale"]
    assert torch.allclose(scales["k_scale"], expected, rtol=0.08 if observer == "mse" else 0.01)


EXTREMES = [
    (0.0, 0.0),
    (3.5, 3.5),
    (-1e-40, 1e-40),
    (-3e38, 3e38),
    (1e30, 1.0000001e30),
    (-1.0, 2**-130),
    (511.0, 512.0),
    (-256.0, 255.9),
]


@pytest.mark.parametrize(("low", "high"), EXTREMES)
def test_bins_reach_from_one_extreme_to_the_other(low, high):
    seen = Histogram(1, 2)
    x = torch.tensor(low) + (torch.tensor(high) / 2 - torch.tensor(low) / 2) * torch.linspace(0, 2, 1000)
    x[0], x[-1] = low, high
    seen.observe(torch.stack([x.clamp(low, high), torch.zeros(1000)], dim=1)[None, None])
    seen.check(1000)
    assert seen.bins[0, 1].amax() == 1000, "a channel beside it goes its own way"
    first, exponent = window(seen.low, seen.high)
    expected = (x.clamp(low, high).double() / 2.0 ** exponent[0, 0].double()).floor().long() - first[0, 0]
    assert torch.equal(torch.bincount(expected, minlength=BINS), seen.bins[0, 0].long())
    if high - low > 2e-36 and high - low > high * 1e-4:
        assert (seen.bins[0, 0] > 0).nonzero().amax() >= BINS // 2 - 1


@pytest.mark.parametrize("observer", ["percentile:99", "mse"])
@pytest.mark.parametrize("words", ["int8 head", "int8 channel", "int8 head asymmetric"])
@pytest.mark.parametrize("largest", [1e-44, 1e-38, 3e38])
def test_a_range_may_be_as_wide_or_as_narrow_as_float32_holds(observer, words, largest):
    x = torch.randn(1, 2, 50, 32).clamp(-3, 3) * (largest / 3)
    x = x / 2 if "asymmetric" in words else x  # its ends may not be further apart than float32 holds
    scale, _ = range_of(observer, x, words)
    smallest = torch.finfo(torch.float32).smallest_normal
    assert bool(((scale > largest / 2000) & (scale <= largest / 126) | (scale == smallest)).all())


def test_a_range_wider_than_float32_holds_is_said_to_be():
    q, k, v = batch()
    k[0, 0, 0, :2] = torch.tensor([-3e38, 3e38])
    for observer in ("amax", "mse"):
        with pytest.raises(tq.ScalesError, match=r"k: values from -3e\+38 to 3e\+38 span more than float32 holds"):
            seen_by(observer, scheme(k="int8 tensor asymmetric static"), (q, k, v)).scales()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_balance_takes_beyond_float32_is_refused(observer):
    q, k, v = batch()
    made = scheme(k="int8 head static", balance={"channel": {"alpha": 1.0, "scale": "static"}})
    with pytest.raises(tq.ScalesError, match=r"a\.k_scale: holds a value that is not finite"):
        seen_by(observer, made, (1e6 * q, k / k.abs().max() * 1e38, v)).scales()


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_values_binned_a_few_at_a_time_are_all_counted(chunk, monkeypatch):
    x, seen = torch.randn(2, 3, 50, 4), [Histogram(3, 4) for _ in range(2)]
    seen[0].observe(x)
    monkeypatch.setattr("tokquant.calibration.histogram.CHUNK", chunk)
    seen[1].observe(x)
    assert torch.equal(seen[0].bins, seen[1].bins) and bool((seen[1].bins.sum(dim=2) == 100).all())


def test_a_calibration_counts_no_more_than_it_can():
    calibrator = tq.Calibrator("kv-fp8", "mse")
    calibrator.observe("a", *batch())
    calibrator.layers["a"].tokens["k"] = 2**31 - 50
    with pytest.raises(ValueError, match="k: 2147483598 tokens and 100 more"):
        calibrator.observe("a", *batch())


def test_a_rotation_beyond_float32_is_refused():
    q, k, v = batch()
    k[0, 0, 0] = 3e38
    with pytest.raises(ValueError, match="k: holds a value that is not finite once it is balanced or rotated"):
        seen_by("mse", scheme(q="int8", k="int8 head static", rotate="hadamard"), (q, k, v))


@pytest.mark.parametrize("margin", [1.0, 1.5])
@pytest.mark.parametrize("words", ["int8 head", "int8 channel asymmetric"])
def test_a_margin_widens_ranges_to_both_sides(words, margin):
    calibrator = seen_by("amax", scheme(v=f"{words} static"), batch())
    usual, wide = calibrator.scales()["a"].tensors, calibrator.scales(margin)["a"].tensors
    assert torch.allclose(wide["v_scale"], usual["v_scale"] * margin)
    if "v_zero" in usual:
        middle, wider = (each["v_zero"] + each["v_scale"] * 127.5 for each in (usual, wide))
        assert torch.allclose(middle, wider, atol=1e-5)
    for wrong in (0, -1, float("nan"), "2", True, 10**400):
        with pytest.raises(ValueError, match=r"margin: .* is not a number above zero"):
            calibrator.scales(wrong)


@pytest.mark.parametrize(
    ("make", "message"), [(lambda: Ema(False), "decay: False is not"), (lambda: Percentile("99"), "'99' is not")]
)
def test_an_observer_of_no_number_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "text", ["amax", "percentile:99.99", "percentile:50.0", "percentile:100.0", "mse", "ema:0.99", "ema:0.0"]
)
def test_an_observer_is_written_as_it_is_read(text):
    assert str(parse(text)) == text and parse(parse(text)) == parse(text) == parse(str(parse(text)))


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        ("max", r"observer: 'max' is not valid; use amax, percentile:99.9, mse or ema:0.99; did you mean 'amax'"),
        ("percentile:200", r"observer: 'percentile:200': percentile: 200.0 is not between 50 and 100"),
        ("percentile:49.9", r"percentile: 49.9 is not between 50 and 100"),
        ("percentile:100.1", r"percentile: 100.1 is not between 50 and 100"),
        ("percentile:nan", r"observer: 'percentile:nan': percentile: nan is not between"),
        ("percentile:x", "observer: 'percentile:x': "),
        ("percentile:", "observer: 'percentile:': "),
        ("ema:1", r"observer: 'ema:1': decay: 1.0 is not at least 0 and below 1"),
        ("amax:3", "observer: 'amax:3' is not valid"),
        (99.9, "observer: 99.9 is not valid"),
        (None, "observer: None is not valid"),
    ],
)
def test_an_observer_that_is_none_is_named(observer, message):
    with pytest.raises(ValueError, match=message):
        tq.Calibrator("kv-fp8", observer)
