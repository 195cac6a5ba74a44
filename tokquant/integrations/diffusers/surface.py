"""All uses of non-public parts of diffusers.

diffusers has no API to add an attention backend: its own are members of an enumeration, with functions in a registry. This
module adds to both, after a check that they have the form of the versions that were tried.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from itertools import count
from typing import Any
from weakref import finalize

from tokquant.errors import UnsupportedError, nearest, quote

TRIED = "0.35 to 0.42"
NEEDED: dict[str, tuple[str, ...]] = {
    "dispatch_attention_fn": (),
    "AttentionBackendName": ("NATIVE", "_member_map_", "_member_names_", "_value2member_map_"),
    "_AttentionBackendRegistry": ("register", "_active_backend", "_backends", "_constraints", "_supported_arg_names"),
}
"""The names that are used from diffusers.models.attention_dispatch, and their attributes."""

_added: set[str] = set()
_numbers = count(1)


def add(name: str, function: Callable) -> None:
    """Add a backend under a public name, or replace the function of one that was added.

    Raises ValueError for the name of one of diffusers' own backends, ImportError, UnsupportedError.
    """
    names, registry = _surface(name)
    if name not in _added and name in names._value2member_map_:
        raise ValueError(f"name: {name!r} is a backend of diffusers' own; choose another")
    member = names._value2member_map_.get(name) or _member(names, name)
    _fill(names, registry, member, function)
    if name not in _added:
        names._member_map_[member.name] = names._value2member_map_[name] = member
        names._member_names_.append(member.name)
        _added.add(name)
        if _asked() == name:
            registry._active_backend = member


def remove(name: str) -> None:
    """Remove an added backend. Models that still use it raise an error when they run. Raises ValueError for one not added."""
    if name not in _added:
        raise ValueError(f"name: no backend {quote(name)} was registered{nearest(name, _added)}")
    names, registry = _surface()
    member = names._value2member_map_.pop(name)
    del names._member_map_[member.name]
    names._member_names_.remove(member.name)
    _added.remove(name)
    if registry._active_backend == member:
        registry._active_backend = names.NATIVE

    def gone() -> None:
        raise ValueError(f"attention backend {name!r} was unregistered; set another: model.set_attention_backend('native')")

    registry.register(member)(gone)


def unlisted(function: Callable) -> Any:
    """A backend without a public name, for the processors that it is given to. It is removed when the last of them is gone.

    Raises ImportError, UnsupportedError.
    """
    names, registry = _surface()
    # two equal members: a registry key that is the given object itself would keep that alive
    kept, given = (_member(names, value) for value in [f"tokquant #{next(_numbers)}"] * 2)
    _fill(names, registry, kept, function)
    finalize(given, _forget, registry, kept)
    return given


def _forget(registry: Any, member: Any) -> None:
    for entries in (registry._backends, registry._constraints, registry._supported_arg_names):
        del entries[member]


def _member(names: Any, value: str) -> Any:
    """The member that `VALUE = value` in the enumeration's class body would have created."""
    member = str.__new__(names, value)
    member._name_, member._value_, member._sort_order_ = value.upper(), value, len(names._member_names_)
    return member


def _fill(names: Any, registry: Any, member: Any, function: Callable) -> None:
    """Register a backend's function. Raises UnsupportedError if it lacks an argument of diffusers, which would be dropped."""
    if new := registry._supported_arg_names[names.NATIVE] - set(inspect.signature(function).parameters):
        raise _changed(f"its backends take {', '.join(sorted(new))}, which tokquant does not know")
    registry.register(member)(function)


def _surface(adding: str | None = None) -> tuple[Any, Any]:
    """The enumeration and the registry. Raises ImportError without diffusers, UnsupportedError for an unsupported version."""
    try:
        constants: Any = import_module("diffusers.utils.constants")
        asked = _asked()
        if asked == adding:
            # the first import looks up the backend of this name, which is not added yet: let it find a known one
            constants.DIFFUSERS_ATTN_BACKEND = "native"
        try:
            dispatch = import_module("diffusers.models.attention_dispatch")
        finally:
            constants.DIFFUSERS_ATTN_BACKEND = asked
    except ModuleNotFoundError as error:
        if error.name == "diffusers":
            raise ImportError("diffusers is not installed: pip install 'tokquant[diffusers]'") from None
        if not (error.name or "").startswith("diffusers."):
            raise
        raise _changed(f"there is no {error.name}") from None
    paths = [path for part, inner in NEEDED.items() for path in (part, *(f"{part}.{name}" for name in inner))]
    if lacking := [path for path in paths if not _has(dispatch, path)]:
        raise _changed(f"attention_dispatch has no {', '.join(lacking)}")
    return dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry


def _asked() -> str:
    """The backend that the environment variable DIFFUSERS_ATTN_BACKEND names."""
    return getattr(import_module("diffusers.utils.constants"), "DIFFUSERS_ATTN_BACKEND", "native")


def _has(owner: object, path: str) -> bool:
    part, _, rest = path.partition(".")
    return hasattr(owner, part) and (not rest or _has(getattr(owner, part), rest))


def _changed(what: str) -> UnsupportedError:
    version = getattr(import_module("diffusers"), "__version__", "of an unknown version")
    return UnsupportedError(f"diffusers {version}: {what}; this works with diffusers {TRIED}: install one of them")
