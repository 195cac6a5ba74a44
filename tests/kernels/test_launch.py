"""The very arguments of a launch, specialized and compiled as for a GPU, on a machine without one."""

import pytest
import torch
from factories import SLOPES, qkv, some_factors, some_mask

import tokquant as tq
from tokquant.inputs import features_of
from tokquant.kernels import generate, launch

CALLS = {
    "int8, causal": ("int8", dict(causal=True)),
    "kv-int4 with a window, softcap and sinks": ("kv-int4", dict(window=(100, 3), softcap=3.0, sinks=torch.zeros(4))),
    "int4 with a boolean mask": ("int4", dict(mask=some_mask(1, 1, 100, 121))),
    "fp8 with an additive mask": ("fp8-rotated", dict(mask=torch.zeros(4, 1, 121))),
    "int8-fast, causal with ALiBi": ("int8-fast", dict(causal=True, bias=tq.bias.alibi(SLOPES))),
    "int8 with ALiBi to both sides": ("int8", dict(bias=tq.bias.alibi(SLOPES))),
    "fp8 with a bias of keys": ("fp8", dict(bias=tq.bias.key_vector(torch.zeros(121)))),
    "decoded keys with factors of one head": (
        "kv-int4-kivi",
        dict(bias=tq.bias.lowrank(some_factors(1, 1, 100, 13), some_factors(2, 1, 121, 13))),
    ),
    "int8 with a dense bias and a boolean mask": (
        "int8",
        dict(bias=tq.bias.dense(some_factors(4, 100, 121)), mask=some_mask(2, 1, 1, 121)),
    ),
    "2-bit keys, strided outputs": ("kv-int2-kivi", {}),
}


@pytest.mark.compiled
@pytest.mark.parametrize(("name", "given"), CALLS.values(), ids=CALLS)
def test_a_launch_compiles_with_its_own_arguments(name, given, absent_gpu):
    scheme = tq.preset(name)
    q, k, v = qkv(100, 121, 64, heads=4, kv_heads=2, batch=2, dtype=torch.float16)
    operands = launch.packed(
        tq.quantize(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, scheme, backend="reference"), scheme
    )
    call = launch.prepare(*operands, scheme, features_of(*operands[:2], **given), return_lse=True)
    kernel = generate.load(call.plan).warmup(*call.arguments, grid=call.grid, **call.config.options())
    assert kernel.asm["cubin"] and ("wgmma" in kernel.asm["ptx"])


@pytest.mark.compiled
def test_lengths_and_strides_do_not_recompile_a_kernel(absent_gpu):
    """Only what is one, or a multiple of 16, is special to Triton."""
    kernels = set()
    for n in (300, 301, 3001):
        q, k, v = qkv(n, n + 2, 64, heads=2, dtype=torch.float16)
        operands = launch.packed(tq.quantize(q, k, v, "int8-fp16", backend="reference"), tq.preset("int8-fp16"))
        call = launch.prepare(*operands, tq.preset("int8-fp16"), features_of(*operands[:2]), return_lse=False)
        kernels.add(generate.load(call.plan).warmup(*call.arguments, grid=call.grid, **call.config.options()).hash)
    assert len(kernels) == 1
