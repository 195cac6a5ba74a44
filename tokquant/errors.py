"""The error types of tokquant, and helpers for messages, which name the argument and say what would work."""

import difflib
from collections.abc import Iterable

import numpy as np


class SchemeError(ValueError):
    """A scheme that cannot be read, or that contradicts itself or the tensors it is used with.

    `problems` holds one `(place, text)` pair for each thing that is wrong, the place as a dotted path.
    """

    def __init__(self, problems: str | list[tuple[str, str]]):
        self.problems = [("", problems)] if isinstance(problems, str) else problems
        super().__init__("\n".join(f"{place}: {text}" if place else text for place, text in self.problems))


class ScalesError(ValueError):
    """Calibrated scales that cannot be used, or a file of scales or of a calibration. Names the layer and what is wrong."""


class CacheFullError(RuntimeError):
    """A KV cache has no room for an append. It is as it was before."""


class CacheFileError(ValueError):
    """A KV cache's file that cannot be used. Names the file and what is wrong with it."""


class UnsupportedError(NotImplementedError):
    """Something that the chosen backend cannot do."""


def quote(value: object, limit: int = 60) -> str:
    """`value` as the user would recognize it, cut to `limit` characters.

    Nested values are summarized by type, so that quoting any value is cheap.
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
    """The first line of an error's message, without the stack that torch appends; its type where the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def nearest(name: object, names: Iterable[str]) -> str:
    """`"; did you mean 'int8'?"` with the most similar of `names`, or an empty string if none is similar."""
    if not isinstance(name, str):
        return ""
    match = difflib.get_close_matches(name[:64].lower(), list(names), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
