"""What a processor multiplies at most: every step of every sum is done, or a peak would be one that nothing reaches."""

import pytest

from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.peak import STEPS, peaks

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")

SUMS = 12
STEP = {"avx2": lambda x: 0x0303 * (signed(x, 16) + signed(x >> 16, 16)) + 5}
"""Others add the same four products."""
LANES = {
    "avx512_bf16": (64, 32, 16),
    "avx512_vnni": (64, 0, 16),
    "avx_vnni": (32, 0, 8),
    "avx2": (16, 0, 8),
    "neon_i8mm": (16, 0, 4),
    "neon_dotprod": (16, 0, 4),
    "portable": (0, 0, 4),
}
"""Products of integers, of bfloat16 and of floats in an instruction."""


def signed(x, bits):
    return (x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


@pytest.fixture(params=build.compiler().instructions if build.available() else [])
def instructions(request, monkeypatch):
    monkeypatch.setenv(build.CHOICE, request.param)
    return request.param


def test_every_sum_of_integers_takes_every_step(instructions):
    if instructions == "portable":
        assert list(peaks(2)) == ["floats"]
        return
    sums = [i * 0x01010101 for i in range(SUMS)]
    step = STEP.get(instructions, lambda x: x + 4 * 3 * 5)
    for _ in range(5):
        sums = [signed(step(x), 32) for x in sums]
    multiply, _ = peaks(2)["integers"]
    assert multiply.func(5, 3) == 3 * sum(sums) % 2**64


def test_every_sum_of_floats_ends_at_one(instructions):
    multiply, _ = peaks(2)["floats"]
    assert multiply.func(0, 3) == 0 and multiply.func(60, 3) == 3 * SUMS


def test_every_sum_of_bfloat16_takes_every_step(instructions):
    if instructions != "avx512_bf16":
        assert "bfloats" not in peaks(2)
        return
    multiply, _ = peaks(2)["bfloats"]
    assert multiply.func(5, 3) == 3 * SUMS * 5 * 2


def test_operations_are_multiplications_and_additions_of_all_threads(instructions):
    found = {kind: operations for kind, (_, operations) in peaks(2).items()}
    wanted = {
        kind: 2 * SUMS * each * STEPS * 2
        for kind, each in zip(("integers", "bfloats", "floats"), LANES[instructions], strict=True)
        if each
    }
    assert found == wanted
