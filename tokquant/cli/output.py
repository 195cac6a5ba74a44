"""Tables for people, JSON for programs, progress on stderr."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

T = TypeVar("T")


def console() -> Console:
    """Standard output; as wide as a table needs where it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def table(title: str, words: Sequence[str], numbers: Sequence[str] = (), **options: Any) -> Table:
    """A table with a column for each of these, numbers to the right."""
    made = Table(*words, title=escape(title), **options)
    for heading in numbers:
        made.add_column(heading, justify="right")
    return made


def facts(found: Mapping[str, str], title: str | None = None) -> Table:
    """A table of names and what is there."""
    made = Table(title=title and escape(title), show_header=False)
    made.add_column(style="bold")
    made.add_column()
    for name, value in found.items():
        made.add_row(name, escape(value))
    return made


def print_json(data: Any) -> None:
    """JSON that every parser takes: what is not finite becomes null."""
    print(json.dumps(_finite(data), indent=2))


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items, with a bar on stderr where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        yield from bar.track(items, total=total, description=what)


def percent(fraction: float) -> str:
    """0.01234 -> '1.234 %'."""
    return f"{100 * fraction:.3f} %"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
