"""docs/low-bits.md: its tables are those of the kept rows, and its sentences say what they say."""

import importlib
import json
import math
from pathlib import Path
from statistics import median

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "low-bits.md").read_text()
STUDIES = ["int4", "peaked", "windows", "transforms", "transform_cost"]
INPUTS = [("normal", 128), ("outlier channels", 128), ("RoPE and bias", 128), ("MiniLM", 32)]


def rows(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"paper-{name}.json").read_text())["rows"]


@pytest.fixture(scope="module")
def studies():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks" / "paper")
        return {name: importlib.import_module(name) for name in STUDIES}


@pytest.fixture(scope="module")
def int4():
    """The error by operand, input, head_dim and codes."""
    return {(row["operand"], row["data"], row["head_dim"], row["codes"]): median(row["errors"]) for row in rows("int4")}


@pytest.fixture(scope="module")
def ratios(studies):
    return studies["transforms"].ratios(rows("transforms"))


def test_every_table_of_the_page_is_that_of_a_study(studies):
    printed = {line for name, study in studies.items() for line in study.table(rows(name)).splitlines()}
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(lines) > 90 and not [line for line in lines if line not in printed]


def test_every_picture_is_small():
    for name in ("int4", "peaked", "transforms"):
        assert f"evidence/{name}.svg" in PAGE
        assert (ROOT / "docs" / "evidence" / f"{name}.svg").stat().st_size < 60_000


def test_keys_want_scales_along_channels_and_values_along_tokens(int4):
    for data in ("outlier channels", "RoPE and bias"):
        for codes in ("int4 token", "int4 token asymmetric"):
            assert 0.40 < int4["k", data, 128, codes] < 0.635
        assert 0.078 < int4["k", data, 128, "int4 channel_block 32 asymmetric"] < 0.1
    by_token = int4["v", "MiniLM", 32, "int4 token asymmetric"]
    assert by_token < min(int4["v", "MiniLM", 32, f"int4 channel_block {n} asymmetric"] for n in (32, 64, 128))


def beside(int4, codes, other):
    """The error of K or V in some codes over that in others, on every input."""
    return {
        (operand, data): x / int4[operand, data, d, other]
        for (operand, data, d, name), x in int4.items()
        if name == codes and operand in "kv" and (data, d) in INPUTS
    }


def test_a_zero_is_worth_its_bits(int4):
    along = beside(int4, "int4 channel_block 32 asymmetric", "int4 channel_block 32")
    found = [along["k", data] for data in ("normal", "RoPE and bias", "MiniLM")]
    assert found == pytest.approx([0.8, 0.61, 0.52], abs=0.011)
    by_token = beside(int4, "int4 token asymmetric", "int4 token").values()
    assert (min(by_token), max(by_token)) == pytest.approx((0.63, 0.86), abs=0.006)


@pytest.mark.parametrize(("asymmetric", "least", "most"), [("", 0.93, 1.07), (" asymmetric", 0.97, 1.36)])
def test_scales_in_fp8_are_free_without_zeros_and_not_with_them(asymmetric, least, most, int4):
    coded = [f"int4 {granularity}{asymmetric}" for granularity in ("token", "group 64", "group 16")]
    found = [x for codes in coded for x in beside(int4, f"{codes}, fp8 scales", codes).values()]
    assert least <= round(min(found), 2) and round(max(found), 2) <= most and (not asymmetric or max(found) > 1.35)


def test_fp4_is_better_for_tokens_with_outliers_alone(int4):
    found = beside(int4, "fp4_e2m1 token", "int4 token")
    stands_out = [found.pop(key) for key in (("k", "outlier channels"), ("k", "RoPE and bias"), ("v", "outlier channels"))]
    assert (min(stands_out), max(stands_out)) == pytest.approx((0.60, 0.67), abs=0.011)
    assert len(found) == 4 and all(0.9 < x < 1.1 for x in found.values())


def test_errors_of_operands_add_as_squares(int4, studies):
    for operand, data, d, codes in int4:
        if operand == "qkv":
            assert int4[operand, data, d, codes] == pytest.approx(studies["int4"].alone(int4, data, d, codes), rel=0.07)


