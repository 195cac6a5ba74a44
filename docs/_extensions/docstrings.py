"""Docstrings as this package writes them, Markdown with a list of arguments, in the reStructuredText that autodoc takes.

Schemes, which are pydantic's, are shown with names and defaults alone: their types hold validators and JSON schemas.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby

from pydantic import BaseModel

SECTION = re.compile(r"(Args|Raises):$")
ENTRY = re.compile(r"([\w*][\w*, ]*): (.*)")
"""`names: what they are`, where an indented list of arguments or errors begins a new one."""


def converted(lines: list[str]) -> Iterator[str]:
    """The same text in reStructuredText: tables, and definition lists for sections; single backticks are the default role's."""
    for kind, group in groupby(_marked(lines), key=lambda pair: pair[0]):
        text = [line for _, line in group]
        if kind == "table":
            yield from _table(text)
        elif kind:
            yield from ["", f"**{kind}**", "", *_definitions(textwrap.dedent("\n".join(text)).splitlines())]
        else:
            yield from map(_escaped, text)


def _marked(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each line with what it belongs to: `table`, the section whose indented lines go on, or nothing."""
    section = ""
    for line in lines:
        if found := SECTION.match(line):
            section = found[1]
        elif section and (line.startswith(" ") or not line):
            yield section, line
        else:
            section = ""
            yield ("table" if line[:1] == line[-1:] == "|" else ""), line


def _definitions(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if found := ENTRY.match(line):
            yield from ["", f"`{found[1]}`", f"    {_escaped(found[2])}"]
        elif line and not line.startswith(" "):
            yield from ["", _escaped(line)]
        else:
            yield _escaped(line)
    yield ""


def _table(lines: list[str]) -> Iterator[str]:
    yield from ["", ".. list-table::", "    :header-rows: 1", ""]
    for row in lines[:1] + lines[2:]:
        for column, cell in enumerate(row.strip("|").split("|")):
            yield f"    {' ' if column else '*'} - {cell.strip()}"
    yield ""


def _escaped(line: str) -> str:
    """A bar outside of code is a bar, not a substitution."""
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", line)


def fields(model: type[BaseModel]) -> str:
    """The signature of a model: its fields, and what they are where they are left out."""
    given = (name if field.is_required() else f"{name}={field.default!r}" for name, field in model.model_fields.items())
    return f"(*, {', '.join(given)})"


def setup(app):
    """Convert every docstring that autodoc reads, and the signatures of schemes."""

    def convert(app, what, name, subject, options, lines):
        lines[:] = list(converted(lines))

    def sign(app, what, name, subject, options, signature, returned):
        if isinstance(subject, type) and issubclass(subject, BaseModel):
            return fields(subject), None
        # a function that is a default is its name, not where it lies in memory
        return (re.sub(r"<function (\w+) at 0x\w+>", r"\1", signature), returned) if signature else None

    app.connect("autodoc-process-docstring", convert)
    app.connect("autodoc-process-signature", sign)
    return {"parallel_read_safe": True}
