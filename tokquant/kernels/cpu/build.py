"""Finds a C++ compiler, builds kernels with it, and loads them only from folders that no other user can write to."""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
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
from tokquant.kernels.cpu.instructions import INSTRUCTIONS, check_name, of_macros

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
"""A program that needs OpenMP's runtime, to find the flags with which one can be built and loaded."""
CHOICE = "TOKQUANT_CPU_INSTRUCTIONS"
"""The environment variable that chooses an instruction set."""
TIMEOUT = 300
"""Seconds after which a compiler is stopped."""
BUILDING: defaultdict[str, Lock] = defaultdict(Lock)
"""A lock per library, by name, held while it is looked up and built, so that other threads wait instead of building it too."""
if hasattr(os, "register_at_fork"):  # not on Windows, which forks nothing
    os.register_at_fork(after_in_child=BUILDING.clear)  # the thread that held a lock does not exist in the child


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler."""

    command: tuple[str, ...]
    version: str
    """The first line that it prints for `--version`."""
    instructions: tuple[str, ...]
    """The sets that it can build for this processor, the fastest first."""

    @cached_property
    def threads(self) -> tuple[str, ...]:
        """OpenMP flags with which a library can be built and loaded; empty if there are none, so kernels run on one thread."""
        # Apple's compiler comes without a runtime; torch has its own, which this process has loaded already
        folder = Path(torch.__file__).parent / "lib"
        with_torch = ("-Xpreprocessor", *OPENMP, f"-L{folder}", "-lomp", f"-Wl,-rpath,{folder}")
        for flags in (OPENMP, with_torch):
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
    """The compiler that `CXX` names, else g++ or clang++ on the path. Raises UnsupportedError if none can be run."""
    return _compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


def available() -> bool:
    """Whether there is a compiler."""
    try:
        compiler()
    except UnsupportedError:
        return False
    return True


def instructions() -> str:
    """The fastest set that compiler and processor support, or the one that `TOKQUANT_CPU_INSTRUCTIONS` names.

    Raises UnsupportedError for one that they do not support, ValueError for an unknown name.
    """
    found = compiler()
    supported = found.instructions
    wanted = os.environ.get(CHOICE)
    if not wanted:
        if supported == ("portable",):
            # once: Python shows a warning of one place a single time
            warnings.warn(
                f"kernels use no vector instructions and are many times slower: {' '.join(found.command)} reports none for "
                f"this processor that tokquant knows; set CXX to another compiler, or {CHOICE}=portable to accept it",
                stacklevel=1,
            )
        return supported[0]
    if check_name(wanted, CHOICE) not in supported:
        raise UnsupportedError(
            f"{CHOICE}: {' '.join(found.command)} has no {wanted} for this processor; use one of {', '.join(supported)}"
        )
    return wanted


def libraries() -> Path:
    """The folder that built libraries are kept in."""
    return store.folder() / "cpu"


def keeps() -> bool:
    """Whether the folder of libraries is one that they are loaded from; else every process builds them anew."""
    return _is_trusted_folder(libraries())


def load(name: str, text: str, instructions: str, more: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Load the library of a kernel's text for an instruction set, and build it first unless it was kept.

    A kept library is loaded only from a folder that this user owns with mode 0700, and only from this user's own file, which
    nobody else can write and which ends with its own hash. Its name is a hash of text, compiler and flags. A new one is kept
    there if possible.

    Raises UnsupportedError if there is no compiler, if it fails (with the first lines that it prints), or if there is no folder
    that libraries can be loaded from.
    """
    built_by = compiler()

    def flags_and_path(threads: tuple[str, ...]) -> tuple[tuple[str, ...], Path]:
        flags = (*FLAGS, *threads, *INSTRUCTIONS[instructions].flags, *more)
        identity = "\0".join((text, *built_by.command, built_by.version, *flags))
        return flags, libraries() / f"{name}_{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"

    _, usual = flags_and_path(OPENMP)
    with BUILDING[usual.name]:
        # first by the usual flags, because finding out those for OpenMP compiles a program
        if (library := _load_kept(usual)) is not None:
            return library
        flags, path = flags_and_path(built_by.threads)
        store.keep(Path("kernels") / f"{path.stem}.cpp", text)
        return _load_kept(path) or _build(built_by, text, flags, path)


