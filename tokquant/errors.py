"""The errors tokquant raises beside the built-in ones. Each names the argument and what would work."""

import difflib
from collections.abc import Iterable

import numpy as np


class SchemeError(ValueError):
    """A scheme that cannot be read, or that contradicts itself or the tensors it meets.

    `problems` holds one `(place, text)` pair for each thing that is wrong, the place as a dotted path.
    """

    def __init__(self, problems: str | list[tuple[str, str]]):
        self.problems = [("", problems)] if isinstance(problems, str) else problems
        super().__init__("\n".join(f"{place}: {text}" if place else text for place, text in self.problems))


class ScalesError(ValueError):
    """Calibrated scales, or a file of them or of a calibration, that cannot be used. Names what is wrong and its layer."""


class CacheFullError(RuntimeError):
    """A KV cache without room for what was to be appended; it is as it was before."""


class CacheFileError(ValueError):
    """A file of a KV cache that cannot be used. Names the file and what is wrong with it."""


class UnsupportedError(NotImplementedError):
    """What no kernel of the chosen target can do."""


def quote(value: object, limit: int = 60) -> str:
    """`value` as the user would recognize it, cut to `limit` characters.

    Nested values are summarized by type, so that quoting stays cheap whatever was passed.
    """
    if isinstance(value, str):
        text = repr(value[: limit + 1])
    elif isinstance(value, int | float | bool | np.generic | None.__class__):
        text = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "an integer of many digits"
    elif isinstance(value, tuple | list) and len(value) <= 4:
        text = ", ".join("..." if isinstance(part, tuple | list | dict) else quote(part, 24) for part in value)
        text = f"[{text}]" if isinstance(value, list) else f"({text})"
    elif isinstance(value, dict) and len(value) <= 4:
        parts = (f"{quote(k, 24)}: {'a dict' if isinstance(v, dict) and v else quote(v, 24)}" for k, v in value.items())
        text = "{" + ", ".join(parts) + "}"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_line(error: Exception) -> str:
    """What an error says, without the stack that torch appends; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(name: object, names: Iterable[str]) -> str:
    """`"; did you mean 'int8'?"`, or nothing where no name is near."""
    if not isinstance(name, str):
        return ""
    match = difflib.get_close_matches(name[:64].lower(), list(names), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
