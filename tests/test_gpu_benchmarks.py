"""python benchmarks/gpu: every stage runs on a CPU with tiny shapes, and what is measured is kept whatever happens."""

import json
import os
import runpy
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

import tokquant as tq
from tokquant.kv_cache import KVCache

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"


@pytest.fixture
def modules(monkeypatch):
    """Its files, importable as they are to one another."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture
def run(modules, monkeypatch, tmp_path):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["gpu", *map(str, words), "--small", "--output", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(FOLDER), run_name="__main__")
        return stop.value.code

    return call


def results(folder, stage):
    return {name: item["rows"] for name, item in json.loads((folder / f"{stage}.json").read_text())["items"].items()}


def test_every_stage_runs_on_a_cpu_and_says_what_needs_a_gpu(run, tmp_path, capsys):
    assert not run("--minutes", 5)
    folder = tmp_path / "cpu-small"
    ceilings = results(folder, "ceilings")
    assert all(row["TOPS"] > 0 for name, rows in ceilings.items() if name.startswith("products") for row in rows)
    assert ceilings["units"][0]["a clock"] == 128 and len(ceilings["units"]) == 6
    assert {row["what"] for row in ceilings["launches"]} == {"an empty kernel", "tq.attention of codes"}
    [[counted]] = results(folder, "tests").values()
    assert counted["skipped"] > 5 and counted["note"] == ""
    assert all("needs a GPU" in row["note"] for rows in results(folder, "tuning").values() for row in rows)
    tables = results(folder, "tables")
    assert [name.split(",")[0] for name in tables] == ["attention", "quantization", "decode"]
    for name, provider in zip(tables, ("int8", "int8", "kv-int8, KVCache"), strict=True):
        assert next(row for row in tables[name] if row["provider"] == provider)["ms"] > 0
    profiles = results(folder, "profiles")
    assert all(rows[0]["us"] > 0 for name, rows in profiles.items() if name.endswith("kernels"))
    assert any("interpreter is on" in row["note"] for name, rows in profiles.items() if "machine code" in name for row in rows)
    page = (folder / "page.md").read_text()
    assert page.startswith("# Measured on ") and page.count("\n### ") == sum(len(results(folder, each)) for each in (
        "ceilings", "tests", "tuning", "tables", "profiles"
    ))  # fmt: skip
    assert "| int8-fp8, head_dim 128, 8k to 32k | 720 | TOPS | not measured |" in capsys.readouterr().out


def test_what_is_no_stage_is_said(run, capsys):
    assert run("ceiling") == 2
    assert "did you mean 'ceilings'?" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.fixture
def stage(modules, monkeypatch, tmp_path):
    """Run items, by name: expected seconds, and what measures them."""

    def call(items, left=100.0, small=False):
        from running import Item, Setting
        from running import run as run_stage

        monkeypatch.setattr("running.import_module", lambda name: sys.modules[__name__])
        made = [Item(name, seconds, measure) for name, (seconds, measure) in items.items()]
        monkeypatch.setattr(sys.modules[__name__], "items", lambda setting: iter(made), raising=False)
        run_stage("ceilings", Setting(torch.device("cpu"), small, tmp_path, {"device": "x"}, time.time() + left))
        return json.loads((tmp_path / "ceilings.json").read_text())

    return call


def test_an_item_that_fails_loses_nobody_and_one_without_time_is_left_out(stage):
    found = stage({"a": (1, lambda: 1 / 0), "b": (1000, list), "c": (1, lambda: [{"ms": 2.0}])})
    assert found["items"]["a"]["rows"] == [{"note": "ZeroDivisionError: division by zero"}]
    assert found["items"]["c"]["rows"] == [{"ms": 2.0}] and found["running"] is None
    assert list(found["left_out"]) == ["b"] and "about 1000 s" in found["left_out"]["b"]


def test_items_that_took_longer_than_expected_make_the_next_expect_more(stage):
    found = stage({"a": (0.01, lambda: time.sleep(0.3) or []), "b": (10, list)}, left=100)
    assert list(found["left_out"]) == ["b"]


def test_a_second_run_goes_on_where_the_first_ended(stage, tmp_path):
    calls = []
    items = {name: (50, lambda name=name: calls.append(name) or [{"item": name}]) for name in "ab"}
    assert list(stage(items, left=10)["items"]) == []
    assert list(stage(items)["items"]) == ["a", "b"] and list(stage(items)["left_out"]) == []
    assert calls == ["a", "b"]
    from record import Record

    assert list(Record(tmp_path / "ceilings.json", {"device": "x"}).items) == ["a", "b"]
    for other in ({"machine": {"device": "y"}}, {"machine": {"device": "x"}, "again": True}):
        assert Record(tmp_path / "ceilings.json", **other).items == {}
        (tmp_path / "ceilings.earlier.json").rename(tmp_path / "ceilings.json")


def test_a_stage_whose_process_dies_goes_on_in_another_and_says_so(modules, monkeypatch, tmp_path):
    from running import Setting, run_in_process

    (tmp_path / "dying.py").write_text(
        "import os\nfrom running import Item\n"
        "def items(setting):\n"
        "    yield Item('well', 1, lambda: [{'ms': 1.0}])\n"
        "    yield Item('dies', 1, lambda: os._exit(7))\n"
        "    yield Item('after', 1, lambda: [{'ms': 3.0}])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run_in_process("dying", Setting(torch.device("cpu"), False, tmp_path, {"device": "x"}, time.time() + 200))
    found = results(tmp_path, "dying")
    assert found == {"well": [{"ms": 1.0}], "dies": [{"note": "its process ended with 7"}], "after": [{"ms": 3.0}]}


def test_an_item_that_does_not_end_is_stopped_and_left_to_a_later_run(modules, monkeypatch, tmp_path):
    from running import Setting, run_in_process

    monkeypatch.setattr("running.GRACE", 0.0)
    (tmp_path / "waiting.py").write_text("def items(setting):\n    while True:\n        pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run_in_process("waiting", Setting(torch.device("cpu"), False, tmp_path, {"device": "x"}, time.time() + 1))
    found = json.loads((tmp_path / "waiting.json").read_text())
    assert found["items"] == {} and "time was over" in found["left_out"]["the stage"]


HANGS = """
import subprocess, sys, time
import running
running.PATIENCE = 1.0

