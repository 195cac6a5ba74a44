"""Seeded faults in quantization kernels: each must be seen by the comparison with the definition."""

import linecache
import math
from functools import cache

import pytest
import torch
from factories import qkv, scheme
from quantized import by_torch, differences

from tokquant.calibration.scales import LayerScales
from tokquant.kernels import generate
from tokquant.kernels import quantize as kernels
from tokquant.schemes import preset

INT4 = scheme("int4", "int4 group:16 asymmetric", "int4 token", "int8 row_block:32")
TURNED = scheme("int8 head", "int8 block:16 mean scale=fp8_e4m3", "int4 channel mean", "int8 row_block:32", rotate="hadamard")
STATIC = scheme("int8", "int8 tensor static", "int8 tensor static", "int8 row_block:32")

# scheme, what stands in kernels, what takes its place
MUTATIONS = {
    "the clamp lost": (STATIC, "tl.clamp(y, -LARGEST, LARGEST,", "tl.clamp(y, -LARGEST, 2.0 * LARGEST,"),
    "the clamp from below lost": (STATIC, "tl.clamp(y, -LARGEST, LARGEST,", "tl.clamp(y, -2.0 * LARGEST, LARGEST,"),
    "the maximum of a column": (preset("int8"), "tl.max(tl.max(bits.reshape(", "tl.max(tl.min(bits.reshape("),
    "the scale of another block": (TURNED, ")) // SCALE_TOKENS", ")) // SCALE_TOKENS + 1"),
    "the scale of the place, not of the token": (
        preset("kv-int8"),
        "* GROUP_TOKENS, PACKED)",
        "* GROUP_TOKENS, 1) * 0 + place",
    ),
    "nibbles swapped": (INT4, "return (even | (odd << 4))", "return (odd | (even << 4))"),
    "tokens not permuted": (preset("int8"), "((column & 2) << 2) | ((column & 12) >> 1) | (column & 1)", "column"),
    "tokens of an element side by side": (INT4, "tl.permute(y, 0, 2, 1)", "y"),
    "rounding cut": (preset("int-flash"), "x, 0.0) + 12582912.0)", "x - 0.5, 0.0) + 12582912.0)"),
    "ties away from zero": (preset("int-flash"), "x, 0.0) + 12582912.0)", "x * (1 + 1e-6), 0.0) + 12582912.0)"),
    "the mean not subtracted": (preset("int8"), "y -= tl.load(offset_at", "y -= 0 * tl.load(offset_at"),
    "NaN dropped": (preset("int-flash-half"), "tl.where(there, tl.abs(x)", "tl.where(there & (x == x), tl.abs(x)"),
    "NaN dropped from minima": (INT4, "bitcast=True), 0x7FC00000)", "bitcast=True), 0)"),
    "a division by the reciprocal": (preset("int-flash"), "fused(fused(quotient, divisor, y),", "fused(0.0 * y,"),
    "what a quotient lacks rounded twice": (preset("int-flash"), "fused(quotient, divisor, y)", "(quotient * divisor + y)"),
    "what a quotient lacks lost below normal numbers": (preset("int-flash"), "scale < 2.2e-19, 1.84", "scale < 0.0, 1.84"),
    "a scale in e4m3 rounded to the nearest": (TURNED, "+ 0xFFFFF)", "+ 0x7FFFF)"),
    "a group of zeros with a scale of zero": (preset("int-flash"), "highest == 0.0, 1.0", "highest == 0.0, 0.0"),
    "the norm multiplied first": (
        TURNED,
        "y = hadamard(y, TOKENS, D_TILE, STAGES) * NORM",
        "y = hadamard(y * NORM, TOKENS, D_TILE, STAGES)",
    ),
    "zeros of integers not halved": (INT4, "- 12582912.0 - HALF", "- 12582912.0"),
    "the tail of tokens not cleared": (preset("int8"), "y = tl.where(here[:, None], y, 0.0).", "y = y."),
    "a token of nothing that weighs": (preset("kv-int8"), "(values + HALF != 0)", "(values + HALF != 1)"),
    "the zero of another group": (INT4, "tl.store(Y.zero + scale_at", "tl.store(Y.zero + scale_at + 1"),
}  # fmt: skip


def agrees(made) -> bool:
    """Whether kernels give what the definition gives, for ragged lengths and a value of each kind."""
    q, k, v = qkv(70, 90, 32, batch=2)
    q[0, 0, 3, 5], k[0, 1, 17, 3], k[1, 1, 2, 20] = math.nan, math.inf, math.nan
    q[0, 1, 4], v[0, 0, 7], v[1, 1, 89] = 0, 0, 0
    # ties, and what is one once it is divided
    ties, steps = torch.linspace(-63.5, 63.5, 32)[1:].round() + 0.5, torch.linspace(0.01, 9, 70)[:, None]
    q[1, 0, :, 0], q[1, 0, :, 1:] = 127.0, ties
    q[1, 1, :, :1], q[1, 1, :, 1:] = 127 * steps, ties * steps
    q[1, 1, 35:] *= 2.0**-128
    scales = None
    if made.k.scale == "static":
        scales = LayerScales("layer", {f"{role}_scale": torch.full((1, 1, 1), 0.01) for role in "kv"})
    found = zip(by_torch(q, k, v, made, scales), kernels.quantize_operands(q, k, v, made, scales), strict=True)
    return not any(differences(one, other) for one, other in found)


agrees_as_it_is = cache(agrees)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_seeded_fault_is_seen(name, monkeypatch):
    made, old, new = MUTATIONS[name]
    assert agrees_as_it_is(made), "the kernels as they are"
    render, found = generate.render, []

    def mutated(plan, *loop):
        text = render(plan, *loop)
        found.append(old in text)
        return text.replace(old, new)

    monkeypatch.setattr(generate, "render", mutated)
    generate.load.cache_clear()
    linecache.clearcache()
    seen = not agrees(made)
    generate.load.cache_clear()
    assert any(found), "the text to change is there"
    assert seen
