"""What was measured beside what is aimed at."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Rows, rows_of

Shape = dict[str, Any]
LONG = {8192, 16384, 32768}
SIXTEEN_BIT = re.compile(r"^(SDPA|FlexAttention|xformers).*(fp16|bf16)")


@dataclass(frozen=True)
class Aim:
    """A number that a figure of every one of some tables should reach, or stay below."""

    what: str
    aimed: float
    unit: str
    of: Callable[[Rows, Shape], float | None]
    """The figure of one table, given its rows that have a time and its shape; None where it is about other ones."""
    at_most: bool = False


def _prefill(shape: Shape, d: int, causal: bool | None, tokens: set[int]) -> bool:
    return (
        shape["workload"] == "attention"
        and shape["head_dim"] == d
        and causal in (None, shape["causal"])
        and shape["tokens"] in tokens
    )


def _row(rows: Rows, provider: str) -> Shape | None:
    return next((row for row in rows if row["provider"] == provider), None)


def _rate(name: str, d: int, causal: bool) -> Callable[[Rows, Shape], float | None]:
    def of(rows: Rows, shape: Shape) -> float | None:
        row = _row(rows, name) if _prefill(shape, d, causal, LONG) else None
        return row and row["rate"] / 1e3

    return of


def _times_faster(ours: Callable[[str], bool], theirs: Callable[[str], bool], wanted: Callable[[Shape], bool]):
    """The fastest of theirs over the fastest of ours."""

    def of(rows: Rows, shape: Shape) -> float | None:
        if not wanted(shape):
            return None
        one, other = ([row["ms"] for row in rows if those(row["provider"])] for those in (ours, theirs))
        return min(other) / min(one) if one and other else None

    return of


def _kernel(name: str) -> bool:
    return name.startswith("int8") and "," not in name


def _whole(name: str) -> bool:
    return name.startswith("int8") and name.endswith(", with quantization")


def _quantization(rows: Rows, shape: Shape) -> float | None:
    if shape["workload"] != "quantization" or shape["tokens"] != 8192:
        return None
    names = [row["provider"] for row in rows if _row(rows, f"{row['provider']}, attention")]
    return max((_row(rows, name)["ms"] / _row(rows, f"{name}, attention")["ms"] for name in names), default=None)  # type: ignore[index]


def _of_copy(copied: float | None) -> Callable[[Rows, Shape], float | None]:
    def of(rows: Rows, shape: Shape) -> float | None:
        row = _row(rows, "kv-int8, KVCache") if shape["workload"] == "decode" and shape["batch"] == 16 else None
        return row["rate"] / copied if row and copied else None

    return of


def aims(folder: Path) -> Iterator[Aim]:
    """All of them, the shares by what the ceilings say."""
    for name, d, full, causal in (
        ("int8-fp8", 128, 720, 620),
        ("int8-fast", 128, 600, 520),
        ("int8", 128, 480, 420),
        ("int8-fp8", 64, 480, 420),
    ):
        for masked, aimed in ((False, full), (True, causal)):
            yield Aim(f"{name}, head_dim {d}, 8k to 32k{', causal' * masked}", aimed, "TOPS", _rate(name, d, masked))
    long = lambda shape: shape["workload"] == "attention" and shape["tokens"] in LONG  # noqa: E731
    short = lambda shape: shape["workload"] == "attention" and shape["tokens"] in (512, 1024)  # noqa: E731
    cache = lambda shape: shape["workload"] == "decode" and shape["tokens"] == 32768  # noqa: E731
    sixteen = lambda name: bool(SIXTEEN_BIT.match(name))  # noqa: E731
    sage = lambda end: lambda name: name.startswith("SageAttention") and name.endswith(end)  # noqa: E731
    yield Aim(
        "the fastest int8 kernel beside the fastest in 16 bits, 8k to 32k", 1.2, "x", _times_faster(_kernel, sixteen, long)
    )
    yield Aim("beside SageAttention, kernels, 8k to 32k", 1.5, "x", _times_faster(_kernel, sage(", kernel"), long))
    yield Aim(
        "beside SageAttention, with quantization, 8k to 32k", 1.4, "x", _times_faster(_whole, sage(", with quantization"), long)
    )
    yield Aim("with quantization beside the fastest in 16 bits, up to 1k", 1.0, "x", _times_faster(_whole, sixteen, short))
    yield Aim("quantization, of the time of attention, 8k", 0.08, "", _quantization, at_most=True)
    for name, aimed in (("kv-int8", 1.7), ("kv-int4", 2.8)):
        mine = lambda provider, name=name: provider == f"{name}, KVCache"  # noqa: E731
        yield Aim(f"decoding {name} beside the fastest in 16 bits, 32k", aimed, "x", _times_faster(mine, sixteen, cache))
    copied = next((row["GB/s"] for row in rows_of(folder, "ceilings") if str(row.get("what", "")).startswith("copy")), None)
    yield Aim("decoding kv-int8, of copy bandwidth, batch 16", 0.8, "", _of_copy(copied))


def beside(folder: Path) -> Rows:
    """Every aim with the least and the most that was measured for it, whether that is enough, and which table is worst."""
    tables: dict[str, Rows] = {}
    for row in rows_of(folder, "tables"):
        if row.get("ms"):
            tables.setdefault(row["item"], []).append(row)
    found: Rows = []
    for aim in aims(folder):
        measured = {name: figure for name, rows in tables.items() if (figure := aim.of(rows, rows[0])) is not None}
        row: dict[str, Any] = {"aim": aim.what, "aimed": aim.aimed, "unit": aim.unit}
        if measured:
            worst = (max if aim.at_most else min)(measured, key=measured.__getitem__)
            met = measured[worst] <= aim.aimed if aim.at_most else measured[worst] >= aim.aimed
            row |= {
                "least": min(measured.values()),
                "most": max(measured.values()),
                "met": "yes" if met else "no",
                "worst": worst,
            }
        else:
            row["met"] = "not measured"
        found.append(row)
    return found