@pytest.mark.parametrize(
    ("codes", "error", "at", "most"),
    [("K int4 token", 0.1, (0.69, 0.78), (0.22, 0.29)), ("K int4 channel_block 32", 0.1, (1.3, 1.46), (0.169, 0.215)),
     ("K int8 token", 0.01, (1.7, 2.1), (0.014, 0.018))],
)  # fmt: skip
def test_what_keys_err_depends_on_how_peaked_attention_is_and_not_on_its_length(codes, error, at, most):
    for tokens in (512, 2048, 8192):
        of = [row for row in rows("peaked") if (row["data"], row["tokens"], row["codes"]) == ("normal", tokens, codes)]
        below, errors = zip(*((math.log2(tokens) - row["entropy"], median(row["errors"])) for row in of), strict=True)
        assert list(errors) == sorted(errors) or codes == "K int8 token"
        assert at[0] < np.interp(math.log(error), np.log(errors), below) < at[1]
        assert most[0] < max(errors) < most[1]


def test_what_values_err_does_not_depend_on_it():
    found = [median(row["errors"]) for row in rows("peaked") if row["codes"].startswith("V") and row["data"] == "normal"]
    assert max(found) < 1.07 * min(found)


def test_a_window_helps_by_the_attention_that_falls_on_it():
    found = {(row["data"], row["scheme"], row["sink"], row["recent"]): median(row["errors"]) for row in rows("windows")}

    def left(data, scheme, sink, recent):
        return found[data, scheme, sink, recent] / found[data, scheme, 0, 0]

    schemes = ("kv-int4", "kv-int4-kivi", "kv-int2-kivi")
    assert all(0.96 < left("normal", scheme, 4, 128) < 0.97 + 0.005 for scheme in schemes)
    assert sorted(left("sink and near tokens", scheme, 4, 0) for scheme in schemes) == pytest.approx(
        [0.39, 0.48, 0.52], abs=0.01
    )
    assert [left("MiniLM", scheme, 0, 32) for scheme in schemes[:2]] == pytest.approx([0.56, 0.8], abs=0.01)


def test_transforms_do_nothing_to_normal_tensors(ratios):
    found = [x for (_, _, _, data), x in ratios.items() if data == "normal"]
    assert min(found) > 0.905 and max(found) < 1.035


def test_the_mean_of_keys_never_costs(ratios):
    found = [x for (_, _, transform, data), x in ratios.items() if transform == "mean of K" and data != "massive token"]
    assert (min(found), max(found)) == pytest.approx((0.28, 1.02), abs=0.005)
    assert max(x for (_, _, transform, _), x in ratios.items() if transform == "mean of K") < 1.045


def test_a_static_offset_of_keys_is_as_good_as_their_mean(ratios):
    for (operand, codes, transform, data), x in ratios.items():
        if transform == "static offset of K" and data != "massive token":
            assert x < 1.06 * ratios[operand, codes, "mean of K", data]


def test_a_rotation_hurts_uniform_values_and_a_mean_that_channels_share(ratios):
    integers = {key: x for key, x in ratios.items() if key[1] != "fp8 head" and key[2] in ("Hadamard", "Hadamard of V")}
    for data, least, most in (("uniform", 1.5, 3.1), ("one mean", 3.0, 4.2)):
        found = [x for key, x in integers.items() if key[3] == data]
        assert (min(found), max(found)) == pytest.approx((least, most), abs=0.05)
    less_mean = [x for key, x in ratios.items() if key[3] == "one mean" and "mean of" in key[2] and "Hadamard" in key[2]]
    assert max(less_mean) < 0.9
    assert ratios["v", "fp8 head", "Hadamard of V", "outlier channels"] == pytest.approx(1.28, abs=0.006)


def test_transforms_that_ride_on_the_one_pass_cost_least():
    found = {row["what"]: row["ratio"] for row in rows("transform_cost")}
    ride = ("static offset of K", "static offset of V", "Hadamard", "Hadamard of V")
    assert max(found[name] for name in ride) < 1.14 < 1.2 < min(found["mean of K"], found["mean of V"])
    assert min(found["balance channel"], found["balance rope_pairs"]) > 2
    bits = {row["what"]: row["bits"] for row in rows("transform_cost")}
    assert bits["block means of Q"] > bits["none"] + 5 > bits["mean of K"] + 4.9
