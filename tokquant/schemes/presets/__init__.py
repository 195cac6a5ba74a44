"""Presets: one YAML file each in this folder, named after the scheme. A new file is a new preset."""

import os
from functools import lru_cache
from importlib import resources

from tokquant.errors import SchemeError, nearest, quote
from tokquant.schemes.scheme import QuantScheme


@lru_cache
def names() -> tuple[str, ...]:
    """Every preset, from exact to few bits."""
    files = [file.name.removesuffix(".yaml") for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml")]
    return tuple(sorted(files, key=lambda name: (-sum(preset(name).bits_per_value().values()), name)))


@lru_cache
def preset(name: str) -> QuantScheme:
    """The preset of that name. Raises SchemeError with the nearest name if there is none."""
    file = resources.files(__name__) / f"{name}.yaml" if isinstance(name, str) and name.isascii() and "/" not in name else None
    if file is None or not file.is_file():
        known = sorted(f.name.removesuffix(".yaml") for f in resources.files(__name__).iterdir() if f.name.endswith(".yaml"))
        raise SchemeError(f"no preset {quote(name)}; use one of {', '.join(known)}{nearest(name, known)}")
    return QuantScheme.from_yaml(file.read_text(encoding="utf-8"))


def source(name: str) -> str:
    """The YAML text of a preset, comments included."""
    preset(name)
    return (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


def resolve(scheme: object) -> QuantScheme:
    """A scheme from what users write: a QuantScheme, a preset's name, or the path of a YAML file. Raises SchemeError."""
    if isinstance(scheme, QuantScheme):
        return scheme
    if isinstance(scheme, os.PathLike):
        return QuantScheme.load(scheme)
    if isinstance(scheme, str):
        return QuantScheme.load(scheme) if scheme.endswith((".yaml", ".yml")) else preset(scheme)
    raise SchemeError(f"scheme: {quote(scheme)} is no scheme; give a QuantScheme, a preset's name or the path of a YAML file")
