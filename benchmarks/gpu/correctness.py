"""Runs the tests that need a GPU: the slow ones under compute-sanitizer by themselves, the others together."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from record import Rows
from running import HUNG, Item, Setting

ROOT = Path(__file__).parents[2]

OUTCOME = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?:\s|$)")
TEST = re.compile(r"\S+\.py::\S.*?(?=\s+(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b|\s*$)")
WHY = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.+?) - (.+)$", re.MULTILINE)


SLOW = "test_sanitizer.py"
SECONDS = (90, 150)
"""Expected seconds of all files but `SLOW`, and of `SLOW`, nearly all spent in Triton's compiler. If time runs out, the tests
that have finished count."""
PROCESSES = 12
"""The most processes of pytest: each takes half a gigabyte of GPU memory, besides what its tests take."""


def items(setting: Setting) -> Iterator[Item]:
    """The files with tests that need a GPU, those of kernels first."""
    paths = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    paths.sort(key=lambda path: path.parent.name != "kernels")
    together = [path for path in paths if path.name != SLOW][: 1 if setting.small else None]
    yield Item("all but the sanitizer's", SECONDS[0], partial(_run, setting, together, SECONDS[0]))
    if not setting.small:
        slow = [path for path in paths if path.name == SLOW]
        yield Item("the sanitizer's", SECONDS[1], partial(_run, setting, slow, SECONDS[1]))


def _run(setting: Setting, paths: list[Path], seconds: int) -> Rows:
    """Run pytest: counts of outcomes, and a row for each failed test. If time runs out it is killed, and what ran counts."""
    command = [sys.executable, "-m", "pytest", *map(str, paths), "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not setting.small:
        # in parallel, as most of the time is Triton's compiler; xdist replaces a process whose GPU context is lost
        command += ["-n", str(max(1, min(PROCESSES, (os.cpu_count() or 2) - 2))), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(2 * seconds), "--timeout-method", "thread"]  # per test; it ends the process
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "COLUMNS": "400",
    }
    log = setting.folder / "tests.log"
    with open(log, "a+") as file:
        start = file.tell()
        # in a session of its own, so that pytest's child processes can be killed with it
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True) as tests:
            try:
                code = tests.wait(min(max(30.0, setting.left), (HUNG - 1) * seconds))
                end = "" if code in (0, 1) else "no test is of this kind" if code == 5 else f"pytest ended with {code}"
            except subprocess.TimeoutExpired:
                os.killpg(tests.pid, signal.SIGKILL)
                end = "stopped: there was no more time"
        file.seek(start)
        text = file.read()
    return summary(text, end)


def summary(text: str, end: str) -> Rows:
    """pytest's output -> counts of outcomes, then a row for each test that failed."""
    # the sections after the results repeat the names of tests
    body = re.split(r"^=+ (?:FAILURES|ERRORS|short test summary info) =+$", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = {}
    for line in body.splitlines():
        test, outcome = TEST.search(line), OUTCOME.search(line)
        if test and outcome:
            found[test[0].strip()] = outcome[1].lower()
    why = dict(WHY.findall(text))
    counts = Counter(found.values())
    rows: Rows = [{"test": "all of them", **counts, "note": end}]
    rows += [{"test": test, "note": why.get(test, result)} for test, result in found.items() if result in ("failed", "error")]
    return rows
