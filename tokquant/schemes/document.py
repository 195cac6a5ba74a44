"""A restricted YAML reader for untrusted documents.

Only mappings, lists and plain scalars of YAML 1.2: no aliases, tags, merge or duplicate keys, and bounded in size and depth,
so that a document means what it looks like and costs what its length suggests.
"""

import re
from typing import Any, NoReturn

import yaml

from tokquant.errors import SchemeError, quote

LARGEST = 64 * 1024
DEEPEST = 16
MOST_NODES = 2000


def read(text: str | bytes) -> Any:
    """The document as dicts, lists, str, int, float, bool and None. Raises SchemeError with the line."""
    if not isinstance(text, str | bytes):
        raise SchemeError(f"a document is text, not {quote(text)}")
    if len(text) > LARGEST:
        raise SchemeError(f"the document has more than {LARGEST} bytes; a scheme needs a few hundred")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SchemeError(f"the document is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        return _Reader(text).document()
    except SchemeError:
        raise
    except (ValueError, OverflowError) as error:
        # the scanner raises these for escapes and versions beyond Python's characters and numbers
        raise SchemeError(f"not YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise SchemeError(f"{f'line {mark.line + 1}: ' if mark else ''}not YAML: {problem}") from None


class _Reader:
    def __init__(self, text: str):
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.nodes = 0

    def document(self) -> object:
        next(self.events)  # the stream's start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            raise SchemeError("the document is empty")
        value = self.node(next(self.events), 0)
        next(self.events)
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            self.refuse(event, "a second document; a file holds one scheme")
        return value

    def refuse(self, event: Any, text: str) -> NoReturn:
        assert event.start_mark is not None
        raise SchemeError(f"line {event.start_mark.line + 1}: {text}")

    def node(self, event: Any, depth: int) -> object:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            self.refuse(event, f"more than {MOST_NODES} values")
        if depth > DEEPEST:
            self.refuse(event, f"nested more than {DEEPEST} deep")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self.refuse(event, "an anchor or alias (& or *); write the value out")
        if event.tag is not None:
            self.refuse(event, f"the tag {quote(event.tag)}; write plain values")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value) if event.style is None else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(item, depth + 1))
            return items
        mapping: dict[str, object] = {}
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            name = self.node(key, depth + 1)
            if not isinstance(name, str) or name == "<<":
                quoted = f', so quote it: "{name}"' if type(name) is int else ""
                self.refuse(key, f"the key {quote(name)}; keys are plain words{quoted}")
            if name in mapping:
                self.refuse(key, f"the key {quote(name)} twice")
            mapping[name] = self.node(next(self.events), depth + 1)
        return mapping


def _scalar(text: str) -> object:
    """A plain scalar by YAML 1.2's core schema, without octal and hexadecimal: `on` and `010` stay text."""
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,18})", text):
        return int(text)
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?|[-+]?\.inf|\.nan", text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text
