"""The hardware and software that a measurement was taken with."""

import platform
from pathlib import Path

import torch
import triton

from tokquant.kernels.cpu import build


def machine(device: torch.device, backend: str) -> dict[str, str]:
    """Versions, backend and device, by name; on a CPU also threads, and what kernels are built for and by."""
    found = {"torch": torch.__version__, "backend": backend}
    if device.type == "cuda":
        return found | {"triton": triton.__version__, "device": torch.cuda.get_device_name(device)}
    if backend == "cpu":
        found |= {"instructions": build.instructions(), "compiler": build.compiler().version}
    return found | {"threads": str(torch.get_num_threads()), "device": _processor()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
