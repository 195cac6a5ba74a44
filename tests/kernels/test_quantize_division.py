"""Kernels divide by a product with the reciprocal and two fused multiply-adds: codes are those of IEEE division."""

import ctypes
import ctypes.util
import math

import pytest
import torch
import triton
import triton.language as tl
from factories import scheme
from quantized import by_torch, differences

from tokquant.calibration.scales import LayerScales
from tokquant.kernels import quantize as kernels
from tokquant.kernels.triton import scales as fragments
from tokquant.precisions import PRECISIONS

RUNS = (by_torch, kernels.quantize_operands)


def agrees(x, scale, words, zero=None):
    """Whether K `[1, H, N, D]` has the codes of the definition, with a static scale for each head."""
    heads = len(scale)
    tensors = {"k_scale": scale.reshape(heads, 1, 1)} | ({} if zero is None else {"k_zero": zero.reshape(heads, 1, 1)})
    made = scheme("fp16", f"{words} head static", "fp16", "fp16")
    other = torch.zeros(1, heads, 1, x.shape[3], dtype=x.dtype)
    found = zip(*(run(other, x, other, made, LayerScales("layer", tensors)) for run in RUNS), strict=True)
    return not any(differences(one, other) for one, other in found)


def beside(x, ulps=2):
    """Floats and their neighbours, first of all."""
    found = [x]
    for end in (math.inf, -math.inf):
        step = x
        for _ in range(ulps):
            step = torch.nextafter(step, torch.tensor(end))
            found.append(step)
    return torch.cat(found, dim=-1)


def hard_scales():
    """Scales s with an x that lies next to where x / s, rounded to float32, begins to be a tie t: with M of 25 bits half a step
    beside t, s M = d mod 2^25 for the smallest d."""
    found = []
    for tie in torch.arange(0.5, 127.5).tolist():
        middle = int(math.ldexp(tie, 25 - math.frexp(tie)[1]))
        for beyond in (middle - 1, middle + 1):
            found += [d * pow(beyond, -1, 2**25) % 2**25 for d in (-1, 1, 3)]
    return torch.tensor([s for s in found if 2**23 <= s < 2**24], dtype=torch.float64).mul(2.0**-23).float()


SCALES = {
    "where ties are hardest": hard_scales()[::5],
    "of every size": 1.7 * 2.0 ** torch.arange(-126, 128, 11).float(),
    "at the ends": torch.tensor([2.0**-126, 1.1 * 2.0**-126, 2.0**-102, 2.0**-62, 2.0**62, 2.0**63, 2.0**127, 3.4e38]),
}


def of_ties(words, scale):
    """`[1, H, N, D]` for a scale a head: every tie between two codes, what codes stand for, and the floats beside these."""
    values = PRECISIONS[words].values().double()
    values = values[values.abs() <= PRECISIONS[words].largest]
    ties = torch.cat(
        [(values[1:] + values[:-1]) / 2, values, torch.tensor([-0.0, 1e9, -1e9, 1e39, -1e39, math.inf, -math.inf])]
    )
    x = beside((scale.double()[:, None] * ties).float())
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).reshape(1, len(scale), -1, 128)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("words", ["int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"])
def test_ties_and_their_neighbours_have_the_codes_of_a_division(words, scale):
    assert agrees(of_ties(words, scale), scale, words)


@pytest.mark.compiled
@pytest.mark.parametrize("on_ptx", [89, 90], indirect=True)
@pytest.mark.parametrize("words", ["fp8_e4m3", "fp8_e5m2"])
def test_8_bit_floats_are_rounded_once_on_every_gpu_that_has_them(words, on_ptx):
    scale = SCALES["of every size"][::6]
    assert agrees(of_ties(words, scale), scale, words)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("words", ["int8", "int4", "int2"])
def test_ties_above_a_zero_have_the_codes_of_a_division(words, scale):
    zero = -scale * torch.linspace(0.3, 40, len(scale))
    ties = torch.arange(PRECISIONS[words].levels + 2).double() - 0.5
    x = beside((zero.double()[:, None] + scale.double()[:, None] * ties).float().clamp(-3e38, 3e38))
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 128)).reshape(1, len(scale), -1, 128)
    assert agrees(x, scale, f"{words} asymmetric", zero.clamp(-3e38, 3e38))


@pytest.mark.parametrize("words", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_has_the_code_of_a_division(dtype, words):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    scale = torch.tensor([2.0**-10, 0.3, 1 / 127, 500.1])
    assert agrees(every.reshape(1, 1, 512, 128).expand(1, 4, 512, 128), scale, words)


@triton.jit
def fuse(A, B, C, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, fragments.fused_interpreted(tl.load(A + i), tl.load(B + i), tl.load(C + i)))


def test_the_interpreter_fuses_as_c_does():
    c = ctypes.CDLL(ctypes.util.find_library("m"))
    c.fmaf.restype, c.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    n = 4096
    a, b, e = (2.0 ** torch.randint(-3, 3, (n,)).float() * torch.randn(n) for _ in range(3))
    # sums that cancel, that round twice to other numbers than once, that are nothing, and that are no numbers
    e[:1024] = -(a[:1024] * b[:1024])
    a[1024:1536], b[1024:1536], e[1024:1536] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0 ** -torch.linspace(24, 75, 512).round()
    a[1536:1540], b[1536:1540], e[1536:1540] = 0.0, -1.0, torch.tensor([0.0, -0.0, math.inf, math.nan])
    expected = torch.tensor([c.fmaf(*row) for row in zip(a.tolist(), b.tolist(), e.tolist(), strict=True)])
    found = torch.full((n,), math.nan)
    fuse[(1,)](a, b, e, found, n)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) and torch.equal(found.signbit(), expected.signbit())
