"""torch's attention in 16 bits, in place of quantization and a kernel, where tuning found it faster, as for short sequences."""

import warnings
from functools import lru_cache

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_efficient_attention, can_use_flash_attention

from tokquant.calibration.scales import needed
from tokquant.features import Features
from tokquant.kernels import launch, targets, tuned
from tokquant.kernels.plan import plan
from tokquant.kernels.products import FLOAT_NAMES, takes_tokens_last
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import QuantScheme


def attention(q: Tensor, k: Tensor, v: Tensor, features: Features) -> Tensor:
    """softmax(scale Q K^T) V in the tensors' own type: `[B, H_q, N_q, D]`, contiguous as a kernel's output is.

    Torch chooses the kernel: selecting one would change the state of the whole process, other threads included.
    """
    # the operator, not torch's function: modes that observe or replace that look for the calls of a model
    out = torch.ops.aten.scaled_dot_product_attention(
        q, k, v, is_causal=features.causal, scale=features.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.contiguous()


def faster(q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, features: Features) -> bool:
    """Whether `attention` supports this call, and tuning found it faster than quantized attention at this shape.

    Warns where it is, once for each tuned shape.
    """
    if not _plain(q, k, scheme, features):
        return False
    (b, heads, n_q, d), n_k = q.shape, k.shape[2]
    made = plan(
        scheme,
        head_dim=d,
        dtype=q.dtype,
        shared_heads=heads // k.shape[1],
        wanted=Wanted.of(features, False),
        tokens_last=takes_tokens_last(scheme, q.dtype),
        interpreted=launch.interpreted(),
        target=targets.of(q.device),
    )
    found = tuned.same(made, q.device, b * heads, n_q, n_k)
    if found is None or not found.sixteen_bit or not fused(q, k, v, features.causal):
        return False
    _say(found, scheme.name, FLOAT_NAMES[q.dtype])
    return True


def does(q: Tensor, k: Tensor, v: Tensor, scheme: QuantScheme, features: Features) -> bool:
    """Whether `attention` supports this call, at least as exactly as the scheme, by a fused kernel."""
    return _plain(q, k, scheme, features) and fused(q, k, v, features.causal)


def _plain(q: Tensor, k: Tensor, scheme: QuantScheme, features: Features) -> bool:
    """Whether torch's 16-bit attention has the features of this call, which are none but causality, and is no less exact."""
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_autocast_enabled(q.device.type)  # torch's attention would run in another type
        and features.scale > 0
        and features.window is features.mask is features.softcap is features.sinks is features.bias is None
        and not (features.causal and q.shape[2] != k.shape[2])  # torch's causal mask is aligned at the first key
        and all(getattr(scheme, role).format.bits <= 16 for role in "qkvp")
        and not needed(scheme)
    )


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether one of torch's fused GPU kernels takes these tensors: torch's other implementation materializes the scores."""
    if not q.is_cuda:
        return False  # without a GPU's driver torch raises when it is asked
    call = SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
    return can_use_flash_attention(call) or can_use_efficient_attention(call) or can_use_cudnn_attention(call)


@lru_cache(maxsize=4096)
def _say(found: tuned.Entry, scheme: str, dtype: str) -> None:
    key = found.key
    warnings.warn(
        f"attention is torch's in {dtype} here, not quantized by {scheme!r}: for {key.n_q} x {key.n_k} tokens and "
        f"{key.batch_heads} heads tuning found {found.sdpa_ms:.4f} ms, and {found.whole_ms:.4f} with quantization; "
        "backend='triton' always quantizes",
        stacklevel=5,
    )
