"""Quantization kernels as they are launched, compiled for GPUs that are not here."""

import re
from collections import Counter

import pytest
import torch
from factories import qkv
from quantized import by_torch, differences

from tokquant.kernels import generate, resources
from tokquant.kernels import quantize as kernels
from tokquant.kernels.quantize_plan import ScalesPlan
from tokquant.kernels.triton.operands import Coded
from tokquant.schemes import preset, preset_names

# instructions for a value of Q, K and V in all their kernels; sm_90, head_dim 128, fp16, Triton 3.6 and 3.9
BUDGETS = {"int8": (22.5, 21.5, 41), "int8-fast": (22.5, 18.5, 32), "fp8": (17, 17, 24), "kv-int8": (20, 21, 29.5)}
BUDGETS |= {"kv-int4": (37, 58, 65), "kv-int4-kivi": (0, 53, 41)}

DYNAMIC = [name for name in preset_names() if preset(name).k.scale == "dynamic" and name != "none"]


def compiled(name, monkeypatch, d=128, dtype=torch.float16):
    """Plan and compiled kernel of every launch that reads Q, K or V, which takes place in the compiler alone."""
    made = []

    def start(plan, grid, arguments):
        made.append((plan, generate.load(plan).warmup(*arguments, grid=grid, **plan.options())))
        [outputs] = [each for each in arguments if isinstance(each, Coded)]
        for each in outputs:
            if torch.is_tensor(each):
                each.zero_()

    monkeypatch.setattr(kernels, "_launch", start)
    kernels.quantize_operands(*qkv(256, 256, d, heads=4, kv_heads=2, batch=2, dtype=dtype), preset(name))
    return [(plan, kernel) for plan, kernel in made if not isinstance(plan, ScalesPlan)]


def values_of_thread(plan, d=128):
    return plan.tokens * d / (32 * plan.num_warps)


def fused(plan):
    """Fused multiply-adds of a thread: two for each value that is divided."""
    return 2 * values_of_thread(plan) if "fused" in plan.holes else 0


@pytest.mark.compiled
@pytest.mark.parametrize("name", BUDGETS)
def test_a_value_is_quantized_within_its_budget(name, absent_gpu, monkeypatch):
    taken = dict.fromkeys("qkv", 0.0)
    for plan, kernel in compiled(name, monkeypatch):
        _, stack, instructions = resources.machine_code(kernel)
        taken[plan.title[0]] += len(instructions) / values_of_thread(plan)
        names = Counter(name.split(".")[0] for _, name, _ in instructions)
        assert stack == 0 and not {"I2F", "F2I"} & set(names), plan
    assert all(value <= most for value, most in zip(taken.values(), BUDGETS[name], strict=True)), taken


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("name", "absent_gpu"),
    [*((name, 90) for name in DYNAMIC), *((name, 80) for name in ("int8", "int8-fast", "kv-int4", "kv-int2-kivi"))],
    indirect=["absent_gpu"],
)
def test_kernels_of_presets_compile_with_next_to_no_spills_and_read_and_write_vectors(name, absent_gpu, monkeypatch):
    for plan, kernel in compiled(name, monkeypatch):
        _, stack, _ = resources.machine_code(kernel)
        assert stack <= 16, plan
        ptx = kernel.asm["ptx"]
        assert "ld.global.v4.b32" in ptx, plan
        assert plan.name.startswith("extremes") or re.search(r"st\.global\.v[24]\.b32", ptx), plan
        assert ptx.count("fma.rn.f32") == fused(plan), "nothing contracts"
        assert ptx.count("div.rn.f32") <= values_of_thread(plan) / 2, "groups are divided, not values"


@pytest.mark.compiled
@pytest.mark.parametrize(("d", "dtype"), [(48, torch.float32), (256, torch.bfloat16)], ids=str)
def test_other_types_and_head_dims_compile_with_few_spills(d, dtype, absent_gpu, monkeypatch):
    for name in ("int8", "kv-int8"):
        for plan, kernel in compiled(name, monkeypatch, d, dtype):
            assert resources.machine_code(kernel)[1] <= 32, plan


@pytest.mark.compiled
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DYNAMIC)
def test_a_gpu_gives_the_codes_of_the_definition(name, dtype):
    q, k, v = (x.cuda() for x in qkv(300, 1000, 128, heads=4, kv_heads=2, batch=2, dtype=dtype))
    q[0, 0, 3, 5], k[0, 1, 17, 3], v[1, 1, 900] = float("nan"), float("inf"), 0
    made = preset(name)
    for one, other in zip(by_torch(q, k, v, made), kernels.quantize_operands(q, k, v, made), strict=True):
        assert differences(one, other) == []