def items(setting):
    def hang():
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (setting.folder / "started").write_text(str(started.pid))
        time.sleep(600)

    yield running.Item("hangs", 0.1, hang)
    yield running.Item("after", 0.1, lambda: [{"ms": 3.0}])
"""


def test_an_item_that_hangs_ends_with_all_that_it_has_started_and_the_stage_goes_on(modules, monkeypatch, tmp_path):
    from record import Record
    from running import Setting, run_in_process

    (tmp_path / "hanging.py").write_text(HANGS)
    monkeypatch.syspath_prepend(str(tmp_path))
    Record(tmp_path / "hanging.json", {"device": "x"}).begin("where an earlier run was stopped", 0.0)
    run_in_process("hanging", Setting(torch.device("cpu"), False, tmp_path, {"device": "x"}, time.time() + 200))
    assert results(tmp_path, "hanging") == {"hangs": [{"note": "it did not end, and was stopped"}], "after": [{"ms": 3.0}]}
    started = Path("/proc") / (tmp_path / "started").read_text() / "stat"
    assert not started.exists() or started.read_text().rpartition(") ")[2][0] in "ZX"


def test_a_command_that_takes_too_long_is_stopped_with_all_that_it_has_started(modules):
    from running import output_of

    words = "import subprocess, sys; print(sys.argv[1], flush=True); {}; sys.exit('no counters')"
    starts = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"  # it has the same pipes
    for does, seconds, expected in (("pass", 60, "ended with 1: here no counters"), (starts, 2, "was stopped after 2 s: here")):
        start = time.time()
        assert output_of([sys.executable, "-c", words.format(does), "here"], seconds) == ("here\n", expected)
        assert time.time() - start < 60


def test_what_prepares_is_done_again_as_long_as_something_is_left_that_needs_it(modules, monkeypatch, tmp_path):
    from running import Item, Setting, run

    done = []
    made = [Item(name, 1, lambda name=name: done.append(name) or [], prepares=name == "a") for name in "abc"]
    monkeypatch.setattr("running.import_module", lambda name: sys.modules[__name__])
    for many, expected in ((2, "ab"), (3, "abac"), (3, "abac")):
        monkeypatch.setattr(sys.modules[__name__], "items", lambda setting, many=many: iter(made[:many]), raising=False)
        run("ceilings", Setting(torch.device("cpu"), False, tmp_path, {"device": "x"}, time.time() + 100))
        assert "".join(done) == expected


@pytest.mark.compiled
def test_what_is_compiled_beforehand_is_what_tuning_and_tables_launch(modules, monkeypatch, tmp_path):
    import tuning
    from running import Setting

    monkeypatch.setattr(tuning, "_failures", lambda jobs, _: [why for why in map(tuning._failure, jobs) if why])  # here
    monkeypatch.setattr(tuning, "CACHES", ["kv-int8"])  # to be calibrated takes numbers, of which there are none
    with fake_cuda(monkeypatch) as seen:
        [row] = tuning._compile(Setting(torch.device("cuda"), False, tmp_path, {}, 0.0), [("int8", 64, True)])
    assert row["failed"] == 0, row
    candidates = len(tq.compile("int8", head_dim=64, causal=True).candidates())
    launched = Counter(name.partition("_")[0] for name in seen.launched)
    assert launched["attention"] == 2 * candidates and launched["decode"] >= 4 and launched["quantize"] >= 6


def test_a_compiler_that_crashes_leaves_the_other_jobs_to_another_pool(modules, tmp_path):
    import tuning

    made = [tmp_path / str(i) for i in range(4)]
    jobs = [
        partial(os.mkdir, made[0]),
        partial(os._exit, 7),
        *(partial(os.mkdir, x) for x in made[1:]),
        partial(os.mkdir, made[0]),
    ]
    failures = tuning._failures(jobs, workers=1)
    assert failures == ["exit 7: it or one beside it crashed", f"kdir {made[0]}: FileExistsError"]
    assert all(x.is_dir() for x in made)


@pytest.mark.parametrize(("scheme", "queries"), [("int8", 64), ("kv-int8", 1), ("kv-fp8", 1)])
def test_what_is_slowest_is_profiled_also_where_its_scales_are_static(scheme, queries, modules, tmp_path):
    from profiles import call_of
    from running import Setting

    from tokquant.evaluation.bench import Shape

    call = call_of(Setting(torch.device("cpu"), True, tmp_path, {}, 0.0), scheme, Shape(1, 4, 2, queries, 64, 64, False))
    assert call().shape == (1, 4, queries, 64)


def test_launches_of_caches_are_tuned_too_and_shown_with_their_splits_and_predictions(modules, monkeypatch, tmp_path):
    from running import Setting
    from tuning import items

    from tokquant.kernels import tuned
    from tokquant.kernels.candidates import Config
    from tokquant.tuning.planner import Trial
    from tokquant.tuning.trials import Tuned

    asked, config = [], Config(16, 128, 4, 3)

    def tune_decode(q, cache, **given):
        asked.append((cache.scheme.name, tuple(q.shape), cache.lengths))
        key = tuned.Key(kernel="decode_a_0", device="H100", triton="3.9.0", batch_heads=32, n_q=1, n_k=1024)
        entry = tuned.Entry(key=key, config=config, split=2, ms=0.4, default_ms=0.5, rank=2, timed=2)
        tuned.record(entry)
        trials = [Trial(config, 0.5, predicted_ms=0.1, split=4), Trial(config, 0.4, predicted_ms=0.2, split=2)]
        return Tuned(entry, tuple(trials), kept=True)

    monkeypatch.setattr("tuning.need_gpu", lambda device: None)
    monkeypatch.setattr(tq, "tune_decode", tune_decode)
    monkeypatch.setattr(tq, "KVCache", lambda *given, **more: KVCache(*given, **more, backend="reference"))
    setting = Setting(torch.device("cpu"), True, tmp_path, {}, time.time() + 100)
    *_, last = items(setting)
    first, second = last.measure()
    assert asked == [("kv-int8", (1, 32, 1, 128), [1024])]
    assert (first["split"], first["predicted ms"], first["ms"], first["note"]) == (4, 0.1, 0.5, "")
    assert (second["split"], second["note"]) == (2, "taken from now on")
    assert [entry.split for entry in tuned.load(tmp_path / "launches.json")] == [2]


def test_outcomes_are_read_from_pytest_also_where_it_was_stopped(modules):
    from correctness import summary

    lines = [
        "tests/a.py::test_one[float16-{'causal': True}] PASSED       [ 10%]",
        "[gw1] [ 20%] FAILED tests/a.py::test_two[a b] ",
        "[gw0] [ 30%] SKIPPED tests/a.py::test_three ",
    ]
    done = "\n".join([*lines, "=== FAILURES ===", "x FAILED tests/a.py::no", "=== short test summary info ===",
                      "FAILED tests/a.py::test_two[a b] - assert 1 == 2"])  # fmt: skip
    counted, failed = summary(done, "")
    assert counted == {"test": "all of them", "passed": 1, "failed": 1, "skipped": 1, "note": ""}
    assert failed == {"test": "tests/a.py::test_two[a b]", "note": "assert 1 == 2"}
    counted, failed = summary("\n".join(lines), "stopped")
    assert counted["note"] == "stopped" and failed["note"] == "failed"


def test_aims_take_the_worst_table_and_the_fastest_of_the_others(modules, tmp_path):
    from aims import compare

    def table(name, shape, **ms):
        shape = {"workload": "attention", "batch": 4, "head_dim": 128, "causal": False} | shape
        rows = [{**shape, "provider": each.replace("_", " "), "ms": x, "rate": 1e6 / x} for each, x in ms.items()]
        return {name: {"seconds": 1.0, "rows": [*rows, {**shape, "provider": "torchao", "note": "not installed"}]}}

    long = {"SDPA flash fp16": 2.0, "SDPA cudnn bf16": 1.5, "int8-fp8": 1.0, "int8": 1.2, "int8, with quantization": 1.4}
    items = (
        table("8k", {"tokens": 8192}, **long, **{"SageAttention 1.0.6, kernel": 1.6})
        | table("32k", {"tokens": 32768}, **{**long, "int8-fp8": 1.25})
        | table("1k", {"tokens": 1024}, **long, **{"int8, auto": 1.55})
        | table("q", {"workload": "quantization", "tokens": 8192}, **{"int8": 0.05, "int8, attention": 1.0})
        | table(
            "d", {"workload": "decode", "tokens": 32768, "batch": 16}, **{"SDPA flash fp16 gqa": 1.0, "kv-int8, KVCache": 0.5}
        )
    )
    (tmp_path / "tables.json").write_text(json.dumps({"items": items}))
    copied = {"memory": {"rows": [{"what": "copy, read and written", "GB/s": 4e6}]}}
    (tmp_path / "ceilings.json").write_text(json.dumps({"items": copied}))
    found = {row["aim"]: row for row in compare(tmp_path)}
    rate = found["int8-fp8, head_dim 128, 8k to 32k"]
    assert (rate["least"], rate["most"], rate["met"], rate["worst"]) == (800, 1000, "yes", "32k")
    peers = found["the fastest int8 kernel beside the fastest in 16 bits, 8k to 32k"]
    assert peers["least"] == pytest.approx(1.5 / 1.2) and peers["met"] == "yes"
    assert found["beside SageAttention, kernels, 8k to 32k"]["least"] == pytest.approx(1.6)
    auto = found["what auto takes of tensors beside the fastest in 16 bits, up to 1k"]
    assert auto["least"] == pytest.approx(1.5 / 1.55) and auto["met"] == "yes"
    assert found["quantization, of the time of attention, 8k"]["met"] == "yes"
    assert found["decoding kv-int8 beside the fastest in 16 bits, 32k"]["least"] == 2.0
    assert found["decoding kv-int8, of copy bandwidth, batch 16"]["least"] == pytest.approx(0.5)
    assert found["int8-fp8, head_dim 64, 8k to 32k"]["met"] == "not measured"
