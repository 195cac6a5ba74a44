"""What a stage has measured: one JSON file, on disk from the moment that something is known."""

import json
from pathlib import Path
from typing import Any

from tokquant.files import write_atomically

Rows = list[dict[str, Any]]
"""Of one thing that was measured: names to numbers and words, as JSON takes them."""


class Record:
    """The results of a stage on one machine. What an earlier run on the same machine and versions found is kept."""

    def __init__(self, path: Path, machine: dict[str, str], again: bool = False):
        self.path, self.machine = path, machine
        self.items: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        """What there was no time for, by name, and why."""
        self.running: str | None = None
        """What was begun last and has not ended."""
        self.until = 0.0
        """When that has hung, by `time.time`."""
        found = read(path)
        if not again and found.get("machine") == machine:
            self.items, self.left_out, self.running = found["items"], found["left_out"], found["running"]
            self.until = found.get("until", 0.0)
        elif found.get("items"):
            path.replace(path.with_suffix(".earlier.json"))

    def begin(self, name: str, until: float) -> None:
        """Say what comes now, so that it is known should it be the last, and when it has hung."""
        self.running, self.until = name, until
        self.write()

    def end(self, name: str, rows: Rows, seconds: float) -> None:
        """Keep what was found."""
        self.items[name] = {"seconds": round(seconds, 1), "rows": rows}
        self.running = None
        self.write()

    def write(self) -> None:
        found = {name: getattr(self, name) for name in ("machine", "running", "until", "left_out", "items")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(found, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """A stage's file, or nothing where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def rows_of(folder: Path, stage: str) -> Rows:
    """Everything that a stage has found, each row with the name of its item."""
    items = read(folder / f"{stage}.json").get("items", {})
    return [{"item": name, **row} for name, item in items.items() for row in item["rows"]]
