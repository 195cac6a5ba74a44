"""Attention of other packages, called as their users would. Each is a call, or a text that says why it cannot run here."""

import importlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokquant.errors import first_line

T = TypeVar("T")
Call = Callable[[], Any]
Calls = dict[str, Call | str]
"""Name -> call, or why there is none."""

PACKAGES = ("sageattention", "xformers", "torchao")


def versions() -> dict[str, str]:
    """Versions of the installed packages, by name."""
    return {name: _version(name) for name in PACKAGES if find_spec(name)}


def torchao(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call | str:
    """torchao's int8 attention on tensors quantized beforehand, per tensor, as its op requires.

    The op is only in builds with `USE_CPU_KERNELS=1`, is fused only where the processor has AMX, and takes causality as a mask.
    """
    if why := lacks("torchao"):
        return why
    try:
        built = torch._C._dispatch_has_kernel_for_dispatch_key("torchao::qscaled_dot_product", "CPU")
    except RuntimeError:  # there is no such op
        built = False
    if not built:
        return f"{version('torchao')} is built without its CPU kernels (USE_CPU_KERNELS=1)"
    shared = q.shape[1] // k.shape[1]
    operands = [q, *(x.repeat_interleave(shared, dim=1) for x in (k, v))]
    scales = [x.abs().max().item() / 127 for x in operands]
    codes = [((x / scale).round() + 128).to(torch.uint8) for x, scale in zip(operands, scales, strict=True)]
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(k.shape[2] - q.shape[2] + 1) if causal else None
    zeros = {f"{name}_zp": 128 for name in "qkvo"}
    steps = {f"{name}_scale": step for name, step in zip("qkvoa", (*scales, scales[2], 1 / 255), strict=True)}
    return partial(torch.ops.torchao.qscaled_dot_product, *codes, attn_mask=mask, **zeros, **steps)


def sageattention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Calls:
    """SageAttention as it dispatches on this GPU, quantization included; and its Triton kernel alone, on its own codes.

    Both take Q, K and V in fp16. Version 2 has its kernels in a folder `triton` and returns LSE with the output.
    """
    name = "SageAttention"
    if why := lacks("sageattention"):
        return {name: why}
    name += f" {_version('sageattention')}"
    # version 1 subtracts the mean of K in place: give it a copy
    q, k, v = q.half(), k.to(torch.float16, copy=True), v.half()
    package = importlib.import_module("sageattention")
    whole = partial(package.sageattn, q, k, v, tensor_layout="HND", is_causal=causal)
    return {f"{name}, kernel": or_why(lambda: _sage_kernel(q, k, v, causal)), f"{name}, with quantization": whole}


def _sage_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    folder = "sageattention.triton" if find_spec("sageattention.triton") else "sageattention"
    quantized = importlib.import_module(f"{folder}.quant_per_block").per_block_int8
    kernel = importlib.import_module(f"{folder}.attn_qk_int8_per_block{'_causal' if causal else ''}").forward
    q_codes, q_scale, k_codes, k_scale = quantized(q, k - k.mean(dim=2, keepdim=True), tensor_layout="HND")
    return partial(kernel, q_codes, k_codes, v, q_scale, k_scale, tensor_layout="HND", output_dtype=torch.float16)


def xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Calls:
    """xformers' memory-efficient attention as it dispatches on this GPU, in fp16."""
    name = "xformers"
    if why := lacks("xformers"):
        return {name: why}
    fmha = importlib.import_module("xformers.ops.fmha")
    mask = importlib.import_module("xformers.ops.fmha.attn_bias").LowerTriangularFromBottomRightMask() if causal else None
    operands = _grouped(q.half(), k.half(), v.half())
    return {f"{name} {_version('xformers')} fp16": partial(fmha.memory_efficient_attention_forward, *operands, mask)}


def split_k(q: Tensor, k: Tensor, v: Tensor) -> Calls:
    """xformers' split-K decoding with K and V in fp16, and in its int4 with one scale and shift per token and head."""
    name = "xformers"
    if why := lacks("xformers"):
        return {name: why}
    name += f" {_version('xformers')} split-K"
    fmha = importlib.import_module("xformers.ops.fmha")
    operands = _grouped(q.half(), k.half(), v.half())
    packed = _grouped(q.half(), _int4_rows(k), _int4_rows(v))
    call = partial(fmha.memory_efficient_attention_forward, op=fmha.triton_splitk.FwOp)
    return {f"{name} fp16": partial(call, *operands), f"{name} int4": partial(call, *packed)}


def _int4_rows(x: Tensor) -> Tensor:
    """`[B, H, N, D] -> [B, H, N, 1 + D / 8]` int32, xformers' layout of a row: fp16 scale and shift, then codes of 0 to 15, the
    first of each two in the low half of a byte."""
    lowest, highest = x.float().aminmax(dim=-1, keepdim=True)
    shift, scale = lowest.half(), ((highest - lowest) / 15).half()
    codes = ((x - shift) / scale).round().clamp(0, 15).to(torch.uint8)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    sides = torch.cat([scale, shift], dim=-1).view(torch.uint8)
    return torch.cat([sides, packed], dim=-1).view(torch.int32)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, H, N, D] -> [B, N, H_kv, H_q / H_kv, D]`, or `[B, N, H, D]` without GQA: the layouts that xformers takes."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[2] == k.shape[2]:
        return q, k, v
    q = q.unflatten(2, (k.shape[2], -1))
    k, v = (x.unsqueeze(3).expand(-1, -1, -1, q.shape[3], -1) for x in (k, v))
    return q, k, v


def lacks(package: str) -> str:
    """Why a package cannot be used; empty where it can."""
    if find_spec(package) is None:
        return "not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # a version made for another torch may raise anything
        return f"cannot be imported: {first_line(error)}"
    return ""


def or_why(make: Callable[[], T]) -> T | str:
    """What `make` returns, or why it failed: an API of another version, a kernel this Triton cannot compile, no memory."""
    try:
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a folder, without metadata
        return "of unknown version"
