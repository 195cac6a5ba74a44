"""Kernels compiled for GPUs that are not here."""

import pytest
import torch

import tokquant as tq

MMA = {"sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma"}
INTEGERS = [(name, target) for name in ("int-flash", "int8", "int8-fast", "int8-fp16") for target in ("sm_80", "sm_90")]


@pytest.mark.compiled
@pytest.mark.parametrize(("name", "target"), [*INTEGERS, ("int8", "sm_89")])
def test_integer_schemes_compile_to_integer_tensor_core_instructions(name, target):
    kernel = tq.compile(name, head_dim=64, causal=True, return_lse=True, target=target)
    ptx = kernel.asm["ptx"]
    assert MMA[target] in ptx and "s8.s8" in ptx
    assert ("f16.f16" in ptx) is (name == "int8-fp16")
    assert kernel.asm["cubin"]


@pytest.mark.compiled
@pytest.mark.parametrize("target", ["sm_89", "sm_90"])
@pytest.mark.parametrize("name", ["int8-fp8", "fp8", "fireq"])
def test_fp8_schemes_compile_to_e4m3_tensor_core_instructions(name, target):
    assert "e4m3.e4m3" in tq.compile(name, head_dim=64, target=target).asm["ptx"]


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_input_type_compiles_and_bf16_values_are_never_cast_to_fp16(dtype):
    ptx = tq.compile("int8-fp16", head_dim=64, dtype=dtype).asm["ptx"]
    assert ("bf16" in ptx) is (dtype == torch.bfloat16)


@pytest.mark.compiled
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_head_dims_compile(head_dim):
    assert tq.compile("int8", head_dim=head_dim).asm["cubin"]


@pytest.mark.compiled
@pytest.mark.parametrize(("name", "mask"), [("int8", "boolean"), ("kv-int4", "additive")])
def test_every_feature_compiles(name, mask):
    features = dict(window=True, mask=mask, softcap=True, sinks=True, return_lse=True, shared_heads=4)
    assert tq.compile(name, head_dim=32, **features).asm["cubin"]


def test_fp8_on_sm_80_says_which_gpus_have_it():
    with pytest.raises(tq.UnsupportedError, match=r"sm_80 has no fp8.*sm_89"):
        tq.compile("fp8", head_dim=64, target="sm_80")


@pytest.mark.parametrize("target", ["sm80", "ampere", "sm_75", "sm_129", "sm_", 90, "sm_٩٠"])
def test_a_target_that_is_none_is_named(target):
    with pytest.raises(ValueError, match="target: "):
        tq.compile("int8", head_dim=64, target=target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "fp16", ["fp16"]], ids=str)
def test_a_dtype_that_is_none_is_named(dtype):
    with pytest.raises(TypeError, match="dtype: "):
        tq.compile("int8", head_dim=64, dtype=dtype)


@pytest.mark.parametrize("head_dim", [0, -1, 64.0, True, "64"])
def test_a_head_dim_that_is_none_is_named(head_dim):
    with pytest.raises(ValueError, match="head_dim: "):
        tq.compile("int8", head_dim=head_dim)


def test_a_head_dim_beyond_a_kernel_is_refused():
    with pytest.raises(tq.UnsupportedError, match="head_dim 512"):
        tq.compile("int8", head_dim=512)


@pytest.mark.parametrize(
    "wrong", [dict(causal="no"), dict(softcap=-1.0), dict(window=(3, 3)), dict(sinks=torch.zeros(3))], ids=str
)
def test_a_feature_is_there_or_not(wrong):
    with pytest.raises(TypeError, match=f"{next(iter(wrong))}: .* is not a bool"):
        tq.compile("int8", head_dim=64, **wrong)


@pytest.mark.parametrize("wrong", [dict(mask="boolean"), dict(bias="dense")], ids=str)
def test_sequences_of_their_own_lengths_have_no_value_a_pair(wrong):
    with pytest.raises(tq.UnsupportedError, match="no mask and no dense bias"):
        tq.compile("int8", head_dim=64, varlen=True, **wrong)


def test_the_interpreter_cannot_compile_and_says_so(interpreter):
    with pytest.raises(tq.UnsupportedError, match="unset TRITON_INTERPRET"):
        _ = tq.compile("int8", head_dim=64).asm
