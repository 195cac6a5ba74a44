"""What tuning has learned: one JSON file an entry, its key in clear, which chooses among candidates and does nothing else."""

import math
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tokquant.files import write_atomically
from tokquant.kernels import generate, store
from tokquant.kernels.candidates import Config
from tokquant.kernels.plan import Plan

SHIPPED = Path(__file__).parent / "shipped"
"""Entries for known devices, as `tokquant cache export` writes them, one file a device."""

NEAR = 4
"""Doublings between the shape of a call and that of an entry, all sizes together, up to which the entry is taken."""

MARGIN = 1.05
"""How many times as fast torch's attention must have been for it to be taken: less is noise."""

LARGEST = 2**22
"""Bytes of a file that is read."""


class Key(BaseModel):
    """What a timing holds for. Sizes are rounded up to powers of two."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kernel: str = Field(pattern=r"^[a-z0-9_]{1,200}$")
    """Its name, and a hash of its text."""
    device: str = Field(min_length=1, max_length=200)
    triton: str = Field(min_length=1, max_length=50)
    batch_heads: int = Field(ge=1, le=2**40)
    n_q: int = Field(ge=1, le=2**40)
    n_k: int = Field(ge=1, le=2**40)

    def distance(self, other: "Key") -> float:
        """How far apart two shapes are, in doublings."""
        pairs = ((self.batch_heads, other.batch_heads), (self.n_q, other.n_q), (self.n_k, other.n_k))
        return sum(abs(math.log2(a / b)) for a, b in pairs)


class Entry(BaseModel):
    """The fastest launch of a kernel on a device, for a shape."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    key: Key
    config: Config
    ms: float = Field(gt=0)
    default_ms: float | None = Field(gt=0)
    """What the launch without tuning took, timed in turn with it; None where it cannot run."""
    split: int | None = None
    """Of a kernel that reads pages: programs for each multiprocessor that its keys are split for."""
    rank: int | None = Field(default=None, ge=1)
    """The place that the planner had given it, from 1; None in files from before it did."""
    timed: int | None = Field(default=None, ge=1)
    """How many launches were timed."""
    whole_ms: float | None = Field(default=None, gt=0)
    """Quantization and this launch, timed in turn with"""
    sdpa_ms: float | None = Field(default=None, gt=0)
    """torch's attention to the same tensors in their own 16-bit type; None where it does not do what the kernel does."""

    @property
    def sixteen_bit(self) -> bool:
        """Whether torch's attention in 16 bits was faster than to quantize."""
        return self.whole_ms is not None and self.sdpa_ms is not None and self.sdpa_ms * MARGIN < self.whole_ms

    def chooses_for(self, plan: Plan) -> bool:
        """Whether this launch is one that tuning of the plan may choose."""
        return self.config in plan.candidates and self.split in plan.splits

    @property
    def file_name(self) -> str:
        """Of its file in the cache folder."""
        return f"{self.key.kernel}-{sha256(self.key.model_dump_json().encode()).hexdigest()[:12]}.json"


ENTRIES = TypeAdapter(list[Entry])


def key_of(plan: Plan, device: torch.device, batch_heads: int, n_q: int, n_k: int) -> Key:
    """The key of a launch on a GPU."""
    sizes = dict(zip(("batch_heads", "n_q", "n_k"), _rounded(batch_heads, n_q, n_k), strict=True))
    return Key(kernel=generate.name_of(plan), device=torch.cuda.get_device_name(device), triton=_triton(), **sizes)


def _rounded(*sizes: int) -> tuple[int, ...]:
    return tuple(1 << (size - 1).bit_length() for size in sizes)


def choose(plan: Plan, device: torch.device, batch_heads: int, n_q: int, n_k: int) -> tuple[Config, int | None]:
    """Launch and split of the nearest shape that was tuned for this kernel, device and Triton; else the plan's own."""
    near = _of_call(plan, device, batch_heads, n_q, n_k)
    return (plan.config, plan.splits[0]) if near is None else (near.config, near.split)


def same(plan: Plan, device: torch.device, batch_heads: int, n_q: int, n_k: int) -> Entry | None:
    """The entry of this very shape, in powers of two; None where there is none."""
    near = _of_call(plan, device, batch_heads, n_q, n_k)
    if near is None or (near.key.batch_heads, near.key.n_q, near.key.n_k) != _rounded(batch_heads, n_q, n_k):
        return None
    return near


def _of_call(plan: Plan, device: torch.device, *sizes: int) -> Entry | None:
    return None if device.type != "cuda" else _nearest(store.folder(), plan, device, *_rounded(*sizes))


@lru_cache(maxsize=4096)
def _nearest(_: Path, plan: Plan, device: torch.device, batch_heads: int, n_q: int, n_k: int) -> Entry | None:
    return nearest(plan, key_of(plan, device, batch_heads, n_q, n_k))


def nearest(plan: Plan, key: Key) -> Entry | None:
    """The entry nearest to `key`, if one is near. An entry that names no candidate is none."""
    alike = [
        entry
        for entry in known(key.kernel)
        if (entry.key.kernel, entry.key.device, entry.key.triton) == (key.kernel, key.device, key.triton)
        and entry.chooses_for(plan)
    ]
    near = min(alike, key=lambda entry: entry.key.distance(key), default=None)
    return None if near is None or near.key.distance(key) > NEAR else near


def record(entry: Entry) -> Path | None:
    """Keep an entry, in place of one with the same key. Returns its path, or None where the folder cannot be written."""
    path = folder() / entry.file_name
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, (entry.model_dump_json(indent=2) + "\n").encode())
    except OSError:
        return None
    _nearest.cache_clear()
    return path


def folder() -> Path:
    """Where entries are kept."""
    return store.folder() / "tuning"


def entries(kernel: str = "") -> Iterator[Entry]:
    """The entries of the cache folder, or those of one kernel. What cannot be read or is no entry is passed over."""
    try:
        paths = sorted(folder().glob(f"{kernel}*.json"))
    except OSError:
        return
    for path in paths:
        entry = _read(path)
        if entry is not None and path.name == entry.file_name:
            yield entry


def known(kernel: str = "") -> tuple[Entry, ...]:
    """Those, and what ships behind them."""
    return (*entries(kernel), *_shipped())


def export(path: Path) -> int:
    """Write all entries of the cache folder into one file; how many they are."""
    found = list(entries())
    write_atomically(path, ENTRIES.dump_json(found, indent=2) + b"\n")
    return len(found)


def load(path: Path) -> list[Entry]:
    """The entries of an exported file. Raises ValueError where it is none, OSError where it cannot be read."""
    data = _bytes(path)
    try:
        return ENTRIES.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path}: not a list of tuning entries as `tokquant cache export` writes: {where} {first['msg']}"
        ) from None


def clear() -> int:
    """Remove the entries of the cache folder, and nothing else; how many they were."""
    found = [folder() / entry.file_name for entry in entries()]
    for path in found:
        path.unlink(missing_ok=True)
    _nearest.cache_clear()
    return len(found)


def _read(path: Path) -> Entry | None:
    try:
        return Entry.model_validate_json(_bytes(path))
    except (OSError, ValueError):
        return None


def _bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"{path}: more than {LARGEST} bytes, which no file of tuning entries has")
    return data


@lru_cache(maxsize=1)
def _shipped() -> tuple[Entry, ...]:
    return tuple(entry for path in sorted(SHIPPED.glob("*.json")) for entry in load(path))


@lru_cache(maxsize=1)
def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
