"""Attention to the 16-bit ends of a cache."""

import numpy as np
import pytest
import torch

from tokquant import windows
from tokquant.features import Features
from tokquant.reference import matmul_kept


@pytest.mark.parametrize("product", [matmul_kept, windows._matmul_kept], ids=["on a CPU", "on a GPU"])
def test_a_weight_of_zero_takes_nothing_of_a_value_that_is_not_finite(product):
    p, v = torch.rand(2, 3, 5), torch.randn(2, 5, 4)
    p[:, :2, 1] = p[:, 1:, 3] = 0
    v[:, 1], v[0, 3, 2] = float("nan"), float("inf")
    expected = p @ v.nan_to_num(0, 0, 0)
    expected[:, 2] = expected[0, 0, 2] = float("nan")
    torch.testing.assert_close(product(p, v), expected, equal_nan=True)


def test_finite_values_on_a_cpu_are_multiplied_as_they_are_without_a_copy_that_marks_those_that_are_not(monkeypatch):
    def joined(*_, **__):
        raise AssertionError("a copy of twice the size of V, which takes longer than the product")

    held = windows.Windows((2, 2, 16), 0, 24, 1, torch.float16, torch.device("cpu"))
    k, v = (torch.randn(2, 2, 24, 16).half() for _ in range(2))
    sequence, token = (x.ravel() for x in np.indices((2, 24)))
    held.put(k, v, (sequence, token, token))
    q, lengths = torch.randn(2, 4, 1, 16).half(), np.full(2, 24, np.int32)
    monkeypatch.setattr(torch, "cat", joined)
    out, lse = held.attention(q, lengths, np.zeros(2, np.int32), Features(scale=0.25, causal=True))
    s = 0.25 * q.double() @ k.double().repeat_interleave(2, 1).mT
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), s.softmax(-1) @ v.double().repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