def _build(built_by: Compiler, text: str, flags: tuple[str, ...], path: Path) -> ctypes.CDLL:
    """Build and load a library, and keep it at `path` if possible."""
    with tempfile.TemporaryDirectory(prefix="tokquant-") as private:
        library = Path(private) / path.name
        _compile(built_by, text, flags, library)
        if _is_trusted_folder(path.parent):
            data = library.read_bytes()
            with suppress(OSError):
                if path.is_symlink():
                    path.unlink()  # it would be written through, and then not loaded again
                # a umask of 0002 would let the group write it, and then it would not be loaded again
                write_atomically(path, data + hashlib.sha256(data).digest(), mode=0o600)
        try:
            return ctypes.CDLL(str(library))  # stays mapped after the folder is deleted
        except OSError as error:
            if (kept := _load_kept(path)) is not None:
                return kept
            raise UnsupportedError(
                f"backend: a kernel was built and cannot be loaded: {error}; set TOKQUANT_CACHE_DIR or TMPDIR to a folder of "
                "yours on a file system that programs may be run from, or use backend='reference'"
            ) from None


def _load_kept(path: Path) -> ctypes.CDLL | None:
    """The library that was kept at `path`, if nobody else can have written it and it can be loaded."""
    if not (_is_trusted_folder(path.parent) and _is_trusted_file(path)):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # a library that cannot be loaded is built again
        return None


def _compile(built_by: Compiler, text: str, flags: tuple[str, ...], library: Path) -> None:
    source = library.with_suffix(".cpp")
    source.write_text(text, encoding="utf-8")
    command = [*built_by.command, *flags, str(source), "-o", str(library)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"backend: {built_by.command[0]} cannot be run: {error}; use backend='reference'") from None
    if result.returncode or not library.exists():
        output = "\n".join((result.stderr or result.stdout).replace(str(source), source.name).splitlines()[:8])
        raise UnsupportedError(
            f"backend: {' '.join(built_by.command)} ({built_by.version}) fails on {source.name}; set CXX to another compiler "
            f"(g++ from 9, clang++ from 14), or use backend='reference'. It says:\n{output}"
        )


def _is_trusted_folder(folder: Path) -> bool:
    """Whether only this user can write to the folder, which is created if missing."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return False
    # a folder made in one that hands down its group is of mode 2700, which lets nobody else in
    mode = stat.S_IMODE(status.st_mode) & ~stat.S_ISGID
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and mode == 0o700


def _is_trusted_file(path: Path) -> bool:
    """Whether the file is this user's, nobody else can write it, and it ends with the hash of its contents."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return False
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


@lru_cache(maxsize=16)
def _compiler(wanted: str, path: str) -> Compiler:
    try:
        commands = [shlex.split(wanted)] if wanted.strip() else [[name] for name in COMPILERS]
    except ValueError:  # a quotation mark is not closed
        commands = []
    for command in commands:
        if shutil.which(command[0], path=path) is None:
            continue
        output = _run([*command, "--version"])
        if output is None:
            continue
        version = output.splitlines()[0] if output else "unknown"
        return Compiler(tuple(command), version, of_macros(_macros(command)))
    sought = f"CXX={quote(wanted)}" if wanted.strip() else " and ".join(COMPILERS)
    raise UnsupportedError(
        f"backend: 'cpu' needs a C++ compiler, and {sought} cannot be run; install one (apt install g++), set CXX, or use "
        "backend='reference'"
    )


def _macros(command: list[str]) -> set[str]:
    """The macros that a compiler defines for this processor, which name the instructions that both support."""
    # asked twice, as a busy machine may fail to start a process; clang for Arm takes the last one
    for native in ("-march=native", "-march=native", "-mcpu=native"):
        output = _run([*command, native, "-dM", "-E", "-x", "c++", os.devnull])
        if output is not None:
            return {line.split()[1] for line in output.splitlines() if line.startswith("#define ")}
    return set()


def _run(command: list[str]) -> str | None:
    """The output of a command; None if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True, errors="replace").stdout
    except (OSError, subprocess.SubprocessError):
        return None
