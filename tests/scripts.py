"""Python as a user starts it, each time in a process of its own, forked from one that has imported torch and tokquant."""

import multiprocessing
import os
import runpy
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tokquant"])


@dataclass(frozen=True)
class Ran:
    """What `subprocess.run` says of it."""

    returncode: int
    stdout: str
    stderr: str


def python(*words: object, cwd: Path | None = None, **environment: str) -> Ran:
    """`python FILE WORDS` or `python -m MODULE WORDS`."""
    with TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = FORKED.Process(target=_run, args=([str(word) for word in words], cwd, {**os.environ, **environment}, streams))
        process.start()
        process.join()
        return Ran(process.exitcode, *(path.read_text() for path in streams))


def _run(words: list[str], cwd: Path | None, environment: dict[str, str], streams: list[Path]) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    module = words[0] == "-m"
    sys.argv = words[module:]
    sys.path.insert(0, os.getcwd() if module else str(Path(words[0]).parent))
    run = runpy.run_module if module else runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
