"""The performance targets, in the table `AIMS`, and their comparison with what was measured."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Rows, rows_of

Table = dict[str, Any]
"""Results for one shape: its fields in `tokquant bench`, `ms` and `rate` by provider, and `copied`, GB/s of copying memory."""
Figure = Callable[[Table], float | None]
"""A figure of one table; None for tables that the figure is not about."""
Providers = Callable[[str], bool]
"""Selects providers by name."""


@dataclass(frozen=True)
class Aim:
    """A target for one figure, in every table that has the figure."""

    what: str
    aimed: float
    unit: str
    of: Figure
    at_most: bool = False
    """Whether the figure should stay below the target, instead of reaching it."""


def _long(table: Table) -> bool:
    return table["workload"] == "attention" and table["tokens"] in (8192, 16384, 32768)


def _short(table: Table) -> bool:
    return table["workload"] == "attention" and table["tokens"] in (512, 1024)


def _decoding(table: Table) -> bool:
    return table["workload"] == "decode" and table["tokens"] == 32768


def _kernel(name: str) -> bool:
    return name.startswith("int8") and "," not in name


def _whole(name: str) -> bool:
    return name.startswith("int8") and name.endswith(", with quantization")


def _auto(name: str) -> bool:
    return name.startswith("int8") and name.endswith(", auto")


def _sixteen_bit(name: str) -> bool:
    return bool(re.match(r"(SDPA|FlexAttention|xformers).*(fp16|bf16)", name))


def _sage(what: str) -> Providers:
    return lambda name: name.startswith("SageAttention") and name.endswith(f", {what}")


def _cache(scheme: str) -> Providers:
    return lambda name: name == f"{scheme}, KVCache"


def _rate(scheme: str, head_dim: int, causal: bool) -> Figure:
    def of(table: Table) -> float | None:
        about = _long(table) and (table["head_dim"], table["causal"]) == (head_dim, causal)
        return table["rate"][scheme] / 1e3 if about and scheme in table["rate"] else None

    return of


def _speedup(ours: Providers, theirs: Providers, about: Callable[[Table], bool]) -> Figure:
    """The speedup of the fastest of ours over the fastest of theirs."""

    def of(table: Table) -> float | None:
        our_ms, their_ms = ([ms for name, ms in table["ms"].items() if chosen(name)] for chosen in (ours, theirs))
        return min(their_ms) / min(our_ms) if about(table) and our_ms and their_ms else None

    return of


def _quantization(table: Table) -> float | None:
    """Time of quantization over that of attention, for the scheme where this is largest."""
    if table["workload"] != "quantization" or table["tokens"] != 8192:
        return None
    ms = table["ms"]
    return max((ms[name] / ms[f"{name}, attention"] for name in ms if f"{name}, attention" in ms), default=None)


def _of_copying(table: Table) -> float | None:
    """Bandwidth of decoding over that of copying memory."""
    rate = table["rate"].get("kv-int8, KVCache") if _decoding(table) and table["batch"] == 16 else None
    return rate / table["copied"] if rate and table["copied"] else None


AIMS = (
    Aim("int8-fp8, head_dim 128, 8k to 32k", 720, "TOPS", _rate("int8-fp8", 128, False)),
    Aim("int8-fp8, head_dim 128, 8k to 32k, causal", 620, "TOPS", _rate("int8-fp8", 128, True)),
    Aim("int8-fast, head_dim 128, 8k to 32k", 600, "TOPS", _rate("int8-fast", 128, False)),
    Aim("int8-fast, head_dim 128, 8k to 32k, causal", 520, "TOPS", _rate("int8-fast", 128, True)),
    Aim("int8, head_dim 128, 8k to 32k", 480, "TOPS", _rate("int8", 128, False)),
    Aim("int8, head_dim 128, 8k to 32k, causal", 420, "TOPS", _rate("int8", 128, True)),
    Aim("int8-fp8, head_dim 64, 8k to 32k", 480, "TOPS", _rate("int8-fp8", 64, False)),
    Aim("int8-fp8, head_dim 64, 8k to 32k, causal", 420, "TOPS", _rate("int8-fp8", 64, True)),
    Aim("the fastest int8 kernel beside the fastest in 16 bits, 8k to 32k", 1.2, "x", _speedup(_kernel, _sixteen_bit, _long)),
    Aim("beside SageAttention, kernels, 8k to 32k", 1.5, "x", _speedup(_kernel, _sage("kernel"), _long)),
    Aim("beside SageAttention, with quantization, 8k to 32k", 1.4, "x", _speedup(_whole, _sage("with quantization"), _long)),
    # auto may choose torch's 16-bit attention itself: a difference below a twentieth is noise
    Aim("what auto takes of tensors beside the fastest in 16 bits, up to 1k", 0.95, "x", _speedup(_auto, _sixteen_bit, _short)),
    Aim("quantization, of the time of attention, 8k", 0.08, "", _quantization, at_most=True),
    Aim("decoding kv-int8 beside the fastest in 16 bits, 32k", 1.7, "x", _speedup(_cache("kv-int8"), _sixteen_bit, _decoding)),
    Aim("decoding kv-int4 beside the fastest in 16 bits, 32k", 2.8, "x", _speedup(_cache("kv-int4"), _sixteen_bit, _decoding)),
    Aim("decoding kv-int8, of copy bandwidth, batch 16", 0.8, "", _of_copying),
)


def compare(folder: Path) -> Rows:
    """A row for every aim: the least and the most that was measured for it, whether it is met, and the worst table."""
    copied = next((row["GB/s"] for row in rows_of(folder, "ceilings") if str(row.get("what", "")).startswith("copy")), None)
    tables: dict[str, Table] = {}
    for row in rows_of(folder, "tables"):
        if row.get("ms"):
            table = tables.setdefault(row["item"], {**row, "ms": {}, "rate": {}, "copied": copied})
            table["ms"][row["provider"]] = row["ms"]
            if row.get("rate"):
                table["rate"][row["provider"]] = row["rate"]
    found: Rows = []
    for aim in AIMS:
        measured = {name: figure for name, table in tables.items() if (figure := aim.of(table)) is not None}
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
