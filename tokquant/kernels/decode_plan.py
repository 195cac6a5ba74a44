"""The plan of a decoding kernel: the attention kernel's plan, changed for keys and values that lie in pages."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch

from tokquant import precisions
from tokquant.errors import UnsupportedError
from tokquant.kernels import targets
from tokquant.kernels.candidates import Config
from tokquant.kernels.plan import Plan, plan
from tokquant.kernels.products import BYTES, EIGHT
from tokquant.kernels.quantize_task import LONGEST
from tokquant.kernels.triton import fragments, scales
from tokquant.kernels.wanted import PLAIN, Wanted
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.appending import check_append_only
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import place

LANES = 32
"""Partial sums over keys in a row, so many that even with four warps side by side each belongs to one thread."""

Table = tuple[tuple[int, int], ...]
"""Launches as (num_warps, num_stages)."""

INTEGERS: Table = ((2, 3), (4, 3), (2, 2), (4, 2))
"""For at most 16 rows and integer products. With few warps, fewer load the same data and wait for each other's row maxima."""
FLOATS: Table = ((4, 3), (4, 2), (8, 3), (2, 2))
"""For 16-bit operands or 17 to 32 rows, which do not fit the registers of two warps."""
MANY_ROWS: Table = ((4, 2), (4, 3), (8, 2), (4, 1))
"""For more than 32 rows."""


@dataclass(frozen=True, eq=False, repr=False)
class DecodePlan(Plan):
    """The plan of a kernel that attends to pages."""

    splits: ClassVar[tuple[int | None, ...]] = (4, 1, 2, 8)
    """Ways to split keys, as programs per multiprocessor; the first is the untuned one."""


def check_pages(scheme: QuantScheme, page: int) -> None:
    """Raise SchemeError or UnsupportedError unless codes of `scheme` can be appended to pages of `page` tokens by a kernel."""
    check_append_only(scheme)
    for operand in (scheme.k, scheme.v):
        kind, size = operand.granularity.kind, operand.granularity.size or 1
        if operand.scaled and kind in ("block", "channel_block") and size > min(page, LONGEST):
            raise UnsupportedError(
                f"{operand.role}.granularity: {kind} {size} is more than a kernel appends at once to pages of {page} tokens; "
                f"use {{{kind}: {min(page, LONGEST)}}}, or backend='reference'"
            )


