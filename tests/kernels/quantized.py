"""What it means that two quantized tensors are equal."""

from dataclasses import fields

import torch

from tokquant.kernels import launch
from tokquant.quantize import quantize_operands


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
