"""tokquant bench, and the scripts in benchmarks/ that are the same."""

import json
import runpy
from pathlib import Path

import pytest
import torch

import tokquant as tq
from tokquant.evaluation import bench

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ("--tokens", 64, "--head-dim", 32, "--repeats", 1)


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    monkeypatch.setattr(bench, "SCRATCH_BYTES", 2**20)


def test_attention_is_timed_at_every_size_both_ways(tokquant):
    code, out, err = tokquant("bench", *SMALL, "--tokens", 32, "--heads", 2, "-s", "int8", "--device", "cpu", "--json")
    tables = json.loads(out)
    assert code == 0, err
    shapes = [(table["shape"]["tokens"], table["shape"]["causal"]) for table in tables]
    assert shapes == [(64, False), (64, True), (32, False), (32, True)]
    for table in tables:
        assert set(table) == {"workload", "shape", "peer", "unit", "rows", "machine"}
        sizes = {name: table["shape"][name] for name in ("batch", "heads", "kv_heads", "queries", "head_dim")}
        assert sizes == {"batch": 1, "heads": 2, "kv_heads": 2, "queries": table["shape"]["tokens"], "head_dim": 32}
        found = {row["provider"]: row for row in table["rows"]}
        assert {"SDPA fp32", "SDPA bf16", "int8", "int8, with quantization"} <= set(found)
        assert found[table["peer"]]["ratio"] == 1 and (table["workload"], table["unit"]) == ("attention", "GOPS")
        assert all(set(row) == {"provider", "ms", "least_ms", "ratio", "rate", "share", "note"} for row in table["rows"])


def test_decode_is_one_query_for_heads_that_share_keys(tokquant):
    code, out, err = tokquant("bench", "decode", *SMALL, "-s", "kv-int8", "-s", "fp8", "--device", "cpu", "--json")
    assert code == 0, err
    [table] = json.loads(out)
    shape = table["shape"]
    assert (shape["heads"], shape["kv_heads"], shape["queries"], shape["causal"]) == (32, 8, 1, False)
    rows = {row["provider"]: row for row in table["rows"]}
    assert {"kv-int8", "kv-int8, KVCache", "kv-int8, one token appended", "fp8", "reading memory"} <= rows.keys()
    assert "a dynamic scale a head" in rows["fp8, KVCache"]["note"]


def test_more_queries_and_a_scheme_of_ones_own(tokquant, tmp_path):
    path = tmp_path / "mine.yaml"
    tq.preset("int8-fast").dump(path)
    words = ("--heads", 4, "--kv-heads", 2, "--queries", 3, "--batch", 2, "--causal", "--device", "cpu", "--json")
    code, out, err = tokquant("bench", "decode", *SMALL, "-s", path, *words)
    assert code == 0, err
    [table] = json.loads(out)
    assert table["shape"] == dict(batch=2, heads=4, kv_heads=2, queries=3, tokens=64, head_dim=32, causal=True)
    own = [str(path), f"{path}, KVCache"]
    assert [row["provider"] for row in table["rows"]] == ["SDPA fp32 gqa", "SDPA bf16 gqa", *own, "reading memory"]


def test_a_table_has_the_reasons_and_the_machine(tokquant, monkeypatch):
    monkeypatch.setattr("tokquant.evaluation.packages.find_spec", lambda name: None)
    code, out, err = tokquant("bench", *SMALL, "--no-causal", "-s", "int8", "--device", "cpu")
    assert code == 0, err
    [line] = [line for line in out.splitlines() if "torchao" in line]
    assert "not installed" in line
    assert "8 heads, 64 x 64 tokens, head_dim 32" in out and f"torch {torch.__version__}" in out and "x SDPA" in out


@pytest.mark.parametrize(("runs", "warned"), [([1.0, 1.5, 9.0], False), ([1.0, 3.0, 4.0], True)])
def test_a_machine_that_was_busy_is_told(runs, warned, tokquant, monkeypatch):
    monkeypatch.setattr(bench, "interleaved", lambda calls, *rest: [runs] * len(calls))
    code, out, err = tokquant("bench", *SMALL, "--no-causal", "-s", "int8", "--device", "cpu")
    assert code == 0 and f"{runs[1]:.3f}" in out
    assert ("a median is 3.0 times the fastest run" in err) == warned


@pytest.mark.parametrize("workload", ["attention", "decode"])
def test_the_benchmarks_are_the_command(workload, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [workload, *map(str, SMALL), "-s", "int8", "--json", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / f"{workload}.py"), run_name="__main__")
    tables = json.loads(capsys.readouterr().out)
    assert not stop.value.code and {table["workload"] for table in tables} == {workload}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("decod",), "workload: 'decod' is not valid; use one of attention, quantization, decode; did you mean 'decode'?"),
        (("-s", "int9"), "no preset 'int9'"),
        (("--heads", "6", "--kv-heads", "4"), "--kv-heads: 4 does not divide the 6 heads of Q"),
        (("decode", "--kv-heads", "3"), "--kv-heads: 3 does not divide the 32 heads of Q"),
        (("--queries", "2"), "--queries: attention has as many as --tokens"),
        (("quantization", "--queries", "2"), "--queries: quantization has as many as --tokens"),
        (("--warm",), "--cold, --warm: attention is timed as it comes"),
        (("--device", "nowhere"), "--device: 'nowhere' cannot be used"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_what_the_user_got_wrong_is_one_message(words, message, tokquant):
    code, out, err = tokquant("bench", *words)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err
