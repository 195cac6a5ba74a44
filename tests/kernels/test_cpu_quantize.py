"""C++ kernels that quantize give what the definition gives: every code and every scale, not nearly but just."""

import math
from dataclasses import replace

import pytest
import torch
from factories import nan_filled, pairwise, qkv, scheme
from quantized import differences, same

import tokquant as tq
from tokquant.calibration.scales import LayerScales
from tokquant.errors import SchemeError
from tokquant.kernels.cpu import build, launch, quantize_plan
from tokquant.kernels.cpu import quantize as kernels
from tokquant.kernels.cpu.quantize_plan import Task
from tokquant.precisions import PRECISIONS, register
from tokquant.quantize import quantize_operands
from tokquant.schemes import preset, preset_names

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")

DYNAMIC = [name for name in preset_names() if preset(name).k.scale == "dynamic"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def kept_builds(tmp_path_factory, monkeypatch):
    """Libraries are kept from test to test."""
    folder = tmp_path_factory.getbasetemp() / "builds"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("TOKQUANT_CACHE_DIR", str(folder))


def differing(q, k, v, made, scales=None):
    """The fields in which the kernels' operands are not those of the definition. Codes that may be NaN are compared as numbers."""
    found = []
    expected = launch.packed(quantize_operands(q, k, v, made, scales), made)
    for one, other in zip(expected, kernels.quantize_operands(q, k, v, made, scales), strict=True):
        fields = differences(one, other)
        if fields == ["codes"] and one.stored_values().isnan().any() and same(one.stored_values(), other.stored_values()):
            fields = []
        found += [f"{name} of {one}" for name in fields]
    return found


@pytest.fixture
def planned(monkeypatch):
    """The tasks that kernels were started for, with outputs that show what is not written."""
    tasks = []
    monkeypatch.setattr(kernels, "plan", lambda task, *rest, plan=kernels.plan: (tasks.append(task), plan(task, *rest))[1])
    return tasks


@pytest.mark.parametrize("name", DYNAMIC)
def test_presets_are_quantized_as_the_definition_says(name, planned):
    made = preset(name)
    assert differing(*qkv(37, 150, 64, 4, 2, dtype=torch.float16), made) == []
    assert len(planned) == 2 + made.q.scaled, "floats of Q stay the tensor they are"


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
# three kernels each, of a second: most are left to the slow run
CHOICES = [pytest.param(*row, marks=[] if place % 20 == 7 else pytest.mark.slow) for place, row in enumerate(CHOICES)]


@pytest.mark.parametrize(("words", "granularity", "scale", "smooth", "transforms", "p", "dtype", "shape"), CHOICES, ids=str)
def test_every_choice_is_quantized_as_the_definition_says(words, granularity, scale, smooth, transforms, p, dtype, shape):
    words = f"{words} {granularity} scale={scale}"
    queries = words.replace(" asymmetric", "") + (" block_mean" if smooth else "")
    try:
        made = scheme(queries, f"{words} {smooth}", f"{words} {smooth}", p, **transforms)
    except SchemeError:  # blocks of V and P that do not go together
        made = scheme(queries, f"{words} {smooth}", f"{words} {smooth}", "int8 row_block:16", **transforms)
    assert differing(*qkv(*shape, dtype), made) == []
