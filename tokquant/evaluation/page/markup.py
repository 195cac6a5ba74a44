"""HTML from Python: text is escaped unless it is markup already."""

import re
from html import escape


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


EMPTY = ("meta", "link")
"""Elements without an end."""


def tag(name: str, /, *content: str, **attributes: object) -> Markup:
    """An element. A trailing underscore of an attribute is dropped, others become dashes; one that is None is left out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(_printable(str(value)))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in EMPTY else f"{start}{join(*content)}</{name}>")


def join(*content: str) -> Markup:
    """One after another."""
    return Markup("".join(each if isinstance(each, Markup) else escape(_printable(each), quote=False) for each in content))


def _printable(text: str) -> str:
    # what HTML cannot hold, even escaped, and what turns the direction of the text that follows
    return re.sub(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text
    )
