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
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock

import torch

from tokquant.errors import UnsupportedError, quote
from tokquant.files import write_atomically
from tokquant.kernels import store
from tokquant.kernels.cpu.instructions import INSTRUCTIONS, chosen, of_macros

COMPILERS = ("g++", "clang++")
# no -ffast-math: NaN, infinities and the order of sums are part of the result
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared")
OPENMP = ("-fopenmp",)
THREADED = """
extern "C" int threads() {
    int found = 0;
#pragma omp parallel reduction(+ : found)
    found += 1;
    return found;
}
"""
"""What needs OpenMP's runtime."""
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

    @cached_property
    def threads(self) -> tuple[str, ...]:
        """The first flags for OpenMP with which it builds what can be loaded; none where kernels must run on one thread."""
        # torch's own runtime is in the process already; Apple's compiler comes without one
        beside_torch = Path(torch.__file__).parent / "lib"
        of_torch = ("-Xpreprocessor", *OPENMP, f"-L{beside_torch}", "-lomp", f"-Wl,-rpath,{beside_torch}")
        for flags in (OPENMP, of_torch):
            with tempfile.TemporaryDirectory(prefix="tokquant-") as private:
                source, library = Path(private) / "threads.cpp", Path(private) / "threads.so"
                source.write_text(THREADED, encoding="utf-8")
                if _run([*self.command, *flags, "-fPIC", "-shared", str(source), "-o", str(library)]) is None:
                    continue
                with suppress(OSError):
                    ctypes.CDLL(str(library))
                    return flags
        return ()


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
    here = compiler()
    found = here.instructions
    wanted = os.environ.get(CHOICE)
    if not wanted:
        return found[0]
    if chosen(wanted, CHOICE) not in found:
        raise UnsupportedError(
            f"{CHOICE}: {' '.join(here.command)} has no {wanted} for this processor; use one of {', '.join(found)}"
        )
    return wanted


def libraries() -> Path:
    """The folder that they are kept in."""
    return store.folder() / "cpu"


def load(name: str, text: str, instructions: str, more: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of a kernel's text, built for an instruction set, or found built.

    It is found only in a folder that this user owns with mode 0700, in a file that is this user's alone, under a name that
    hashes text, compiler and flags, and with its own hash at its end. Otherwise it is built, and kept there if possible.

    Raises UnsupportedError where there is no compiler, with the first lines of what it says where it fails, and where no folder
    is one that libraries can be loaded from.
    """
    built_by = compiler()

    def of(threads: tuple[str, ...]) -> tuple[tuple[str, ...], Path]:
        flags = (*FLAGS, *threads, *INSTRUCTIONS[instructions].flags, *more)
        identity = "\0".join((text, *built_by.command, built_by.version, *flags))
        return flags, libraries() / f"{name}_{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"

    _, usual = of(OPENMP)
    with BUILDING[usual.name]:
        if (found := _kept(usual)) is not None:
            return found  # before a compiler is asked for OpenMP, which takes as long as to build something small
        flags, path = of(built_by.threads)
        store.keep(Path("kernels") / f"{path.stem}.cpp", text)
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
            f"(g++ from 9, clang++ from 14), or use backend='reference'. It says:\n{said}"
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
        said = _run([*command, "--version"])
        if said is None:
            continue
        version = said.splitlines()[0] if said else "unknown"
        return Compiler(tuple(command), version, of_macros(_macros(command)))
    sought = f"CXX={quote(wanted)}" if wanted.strip() else " and ".join(COMPILERS)
    raise UnsupportedError(
        f"backend: 'cpu' needs a C++ compiler, and {sought} cannot be run; install one (apt install g++), set CXX, or use "
        "backend='reference'"
    )


def _macros(command: list[str]) -> set[str]:
    """What a compiler defines for this processor: what both can do."""
    for native in ("-march=native", "-mcpu=native"):  # clang for Arm takes the latter
        said = _run([*command, native, "-dM", "-E", "-x", "c++", os.devnull])
        if said is not None:
            return {line.split()[1] for line in said.splitlines() if line.startswith("#define ")}
    return set()


def _run(command: list[str]) -> str | None:
    """What a command prints; None where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True, errors="replace").stdout
    except (OSError, subprocess.SubprocessError):
        return None
