"""The GPUs that kernels are compiled for: resources of a multiprocessor, and rates from the datasheets."""

from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import torch

from tokquant.errors import quote


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU architecture and a card that has it. Rates are those of the datasheet, dense, with float32 accumulation."""

    name: str
    backend: Literal["cuda", "hip"] = "cuda"
    arch: int | str
    lanes: int = 32
    """Threads of a warp."""
    registers: int = 65536
    """32-bit registers of a multiprocessor."""
    shared_bytes: int
    """Shared memory of a multiprocessor; one block may take all but a kilobyte."""
    tensor_memory_bytes: int = 0
    """Tensor memory of a multiprocessor, where its tensor cores accumulate there."""
    warps: int
    """The most warps that a multiprocessor holds."""
    fp8: bool = True
    """Whether tensor cores multiply OCP's e4m3 and e5m2."""

    card: str
    multiprocessors: int
    gigahertz: float
    terabytes: float
    """Bandwidth of memory, 1e12 bytes a second."""
    rates: MappingProxyType[str, int] = field(hash=False)
    """Multiplications and additions per clock of a multiprocessor: `int8`, `fp8`, `fp16` on tensor cores, `fp32` on cores."""
    exponentials: int = 16
    """Exponentials per clock of a multiprocessor."""
    issued: int = 128
    """Instructions issued per clock of a multiprocessor, counted per thread."""
    schedulers: int = 4
    """Warp schedulers of a multiprocessor."""
    port_bytes: int = 64
    """Bytes per clock that one multiprocessor can read from the L2 cache."""
    cache_bytes: int | None = None
    """Bytes per clock that the L2 cache delivers to all multiprocessors; where None, limited by `port_bytes` alone."""
    cache_size: int
    """Bytes of the L2 cache; on AMD of the Infinity Cache."""

    def __hash__(self) -> int:
        return hash(self.name)  # fast, as every call looks plans up by target

    @property
    def fast_bytes(self) -> int:
        """Fast memory of one multiprocessor: registers, shared memory and tensor memory."""
        return 4 * self.registers + self.shared_bytes + self.tensor_memory_bytes

    def cache_terabytes(self, processors: int) -> float:
        """Peak bandwidth of the L2 cache to this many multiprocessors, 1e12 bytes a second."""
        ports = self.port_bytes * min(processors, self.multiprocessors)
        return min(ports, self.cache_bytes or ports) * self.gigahertz / 1e3


def _rates(int8: int, fp8: int, fp16: int, fp32: int = 256) -> MappingProxyType[str, int]:
    return MappingProxyType({"int8": int8, "fp8": fp8, "fp16": fp16, "fp32": fp32})


_KB, _MB = 2**10, 2**20
TARGETS = {
    target.name: target
    for target in (
        Target(
            name="sm_80", arch=80, shared_bytes=164 * _KB, warps=64, fp8=False, cache_size=40 * _MB,
            card="A100 SXM", multiprocessors=108, gigahertz=1.41, terabytes=2.04, rates=_rates(4096, 0, 2048, 128),
            cache_bytes=5120,  # NVIDIA A100 Tensor Core GPU Architecture, whitepaper of 2020
        ),
        Target(
            name="sm_86", arch=86, shared_bytes=100 * _KB, warps=48, fp8=False, cache_size=6 * _MB,
            card="RTX 3090", multiprocessors=82, gigahertz=1.70, terabytes=0.936, rates=_rates(2048, 0, 512),
        ),
        Target(
            name="sm_89", arch=89, shared_bytes=100 * _KB, warps=48, cache_size=96 * _MB,
            card="L40S", multiprocessors=142, gigahertz=2.52, terabytes=0.864, rates=_rates(2048, 2048, 1024),
        ),
        Target(
            name="sm_90", arch=90, shared_bytes=228 * _KB, warps=64, cache_size=50 * _MB,
            card="H100 SXM", multiprocessors=132, gigahertz=1.83, terabytes=3.35, rates=_rates(8192, 8192, 4096),
            cache_bytes=5120,  # as the A100
        ),
        Target(
            name="sm_100", arch=100, shared_bytes=228 * _KB, tensor_memory_bytes=256 * _KB, warps=64, cache_size=126 * _MB,
            card="B200", multiprocessors=148, gigahertz=1.85, terabytes=8.0, rates=_rates(16384, 16384, 8192),
        ),
        Target(
            name="sm_120", arch=120, shared_bytes=100 * _KB, warps=48, cache_size=96 * _MB,
            card="RTX 5090", multiprocessors=170, gigahertz=2.41, terabytes=1.79, rates=_rates(2048, 1024, 512),
        ),
        Target(
            name="gfx942", backend="hip", arch="gfx942", lanes=64, registers=131072, shared_bytes=64 * _KB, warps=32, fp8=False,
            card="MI300X", multiprocessors=304, gigahertz=2.10, terabytes=5.3, rates=_rates(4096, 4096, 2048),
            issued=64, cache_size=256 * _MB,
        ),
    )
}  # fmt: skip
DEFAULT = TARGETS["sm_90"]


def get(name: object) -> Target:
    """The target of that name. Raises ValueError that lists the known ones."""
    if not isinstance(name, str) or name not in TARGETS:
        known = ", ".join(f"{target.name} ({target.card})" for target in TARGETS.values())
        raise ValueError(f"target: {quote(name)} is not valid; use one of {known}")
    return TARGETS[name]


def of(device: torch.device) -> Target:
    """The target of a device's GPU, or the nearest older one that is known; the default where there is no GPU.

    Every GPU of AMD is taken for gfx942.
    """
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    return _of_capability(*torch.cuda.get_device_capability(device))


@lru_cache(maxsize=16)
def _of_capability(major: int, minor: int) -> Target:
    """The target of NVIDIA's GPUs of this compute capability, or the nearest older one that is known."""
    known = [target for target in TARGETS.values() if isinstance(target.arch, int) and target.arch <= 10 * major + minor]
    return known[-1] if known else TARGETS["sm_80"]
