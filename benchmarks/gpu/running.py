"""How a stage runs: one item after another while there is time, in a process of its own where there is a GPU.

A kernel that reads where it must not leaves its process without a GPU, one may never end, and a compiler may crash: the stage
then goes on in a new process, and the item says what happened to it.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from record import Record, Rows

STAGES = {"ceilings": 1.0, "tests": 4.0, "tuning": 3.0, "tables": 6.0, "profiles": 2.0}
"""Their shares of the time, in the order in which they run."""
MODULES = {"tests": "correctness"}
"""Of stages whose file has another name."""
LOST = 3
"""The exit code of a process whose GPU no longer answers."""
GRACE = 20.0
"""Seconds that an item may take beyond its stage's time."""
HUNG = 4.0
"""Times what an item should take, after which it is taken to have hung,"""
PATIENCE = 120.0
"""and at least so many seconds."""


@dataclass(frozen=True)
class Setting:
    """Where and how a stage runs."""

    device: torch.device
    small: bool
    folder: Path
    """For results."""
    machine: dict[str, str]
    end: float
    """When the stage's time is over, by `time.time`."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.time()


@dataclass(frozen=True)
class Item:
    """Something to measure."""

    name: str
    seconds: float
    """What it should take on a GPU, its compilation included: it is not begun with less time left."""
    measure: Callable[[], Rows]
    prepares: bool = False
    """Whether it is there for those after it, in what a machine forgets: it is done anew as long as one of them is left."""


def run(stage: str, setting: Setting) -> None:
    """Measure what the stage's file does not have yet, in this process. Exits with LOST where the GPU no longer answers."""
    record = Record(setting.folder / f"{stage}.json", setting.machine)
    record.left_out = {}
    items: list[Item] = list(import_module(MODULES.get(stage, stage)).items(setting))
    wanted = [item for item in items if item.prepares or item.name not in record.items]
    expected = took = 0.0
    for item in wanted if not all(item.prepares for item in wanted) else []:
        # as much slower or faster than expected as those before it were
        needed = item.seconds * (max(0.6, took / expected) if expected else 1.0)
        if needed > setting.left and not setting.small:
            record.left_out[item.name] = f"takes about {needed:.0f} s, and {max(0.0, setting.left):.0f} s were left"
            record.write()
            continue
        start = time.time()
        record.begin(item.name, start + max(PATIENCE, HUNG * needed))
        try:
            rows = item.measure()
            expected, took = expected + item.seconds, took + time.time() - start
        except Exception as error:
            rows = [{"note": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]
        answers = setting.device.type != "cuda" or _answers()  # which waits for what the item has left running
        seconds = time.time() - start
        record.end(item.name, rows, seconds)
        print(f"{stage}: {item.name}, {seconds:.1f} s", flush=True)
        if not answers:
            raise SystemExit(LOST)
    record.write()


def apart(stage: str, setting: Setting) -> None:
    """`run` in a process of its own, in a new one where that ends early or hangs."""
    record = Record(setting.folder / f"{stage}.json", setting.machine)
    record.running = None  # whatever an earlier run was stopped at
    record.write()
    while True:
        process = multiprocessing.get_context("spawn").Process(target=run, args=(stage, setting))
        process.start()
        hung = False
        while process.is_alive() and not hung and setting.left > -GRACE:
            process.join(0.5)
            record = Record(setting.folder / f"{stage}.json", setting.machine)
            hung = record.running is not None and time.time() > record.until
        in_time = hung or not process.is_alive()
        if process.is_alive():
            _end(process.pid)
        process.join()
        if in_time and process.exitcode == 0:
            return
        record = Record(setting.folder / f"{stage}.json", setting.machine)
        begun, record.running = record.running, None
        why = f"its process ended with {process.exitcode}" if in_time else "the stage's time was over before it had ended"
        why = "it did not end, and was stopped" if hung else why
        if in_time and begun is not None:
            record.end(begun, [{"note": why}], 0.0)
        elif not in_time or (not hung and process.exitcode != LOST):
            # for a later run
            record.left_out[begun or "the stage"] = why
            record.write()
            return


def _end(process: int | None) -> None:
    """Of a process and what it has started, which would keep the GPU busy."""
    started = [process]
    for each in started:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):
                started += map(int, children.read_text().split())
    for each in started:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
