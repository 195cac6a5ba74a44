"""Writes a Markdown page of all results in a folder."""

from pathlib import Path
from typing import Any

from aims import compare
from record import Rows, read
from running import STAGES

from tokquant.files import write_atomically

TITLES = {
    "ceilings": "Ceilings",
    "tests": "Tests that need a GPU",
    "tuning": "Launches",
    "tables": "Attention, decoding and quantization beside others",
    "profiles": "Profiles",
}


def write(folder: Path) -> None:
    """Write `page.md` from the files of the stages: first the aims, then a section for each stage."""
    files = {stage: found for stage in STAGES if (found := read(folder / f"{stage}.json"))}
    machine = next(iter(files.values()))["machine"]
    parts = [
        f"# Measured on {machine['device']}",
        "; ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "Medians of runs in turn in one process, by the GPU's clock, caches cold; rates are of 1e9 operations, or bytes, a "
        "second. `python benchmarks/gpu` measures, and writes this page.",
        "## Beside the aims",
        table(compare(folder)),
    ]
    for stage, found in files.items():
        parts.append(f"## {TITLES[stage]}")
        for name, item in found["items"].items():
            parts += [f"### {name}", *_item(item["rows"]), f"{item['seconds']} s."]
        if found["left_out"]:
            parts += ["### Left out", table([{"what": name, "why": why} for name, why in found["left_out"].items()])]
    write_atomically(folder / "page.md", ("\n\n".join(parts) + "\n").encode())


def _item(rows: Rows) -> list[str]:
    """The rows of an item: columns with one value for all rows as a line, the others as a table."""
    shared = {name: value for name, value in rows[0].items() if all(row.get(name) == value for row in rows)} if rows[1:] else {}
    line = ", ".join(f"{name} {_cell(value)}" for name, value in shared.items())
    rest = [{name: value for name, value in row.items() if name not in shared} for row in rows]
    return [*([line] if line else []), *([table(rest)] if rest else [])]


def table(rows: Rows) -> str:
    """A Markdown table of rows whose columns may differ, columns in order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " ".join(str(value).replace("|", "\\|").split())
