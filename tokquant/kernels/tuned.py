"""The tuning cache: one JSON file per entry, which can only choose among a plan's candidates."""

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
"""Entries that ship with the package, one file per device, as `tokquant cache export` writes them."""

NEAR = 4
"""The largest `Key.distance` at which an entry is used for a call of another shape."""

MARGIN = 1.05
"""Speedup that torch's 16-bit attention needs to be chosen: less is noise."""

LARGEST = 2**22
"""The most bytes that a file may have."""


class Key(BaseModel):
    """The kernel, device, Triton version and shape that a timing is for. Sizes are rounded up to powers of two."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kernel: str = Field(pattern=r"^[a-z0-9_]{1,200}$")
    """Its name, and a hash of its source."""
    device: str = Field(min_length=1, max_length=200)
    triton: str = Field(min_length=1, max_length=50)
    batch_heads: int = Field(ge=1, le=2**40)
    n_q: int = Field(ge=1, le=2**40)
    n_k: int = Field(ge=1, le=2**40)

    def distance(self, other: "Key") -> float:
        """Distance of two shapes: doublings from one to the other, summed over the three sizes."""
        pairs = ((self.batch_heads, other.batch_heads), (self.n_q, other.n_q), (self.n_k, other.n_k))
        return sum(abs(math.log2(a / b)) for a, b in pairs)


class Entry(BaseModel):
    """The fastest launch of a kernel on a device, for a shape."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    key: Key
    config: Config
    ms: float = Field(gt=0)
    default_ms: float | None = Field(gt=0)
    """Time of the untuned launch, interleaved with this one's; None where it cannot run."""
    split: int | None = None
    """For a kernel that reads pages: the programs per multiprocessor that its keys are split into."""
    rank: int | None = Field(default=None, ge=1)
    """Its rank in the planner's order, from 1; None in files of earlier versions."""
    timed: int | None = Field(default=None, ge=1)
    """The number of launches that were timed."""
    whole_ms: float | None = Field(default=None, gt=0)
    """Time of quantization and this launch together, interleaved with `sdpa_ms`."""
    sdpa_ms: float | None = Field(default=None, gt=0)
    """Time of torch's attention on the same tensors in their 16-bit type; None where that does not compute the same."""

    @property
    def sixteen_bit(self) -> bool:
        """Whether torch's attention in 16 bits was faster than quantized attention."""
        return self.whole_ms is not None and self.sdpa_ms is not None and self.sdpa_ms * MARGIN < self.whole_ms

    def chooses_for(self, plan: Plan) -> bool:
        """Whether this launch is among the plan's candidates."""
        return self.config in plan.candidates and self.split in plan.splits

    @property
    def file_name(self) -> str:
        """Name of its file in the cache folder."""
        return f"{self.key.kernel}-{sha256(self.key.model_dump_json().encode()).hexdigest()[:12]}.json"


ENTRIES = TypeAdapter(list[Entry])


def key_of(plan: Plan, device: torch.device, batch_heads: int, n_q: int, n_k: int) -> Key:
    """The key of a call on a GPU."""
    sizes = dict(zip(("batch_heads", "n_q", "n_k"), _rounded(batch_heads, n_q, n_k), strict=True))
    return Key(kernel=generate.name_of(plan), device=torch.cuda.get_device_name(device), triton=_triton(), **sizes)


def _rounded(*sizes: int) -> tuple[int, ...]:
    return tuple(1 << (size - 1).bit_length() for size in sizes)


def choose(plan: Plan, device: torch.device, batch_heads: int, n_q: int, n_k: int) -> tuple[Config, int | None]:
    """Launch and split of the nearest shape that was tuned for this kernel, device and Triton; else the plan's own."""
    near = _of_call(plan, device, batch_heads, n_q, n_k)
    return (plan.config, plan.splits[0]) if near is None else (near.config, near.split)


def same(plan: Plan, device: torch.device, batch_heads: int, n_q: int, n_k: int) -> Entry | None:
    """The entry of exactly this shape, rounded to powers of two; None where there is none."""
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
    """The entry nearest to `key`, if it is within `NEAR`. Entries whose launch is no candidate of the plan are ignored."""
    matching = [
        entry
        for entry in known(key.kernel)
        if (entry.key.kernel, entry.key.device, entry.key.triton) == (key.kernel, key.device, key.triton)
        and entry.chooses_for(plan)
    ]
    near = min(matching, key=lambda entry: entry.key.distance(key), default=None)
    return None if near is None or near.key.distance(key) > NEAR else near


def record(entry: Entry) -> Path | None:
    """Write an entry, replacing one with the same key. Returns its path, or None where the folder cannot be written."""
    path = folder() / entry.file_name
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, (entry.model_dump_json(indent=2) + "\n").encode())
    except OSError:
        return None
    _nearest.cache_clear()
    return path


def folder() -> Path:
    """The folder of the entries."""
    return store.folder() / "tuning"


def entries(kernel: str = "") -> Iterator[Entry]:
    """The entries of the cache folder, or those of one kernel. Files that cannot be read, or are no entries, are skipped."""
    try:
        paths = sorted(folder().glob(f"{kernel}*.json"))
    except OSError:
        return
    for path in paths:
        entry = _read(path)
        if entry is not None and path.name == entry.file_name:
            yield entry


def known(kernel: str = "") -> tuple[Entry, ...]:
    """The entries of the cache folder, followed by those that ship with the package."""
    return (*entries(kernel), *_shipped())


def export(path: Path) -> int:
    """Write all entries of the cache folder to one file; returns their number."""
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
    """Remove the entries of the cache folder, and no other files; returns their number."""
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
