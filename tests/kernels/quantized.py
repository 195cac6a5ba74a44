"""Schemes of every kind to quantize by, and what it means that two quantized tensors are equal."""

from dataclasses import fields

import torch
from factories import pairwise, scheme

from tokquant.errors import SchemeError
from tokquant.kernels import launch
from tokquant.quantize import quantize_operands

FLOATS = [torch.float16, torch.bfloat16, torch.float32]

CHOICES = pairwise(
    words=["int8", "int8 asymmetric", "int4", "int4 asymmetric", "int2", "int2 asymmetric", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"],
    granularity=["token", "tensor", "head", "channel", "block:16", "block:256", "channel_block:32",
                 "channel_block:256", "group:16"],
    scale=["fp32", "fp16", "fp8_e4m3"],
    smooth=["", "mean"],
    transforms=[{}, {"rotate": "hadamard", "rotate_v": "hadamard"}, {"balance": "channel"},
                {"balance": "rope_pairs", "rotate": "hadamard"}],
    p=["int8 row_block:64", "uint8 row_block:64", "uint8 row_block:256", "fp16"],
    dtype=FLOATS,
    shape=[(33, 70, 32, 4, 1, 2), (130, 16, 48, 1, 1, 1), (3, 1, 16, 2, 1, 2), (5, 300, 80, 1, 1, 1), (20, 129, 160, 1, 1, 1)],
)  # fmt: skip


MISFITS = [
    ("int8 token scale=fp16", 1e8, "k: a scale of .* does not fit scale_dtype fp16"),
    ("int2 head scale=fp8_e4m3", 500.0, "k: a scale of 500 does not fit scale_dtype fp8_e4m3"),
    ("int4 token asymmetric scale=fp8_e4m3", -500.0, "k: a zero of 500 does not fit"),
    ("int8 token asymmetric scale=fp16", -1e6, "k: a zero of 1e.06 does not fit"),
    ("int8 token asymmetric", torch.tensor([-3e38, 3e38]), "k: values from -3e.38 to 3e.38 span more than float32 holds"),
    ("int4 head asymmetric", torch.tensor([-3e38, 3e38]), "k: values from -3e.38 to 3e.38 span more than float32 holds"),
    ("int4 channel asymmetric scale=fp8_e4m3", -500.0, "k: a zero of 500 does not fit"),
    ("int8 block:256 scale=fp16", 1e8, "k: a scale of .* does not fit scale_dtype fp16"),
    ("fp16 mean", 1e6, "k: a value of .* does not fit fp16; use precision: bf16"),
]
"""Words of K, values that its types do not hold, and what is said of them."""


def chosen(words, granularity, scale, smooth, transforms, p):
    """The scheme of one of these choices, with another P where blocks of V do not go together with that."""
    words = f"{words} {granularity} scale={scale}"
    queries = words.replace(" asymmetric", "") + (" block_mean" if smooth else "")
    try:
        return scheme(queries, f"{words} {smooth}", f"{words} {smooth}", p, **transforms)
    except SchemeError:
        return scheme(queries, f"{words} {smooth}", f"{words} {smooth}", "int8 row_block:16", **transforms)


def by_torch(q, k, v, made, scales=None):
    return launch.packed(quantize_operands(q, k, v, made, scales), made)


def same(a, b):
    """Equal in type, shape and every value; NaN is NaN whatever its bits."""
    if a is None or b is None:
        return a is b
    if not torch.is_tensor(a):
        return a == b
    a, b = (x.contiguous().float() if x.is_floating_point() else x for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())


def differences(one, other):
    """The fields of two quantized tensors that differ; sums of floats may by float32's rounding."""
    found = [field.name for field in fields(one) if field.name not in ("frame", "logit_offset")]
    found = [name for name in found if not same(getattr(one, name), getattr(other, name))]
    found += [field.name for field in fields(one.frame) if not same(*(getattr(x.frame, field.name) for x in (one, other)))]
    a, b = one.logit_offset, other.logit_offset
    if (a is None) != (b is None) or (a is not None and not torch.allclose(a, b, rtol=1e-5, atol=1e-4, equal_nan=True)):
        found.append("logit_offset")
    return found
