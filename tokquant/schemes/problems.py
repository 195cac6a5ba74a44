"""Turns pydantic's errors into sentences: where the problem is, what was written, and what would be accepted."""

from typing import Any

from pydantic import BaseModel, ValidationError

from tokquant.errors import SchemeError, nearest, quote


def explain(model: type[BaseModel], error: ValidationError) -> list[tuple[str, str]]:
    """Each of pydantic's errors as (place, sentence that quotes what was written)."""
    problems = []
    for finding in error.errors(include_url=False):
        place = ".".join(printable(part) for part in finding["loc"])
        cause = (finding.get("ctx") or {}).get("error")
        written = quote(finding.get("input"))
        if isinstance(cause, SchemeError):
            problems += [(".".join(filter(None, (place, inner))), text) for inner, text in cause.problems]
        elif finding["type"] == "extra_forbidden":
            known = _fields(model, finding["loc"][:-1])
            problems.append((place, f"unknown key; use {', '.join(known)}{nearest(finding['loc'][-1], known)}"))
        elif finding["type"] == "missing":
            problems.append((place, "is missing"))
        elif finding["type"] == "literal_error":
            accepted = (finding.get("ctx") or {})["expected"]
            problems.append(
                (
                    place,
                    f"{written} is not accepted; use {accepted}{nearest(finding.get('input'), accepted.split(chr(39))[1::2])}",
                )
            )
        elif finding["type"] == "model_type":
            problems.append((place, f"{written} is not accepted; write a mapping such as {{precision: int8}}"))
        else:
            problems.append((place, f"{written} is not accepted; {finding['msg'][0].lower()}{finding['msg'][1:]}"))
    return problems


def printable(part: object) -> str:
    """A part of a place as it can be shown: quoted where it has control characters."""
    text = str(part)[:40]
    return text if text.isprintable() else repr(text)


def _fields(model: Any, place: tuple) -> list[str]:
    for part in place:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
