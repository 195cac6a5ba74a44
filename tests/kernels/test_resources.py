"""What kernels take of an H100 and H200, read from machine code: a change that makes a main loop longer is seen here."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import tokquant as tq
from tokquant.kernels import targets
from tokquant.kernels.plan import plan
from tokquant.kernels.resources import Resources, amdgcn, main_loops, sass
from tokquant.kernels.roofline import predict
from tokquant.schemes import preset, preset_names
from tokquant.schemes.granularity import parse

# instructions a score in the loop over whole tiles; sm_90, head_dim 128, Triton 3.9
TRITON = version("triton")
BUDGETS = {"int8-fp16": 8.8, "int8-fp8": 8.7, "int8-fast": 11.0, "int8": 14.7, "fp8": 8.2, "int-flash": 13.6}
MORE_A_KEY = {"int8-token": 16.6, "kv-int8": 15.8, "kv-int4": 24.5}  # whose keys have scales, weights and zeros of their own
K_A_TOKEN = {"int8-fp16": 10.5, "int8-fp8": 10.5}


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
@pytest.mark.skipif(not TRITON.startswith("3.9."), reason="the budgets are those of Triton 3.9")
@pytest.mark.parametrize("name", MORE_A_KEY)
def test_values_of_their_own_for_each_key_keep_to_a_budget(name):
    kernel = tq.compile(name, head_dim=128, target="sm_90")
    assert kernel.resources.instructions_per_score <= MORE_A_KEY[name]


@pytest.mark.compiled
@pytest.mark.skipif(not TRITON.startswith("3.9."), reason="the budgets are those of Triton 3.9")
@pytest.mark.parametrize("name", K_A_TOKEN)
def test_a_scale_for_each_token_of_k_costs_little(name):
    k = preset(name).k.model_copy(update={"granularity": parse("token")})
    kernel = tq.compile(preset(name).model_copy(update={"k": k}), head_dim=128, target="sm_90")
    assert kernel.resources.instructions_per_score <= K_A_TOKEN[name]


PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()


@pytest.mark.compiled
@pytest.mark.skipif(not TRITON.startswith("3.9."), reason="the page's counts are those of Triton 3.9")
@pytest.mark.parametrize(("name", "d"), [("int8-fp8", 128), ("int8-fast", 64)])
def test_the_page_about_gpus_has_the_predictions_of_what_is_compiled(name, d):
    kernel = tq.compile(name, head_dim=d, target="sm_90")
    found, made = kernel.resources, kernel.prediction
    counts = (f"{found.instructions_per_score:.1f}", f"{1e3 * made.products:.0f}", f"{1e3 * made.instructions:.0f}")
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` | {d} |")]
    cells = [cell.strip() for cell in row.split("|")[3:-1]]
    assert cells == [*counts, f"{made.serial_tops:.0f}", f"{made.roofline_tops:.0f}", str(found.spill_bytes or "")]


def test_every_preset_is_on_the_page_about_gpus():
    assert all(PAGE.count(f"\n| `{name}` | ") == 2 for name in preset_names())


TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100"]
LIKELY = {"int8-fp8": 4, "fp8": 4, "fp8-rotated": 4, "kv-int4": 5, "fireq": 5, "int4": 1}  # on sm_90, where it is not the first
OFTEN = {("sm_80", "int-flash"), ("sm_89", "kv-fp8"), ("sm_100", "int8-fast"), *(("sm_90", name) for name in preset_names())}
HERE = [
    pytest.param(target, name, marks=[] if (target, name) in OFTEN else pytest.mark.slow)
    for target in TARGETS
    for name in preset_names()
]


@pytest.mark.compiled
@pytest.mark.parametrize(("target", "name"), HERE)
def test_a_preset_has_a_candidate_that_fits_and_spills_nothing(target, name):
    try:
        kernel = tq.compile(name, head_dim=128, target=target)
    except tq.UnsupportedError as error:
        assert target == "sm_80" and "fp8" in str(error)
        return
    candidates = kernel.candidates()
    likely = candidates.pop(LIKELY.get(name, 0))
    found = (each.resources for each in (likely, *candidates))
    assert any(resources.fits and resources.spill_bytes == 0 for resources in found)


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["int8-fast", "int-flash"])
def test_a_kernel_for_amd_is_measured_too(name):
    resources = tq.compile(name, head_dim=64, target="gfx942").resources
    assert resources.fits and resources.spill_bytes == 0
    assert any("i32" in instruction and "i8" in instruction for instruction in resources.tensor_core)
    assert 5 < resources.instructions_per_score < 30


def resources_of(instructions):
    return Resources(
        registers=200, spill_bytes=0, shared_bytes=0, blocks_per_multiprocessor=1,
        instructions_per_score=instructions, loop={}, tensor_core={},
    )  # fmt: skip


def test_the_model_is_products_then_whatever_softmax_waits_for():
    made = plan(preset("int8-fast"), head_dim=128, dtype=torch.float16)
    h100 = targets.get("sm_90")
    few, many = (predict(resources_of(count), made, 128, h100) for count in (4.0, 16.0))
    # 2 x 128 operations a product at 8192 a clock; 16 exponentials a clock
    assert few.products == many.products == 2 * 256 / 8192 and few.exponentials == 1 / 16
    whole = 132 * 1.83e9 * 4 * 128 / 1e12
    assert few.serial_tops == pytest.approx(whole / (0.0625 + 0.0625)) and few.roofline_tops == pytest.approx(whole / 0.0625)
    assert many.serial_tops == pytest.approx(whole / (0.0625 + 16 / 128)) and many.share == pytest.approx(1 / 3)


def test_products_of_p_and_v_run_beside_the_softmax_in_the_loop_for_hopper():
    made = plan(preset("int8-fast"), head_dim=128, dtype=torch.float16)
    few, many = (predict(resources_of(count), made, 128, targets.get("sm_90"), "hopper") for count in (1.0, 16.0))
    whole = 132 * 1.83e9 * 4 * 128 / 1e12
    assert few.serial_tops == pytest.approx(whole / (1 / 32 + 1 / 16)), (
        "exponentials, which take longer than half of the products"
    )
    assert many.serial_tops == pytest.approx(whole / (1 / 32 + 1 / 8)) and many.roofline_tops == few.roofline_tops
    assert many.clocks(0.5) == pytest.approx(1 / 32 + 1 / 8 + 0.5)


def test_half_precision_products_take_twice_as_long():
    made = plan(preset("int8-fp16"), head_dim=128, dtype=torch.float16)
    assert predict(resources_of(8.0), made, 128, targets.get("sm_90")).products == 256 / 8192 + 256 / 4096


@pytest.mark.parametrize(
    ("capability", "name"), [((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120"), ((8, 7), "sm_86"), ((7, 5), "sm_80")]
)
def test_a_gpu_is_the_nearest_target_that_is_not_newer(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert targets.of(torch.device("cuda", 0)).name == name


@pytest.mark.compiled
def test_a_loop_without_tensor_cores_is_found_too():
    resources = tq.compile("none", head_dim=64).resources
    assert resources.tensor_core == {} and resources.loop["FFMA"] > 500


def test_a_loop_of_amd_goes_back_to_a_label():
    exponentials = [f"\tv_exp_f32_e32 v{i}, v{i}" for i in range(8)]
    lines = ["f:", "\ts_mov_b32 s0, 0", ".LBB0_1:", "\tv_mfma_i32_32x32x16_i8 v[0:15], v[16:17], v[18:19], 0", *exponentials]
    lines += ["\ts_cbranch_scc1 .LBB0_1", ".LBB0_2:", "\ts_cbranch_scc0 .LBB0_2", "\ts_endpgm"]
    [loop] = main_loops(amdgcn("\n".join(lines)))
    assert [name for _, name, _ in loop] == ["v_mfma_i32_32x32x16_i8", *["v_exp_f32_e32"] * 8, "s_cbranch_scc1"]


def test_the_main_loop_is_the_shortest_with_products_and_exponentials():
    def instruction(address, text):
        return f"        /*{address:04x}*/                   {text} ;"

    exponentials = [f"MUFU.EX2 R{i}, R{i}" for i in range(8)]
    program = ["MOV R1, R2", *["NOP"] * 3, "IMMA.16832.S8.S8 R4, R5, R6", *exponentials, "@P0 BRA 0x40", *["NOP"] * 4]
    program += ["@P1 BRA 0x0", "EXIT"]
    text = "\n".join(instruction(16 * place, line) for place, line in enumerate(program))
    [loop] = main_loops(sass(text))
    assert [name for _, name, _ in loop] == ["IMMA.16832.S8.S8", *["MUFU.EX2"] * 8, "BRA"]
    assert main_loops([]) == []


def test_roles_have_loops_of_their_own():
    def loop(place, *names):
        return [*((place + each, name, "") for each, name in enumerate(names)), (place + len(names), "BRA", str(place))]

    products, exponentials = ["HGMMA.64x64x16.F32"], ["MUFU.EX2"] * 4
    whole = [loop(place, *products, *exponentials) for place in (100, 200)]
    edge, copying = loop(300, *products, *exponentials, "SEL"), loop(400, "LDGSTS", "IADD3")
    program = [each for part in (*whole, edge, copying, loop(500, "NOP")) for each in part]
    again = (600, "BRA", "90")  # all of it once more
    assert main_loops([*program, again], roles=3) == [*whole, copying]


@pytest.mark.parametrize("name", preset_names())
def test_every_plan_explains_itself(name):
    words = plan(preset(name), head_dim=128, dtype=torch.float16).explain()
    assert set(words) >= {"Q K^T", "P V", "scale of q", "scale of k", "scale of v", "scale of p"}
    assert ("int8 tensor cores" in words["Q K^T"]) is (preset(name).q.format.kind == "int")
    assert ("row's maximum in each tile" in words["scale of p"]) is (preset(name).p.granularity.kind == "row_block")
