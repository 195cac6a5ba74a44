"""The main loop for Hopper: which kernels support it, and its launch configurations. Used only where tuning chose it."""

from functools import cache
from typing import TYPE_CHECKING

from tokquant.kernels.candidates import Config
from tokquant.kernels.products import EIGHT
from tokquant.kernels.triton import fragments
from tokquant.precisions import bf16, fp8_e4m3, fp8_e5m2, fp16, int8
from tokquant.schemes import QuantScheme

if TYPE_CHECKING:
    from tokquant.kernels.plan import Plan

SIXTEEN = ("tl.float16", "tl.bfloat16")
AS_STORED = tuple(each.decode_tile for each in (int8, fp8_e4m3, fp8_e5m2, fp16, bf16))
"""The decoders that do nothing: tensor cores multiply such codes as they are stored."""

ABSENT = (
    "PADDED", "K_ZERO", "V_TOKEN_ZERO", "V_TILE_ZERO", "V_OUTPUT_ZERO", "V_ROTATED", "BLOCK_MEANS", "CLEAR_TAIL", "VARLEN",
    "LEFT", "SOFTCAP", "ADDITIVE_MASK", "BOOLEAN_MASK", "ALIBI", "KEY_VECTOR", "LOWRANK", "DENSE_BIAS", "SINKS",
)  # fmt: skip
"""Features that this loop lacks, as constants of a plan."""


def takes(plan: "Plan", scheme: QuantScheme) -> bool:
    """Whether the loop supports a plan.

    It takes Q and K in 8 bits; P and V in 8 bits with V's tokens side by side, or in the tensors' own 16-bit type; head_dim 64
    or 128; and no feature that changes scores but a causal mask.
    """
    constants, holes = plan.constants, plan.holes
    return (
        constants["D"] in (64, 128)
        and all(kind in EIGHT for kind in plan.products[: 4 if constants["TOKENS_LAST"] else 2])
        and (
            constants["TOKENS_LAST"]
            # fewer bits would have to be decoded first
            or (scheme.v.format.bits == 16 and plan.products[3] == constants["OWN_TYPE"] in SIXTEEN)
        )
        and all(holes[f"decode_{role}"] in AS_STORED for role in "qkv")
        and not any(constants[name] for name in ABSENT)
        # this loop sums P before it is rounded to a float, and `fragments.rounded` after
        and holes["count"] in (fragments.exact, fragments.nearest_integers)
        # per-tile scales are copied in words of 32 bits
        and not (constants["K_PER_KEY"] and scheme.k.scale_dtype != "fp32")
        and not (constants["V_PER_TILE"] and scheme.v.scale_dtype != "fp32")
    )


@cache
def available() -> bool:
    """Whether this Triton has Gluon as the loop needs it."""
    try:
        from tokquant.kernels.gluon import template  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def candidates(key_tiles: tuple[int, ...]) -> tuple[Config, ...]:
    """Launch configurations, with the untuned tile of keys if registers hold its scores.

    Either 64 queries and four warps, and two blocks fit a multiprocessor; or 128 queries, eight warps that compute and four
    that copy.
    """
    launches = [(block_m, warps, stages) for block_m, warps in ((64, 4), (128, 12)) for stages in (2, 3)]
    return tuple(
        Config(m, tile, warps, stages, "hopper") for tile in key_tiles[:1] if tile in (64, 128) for m, warps, stages in launches
    )
