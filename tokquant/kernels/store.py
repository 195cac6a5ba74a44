"""The cache folder. Nothing that is found in it is ever executed."""

import os
from functools import lru_cache
from pathlib import Path

from tokquant.files import write_atomically


def folder() -> Path:
    """`TOKQUANT_CACHE_DIR`, else `XDG_CACHE_HOME/tokquant`, else `~/.cache/tokquant`."""
    return _named(*map(os.environ.get, ("TOKQUANT_CACHE_DIR", "XDG_CACHE_HOME", "HOME")))


@lru_cache(maxsize=16)
def _named(chosen: str | None, caches: str | None, _: str | None) -> Path:
    # a user of a container may have no home: "~" is then left as it is, and / stands for it
    found = Path(chosen) if chosen else Path(caches or os.path.expanduser("~/.cache").removeprefix("~")) / "tokquant"
    return found.absolute()  # stays where it is if the process goes to another folder


def keep(name: Path, text: str) -> Path:
    """Write a copy of `text` to `name` in the folder and return its path. If the folder cannot be written there is no copy."""
    path = folder() / name
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text.encode())
    except (OSError, ValueError):
        pass
    return path


def writable() -> bool:
    """Whether the folder can be written."""
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder(), os.W_OK)
