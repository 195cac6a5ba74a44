"""`tokquant doctor`: reports what runs on this machine and which backend is chosen."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from tokquant.attention import choose_backend
from tokquant.cli import options, output
from tokquant.errors import UnsupportedError
from tokquant.kernels import launch, store, tuned
from tokquant.kernels.cpu import build


def doctor(json: options.Json = False) -> None:
    """Say which backend, devices, versions and cache folder are in use."""
    report = findings()
    if json:
        output.print_json(report)
        return
    texts = {name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in report.items()}
    output.console().print(output.facts({name.replace("_", " "): text for name, text in texts.items()}))


def findings() -> dict[str, str | bool | list[str]]:
    """The report of `doctor`, by name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if device.type == "cuda" else []
    if launch.interpreted():
        triton = "in its interpreter, on the CPU: right but slow"
    elif device.type == "cuda":
        triton = "compiled"
    else:
        triton = "no GPU; set TRITON_INTERPRET=1 to run kernels in the interpreter, or compile them for any GPU with tq.compile"
    compiler, instructions = _compiler()
    built_anew = f"built anew in every process; {build.libraries()} must be yours, of mode 0700, or set TOKQUANT_CACHE_DIR"
    return {
        "tokquant": version("tokquant"),
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gpus": gpus or "none",
        "threads": str(torch.get_num_threads()),
        "backend_auto": f"{choose_backend('auto', device)} for tensors on {device}",
        "auto_in_16_bits": _sixteen_bit(gpus),
        "triton_kernels": triton,
        "cpu_compiler": compiler,
        "cpu_instructions": instructions,
        "cpu_libraries": "kept" if build.keeps() else built_anew,
        "cache_folder": str(store.folder()),
        "cache_writable": store.writable(),
    }


def _sixteen_bit(gpus: list[str]) -> str:
    """At how many tuned shapes of these GPUs `auto` uses torch's attention instead of quantizing."""
    entries = [entry for entry in tuned.known() if entry.key.device in gpus]
    if not entries:
        return "no: nothing was tuned (tokquant tune)"
    sixteen_bit = sum(entry.sixteen_bit for entry in entries)
    return (
        f"torch's attention at {sixteen_bit} of {len(entries)} tuned shapes (tokquant cache list); never with backend='triton'"
    )


def _compiler() -> tuple[str, str]:
    """The C++ compiler and the instruction set in use, or what is wrong with them."""
    try:
        found = build.compiler()
    except UnsupportedError as error:
        return str(error), "none without a compiler"
    compiler = f"{' '.join(found.command)}: {found.version}{'' if found.threads else '; without OpenMP, on one thread'}"
    try:
        return compiler, build.instructions()
    except (UnsupportedError, ValueError) as error:
        return compiler, str(error)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
