"""What tokquant is timed beside: torch's attention in each way it can be called, other packages where they are installed."""

import importlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokquant.inputs import features_of
from tokquant.reference import Features

Call = Callable[[], Any]
Calls = dict[str, Call | str]
"""Name -> call, or why there is none."""

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ON_CPU = (torch.float32, torch.bfloat16)
ON_GPU = (torch.float16, torch.bfloat16)
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Torch's on a GPU, which are named one by one so that none falls back to another."""


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Calls:
    """The peers of attention over a whole sequence: q `[B, H_q, N_q, D]`, k and v `[B, H_kv, N_k, D]`."""
    found = of_torch(q, k, v, causal)
    if q.device.type == "cpu":
        found["torchao int8"] = _torchao(q, k, v, causal)
    elif find_spec("sageattention"):
        found["sageattention fp16"] = _sage(q, k, v, causal)
    return found


def of_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Calls:
    """Torch's scaled_dot_product_attention by type, kernel and, where heads share keys, by how they do."""
    found: Calls = {}
    on_cpu = q.device.type == "cpu"
    for kind in ON_CPU if on_cpu else ON_GPU:
        keys, values = k.to(kind), v.to(kind)
        for form, rows in _forms(q.to(kind), k, causal).items():
            call = sdpa(rows, keys, values, features_of(q, k, causal=causal))
            if on_cpu:
                found[f"SDPA {NAMES[kind]}{form}"] = call
            else:
                found |= {f"SDPA {name} {NAMES[kind]}{form}": partial(_by, kernel, call) for name, kernel in KERNELS.items()}
    return found


def _forms(q: Tensor, k: Tensor, causal: bool) -> dict[str, Tensor]:
    """Q as it is, and where heads share keys and nothing is masked, the queries of all that do as those of one."""
    if q.shape[1] == k.shape[1]:
        return {"": q}
    return {" gqa": q} | ({} if causal else {" folded": q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])})


def _by(kernel: SDPBackend, call: Call) -> Tensor:
    with sdpa_kernel(kernel):
        return call()


def sdpa(q: Tensor, k: Tensor, v: Tensor, features: Features) -> Callable[[], Tensor]:
    """torch's attention with the same causality and mask. It has no window, softcap or sinks: there it runs without them.

    A bias of whatever kind is a dense mask to it, written out before it is timed: what a user of torch would do.
    """
    mask, causal = features.mask, features.causal
    n_q, n_k = q.shape[2], k.shape[2]
    if features.bias is not None:
        bias = features.bias.block(slice(0, n_q), slice(0, n_k), n_q, n_k, torch.float32)
        added = mask is not None and mask.dtype != torch.bool
        mask = bias if mask is None else bias + mask if added else torch.where(mask, bias, float("-inf"))
    if causal and (n_q != n_k or mask is not None):
        # is_causal is top-left aligned and excludes a mask
        seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        mask = seen if mask is None else mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=features.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _torchao(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call | str:
    """torchao's int8 attention on bytes quantized beforehand, one scale a tensor, as its op takes them.

    The op is only in builds with `USE_CPU_KERNELS=1`, is fused only where the processor has AMX, and is causal by a mask.
    """
    if why := _lacks("torchao"):
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


def _sage(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call | str:
    """sageattention's own choice for this GPU, which quantizes in every call."""
    half = [x.half() for x in (q, k, v)]
    name = "sageattention"
    return _lacks(name) or partial(importlib.import_module(name).sageattn, *half, tensor_layout="HND", is_causal=causal)


def _lacks(package: str) -> str:
    """Why a package cannot be used, or nothing."""
    if find_spec(package) is None:
        return "not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # whatever a package of any age says to this torch
        return f"cannot be imported: {first_line(error)}"
    return ""


def first_line(error: Exception) -> str:
    """What an error says, without the stack that torch appends."""
    return (str(error) or type(error).__name__).splitlines()[0]
