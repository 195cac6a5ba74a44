"""The page about V's scales and P's levels says what its studies found."""

import json
import re
from pathlib import Path

import pytest
import torch

from tokquant.activations import Activations, sample

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "values-and-probabilities.md").read_text()
VALUES, PROBABILITIES, COSTS = (
    json.loads((ROOT / "benchmarks" / "results" / f"paper-{name}.json").read_text())["rows"]
    for name in ("values", "probabilities", "pv_costs")
)
KINDS = [("normal", 4096), ("uniform", 4096), ("outlier channels", 4096), ("token-scaled", 4096), ("real", 512)]
SCHEMES = {
    "`int-flash`": ("int-flash", "int8 head"),
    "`int8`, V per channel": ("custom", "int8 channel less mean"),
    "`kv-int8`": ("kv-int8", "int8 token"),
    "`kv-int8`, P of `uint8`": ("kv-int8, uint8 P", "int8 token"),
    "`int8`": ("int8", "int8 channel_block 128 less mean"),
    "`int8`, blocks of 64": ("custom", "int8 channel_block 64 less mean"),
    "`int8`, blocks of 32": ("custom", "int8 channel_block 32 less mean"),
    "`int8`, V per token": ("custom", "int8 token"),
    "`int8`, V per token, rotated": ("custom", "int8 token rotated"),
    "`int-flash-half`": ("int-flash-half", "fp16"),
}