@lru_cache(maxsize=256)
def decode_plan(
    scheme: QuantScheme,
    *,
    head_dim: int,
    dtype: torch.dtype,
    page: int,
    shared_heads: int = 1,
    wanted: Wanted = PLAIN,
    rows: int = 1,
    one_run: bool = True,
    newer: bool = False,
    interpreted: bool = False,
    target: targets.Target = targets.DEFAULT,
) -> DecodePlan:
    """The plan of a kernel for pages of `page` tokens; LSE is always returned.

    Args:
        rows: queries times the heads of Q that share one of K and V: rows of a program's tile.
        one_run: whether one program visits all keys, so that there are no partial results to merge.
        newer: whether newer keys are kept outside of the pages.

    Raises UnsupportedError for what no such kernel does.
    """
    check_pages(scheme, page)
    base = plan(
        scheme,
        head_dim=head_dim,
        dtype=dtype,
        shared_heads=shared_heads,
        wanted=replace(wanted, lse=True),
        interpreted=interpreted,
        target=target,
    )
    q, k, v = scheme.q, scheme.k, scheme.v
    at = dict(base.places)
    constants: dict[str, Any] = dict(base.constants)
    padded = constants["D_TILE"]
    tile = _key_tile(scheme, page)
    together = k.format.packed if q.format.packed in (1, k.format.packed) else 1
    tokens_last = eight_bits(base)
    k_unit, v_unit = _unit(k, base.products[1]), _unit(v, base.products[3])
    only_scales = at["k"] == "scores" and k.symmetric and k.scale == "dynamic"
    one_per_tile = only_scales and k.granularity.cover(WHOLE, 1)[0] % tile == 0 and tile <= page
    added: dict[str, Any] = {
        "PAGE": page,
        "LANES": LANES,
        "K_PLANES": together,
        "V_PLANES": v.format.packed,
        "Q_IN_PLANES": q.format.packed == 1 and together > 1,
        "V_IN_PLANES": v.format.packed > 1,
        "V_PACKED": v.format.packed,
        "K_WIDTH": -(-head_dim // k.format.packed),
        "V_WIDTH": -(-head_dim // v.format.packed),
        "V_ROW": 1 if tokens_last else -(-head_dim // v.format.packed),
        "V_COLUMN": page if tokens_last else 1,
        "K_UNIT": k_unit,
        "V_UNIT": v_unit,
        "OUTPUT_UNIT": 1.0 if at["v"] == "tile" else v_unit,
        "K_STATIC": at["k"] == "scores" and k.symmetric and k.scale == "static",
        "K_SIDE_OF_TILE": one_per_tile,
        "K_SIDE_OF_TOKEN": only_scales and not one_per_tile,
        "K_PAIR_OF_TOKEN": at["k"] == "scores" and not k.symmetric,
        "V_SIDE_OF_TOKEN": at["v"] == "p" and v.symmetric,
        "V_PAIR_OF_TOKEN": at["v"] == "p" and not v.symmetric,
        "V_CLEARED": base.products[3] != "tl.int8",
        "V_PER_CHANNEL": constants["V_COLUMN"],
        "CODE_ZERO": scheme.p.format.code_zero,
        "ONE_RUN": one_run,
        "NEWER": newer,
    }
    for role, operand in (("K", k), ("V", v)):
        rows_of_page, pairs, columns = sides_shape(operand, head_dim, page)
        tokens, channels = operand.granularity.cover(WHOLE, head_dim) if operand.scaled else (1, head_dim)
        added |= {
            f"{role}_VIA": "tl.float32" if at[role.lower()] == "operand" else constants[f"{role}_VIA"],
            f"{role}_HAS_SCALE": operand.scaled and at[role.lower()] != "q",
            f"{role}_SIDE": pairs * columns,
            f"{role}_SIDES": rows_of_page * pairs * columns,
            f"{role}_COLUMNS": columns,
            f"{role}_STEP": min(tokens, tile),
            f"{role}_PARTS": padded if channels == 1 else max(1, padded // channels),
            f"{role}_BY_CHANNEL": constants[f"{role}_DECODED"] and channels == 1,
        }
    constants |= added
    spans = tile > page
    holes = dict(base.holes)
    for hole in ("scale_scores", "address_v"):
        del holes[hole]
    nvidia = target.backend == "cuda" and not interpreted
    holes |= {
        "decode_k": _decode(k, k_unit, holes["decode_k"], nvidia),
        "decode_v": _decode(v, v_unit, holes["decode_v"], nvidia),
        "lay_q": fragments.as_they_are if q.format.packed == 1 else _lay(together),
        "lay_k": fragments.as_they_are if k.format.packed == 1 else _lay(together),
        "lay_v": fragments.as_they_are if v.format.packed == 1 else fragments.in_planes,
        "order_p": fragments.in_groups if tokens_last else fragments.in_order,
        "order_v": scales.in_groups_of_16 if tokens_last else scales.in_order,
        "page_of": fragments.many_pages if spans else fragments.one_page,
        "tokens_at": fragments.across_pages if spans else fragments.within_page,
    }
    if at["v"] == "p":
        holes["log2_scale"] = fragments.log2_of_normal_ptx if nvidia else fragments.log2_of_normal
    for role, operand in (("k", k), ("v", v)):
        holes[f"widen_{role}"] = _widen(operand, constants[f"{role.upper()}_VIA"], nvidia)
        if at[role] == "operand":
            by_channel = operand.granularity.cover(WHOLE, head_dim)[1] == 1
            holes[f"spread_{role}"] = fragments.of_channels if by_channel else fragments.of_groups
    return DecodePlan(
        name=base.name.replace("attention", "decode"),
        title=f"{base.title}; pages of {page}",
        holes=holes,
        constants=constants,
        products=base.products,
        candidates=_candidates(base, 16 if rows <= 16 else 32 if rows <= 32 else 64, tile, padded, target),
        places=base.places,
    )


precisions.base.WHEN_REPLACED.append(decode_plan.cache_clear)


def eight_bits(plan: Plan) -> bool:
    """Whether P V is an 8-bit product, for which V is stored with its tokens side by side."""
    return plan.products[3] in EIGHT


def sides_shape(operand: Operand, head_dim: int, page: int) -> tuple[int, int, int]:
    """Shape of the scales and zeros of a head in a page: (rows, 2 with zeros or else 1, scales of a row)."""
    if not operand.scaled:
        return (0, 1, 0)
    rows, columns = operand.granularity.scale_shape((1, 1, page, head_dim))[2:]
    return (1 if operand.scale == "static" else rows, 1 if operand.symmetric else 2, columns)


def _key_tile(scheme: QuantScheme, page: int) -> int:
    """Keys of a tile: fixed by row_block; else at most a page, and at most what registers hold of decoded keys."""
    if scheme.p.granularity.size:
        return scheme.key_tile
    # with a P without scale the tile does not change results
    decoded = "operand" in (place(scheme.k), place(scheme.v)) and scheme.p.format.largest is None
    return min(scheme.key_tile, max(32, page), 64 if decoded else 128)


def _unit(operand: Operand, product: str) -> float:
    """The value of a 1 in the decoded tile: less than 1 where codes are decoded into the high bits of a byte."""
    high = operand.format.triton_decode_high is not None and product == "tl.int8"
    return 2.0 ** (operand.format.bits - 8) if high else 1.0


def _decode(operand: Operand, unit: float, usual: Any, nvidia: bool) -> Any:
    if unit == 1.0:
        return usual
    precision = operand.format
    return (nvidia and precision.triton_decode_high_ptx) or precision.triton_decode_high


def _widen(operand: Operand, kind: str, nvidia: bool) -> Any:
    from_bytes = nvidia and operand.format.compute == "tl.int8" and kind == "tl.float16"
    return fragments.to_float16_ptx if from_bytes else fragments.by_cast


def _lay(planes: int) -> Any:
    return fragments.in_planes if planes > 1 else fragments.side_by_side


def _candidates(base: Plan, rows: int, tile: int, padded: int, target: targets.Target) -> tuple[Config, ...]:
    """Launches whose tiles fit shared memory by an upper estimate, which counts packed codes as if they were unpacked."""
    bytes_of_key = padded * sum(BYTES[base.products[index]] for index in (1, 3))
    integers = base.products[1] == base.products[3] == "tl.int8" and padded <= 128 and rows <= 16
    table = MANY_ROWS if rows > 32 else INTEGERS if integers else FLOATS
    every = [Config(rows, tile, warps, stages) for warps, stages in table]
    fitting = [config for config in every if config.num_stages * tile * bytes_of_key <= target.shared_bytes - 1024]
    return tuple(fitting or [replace(config, num_stages=1) for config in every[:2]])
