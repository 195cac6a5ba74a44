"""`tokquant io`: bytes of a kernel, without a GPU."""

import json

import pytest

import tokquant as tq
from tokquant import io_model
from tokquant.io_model import Workload

SHORT = ("--tokens", 1024, "--heads", 8, "--kv-heads", 2, "--head-dim", 64, "--causal")


def test_json_is_the_model_of_the_kernel_that_compile_gives(tokquant):
    code, out, err = tokquant("io", "int8", *SHORT, "--target", "sm_89", "--lse", "--json")
    assert code == 0, err
    report = json.loads(out)
    kernel = tq.compile("int8", head_dim=64, causal=True, shared_heads=4, target="sm_89", return_lse=True)
    found = io_model.standing(kernel, Workload(heads=8, n_q=1024, n_k=1024))
    assert report["tensors"] == found.traffic.tensors and report["kinds"] == found.traffic.kinds
    assert report["bytes"] == sum(report["tensors"].values()) == found.traffic.total
    assert report["bounds"]["active"] == "compulsory" and report["bounds"]["times"] == found.above_bound
    assert report["ms"]["everything"] == pytest.approx(report["bytes"] / 0.864e9)
    assert report["fast_memory"] == 356 * 1024 and report["processors"] == 142
    moved = [launch["bytes"] for launch in report["launches"]]
    assert moved == sorted(moved) and report["bytes"] in moved


def test_the_table_adds_up(tokquant):
    code, out, _ = tokquant("io", "kv-int4", *SHORT)
    assert code == 0
    rows = {cells[1].strip(): cells[2] for cells in (line.split("│") for line in out.splitlines()) if len(cells) > 3}
    numbers = {name: int(cell.replace(",", "")) for name, cell in rows.items()}
    whole = numbers.pop("all")
    assert numbers.pop("in 16 bits") > whole > numbers.pop("lower bound (compulsory)")
    assert sum(numbers.values()) == whole and {"Q", "K", "V", "O", "scales", "zeros"} <= set(numbers)
    assert "operations a byte" in out and "H100 SXM" in out


def test_decoding_reads_keys_once_and_little_else(tokquant):
    code, out, _ = tokquant("io", "kv-int8", "--queries", 1, "--heads", 4, "--json")
    report = json.loads(out)
    assert code == 0 and report["kinds"]["k"] == report["kinds"]["v"] == 4 * 8192 * 128
    assert 1 < report["bounds"]["times"] < 1.15


def test_the_picture_has_the_bounds_the_algorithms_and_the_launches(tokquant, tmp_path):
    path = tmp_path / "io.svg"
    code, _, err = tokquant("io", "int8", *SHORT, "--plot", path)
    assert code == 0, err
    text = path.read_text()
    for words in ("bytes of fast memory", "bound: pebble game, 1 / M", "SquareTiling", "launches of int8"):
        assert f"<!-- {words} -->" in text


def test_a_smaller_memory_raises_the_bound(tokquant):
    reports = [json.loads(tokquant("io", "int8", "--tokens", 65536, "--fast-memory", m, "--json")[1]) for m in (16384, 65536)]
    small, large = (report["bounds"] for report in reports)
    assert small["active"] == large["active"] == "pebble" and small["pebble"] > 2.5 * large["pebble"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("int9",), "no preset 'int9'; use one of fireq"),
        (("int8", "--kv-heads", 5), "--kv-heads: 5 does not divide the 32 heads of Q"),
        (("int8", "--target", "sm_1"), "target: 'sm_1' is not valid"),
        (("int8", "--plot", "nowhere/io.svg"), "--plot: there is no folder nowhere"),
        (("int8", "--plot", "io.gif"), "plot: 'io.gif' is not one of .svg, .png, .pdf"),
        (("fp8", "--target", "sm_80"), "has no fp8"),
    ],
)
def test_what_cannot_be_counted_is_one_message(tokquant, words, message):
    code, out, err = tokquant("io", *words)
    assert (code, out) == (2, "") and message in err
