"""Runs a stage: one item after another while there is time, in a process of its own where there is a GPU.

An illegal access loses the process its GPU context, a kernel may hang, and a compiler may crash: the stage then goes on in a
new process, and the item's result says what happened.
"""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from record import Record, Rows

STAGES = {"ceilings": 1.0, "tests": 4.0, "tuning": 3.0, "tables": 6.0, "profiles": 2.0}
"""Stages in the order in which they run, with their shares of the time."""
MODULES = {"tests": "correctness"}
"""Modules of the stages whose module has another name."""
LOST = 3
"""Exit code of a process whose GPU no longer answers."""
GRACE = 20.0
"""Seconds that an item may run on after its stage's time is over."""
HUNG = 4.0
"""An item counts as hung after this multiple of its expected time,"""
PATIENCE = 120.0
"""but not before this many seconds."""


@dataclass(frozen=True)
class Setting:
    """Where and how a stage runs."""

    device: torch.device
    small: bool
    folder: Path
    """Where results go."""
    machine: dict[str, str]
    end: float
    """When the stage's time is over, by `time.time`."""

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.time()


@dataclass(frozen=True)
class Item:
    """One measurement of a stage."""

    name: str
    seconds: float
    """Expected time on a GPU, compilation included: the item is not started with less time left."""
    measure: Callable[[], Rows]
    prepares: bool = False
    """Whether it only prepares what later items need and no file keeps, so that every run with items left repeats it."""


def run(stage: str, setting: Setting) -> None:
    """Measure, in this process, the items that the stage's file does not have. Exits with LOST if the GPU stops answering."""
    record = Record(setting.folder / f"{stage}.json", setting.machine)
    record.left_out = {}
    items: list[Item] = list(import_module(MODULES.get(stage, stage)).items(setting))
    wanted = [item for item in items if item.prepares or item.name not in record.items]
    expected = took = 0.0
    for item in wanted if not all(item.prepares for item in wanted) else []:
        # corrected by how much slower or faster than expected the items before were
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
        answers = setting.device.type != "cuda" or _gpu_answers()  # waits for what the item has left running
        seconds = time.time() - start
        record.end(item.name, rows, seconds)
        print(f"{stage}: {item.name}, {seconds:.1f} s", flush=True)
        if not answers:
            raise SystemExit(LOST)
    record.write()


def run_in_process(stage: str, setting: Setting) -> None:
    """`run` the stage in a process of its own, and go on in a new one whenever that crashes, hangs or loses its GPU."""
    record = Record(setting.folder / f"{stage}.json", setting.machine)
    record.running = None  # an earlier run may have been stopped within an item
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
            _kill(process.pid)
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
            # left for a later run
            record.left_out[begun or "the stage"] = why
            record.write()
            return


def _kill(process: int | None) -> None:
    """Kill a process and all its descendants, which would keep the GPU busy."""
    family = [process]
    for each in family:  # grows as children are found
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):
                family += map(int, children.read_text().split())
    for each in family:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def output_of(command: list[str], seconds: float, **environment: str) -> tuple[str, str]:
    """The standard output of a command, and how it ended. After `seconds` it is killed with all that it has started."""
    pipes: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes) as process:
        try:
            text, errors = process.communicate(timeout=seconds)
            end = f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            _kill(process.pid)  # a descendant that is left would keep the pipes open, and be waited for
            text, errors = process.communicate()
            end = f"was stopped after {seconds:.0f} s"
    return text, f"{end}: {' '.join((text + errors).split())[-300:]}"


def _gpu_answers() -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
