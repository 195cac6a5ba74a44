"""Chooses the fragment that fills each hole of the attention kernel's template."""

from typing import Any

import torch

from tokquant.kernels.triton import fragments
from tokquant.precisions import Precision
from tokquant.schemes import QuantScheme
from tokquant.schemes.granularity import WHOLE
from tokquant.schemes.placement import place


def fill(
    scheme: QuantScheme,
    encoder: Precision,
    types: dict[str, str],
    *,
    planes: bool,
    tokens_last: bool,
    interpreted: bool,
    nvidia: bool,
) -> dict[str, Any]:
    """The fragment of each hole, by the hole's name.

    Args:
        encoder: the precision that P is encoded in.
        types: types of the operands in their products, by role.
        planes: whether Q and K are multiplied in the order that `meet_in_planes` describes.
        nvidia: whether fragments may be inline PTX.
    """
    q, k, v = scheme.q.format, scheme.k.format, scheme.v.format
    return {
        "decode_q": _decode(q, nvidia),
        "decode_k": _decode(k, nvidia),
        "decode_v": _decode(v, nvidia),
        "lay_q": _lay(q, planes),
        "lay_k": _lay(k, planes),
        "lay_v": lay_v(v, types["v"], tokens_last, nvidia),
        "encode_p": (interpreted and encoder.triton_encode_interpreted) or encoder.triton_encode,
        "address_v": fragments.by_channel if tokens_last else fragments.by_token,
        "order_p": fragments.in_groups if tokens_last else fragments.in_order,
        "product_k": _product(types["q"]),
        "product_v": _product(types["v"]),
        "scale_scores": _scale_scores(scheme),
        "count": _count(scheme),
        "row_reference": fragments.running_maximum if scheme.p.granularity.kind == "unit" else fragments.tile_maximum,
    }


def meet_in_planes(scheme: QuantScheme, padded: bool) -> bool:
    """Whether Q K^T is computed with channels in the order in which K's packed elements hold them, so that K needs no shuffle.

    The sum does not depend on the order. Q is loaded in that order, or packed in the same way.
    """
    q, k = scheme.q.format, scheme.k.format
    if k.packed == 1 or "operand" in (place(scheme.q), place(scheme.k)):
        return False
    return (q.packed == 1 and zero_bits_are_zero(q)) or (q.packed == k.packed and not padded)


def zero_bits_are_zero(precision: Precision) -> bool:
    """Whether a stored element of all zero bits decodes to zeros."""
    nothing = torch.zeros(1, dtype=precision.stored, device="cpu")
    return not precision.decode(precision.unpack(nothing, precision.packed)).any()


def one_scale_a_tile(scheme: QuantScheme) -> bool:
    """Whether all keys of a tile share one scale."""
    return scheme.k.granularity.cover(WHOLE, 1)[0] % scheme.key_tile == 0


def _decode(precision: Precision, nvidia: bool) -> Any:
    return (nvidia and precision.triton_decode_ptx) or precision.triton_decode


def _lay(precision: Precision, planes: bool) -> Any:
    if precision.packed == 1:
        return fragments.as_they_are
    return fragments.in_planes if planes else fragments.side_by_side


def lay_v(precision: Precision, product: str, tokens_last: bool, nvidia: bool) -> Any:
    if precision.packed == 1:
        return fragments.as_they_are
    if tokens_last:
        return fragments.tokens_in_planes
    # multiplied as 8-bit values, just as they are decoded
    as_bytes = product == precision.compute and (product == "tl.int8" or product.startswith("tl.float8"))
    return fragments.side_by_side_ptx if nvidia and as_bytes else fragments.side_by_side


def _product(kind: str) -> Any:
    return fragments.integer_product if kind == "tl.int8" else fragments.float_product


def _scale_scores(scheme: QuantScheme) -> Any:
    if place(scheme.k) != "scores":
        return fragments.scale_by_query
    return fragments.scale_by_tile if one_scale_a_tile(scheme) else fragments.scale_by_key


def _count(scheme: QuantScheme) -> Any:
    if scheme.normalizer == "exact":
        return fragments.exact
    return fragments.nearest_integers if scheme.p.format.compute == "tl.int8" else fragments.rounded
