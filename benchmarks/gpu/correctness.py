"""The tests that need a GPU, each file of them in a process of its own."""

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
from running import Item, Setting

ROOT = Path(__file__).parents[2]

OUTCOME = re.compile(r"(?:^|\s)(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?:\s|$)")
TEST = re.compile(r"\S+\.py::\S.*?(?=\s+(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b|\s*$)")
WHY = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.+?) - (.+)$", re.MULTILINE)


SECONDS = {"test_on_gpu.py": 60, "test_sanitizer.py": 150}
"""That a file takes, where it is not 20: nearly all of them Triton's compiler."""


def items(setting: Setting) -> Iterator[Item]:
    """The files with such tests, the short ones and those about kernels first."""
    paths = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    paths.sort(key=lambda path: (SECONDS.get(path.name, 20), path.parent.name != "kernels"))
    for path in paths[:1] if setting.small else paths:
        yield Item(str(path.relative_to(ROOT)), SECONDS.get(path.name, 20), partial(_run, setting, path))


def _run(setting: Setting, path: Path) -> Rows:
    """Counts, and every test that fails with what it says. What has no time left is stopped, and counts as far as it came."""
    command = [sys.executable, "-m", "pytest", str(path), "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not setting.small:
        command += ["-n", "6", "--dist", "worksteal"]  # most of their time is Triton's compiler
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "COLUMNS": "400",
    }
    log = setting.folder / "tests.log"
    with open(log, "a+") as file:
        start = file.tell()
        # a session of its own, so that what pytest has started ends with it
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True) as tests:
            try:
                code = tests.wait(max(30.0, setting.left))
                end = "" if code in (0, 1) else "no test is of this kind" if code == 5 else f"pytest ended with {code}"
            except subprocess.TimeoutExpired:
                os.killpg(tests.pid, signal.SIGKILL)
                end = "stopped: the stage's time was over"
        file.seek(start)
        text = file.read()
    return summary(text, end)


def summary(text: str, end: str) -> Rows:
    """pytest's output -> counts of outcomes, then a row for each test that failed."""
    # what comes after the short summary's heading repeats what was said
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
