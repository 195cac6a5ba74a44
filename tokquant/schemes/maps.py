"""Scheme maps: a scheme for each layer of a model, and their YAML documents."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tokquant.errors import SchemeError, nearest, quote
from tokquant.files import write_atomically
from tokquant.schemes import document
from tokquant.schemes.heads import HeadSchemes, LayerScheme, parts_of
from tokquant.schemes.presets import names as preset_names
from tokquant.schemes.presets import preset
from tokquant.schemes.scheme import QuantScheme, load_document, write_yaml

KEYS = ("name", "layers", "schemes")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class SchemeMap:
    """A scheme for each layer: that of the first pattern that its name matches, with `*`, `?` and `[0-5]` as in a shell.

    Raises SchemeError for a map without layers, and for an invalid pattern, scheme or name.
    """

    layers: tuple[tuple[str, LayerScheme], ...]
    """(pattern, scheme), in order."""
    name: str = "custom"

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,))
        if not self.layers:
            raise SchemeError([("layers", 'is empty; write a pattern and its scheme, such as {"*": int8}')])
        for entry in self.layers:
            pattern, scheme = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, None)
            if not isinstance(pattern, str) or not isinstance(scheme, LayerScheme):
                example = "(pattern, scheme), such as ('layers.*', preset('int8')); from_data takes a mapping with names"
                raise SchemeError([("layers", f"{quote(entry)} is no entry; give {example}")])
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            text = f"{quote(self.name)} is not accepted; use lower-case letters, digits, '.', '_' and '-'"
            raise SchemeError([("name", text)])

    def __getitem__(self, layer: str) -> LayerScheme:
        if not isinstance(layer, str):
            raise SchemeError(f"layer: {quote(layer)} is no name of a layer")
        for pattern, scheme in self.layers:
            if fnmatchcase(layer, pattern):
                return scheme
        patterns = [pattern for pattern, _ in self.layers]
        raise SchemeError(
            f"scheme map {self.name!r}: no pattern matches layer {quote(layer)}; it has {', '.join(patterns[:8])}"
            f'{nearest(layer, patterns)}; end it with "*" for all others'
        )

    def only(self) -> LayerScheme | None:
        """The scheme of every layer, if all have the same; else None."""
        first = self.layers[0][1]
        return first if all(scheme == first for _, scheme in self.layers) else None

    def schemes(self) -> list[QuantScheme]:
        """Every distinct scheme of the map."""
        found = (part for _, scheme in self.layers for _, part in parts_of(scheme))
        return list({(scheme.name, scheme.digest()): scheme for scheme in found}.values())

    def __str__(self) -> str:
        return ", ".join(f"{pattern}: {scheme.name}" for pattern, scheme in self.layers)

    # ------------------------------------------------------------------ documents

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "SchemeMap":
        """A map from the mapping that its YAML document holds. Raises SchemeError."""
        if not isinstance(data, Mapping):
            raise SchemeError(f"a scheme map is a mapping with layers, not {quote(data)}")
        found = []
        if unknown := [key for key in data if key not in KEYS]:
            found.append((str(unknown[0]), f"unknown key; a scheme map has {', '.join(KEYS)}{nearest(unknown[0], KEYS)}"))
        given, layers, name = data.get("schemes", {}), data.get("layers", {}), data.get("name", "custom")
        if not isinstance(layers, dict) or not isinstance(given, dict):
            wrong, value = ("layers", layers) if not isinstance(layers, dict) else ("schemes", given)
            found.append((wrong, f"{quote(value)} is not accepted; write a mapping such as " + '{"layers.*": int8}'))
        if found:
            raise SchemeError(found)
        own = {key: _inline(value, f"schemes.{key}", {"name": key}) for key, value in given.items()}
        entries = tuple((pattern, _entry(value, f"layers.{pattern}", own)) for pattern, value in layers.items())
        return cls(entries, name)

    @classmethod
    def from_yaml(cls, text: str | bytes) -> "SchemeMap":
        """A map from a YAML document. Raises SchemeError."""
        return cls.from_data(document.read(text))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SchemeMap":
        """A map from a YAML file, with its name where it has none. Raises SchemeError, also where it cannot be read."""
        return load_document(path, cls.from_data)

    def to_data(self) -> dict[str, Any]:
        """What `from_data` reads back to an equal map: schemes that are not presets are written out under `schemes`."""
        names = _distinct_names(self.schemes())

        def entry(scheme: LayerScheme) -> Any:
            if isinstance(scheme, QuantScheme):
                return names[scheme.name, scheme.digest()]
            return {"heads": {_range(each): names[part.name, part.digest()] for each, part in scheme.slices()}}

        own = {}
        for scheme in self.schemes():
            if not _is_preset(scheme):
                name = names[scheme.name, scheme.digest()]
                given = {} if name == scheme.name else {"name": scheme.name}
                own[name] = given | scheme.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
        data: dict[str, Any] = {"name": self.name} | ({"schemes": own} if own else {})
        return data | {"layers": {pattern: entry(scheme) for pattern, scheme in self.layers}}

    def to_yaml(self) -> str:
        """The map as a YAML document that `from_yaml` reads back to an equal one."""
        return write_yaml(self.to_data())

    def dump(self, path: str | os.PathLike) -> None:
        """Write the map as YAML, atomically."""
        write_atomically(path, self.to_yaml().encode())

    def digest(self) -> str:
        """A hash of what the map does, twelve hexadecimal digits; names do not enter."""
        data = [[pattern, [[n, part.digest()] for n, part in parts_of(scheme)]] for pattern, scheme in self.layers]
        return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]


def _entry(value: object, place: str, own: Mapping[str, QuantScheme]) -> LayerScheme:
    """The scheme of a layer as a document has it; `own` are the schemes under the document's `schemes`."""
    if not isinstance(value, dict) or "heads" not in value:
        return _inline(value, place, own=own)
    ranges = value["heads"]
    if len(value) > 1 or not isinstance(ranges, dict) or not ranges:
        raise SchemeError([(place, f'{quote(value)} is not accepted; write {{heads: {{"0-5": int8, "6-11": int4}}}}')])
    parts, at = [], 0
    for key, inner in ranges.items():
        first, last = _ends(key, f"{place}.heads")
        if first != at or last < first:
            raise SchemeError(
                [(f"{place}.heads", f"{quote(key)} does not begin with head {at}; write ranges in order, without gaps")]
            )
        parts.append((last - first + 1, _inline(inner, f"{place}.heads.{key}", own=own)))
        at = last + 1
    return HeadSchemes(tuple(parts))


