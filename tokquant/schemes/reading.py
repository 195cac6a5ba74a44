"""Resolves a `scheme` argument (an object, a preset's name or a path) to a scheme, a map, or the scheme of a layer."""

import os
from collections.abc import Mapping
from typing import Any

from tokquant.errors import SchemeError, quote
from tokquant.schemes.heads import HeadSchemes, LayerScheme
from tokquant.schemes.maps import SchemeMap
from tokquant.schemes.presets import preset
from tokquant.schemes.scheme import QuantScheme, load_document


def read(scheme: object) -> QuantScheme | SchemeMap:
    """The scheme or map that a `scheme` argument means: one of these itself, a preset's name, or the path of a YAML file.

    Raises SchemeError.
    """
    if isinstance(scheme, QuantScheme | SchemeMap):
        return scheme
    if isinstance(scheme, os.PathLike):
        return load(scheme)
    if isinstance(scheme, str):
        is_path = scheme.endswith((".yaml", ".yml")) or "/" in scheme or os.sep in scheme
        return load(scheme) if is_path else preset(scheme)
    raise SchemeError(f"scheme: {quote(scheme)} is no scheme; give a QuantScheme, a SchemeMap, a preset's name or a YAML file")


def load(path: str | os.PathLike) -> QuantScheme | SchemeMap:
    """The scheme or the scheme map of a YAML file. Raises SchemeError, also where the file cannot be read."""
    return load_document(path, of_data)


def of_data(data: Any) -> QuantScheme | SchemeMap:
    """The scheme of a document or of `to_data`, or the map if it has `layers` or `schemes`. Raises SchemeError."""
    is_map = isinstance(data, Mapping) and not {"layers", "schemes"}.isdisjoint(data)
    return SchemeMap.from_data(data) if is_map else QuantScheme.from_data(data)


def of_layer(scheme: object, layer: str | None = None) -> LayerScheme:
    """The scheme that a `scheme` argument means for one layer. Raises SchemeError, also for a map of several schemes without
    `layer`."""
    if isinstance(scheme, HeadSchemes):
        return scheme
    found = read(scheme)
    if isinstance(found, QuantScheme):
        return found
    if layer is not None:
        return found[layer]
    if (only := found.only()) is not None:
        return only
    example = found.layers[0][0]
    text = f"say which one this is, as layer={example!r} (--layer on the command line)"
    raise SchemeError(f"scheme: {found.name!r} is a map of layers; {text}")


def resolve(scheme: object, layer: str | None = None) -> QuantScheme:
    """As `of_layer`, where all heads must have one scheme. Raises SchemeError."""
    found = of_layer(scheme, layer)
    if isinstance(found, HeadSchemes):
        names = ", ".join(part.name for _, part in found.parts)
        raise SchemeError(f"scheme: its heads take different schemes ({names}) here, where one is needed; give one of them")
    return found
