"""What tuning has learned: found again, moved, never trusted."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from tokquant.kernels import generate, store, tuned
from tokquant.kernels.candidates import Config
from tokquant.kernels.plan import plan
from tokquant.schemes import preset

PLAN = plan(preset("int8"), head_dim=64, dtype=torch.float16)
OTHER = PLAN.candidates[2]


def key(**changed):
    fields = dict(kernel=generate.name_of(PLAN), device="NVIDIA H200", triton="3.9.0", batch_heads=32, n_q=4096, n_k=4096)
    return tuned.Key(**{**fields, **changed})


def entry(config=OTHER, **changed):
    return tuned.Entry(key=key(**changed), config=config, ms=1.5, default_ms=2.0)


def nearest(plan, wanted):
    found = tuned.nearest(plan, wanted)
    return plan.config if found is None else found.config


def choose(*call):
    return tuned.choose(*call)[0]


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch):
    monkeypatch.setattr(tuned, "_shipped", lambda: ())


def test_what_was_recorded_is_found_again():
    assert nearest(PLAN, key()) == PLAN.config != OTHER
    path = tuned.record(entry())
    assert nearest(PLAN, key()) == OTHER
    kept = json.loads(path.read_text())
    assert kept["key"]["device"] == "NVIDIA H200" and kept["config"]["block_m"] == OTHER.block_m


@pytest.mark.parametrize(
    "changed", [dict(device="NVIDIA A100"), dict(triton="3.6.0"), dict(kernel="attention_other_0123")], ids=str
)
def test_another_kernel_device_or_triton_is_not_taken(changed):
    tuned.record(entry(**changed))
    assert nearest(PLAN, key()) == PLAN.config


def test_of_several_shapes_the_nearest_is_taken():
    near, far = PLAN.candidates[1], PLAN.candidates[3]
    tuned.record(entry(near, n_q=1024, n_k=1024))
    tuned.record(entry(far, n_q=65536, n_k=65536))
    assert nearest(PLAN, key(n_q=2048, n_k=2048)) == near
    assert nearest(PLAN, key(n_q=32768, n_k=32768)) == far


def test_a_shape_far_from_all_that_were_tuned_takes_the_plans_own():
    tuned.record(entry(batch_heads=1, n_q=1, n_k=128))
    assert nearest(PLAN, key(n_q=65536, n_k=65536)) == PLAN.config
    assert nearest(PLAN, key(batch_heads=1, n_q=2, n_k=256)) == OTHER


def test_the_same_key_is_replaced():
    paths = {tuned.record(entry(config)) for config in PLAN.candidates[:3]}
    assert len(paths) == 1 and nearest(PLAN, key()) == PLAN.candidates[2]


def test_an_entry_only_chooses_among_candidates():
    tuned.record(entry(Config(block_m=16, block_n=16, num_warps=32, num_stages=9)))
    assert nearest(PLAN, key()) == PLAN.config


POISON = {
    "half a file": lambda text: text[: len(text) // 2],
    "nothing": lambda text: "",
    "another document": lambda text: "[1, 2, 3]",
    "an unknown key": lambda text: text.replace('"ms"', '"command": "rm", "ms"'),
    "a time that is none": lambda text: text.replace('"ms": 1.5', '"ms": NaN'),
    "a size as text": lambda text: text.replace('"n_q": 4096', '"n_q": "4096"'),
    "another key than its name": lambda text: text.replace('"n_q": 4096', '"n_q": 8192'),
    "bytes that are no text": lambda text: b"\xff\xfe\x00" * 100,
    "more than is read": lambda text: text + " " * (tuned.LARGEST + 1),
}  # fmt: skip


@pytest.mark.parametrize("spoil", POISON.values(), ids=POISON)
def test_a_spoiled_entry_is_none_and_the_next_recording_heals_it(spoil):
    path = tuned.record(entry())
    spoiled = spoil(path.read_text())
    path.write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.encode())
    assert nearest(PLAN, key()) == PLAN.config and list(tuned.entries()) == []
    tuned.record(entry())
    assert nearest(PLAN, key()) == OTHER


def test_a_folder_in_place_of_an_entry_is_passed_over():
    (tuned.folder() / entry().file_name).mkdir(parents=True)
    assert nearest(PLAN, key()) == PLAN.config
    assert tuned.record(entry()) is None


def test_a_cache_folder_that_cannot_be_written_keeps_nothing_and_harms_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", str(tmp_path / "file"))
    assert tuned.record(entry()) is None
    assert nearest(PLAN, key()) == PLAN.config and tuned.clear() == 0


def test_entries_move_to_another_folder(monkeypatch, tmp_path):
    for n in (1024, 4096):
        tuned.record(entry(n_q=n))
    assert tuned.export(tmp_path / "entries.json") == 2
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert nearest(PLAN, key()) == PLAN.config
    for each in tuned.load(tmp_path / "entries.json"):
        tuned.record(each)
    assert nearest(PLAN, key()) == OTHER and len(list(tuned.entries())) == 2


@pytest.mark.parametrize("text", ["{}", "[{}]", "no json", '[{"key": 1}]'])
def test_a_file_that_is_no_export_says_what_would_be_one(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="not a list of tuning entries as `tokquant cache export` writes"):
        tuned.load(tmp_path / "file.json")


def test_clear_removes_entries_and_nothing_else():
    tuned.record(entry())
    others = [tuned.folder() / "notes.txt", tuned.folder() / "other.json", store.folder() / "kernels" / "a.py"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert tuned.clear() == 1
    assert all(path.exists() for path in others) and list(tuned.entries()) == []


def test_entries_that_ship_serve_where_the_folder_has_none(monkeypatch):
    monkeypatch.setattr(tuned, "_shipped", lambda: (entry(n_q=1024),))
    assert nearest(PLAN, key()) == OTHER
    tuned.record(entry(PLAN.candidates[1]))
    assert nearest(PLAN, key()) == PLAN.candidates[1], "the nearer one"


def test_what_ships_can_be_read():
    shipped = [tuned.load(path) for path in tuned.SHIPPED.glob("*.json")]
    assert all(each.ms > 0 for entries in shipped for each in entries)


def _record_and_read(folder, number, barrier, failures):
    os.environ["TOKQUANT_CACHE_DIR"] = folder
    barrier.wait()
    for turn in range(30):
        config = PLAN.candidates[(number + turn) % len(PLAN.candidates)]
        tuned.record(entry(config))
        found = nearest(PLAN, key())
        if found not in PLAN.candidates or len(list(tuned.entries())) != 1:
            failures.put((number, turn))


def test_many_processes_record_and_read_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, failures = context.Barrier(8), context.Queue()
    workers = [context.Process(target=_record_and_read, args=(str(tmp_path), number, barrier, failures)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures.empty() and all(worker.exitcode == 0 for worker in workers)
    assert [path.suffix for path in tuned_files(tmp_path)] == [".json"], "no temporary files are left"


def tuned_files(folder):
    return list((folder / "tuning").iterdir())


def test_a_process_that_is_killed_leaves_the_last_whole_entry(tmp_path):
    program = (
        "import os; from test_tuned import *; print('ready', flush=True)\n"
        "turn = 0\n"
        "while True:\n"
        "    tuned.record(entry(PLAN.candidates[turn % 3])); turn += 1\n"
    )
    environment = {**os.environ, "TOKQUANT_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=os.path.dirname(__file__), env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    while not (tmp_path / "tuning").is_dir() or not list((tmp_path / "tuning").glob("*.json")):
        assert process.poll() is None
    process.kill()
    process.wait()
    [path] = (tmp_path / "tuning").glob("*.json")
    assert tuned.Entry.model_validate_json(path.read_bytes()).config in PLAN.candidates


def test_the_cpu_takes_what_is_taken_without_tuning():
    assert choose(PLAN, torch.device("cpu"), 32, 4096, 4096) == PLAN.config


def test_a_gpu_takes_what_was_recorded_for_its_name_and_shape(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tuned, "_triton", lambda: "3.9.0")
    tuned._nearest.cache_clear()
    device = torch.device("cuda", 0)
    assert choose(PLAN, device, 32, 4000, 3000) == PLAN.config
    tuned.record(entry())
    assert choose(PLAN, device, 32, 4000, 3000) == OTHER, "a recording is seen at once"
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", str(tmp_path))
    assert choose(PLAN, device, 32, 4000, 3000) == PLAN.config, "and another folder too"
    tuned._nearest.cache_clear()
