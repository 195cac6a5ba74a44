"""What kernels take of an H100 and H200, read from machine code: a change that makes a main loop longer is seen here."""

from importlib.metadata import version

import pytest

import tokquant as tq
from tokquant.kernels.plan import plan
from tokquant.kernels.resources import main_loop, sass
from tokquant.schemes import preset, preset_names

# instructions a score in the loop over whole tiles; sm_90, head_dim 128, Triton 3.9
TRITON = version("triton")
BUDGETS = {"int8-fp16": 9.0, "int8-fp8": 9.0, "int8-fast": 11.1, "int8": 15.0, "fp8": 8.5, "int-flash": 14.0}


@pytest.mark.compiled
@pytest.mark.skipif(not TRITON.startswith("3.9."), reason="the budgets are those of Triton 3.9")
@pytest.mark.parametrize("name", BUDGETS)
def test_the_main_loop_keeps_its_budget(name):
    resources = tq.compile(name, head_dim=128, target="sm_90").resources
    assert resources.instructions_per_score <= BUDGETS[name]
    unwanted = {"F2I", "I2F", "LDL", "STL", "STS", "SEL"} & {k for k, count in resources.loop.items() if count > 2}
    assert not unwanted, "conversions, spills and shuffles stay out of the loop"
    assert resources.spill_bytes <= 16 and resources.blocks_per_multiprocessor >= 1
    integer = sum(count for instruction, count in resources.tensor_core.items() if instruction.startswith("IGMMA"))
    assert (integer > 0) is name.startswith("int"), resources.tensor_core


@pytest.mark.compiled
def test_a_loop_without_tensor_cores_is_found_too():
    resources = tq.compile("none", head_dim=64).resources
    assert resources.tensor_core == {} and resources.loop["FFMA"] > 1000


def test_the_main_loop_is_the_shortest_with_products_and_exponentials():
    def instruction(address, text):
        return f"        /*{address:04x}*/                   {text} ;"

    exponentials = [f"MUFU.EX2 R{i}, R{i}" for i in range(8)]
    program = ["MOV R1, R2", *["NOP"] * 3, "IMMA.16832.S8.S8 R4, R5, R6", *exponentials, "@P0 BRA 0x40", *["NOP"] * 4]
    program += ["@P1 BRA 0x0", "EXIT"]
    text = "\n".join(instruction(16 * place, line) for place, line in enumerate(program))
    assert [name for _, name, _ in main_loop(sass(text))] == ["IMMA.16832.S8.S8", *["MUFU.EX2"] * 8, "BRA"]
    assert main_loop([]) == []


@pytest.mark.parametrize("name", preset_names())
def test_every_plan_explains_itself(name):
    import torch

    words = plan(preset(name), head_dim=128, dtype=torch.float16).explain()
    assert set(words) >= {"Q K^T", "P V", "scale of q", "scale of k", "scale of v", "scale of p"}
    assert ("int8 tensor cores" in words["Q K^T"]) is (preset(name).q.format.kind == "int")
    assert ("row's maximum in each tile" in words["scale of p"]) is (preset(name).p.granularity.kind == "row_block")
