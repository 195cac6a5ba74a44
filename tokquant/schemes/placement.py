"""Where the scales of each operand enter the arithmetic: decided here alone, for quantization, emulation and kernels."""

from functools import lru_cache
from typing import Literal

import torch

from tokquant import precisions
from tokquant.schemes.scheme import Operand, QuantScheme

Place = Literal["none", "scores", "q", "operand", "p", "tile", "output"]


def place(operand: Operand) -> Place:
    """Where the operand's scale is applied.

    none     there is no scale
    scores   on the integer scores: the scale does not vary along the channels that Q K^T contracts
    q        K per channel: multiplied into Q before Q is quantized
    operand  the scale varies along what the product contracts: decoded to the input's own type before it
    p        V per token: into P before P is quantized
    tile     V per block of tokens: on each key tile's product
    output   V per channel, head or tensor: on the output
    """
    kind = operand.granularity.kind
    if not operand.scaled:
        return "none"
    if kind == "group":
        return "operand"
    if operand.role == "v":
        return {"token": "p", "block": "tile", "channel_block": "tile"}.get(kind, "output")  # type: ignore[return-value]
    if kind == "channel" and operand.role == "k":
        return "q"
    return "operand" if kind in ("channel", "channel_block") else "scores"


def lowers_logits(scheme: QuantScheme) -> bool:
    """Whether logits lack q . c, as K is quantized without an offset c: softcap, sinks and LSE need it added back."""
    return scheme.k.smooth != "none" or (place(scheme.k) == "q" and not scheme.k.symmetric)


def needs_code_sums(scheme: QuantScheme) -> bool:
    """Whether V carries the sums of its codes, to correct for an unsigned P that is shifted to fit signed integers."""
    integers = scheme.v.format.compute == "tl.int8" and place(scheme.v) != "operand"
    return scheme.p.format.code_zero != 0 and integers


def needs_query_sums(scheme: QuantScheme) -> bool:
    """Whether Q carries the sums of its codes, which multiply K's zeros in the scores."""
    return not scheme.k.symmetric and place(scheme.k) == "scores"


@lru_cache(maxsize=1024)  # every call asks
def as_bytes(scheme: QuantScheme, role: str) -> bool:
    """Whether the CPU's kernels multiply K by Q (role "k"), or V by P ("v"), as int8; otherwise as floats."""
    operand, other = getattr(scheme, role), scheme.q if role == "k" else scheme.p
    if role == "v":
        if other.format.cpp_encode != precisions.get("int8").cpp_encode:
            return False  # bytes of P are the nearest integers
    elif place(scheme.q) == "operand":
        return False
    return place(operand) != "operand" and operand.format.compute == other.format.compute == "tl.int8"


precisions.base.WHEN_REPLACED.append(as_bytes.cache_clear)


def in_bfloat(scheme: QuantScheme, role: str, dtype: torch.dtype) -> bool:
    """Whether bfloat16 holds every operand of a product, K and Q or V and P, exactly; `dtype` is that of the tensors."""

    def held(x: Operand) -> bool:
        return dtype == torch.bfloat16 if place(x) == "operand" else x.format.of(dtype).in_bfloat

    if role == "k":
        return held(scheme.k) and held(scheme.q)
    return held(scheme.v) and scheme.p.format.of(dtype).in_bfloat
