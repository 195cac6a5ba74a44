"""Compares a kernel's output with float64 attention on the same codes."""

import torch
from factories import bounds, exact_operands, gpu_rounding

from tokquant.inputs import features_of
from tokquant.reference import oracle


def assert_exact(out, lse, operands, s, **given):
    """Assert that output and LSE differ from float64 on the same codes by P's rounding and a GPU's arithmetic at most."""
    features = features_of(*operands[:2], **given)
    exact, exact_lse = oracle(*exact_operands(*operands), features)
    most, most_lse = bounds(operands, s, features)
    reach, more = operands[2].dequantize(torch.float64).abs().max(), gpu_rounding(out, s)
    assert bool(((out - exact).abs() <= most + more * reach).all())
    assert bool(((lse - exact_lse).abs() <= most_lse + 4 * more)[exact_lse.isfinite()].all())
    assert torch.equal(lse[~exact_lse.isfinite()].double(), exact_lse[~exact_lse.isfinite()])
