"""Writes a file atomically: a reader sees either the old bytes or all of the new ones."""

import contextlib
import errno
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes, mode: int = 0o666) -> None:
    """Write `data` beside `path`, flush it to disk, then rename it into place. The umask takes its part of `mode`.

    Links are followed, and devices and pipes are written to: a new name would replace them. Raises OSError as the file system
    does, naming `path`; an existing file is then unchanged.
    """
    given = Path(path)
    if given.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(given))
    path = Path(os.path.realpath(given))
    temporary = path.parent / f".{path.name[:64]}.{secrets.token_hex(8)}"
    try:
        if given.exists() and not given.is_file():
            given.write_bytes(data)
            return
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, str(given)) from None
        raise
