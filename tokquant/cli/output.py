"""Output of commands: tables, JSON, and progress bars on stderr."""

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
    """Standard output; 160 columns wide if it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def table(title: str, words: Sequence[str], numbers: Sequence[str] = (), **options: Any) -> Table:
    """A table with a column for each heading; `numbers` are right-aligned."""
    result = Table(*words, title=escape(title), **options)
    for heading in numbers:
        result.add_column(heading, justify="right")
    return result


def facts(values: Mapping[str, str], title: str | None = None) -> Table:
    """A table of names and values."""
    result = Table(title=title and escape(title), show_header=False)
    result.add_column(style="bold")
    result.add_column()
    for name, value in values.items():
        result.add_row(name, escape(value))
    return result


def print_json(data: Any) -> None:
    """Print JSON. Numbers that are not finite become null, since JSON has none."""
    print(json.dumps(_finite(data), indent=2))


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Iterate over the items, with a progress bar if stderr is a terminal."""
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
