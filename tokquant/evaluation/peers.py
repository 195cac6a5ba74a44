"""The peers that tokquant is benchmarked against: torch's attention, called every way it can be, and other packages."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokquant.evaluation import packages
from tokquant.evaluation.packages import Call, Calls
from tokquant.features import Features
from tokquant.inputs import features_of
from tokquant.kernels.products import FLOAT_NAMES

ON_CPU = (torch.float32, torch.bfloat16)
ON_GPU = (torch.float16, torch.bfloat16)
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Torch's kernels on a GPU, chosen by name so that none silently falls back to another."""


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Calls:
    """The peers of attention over a whole sequence: q `[B, H_q, N_q, D]`, k and v `[B, H_kv, N_k, D]`."""
    found = of_torch(q, k, v, causal)
    if q.device.type == "cpu":
        return found | {"torchao int8": packages.torchao(q, k, v, causal)}
    others = {"SageAttention": packages.sageattention, "xformers": packages.xformers}
    return found | flex(q, k, v, causal) | _of_packages(others, q, k, v, causal)


def decode(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Calls:
    """The peers of decoding: one query, or a few, and many keys."""
    found = of_torch(q, k, v, causal)
    if q.device.type == "cpu" or causal:
        return found
    return found | flex(q, k, v, causal) | _of_packages({"xformers": packages.split_k}, q, k, v)


def _of_packages(makers: dict[str, Callable[..., Calls]], *arguments: Any) -> Calls:
    """The calls of these packages. A package that fails says why, and the others still run."""
    found: Calls = {}
    for name, make in makers.items():
        calls = packages.or_why(partial(make, *arguments))
        found |= {name: calls} if isinstance(calls, str) else calls
    return found


def of_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Calls:
    """Torch's scaled_dot_product_attention in every type, with every kernel, and in every form of GQA."""
    found: Calls = {}
    on_cpu = q.device.type == "cpu"
    for dtype in ON_CPU if on_cpu else ON_GPU:
        type_name = FLOAT_NAMES[dtype]
        keys, values = k.to(dtype), v.to(dtype)
        for form, rows in _gqa_forms(q.to(dtype), k, causal).items():
            call = sdpa(rows, keys, values, features_of(q, k, causal=causal))
            if on_cpu:
                found[f"SDPA {type_name}{form}"] = call
            else:
                found |= {f"SDPA {name} {type_name}{form}": partial(_by, kernel, call) for name, kernel in KERNELS.items()}
    return found


def _gqa_forms(q: Tensor, k: Tensor, causal: bool) -> dict[str, Tensor]:
    """Q as it is; with GQA and no mask also folded, the heads that share keys laid out as queries of one head."""
    if q.shape[1] == k.shape[1]:
        return {"": q}
    return {" gqa": q} | ({} if causal else {" folded": q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])})


def _by(kernel: SDPBackend, call: Call) -> Tensor:
    with sdpa_kernel(kernel):
        return call()


def sdpa(q: Tensor, k: Tensor, v: Tensor, features: Features) -> Callable[[], Tensor]:
    """torch's attention with these features. It has no window, softcap or sinks, and runs without them.

    A bias of any kind becomes a dense mask, written out before timing, as a user of torch would do.
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


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Calls:
    """torch's FlexAttention as its users call it: compiled, in fp16, with its default launch options."""
    q, k, v = (x.half() for x in (q, k, v))
    n_q, n_k, mask = q.shape[2], k.shape[2], None

    def call() -> Tensor:
        nonlocal mask
        attend, make_mask = _flex()
        if causal and mask is None:  # made in the first call: that compiles a kernel too, and may fail
            mask = make_mask(lambda b, h, i, j: j <= i + (n_k - n_q), None, None, n_q, n_k, device=q.device)
        return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return {"FlexAttention fp16": call}


@cache
def _flex() -> tuple[Callable, Callable]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # fullgraph: eager FlexAttention would materialize the scores; not dynamic: a graph for each shape is the fastest
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, fullgraph=True, dynamic=False), torch.compile(create_block_mask, dynamic=False)
