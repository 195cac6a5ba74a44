"""Find a C++ compiler, build a kernel with it, and load it from nowhere that others can write to."""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

from tokquant.errors import UnsupportedError, nearest, quote
from tokquant.files import write_atomically
from tokquant.kernels import store

COMPILERS = ("g++", "clang++")
# no -ffast-math: NaN, infinities and the order of sums are part of the result
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
INSTRUCTIONS = {
    "avx512_vnni": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
"""The fastest first, each a file of its products and the flags it is built with. No -march=native: a cache folder may be
shared by machines."""
NEEDED = {
    "avx512_vnni": ("__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__", "__AVX512VNNI__"),
    "avx2": ("__AVX2__", "__FMA__", "__F16C__"),
}
CHOICE = "TOKQUANT_CPU_INSTRUCTIONS"
"""The environment variable that forces a set."""
SECONDS = 300
"""After which a compiler is given up."""
BUILDING: defaultdict[str, Lock] = defaultdict(Lock)
"""Held while a library is looked for and built, by its name: other threads wait and find it, instead of building it too."""
if hasattr(os, "register_at_fork"):  # not on Windows, which forks nothing
    os.register_at_fork(after_in_child=BUILDING.clear)  # who held one is not in the child


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler."""

    command: tuple[str, ...]
    version: str
    """The first line of what it says about itself."""
    instructions: tuple[str, ...]
    """What it builds for this processor, the fastest first."""


def compiler() -> Compiler:
    """The compiler that `CXX` names, else g++ or clang++ on the path. Raises UnsupportedError where there is none."""
    return _compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


def available() -> bool:
    """Whether there is a compiler."""
    try:
        compiler()
    except UnsupportedError:
        return False
    return True


def instructions() -> str:
    """The fastest set that compiler and processor have, or the one that `TOKQUANT_CPU_INSTRUCTIONS` names.

    Raises UnsupportedError for one that they lack, ValueError for one that is none.
    """
    found = compiler().instructions
    chosen = os.environ.get(CHOICE)
    if not chosen:
        return found[0]
    if chosen not in INSTRUCTIONS:
        raise ValueError(
            f"{CHOICE}: {quote(chosen)} is none; use one of {', '.join(INSTRUCTIONS)}{nearest(chosen, INSTRUCTIONS)}"
        )
    if chosen not in found:
        raise UnsupportedError(f"{CHOICE}: this processor has no {chosen}; use one of {', '.join(found)}")
    return chosen


def libraries() -> Path:
    """The folder that they are kept in."""
    return store.folder() / "cpu"


def load(name: str, text: str, chosen: str, more: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of a kernel's text, built for an instruction set, or found built.

    It is found only in a folder that this user owns with mode 0700, in a file that is this user's alone, under a name that
    hashes text, compiler and flags, and with its own hash at its end. Otherwise it is built, and kept there if possible.

    Raises UnsupportedError where there is no compiler, with the first lines of what it says where it fails, and where no folder
    is one that libraries can be loaded from.
    """
    built_by = compiler()
    flags = (*FLAGS, *INSTRUCTIONS[chosen], *more)
    identity = "\0".join((text, *built_by.command, built_by.version, *flags))
    file_name = f"{name}_{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    store.keep(Path("kernels") / f"{file_name}.cpp", text)
    path = libraries() / f"{file_name}.so"
    with BUILDING[file_name]:
        return _kept(path) or _built(built_by, text, flags, path)


def _built(built_by: Compiler, text: str, flags: tuple[str, ...], path: Path) -> ctypes.CDLL:
    """A new library, which is kept at `path` if possible."""
    with tempfile.TemporaryDirectory(prefix="tokquant-") as private:
        library = Path(private) / path.name
        _compile(built_by, text, flags, library)
        if _own_folder(path.parent):
            data = library.read_bytes()
            with suppress(OSError):
                write_atomically(path, data + hashlib.sha256(data).digest())
        try:
            return ctypes.CDLL(str(library))  # which stays mapped after the folder is gone
        except OSError as error:
            if (found := _kept(path)) is not None:
                return found
            raise UnsupportedError(
                f"backend: a kernel was built and cannot be loaded: {error}; set TOKQUANT_CACHE_DIR or TMPDIR to a folder of "
                "yours on a file system that programs may be run from, or use backend='reference'"
            ) from None


def _kept(path: Path) -> ctypes.CDLL | None:
    """The library that was kept there, where nobody else can have written it."""
    if not (_own_folder(path.parent) and _own_file(path)):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # a bad entry is a miss
        return None


def _compile(built_by: Compiler, text: str, flags: tuple[str, ...], library: Path) -> None:
    source = library.with_suffix(".cpp")
    source.write_text(text, encoding="utf-8")
    command = [*built_by.command, *flags, str(source), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"backend: {built_by.command[0]} cannot be run: {error}; use backend='reference'") from None
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).replace(str(source), source.name).splitlines()[:8])
        raise UnsupportedError(
            f"backend: {' '.join(built_by.command)} ({built_by.version}) fails on {source.name}; set CXX to another compiler "
            f"(g++ from 9, clang++ with OpenMP), or use backend='reference'. It says:\n{said}"
        )


def _own_folder(folder: Path) -> bool:
    """Whether libraries may be kept in and loaded from it; it is made where there is none."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700


def _own_file(path: Path) -> bool:
    """Whether it is a file of this user, that no other can write, whole."""
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return False
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


@lru_cache(maxsize=16)
def _compiler(wanted: str, path: str) -> Compiler:
    try:
        commands = [shlex.split(wanted)] if wanted.strip() else [[name] for name in COMPILERS]
    except ValueError:  # a quotation that does not end
        commands = []
    for command in commands:
        if shutil.which(command[0], path=path) is None:
            continue
        try:
            said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        found = _macros(command)
        sets = [name for name in INSTRUCTIONS if all(macro in found for macro in NEEDED.get(name, ()))]
        return Compiler(tuple(command), said.stdout.splitlines()[0] if said.stdout else "unknown", tuple(sets))
    sought = f"CXX={quote(wanted)}" if wanted.strip() else " and ".join(COMPILERS)
    raise UnsupportedError(
        f"backend: 'cpu' needs a C++ compiler, and {sought} cannot be run; install one (apt install g++), set CXX, or use "
        "backend='reference'"
    )


def _macros(command: list[str]) -> set[str]:
    """What a compiler defines for this processor: what both can do."""
    try:
        said = subprocess.run(
            [*command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True, text=True, timeout=SECONDS, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return set()
    return {line.split()[1] for line in said.stdout.splitlines() if line.startswith("#define ")}
