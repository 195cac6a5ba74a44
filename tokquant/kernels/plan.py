"""Makes all decisions about an attention kernel: from a scheme, the tensors' types and a target to its holes and constants."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch

from tokquant import precisions
from tokquant.bias.factors import block_of
from tokquant.errors import UnsupportedError
from tokquant.kernels import holes, hopper, targets
from tokquant.kernels.candidates import Config, candidates
from tokquant.kernels.products import BYTES, TRITON_TYPES, UNITS, product_types, via
from tokquant.kernels.triton import fragments
from tokquant.kernels.wanted import PLAIN, Wanted
from tokquant.schemes import Operand, QuantScheme
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import Place, lowers_logits, needs_code_sums, place

PLACES: dict[Place, tuple[str, str]] = {
    "none": ("none", "the values are stored as they are"),
    "scores": ("on the scores", "it does not vary along the channels that Q K^T sums over"),
    "q": ("in Q, before Q is quantized", "it varies along the channels that Q K^T sums over, so it cannot wait"),
    "operand": ("decoded before the product", "it varies along what the product sums over, within a tile"),
    "p": ("in P, before P is rounded", "it varies along the tokens that P V sums over"),
    "tile": ("on each tile's product", "it is one for all the tokens that a tile's P V sums over"),
    "output": ("on the output", "it does not vary along the tokens that P V sums over"),
}


@dataclass(frozen=True)
class Plan:
    """The complete description of a kernel before it is generated. Equal plans give equal kernels."""

    name: str
    title: str
    holes: Mapping[str, Any]
    """The fragment that fills each hole of the template."""
    constants: Mapping[str, Any]
    """The template's constexprs: values in bool, int and float, types as Triton names them. A constant always has one kind."""
    products: tuple[str, str, str, str]
    """The types that q, k, p and v have in their products, as Triton's names."""
    candidates: tuple[Config, ...]
    """Launches that tuning may choose; the first is the untuned one, and that of deterministic calls."""

    places: tuple[tuple[str, Place], ...]
    """Where the scales of q, k and v are applied."""

    splits: ClassVar[tuple[int | None, ...]] = (None,)
    """Ways to split the keys between programs, which tuning chooses as it does candidates; here none."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # cached, as every launch looks its kernel up
        return hash((self.name, tuple(self.holes.items()), tuple(self.constants.items()), self.candidates))

    @property
    def config(self) -> Config:
        """The untuned launch configuration."""
        return self.candidates[0]

    def explain(self) -> dict[str, str]:
        """The decisions in words: units that multiply Q K^T and P V, where scales are applied and why, and how P is scaled."""
        q, _, _, v = self.products
        units = (("Q K^T", q), ("P V", v))
        words = {name: UNITS.get(kind, f"{kind.removeprefix('tl.')} tensor cores") for name, kind in units}
        words |= {f"scale of {role}": f"{PLACES[at][0]}: {PLACES[at][1]}" for role, at in self.places}
        if self.constants["LOG2_LARGEST"] == 0:
            words["scale of p"] = "none: the values are rounded to its type"
        elif self.holes["row_reference"] is fragments.tile_maximum:
            words["scale of p"] = f"the row's maximum in each tile of {self.config.block_n} keys"
        else:
            words["scale of p"] = "the row's running maximum"
        if self.holes["order_p"] is fragments.in_groups:
            words["layout of v"] = "tokens side by side, permuted in groups of 16, so that P stays in its registers"
        return words

    def __repr__(self) -> str:
        return f"<plan {self.name}: {self.title}>"


@lru_cache(maxsize=256)
def plan(
    scheme: QuantScheme,
    *,
    head_dim: int,
    dtype: torch.dtype,
    shared_heads: int = 1,
    wanted: Wanted = PLAIN,
    tokens_last: bool = False,
    interpreted: bool = False,
    portable: bool = False,
    target: targets.Target = targets.DEFAULT,
) -> Plan:
    """The plan of an attention kernel for tensors of `dtype`. Raises UnsupportedError for what no Triton kernel can do.

    `target` decides the launch configurations, and between equivalent fragments; `portable` excludes the loop for Hopper, which
    needs rows of codes aligned to 16 bytes.
    """
    _refuse(scheme, head_dim, wanted)
    types = {**product_types(scheme, "qk", dtype), **product_types(scheme, "pv", dtype)}
    q, k, v, p = scheme.q, scheme.k, scheme.v, scheme.p.format
    at = {role: place(getattr(scheme, role)) for role in "qkv"}
    padded = max(32, 1 << (head_dim - 1).bit_length())
    lowered = lowers_logits(scheme)
    natural = wanted.softcap or wanted.mask == "additive" or wanted.bias != "none"
    planes = holes.meet_in_planes(scheme, padded > head_dim)
    constants: dict[str, Any] = {
        "D": head_dim,
        "D_TILE": padded,
        "PADDED": padded > head_dim,
        "SHARED_HEADS": shared_heads,
        "OWN_TYPE": TRITON_TYPES[dtype],
        "LOG2_LARGEST": _log2(p.largest),
        "LOGIT_BASE": 1.0 if natural else math.log2(math.e),
        "FIRST_PHASE": 0 if wanted.left else 1,
        "K_ZERO": at["k"] == "scores" and not k.symmetric,
        "K_ZERO_DECODED": at["k"] == "operand" and not k.symmetric,
        "V_ZERO_DECODED": at["v"] == "operand" and not v.symmetric,
        "V_PER_TOKEN": at["v"] == "p",
        "V_PER_TILE": at["v"] == "tile",
        "V_ON_OUTPUT": at["v"] == "output",
        "V_TOKEN_ZERO": at["v"] == "p" and not v.symmetric,
        "V_TILE_ZERO": at["v"] == "tile" and not v.symmetric,
        "V_OUTPUT_ZERO": at["v"] == "output" and not v.symmetric,
        "V_TOKENS": 16 * v.format.packed if tokens_last else 1,
        "V_STACKED": v.format.packed if tokens_last else 1,
        "TOKENS_FIRST": not tokens_last,
        "TOKENS_LAST": tokens_last,
        "PLANES": planes and q.format.packed == 1,
        "V_COLUMN": int("channel" in v.granularity.kind),
        "V_ROTATED": scheme.rotate_v == "hadamard",
        "V_STAGES": (head_dim & -head_dim).bit_length() - 1,
        "V_NORM": (head_dim & -head_dim) ** -0.5,
        "V_MEAN": v.smooth != "none",
        "BLOCK_MEANS": q.smooth == "block_mean",
        "UNSIGNED_P": needs_code_sums(scheme),
        "CLEAR_TAIL": needs_code_sums(scheme) and not holes.zero_bits_are_zero(v.format),
        "CLEAR_CHANNELS": padded > head_dim and not holes.zero_bits_are_zero(q.format),
        "VARLEN": wanted.varlen,
        "LEFT": wanted.left,
        "RIGHT": wanted.right,
        "SOFTCAP": wanted.softcap,
        "LOWERED_SOFTCAP": wanted.softcap and lowered,
        "LOWERED_LOGITS": lowered and not wanted.softcap and (wanted.lse or wanted.sinks),
        "ADDITIVE_MASK": wanted.mask == "additive",
        "BOOLEAN_MASK": wanted.mask == "boolean",
        "ALIBI": "alibi" in wanted.bias,
        "ALIBI_BOTH": wanted.bias == "alibi",
        "ALIBI_PAST": wanted.bias == "past_alibi",
        "KEY_VECTOR": wanted.bias == "key_vector",
        "LOWRANK": wanted.bias == "lowrank",
        "RANK": wanted.bias_rank,
        "RANK_TILE": block_of(wanted.bias_rank),
        "RANK_PADDED": block_of(wanted.bias_rank) > wanted.bias_rank,
        "DENSE_BIAS": wanted.bias == "dense",
        "NATURAL": natural,
        "SINKS": wanted.sinks,
        "WITH_LSE": wanted.lse,
        "BESIDE": wanted.beside,
    }
    for role in "qkv":
        operand: Operand = getattr(scheme, role)
        tokens, channels = operand.granularity.cover(WHOLE, head_dim) if operand.scaled else (1, head_dim)
        constants |= {
            f"{role.upper()}_PACKED": operand.format.packed,
            f"{role.upper()}_GROUP": tokens,
            f"{role.upper()}_CHANNELS": channels,
            f"{role.upper()}_TYPE": types[role],
            f"{role.upper()}_VIA": via(operand, types[role]),
            f"{role.upper()}_HALF": 0 if operand.symmetric else 2 ** (operand.format.bits - 1),
            f"{role.upper()}_HAS_SCALE": at[role] in ("scores", "operand", "tile", "output"),
            f"{role.upper()}_SCALED": at[role] == "scores",
            f"{role.upper()}_DECODED": at[role] == "operand",
        }
    constants["P_TYPE"] = types["p"]
    if tokens_last:
        constants["V_PACKED"] = 1
    constants["MAY_BE_EMPTY"] = types["q"] != "tl.int8"
    constants["JOINED"] = natural or any(constants[name] for name in ("BOOLEAN_MASK", "BLOCK_MEANS", "V_PER_TOKEN", "K_ZERO"))
    constants["K_PER_TILE"] = at["k"] == "scores" and holes.one_scale_a_tile(scheme)
    constants["K_PER_KEY"] = at["k"] == "scores" and not holes.one_scale_a_tile(scheme)
    wide = "tl.float32" in types.values()
    nvidia = target.backend == "cuda" and not interpreted
    how = dict(planes=planes, tokens_last=tokens_last, interpreted=interpreted, nvidia=nvidia)
    filled = holes.fill(scheme, p.of(dtype), types, **how)
    if wanted.beside:
        filled["product_v"] = fragments.kept_product
    precision_names = "_".join(getattr(scheme, role).precision for role in "qkvp")
    tiles = tuple(tile for tile in _key_tiles(scheme, wide) if not tokens_last or tile >= 16 * v.format.packed)
    made = Plan(
        name=f"attention_{precision_names}",
        title=_title(scheme, head_dim, wanted),
        holes=filled,
        constants=constants,
        products=(types["q"], types["k"], types["p"], types["v"]),
        places=tuple(at.items()),
        candidates=candidates(
            key_tiles=tiles,
            # low-rank factors of a bias take shared memory as channels do
            head_dim=max(padded, constants["RANK_TILE"]) if constants["LOWRANK"] else padded,
            wide=wide,
            masked=wanted.mask != "none" or wanted.bias == "dense",
            biased=wanted.bias != "none" or q.smooth == "block_mean",
            crowded=at["v"] == "p",
            decoded="operand" in (at["k"], at["v"]),
            bytes_of_tokens=_bytes_of_tokens(types, padded, constants),
            target=target,
        ),
    )
    if not (portable or interpreted) and target.name == "sm_90" and hopper.takes(made, scheme) and hopper.available():
        made = replace(made, candidates=(*made.candidates, *hopper.candidates(tiles)))
    if not interpreted:
        _refuse_on(target, made, scheme)
    return made


precisions.base.WHEN_REPLACED.append(plan.cache_clear)


def _key_tiles(scheme: QuantScheme, wide: bool) -> tuple[int, ...]:
    """Values of block_n that change results by P's rounding at most: `row_block` and stored sums allow just one."""
    tile = scheme.key_tile
    if scheme.p.granularity.size or needs_code_sums(scheme):
        return (tile,)
    half, quarter = max(tile // 2, 32), max(tile // 4, 32)
    if scheme.p.format.largest is not None:
        return tuple(dict.fromkeys((tile, half)))
    # without a scale of P the tile matters to speed alone; tiles of float32 and of decoded operands fill registers
    decoded = "operand" in (place(scheme.k), place(scheme.v))
    return tuple(dict.fromkeys((quarter, half) if wide else (half, tile) if decoded else (tile, half)))


def _bytes_of_tokens(types: dict[str, str], head_dim: int, constants: dict[str, Any]) -> tuple[int, int]:
    """Bytes of shared memory for a query, and for a key and its value, as the products take them."""
    q, k, v = (head_dim * BYTES[types[role]] for role in "qkv")
    factors = 2 * constants["RANK_TILE"] if constants["LOWRANK"] else 0
    # a decoded operand takes memory for its codes too
    codes = sum(head_dim // constants[f"{role}_PACKED"] for role in "KV" if constants[f"{role}_DECODED"])
    return q + factors, k + v + codes + factors


def _refuse_on(target: targets.Target, plan: Plan, scheme: QuantScheme) -> None:
    """Raise UnsupportedError for types that `target` lacks."""
    used = [*plan.products, *(f"tl.float8 scales of {r}" for r in "qkv" if getattr(scheme, r).scale_dtype == "fp8_e4m3")]
    used += [getattr(scheme, role).format.compute for role in "qkvp"]
    if not target.fp8 and any("float8" in kind for kind in used):
        raise UnsupportedError(
            f"target: {target.name} has no fp8 of this kind (e4m3fn), which scheme {scheme.name!r} uses; take an int8 scheme, "
            "or sm_89 and newer"
        )


def _refuse(scheme: QuantScheme, head_dim: int, wanted: Wanted) -> None:
    """Raise UnsupportedError for what no kernel does, with what would work."""
    if not 32 <= scheme.key_tile <= 256:
        raise UnsupportedError(
            f"scheme {scheme.name!r}: a key tile of {scheme.key_tile} does not suit a kernel; use row_block 32 to 256, "
            "or backend='reference'"
        )
    if head_dim > 256:
        raise UnsupportedError(f"head_dim {head_dim} is more than a kernel holds; at most 256, or backend='reference'")
    if wanted.bias_rank > 256:
        raise UnsupportedError(
            f"bias: rank {wanted.bias_rank} is more than a kernel holds; at most 256, a dense bias, or backend='reference'"
        )


def _log2(largest: float | None) -> float:
    # rounded to float32 as the kernel will
    return torch.tensor(float(largest or 1), dtype=torch.float64, device="cpu").log2().float().item()


def _title(scheme: QuantScheme, head_dim: int, wanted: Wanted) -> str:
    operands = [
        f"{role} {operand.precision}" + (f" per {operand.granularity}" if operand.format.largest is not None else "")
        for role, operand in (("q", scheme.q), ("k", scheme.k), ("v", scheme.v), ("p", scheme.p))
    ]
    words = {
        "left": "a left bound",
        "right": "a right bound (0 is causal)",
        "softcap": "softcap",
        "sinks": "sinks",
        "lse": "LSE",
        "varlen": "sequences of their own lengths",
        "beside": "other keys beside these",
    }
    features = [word for name, word in words.items() if getattr(wanted, name)]
    features += [f"{wanted.mask} mask"] if wanted.mask != "none" else []
    if wanted.bias != "none":
        features += [
            wanted.bias.replace("_", " ") + " bias" + (f" of rank {wanted.bias_rank}" if wanted.bias == "lowrank" else "")
        ]
    return ", ".join([*operands, f"head_dim {head_dim}"]) + (f"; with {', '.join(features)}" if features else "")