def _inline(
    value: object, place: str, defaults: Mapping[str, Any] | None = None, own: Mapping[str, QuantScheme] | None = None
) -> QuantScheme:
    """One scheme as a document has it: a name, or written out."""
    own = own or {}
    try:
        if isinstance(value, str):
            if value in own:
                return own[value]
            if value not in preset_names():
                known = [*own, *preset_names()]
                raise SchemeError(f"no scheme {quote(value)} under schemes, and no preset of that name{nearest(value, known)}")
            return preset(value)
        if isinstance(value, dict):
            return QuantScheme.from_data({**(defaults or {}), **value})
        raise SchemeError(f"{quote(value)} is no scheme; write a preset's name, or a mapping with q, k, v and p")
    except SchemeError as error:
        raise SchemeError([(f"{place}.{inner}" if inner else place, text) for inner, text in error.problems]) from None


def _ends(key: object, place: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(key))
    if not found:
        raise SchemeError([(place, f'{quote(key)} is no range of heads; write "0-5", or "6" for one')])
    return int(found[1]), int(found[2] or found[1])


def _range(heads: slice) -> str:
    return str(heads.start) if heads.stop - heads.start == 1 else f"{heads.start}-{heads.stop - 1}"


def _is_preset(scheme: QuantScheme) -> bool:
    return scheme.name in preset_names() and preset(scheme.name) == scheme


def _distinct_names(schemes: list[QuantScheme]) -> dict[tuple[str, str], str]:
    """A unique name for each scheme: its own, followed by its digest where another scheme or a preset has that name."""
    taken: set[str] = set()
    names = {}
    for scheme in sorted(schemes, key=lambda scheme: not _is_preset(scheme)):
        clash = scheme.name in taken or (scheme.name in preset_names() and not _is_preset(scheme))
        name = f"{scheme.name[:51]}-{scheme.digest()}" if clash else scheme.name
        taken.add(name)
        names[scheme.name, scheme.digest()] = name
    return names
