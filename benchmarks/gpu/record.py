"""The results of a stage in one JSON file, written after every item, so that a crash loses nothing."""

import json
from pathlib import Path
from typing import Any

from tokquant.files import write_atomically

Rows = list[dict[str, Any]]
"""Rows of a table of results: column -> number or text, as JSON takes them."""


class Record:
    """The results of a stage on one machine, together with those of earlier runs on the same machine and versions."""

    def __init__(self, path: Path, machine: dict[str, str], again: bool = False):
        self.path, self.machine = path, machine
        self.items: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        """Items that there was no time for, and why, by name."""
        self.running: str | None = None
        """The item that has begun and not ended."""
        self.until = 0.0
        """The time, by `time.time`, from which on the running item counts as hung."""
        found = read(path)
        if not again and found.get("machine") == machine:
            self.items, self.left_out, self.running = found["items"], found["left_out"], found["running"]
            self.until = found.get("until", 0.0)
        elif found.get("items"):
            path.replace(path.with_suffix(".earlier.json"))

    def begin(self, name: str, until: float) -> None:
        """Record that an item starts, so that another process knows which one crashed, or has hung after `until`."""
        self.running, self.until = name, until
        self.write()

    def end(self, name: str, rows: Rows, seconds: float) -> None:
        """Record the rows of an item that has ended."""
        self.items[name] = {"seconds": round(seconds, 1), "rows": rows}
        self.running = None
        self.write()

    def write(self) -> None:
        found = {name: getattr(self, name) for name in ("machine", "running", "until", "left_out", "items")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(found, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """The data of a stage's file; empty where there is none, or it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def rows_of(folder: Path, stage: str) -> Rows:
    """All rows of a stage, each with the name of its item."""
    items = read(folder / f"{stage}.json").get("items", {})
    return [{"item": name, **row} for name, item in items.items() for row in item["rows"]]
