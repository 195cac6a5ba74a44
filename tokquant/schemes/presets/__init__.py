"""Presets: one YAML file each in this folder, named after the scheme. A new file is a new preset."""

from functools import lru_cache
from importlib import resources

from tokquant.errors import SchemeError, nearest, quote
from tokquant.schemes.scheme import QuantScheme


@lru_cache
def names() -> tuple[str, ...]:
    """Every preset, from exact to few bits."""
    return tuple(sorted(_files(), key=lambda name: (-sum(preset(name).bits_per_value().values()), name)))


def preset(name: str) -> QuantScheme:
    """The preset of that name. Raises SchemeError with the nearest name if there is none."""
    if name not in _files():
        raise SchemeError(f"no preset {quote(name)}; use one of {', '.join(_files())}{nearest(name, _files())}")
    return _read(name)


def source(name: str) -> str:
    """The YAML text of a preset, comments included. Raises as `preset`."""
    if name not in _files():
        preset(name)
    return (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


@lru_cache
def _files() -> tuple[str, ...]:
    found = [file.name for file in resources.files(__name__).iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")))


@lru_cache
def _read(name: str) -> QuantScheme:
    return QuantScheme.from_yaml(source(name))
