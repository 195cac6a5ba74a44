"""What a launch costs the CPU beside Triton's own part: each of its lookups is one of thousands a second."""

from dataclasses import replace

import pytest
import torch
from factories import scheme

import tokquant as tq
from tokquant.kernels import generate
from tokquant.kernels.cpu.quantize_plan import task_of
from tokquant.kernels.decode_plan import decode_plan
from tokquant.kernels.plan import plan
from tokquant.kernels.quantize_plan import QuantizePlan
from tokquant.kernels.quantize_plan import plan as quantize_plan
from tokquant.kernels.quantize_task import Task
from tokquant.precisions.base import PRECISIONS, register
from tokquant.transforms import Frame

MADE = dict(head_dim=64, dtype=torch.float16)
PLANS = {
    "attention": lambda: plan.__wrapped__(tq.preset("int8"), **MADE),
    "decoding": lambda: decode_plan.__wrapped__(tq.preset("kv-int8"), page=128, **MADE),
    "quantization": lambda: quantize_plan.__wrapped__(Task(spec=tq.preset("int8").q, step="both", **MADE)),
}


@pytest.mark.parametrize("made", PLANS.values(), ids=PLANS)
def test_a_plan_is_hashed_once_and_equal_plans_are_one_key(made):
    class Counted(dict):
        read = 0

        def items(self):
            Counted.read += 1
            return super().items()

    one, other = made(), made()
    assert one is not other and one == other and hash(one) == hash(other)
    fresh = made()
    object.__setattr__(fresh, "constants", Counted(fresh.constants))
    assert hash(fresh) == hash(fresh) == hash(one) and Counted.read == 1


def test_a_plan_of_pages_is_none_of_attention():
    of_pages = PLANS["decoding"]()
    assert of_pages != PLANS["attention"]() and of_pages != quantize_plan(Task(spec=tq.preset("int8").q, step="both", **MADE))


@pytest.mark.compiled
@pytest.mark.parametrize("made", PLANS.values(), ids=PLANS)
def test_constants_are_in_a_kernels_key_and_compared_at_no_launch(made):
    found = made()
    kernel = generate.load(found)
    assert not kernel.used_global_vals
    generate.load.cache_clear()
    name = "D_TILE" if isinstance(found, QuantizePlan) else "LOGIT_BASE"
    object.__setattr__(found, "constants", {**found.constants, name: 128})
    found.__dict__.pop("_hash")
    assert generate.load(found).cache_key != kernel.cache_key


def test_a_task_on_a_cpu_is_made_once_and_anew_for_a_precision_that_was_replaced():
    given = scheme("int8", "int8", "int8", "int8"), "k", 64, torch.float32, Frame().steps()
    task = task_of(*given)
    assert task_of(*given) is task and task.as_bytes
    eight = PRECISIONS["int8"]
    try:
        register(replace(eight, cpp_quantize=""), replace=True)
        assert task_of(*given) is None, "the definition's"
        register(replace(eight, compute="tl.float16"), replace=True)
        assert not task_of(*given).as_bytes
    finally:
        register(eight, replace=True)
    assert task_of(*given) == task