def lines(first: str) -> dict[str, list[float]]:
    """Numbers of each line of the table whose first column has this name, by the line's name."""
    table = PAGE.partition(f"\n| {first} |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name: [float(cell.removesuffix(" %")) for cell in rest] for name, *rest in cells}


def only(rows: list[dict], /, **wanted) -> dict:
    """The row that has all of this; rows that repeat it find the same."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert found and all(row["rel_l1"] == found[0]["rel_l1"] for row in found), wanted
    return found[0]


def of_values(data: str, tokens: int, v: str, p: str, q: str = "fp32") -> float:
    rows = [row for row in VALUES if re.search(p, row["p"])]
    return 100 * only(rows, data=data, sigma=int(data == "token-scaled"), tokens=tokens, v=v, q=q)["rel_l1"]


def of_p(rows: str, tokens: int, p: str, v: str = "fp16", normalizer: str = "exact") -> float:
    return 100 * only(PROBABILITIES, rows=rows, tokens=tokens, p=p, v=v, normalizer=normalizer)["rel_l1"]


def written(numbers: list[float]) -> object:
    return pytest.approx(numbers, abs=0.0051)


def test_the_scales_of_int8_v():
    table = lines("one scale of V for")
    assert len(table) == 10
    for name, numbers in table.items():
        v = f"int8 {name}"
        errors = [of_values(*kind, v, "row_block") for kind in KINDS] + [of_values("real", 512, v, "int8 unit")]
        assert numbers[:6] == written(errors), name
        cost = only(COSTS, v=v, p=next(row["p"] for row in VALUES if row["v"] == v and "row_block" in row["p"]))
        assert [numbers[6], numbers[8]] == written([cost["bits"], cost["time"]]), name
        assert numbers[7] == pytest.approx(cost["instructions"], abs=0.051), name


def test_whole_schemes():
    table = lines("whole scheme")
    assert table.keys() == SCHEMES.keys()
    kinds = [("token-scaled", 1024), ("token-scaled", 4096), ("token-scaled", 16384), *(KINDS[i] for i in (0, 2, 4))]
    for name, (scheme, v) in SCHEMES.items():
        rows = [row for row in VALUES if row["scheme"] == scheme and row["q"] == "int8 token"]
        found = [only(rows, v=v, data=data, tokens=tokens, sigma=int(data == "token-scaled")) for data, tokens in kinds]
        assert table[name] == written([100 * row["rel_l1"] for row in found]), name


def test_e4m3_and_int4():
    kinds = "outlier channels | token-scaled | real"
    table = lines(f"one scale of V for | e4m3: {kinds} | int4: {kinds}")
    assert len(table) == 9
    for name, numbers in table.items():
        found = [of_values(*kind, f"{precision} {name}", "") for precision in ("fp8_e4m3", "int4") for kind in KINDS[2:]]
        assert numbers == written(found), name
    assert [min(line[2] for line in table.values()), max(line[2] for line in table.values())] == [1.07, 1.18]


def test_the_levels_of_p():
    table = lines("P")
    assert len(table) == 13
    for p, numbers in table.items():
        found = [of_p("flat", tokens, p) for tokens in (256, 1024, 4096, 16384)]
        found += [of_p("peaked", 4096, p), of_p("hot key", 4096, p), of_p("hot key", 4096, p, normalizer="quantized")]
        assert numbers[:8] == written([*found, of_p("real", 512, p)]), p
        v = {"fp8": "fp8_e4m3 channel", "fp1": "fp16"}.get(p[:3], "int8 channel")
        assert numbers[8] == pytest.approx(only(COSTS, v=v, p=p)["instructions"], abs=0.051), p


def test_tokens_that_differ_in_size_cost_int8_at_most_2_3_percent_and_the_paper_over_10():
    scaled = [row for row in VALUES if row["data"] == "token-scaled" and row["sigma"] == 1]
    ours, papers = ({row["tokens"]: row for row in scaled if row["scheme"] == name} for name in ("int8", "int-flash"))
    assert max(row["most"] for row in ours.values()) < 0.02305
    means = [100 * row["rel_l1"] for row in ours.values()]
    assert [min(means), max(means)] == written([1.92, 1.98])
    assert [100 * papers[n]["rel_l1"] for n in (1024, 16384)] == written([6.97, 11.75])
    assert all((row["rel_l1"] > 0.1) is (n >= 4096) for n, row in papers.items()) and len(papers) == len(ours) == 5


def test_what_sizes_and_the_mean_of_v_are_to_p():
    block = "int8 channel_block 128"
    found = [of_values("real", 512, v, p) for p in ("fp32", "row_block", "int8 unit") for v in (block, f"{block} less mean")]
    assert found == written([0.31, 0.30, 0.68, 0.56, 2.54, 1.40])
    assert [of_values("real", 512, v, "row_block") for v in ("int8 token", "int8 token less mean")] == written([0.39, 0.40])
    of_int4 = [of_values("real", 512, f"int4 channel_block 128{mean}", "") for mean in ("", " less mean")]
    assert of_int4 == written([4.85, 5.56])
    scaled = [of_values("token-scaled", 4096, "int8 token", p) for p in ("row_block", "fp32", "int8 unit")]
    assert scaled == written([1.17, 0.61, 4.79])
    hot = [of_p("hot key, V with means", 1024, "int8 unit", normalizer=each) for each in ("exact", "quantized")]
    assert [*hot, of_p("hot key, V with means", 1024, "int8 unit", "fp16 less mean")] == written([19.79, 12.33, 1.06])


def test_what_of_the_error_is_v_s_and_what_keys_are_looked_at():
    block = "int8 channel_block 128 less mean"
    alone = [of_p("flat", tokens, "fp32 unit", block) for tokens in (256, 1024, 4096, 16384)]
    assert [min(alone), max(alone), of_p("real", 512, "fp32 unit", block)] == written([0.62, 0.65, 0.30])
    assert [of_p("flat", 16384, p, block) for p in ("int8 unit", "uint8 row_block 128")] == written([4.06, 0.93])
    keys = {row["rows"]: round(row["keys"]) for row in PROBABILITIES if row["tokens"] == 4096}
    assert (keys["flat"], keys["peaked"]) == (2490, 4)


def test_the_key_that_real_queries_look_at_most_is_often_the_first_and_adds_little():
    found = {row["data"]: (row["at_heaviest"], row["first"]) for row in VALUES if row["data"] in ("real", "normal")}
    assert found["real"] == pytest.approx((0.60, 0.44), abs=0.005) and found["normal"] == pytest.approx((1, 0), abs=0.005)
    first = []
    for _, _, v in Activations(sample()).values():
        largest = v.double().abs().amax(dim=3)  # [1, H, N]
        first.append(largest[:, :, 0] / largest.mean(dim=2))
    assert sum(map(torch.Tensor.mean, first)) / 6 == pytest.approx(0.09, abs=0.005)


def test_costs_that_are_not_in_a_table():
    def times(*v: str) -> list[float]:
        return [row["time"] for row in COSTS if row["v"] in v and row["p"] == "uint8 row_block 128"]

    same = times(*(f"int8 {each}" for each in ("tensor", "head", "block 128", "channel", "channel_block 128", "token")))
    assert len(same) == 7 and 0.995 < min(same) <= max(same) < 1.025 and abs(same[1] - 1) < 0.015
    floats = [row["time"] for row in COSTS if row["v"].startswith("f")]
    assert 1.95 < min(floats) <= max(floats) < 2.1
    assert only(COSTS, v="int8 channel", p="uint8 row_block 256")["spilled"] == 256
    assert only(COSTS, v="int8 token", p="uint8 row_block 128")["tile"] == "64 x 128, 4 warps"
