"""The public door to tuning: it checks and directs, as `attention` does."""

import torch
from torch import Tensor

from tokquant.attention import quantize
from tokquant.bias import Bias
from tokquant.calibration.scales import LayerScales
from tokquant.errors import UnsupportedError
from tokquant.inputs import check_tensors, features_of
from tokquant.kernels import tuning
from tokquant.kernels.tuning import Tuned
from tokquant.schemes import QuantScheme, SchemeMap, resolve


def tune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scheme: QuantScheme | SchemeMap | str,
    *,
    layer: str | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Bias | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scales: LayerScales | None = None,
    return_lse: bool = False,
    repeats: int = 20,
) -> Tuned:
    """Find the fastest launch of the kernel that `attention` takes for this call, and keep it for calls of like shape.

    Every candidate's machine code is read first; what spills, does not fit or has far more instructions than others is not
    timed. The rest runs in turn on the GPU, `repeats` times each, with a cold cache. The result lies in the cache folder
    (`tokquant cache list`) and is found again by kernel, device, Triton and shape. Causality, masks, biases and so on each
    make another kernel; sequences of their own lengths (`attention_varlen`) take what was found for a batch.

    Args are as for `attention`. Raises as it does; UnsupportedError where there is no GPU.
    """
    found = resolve(scheme, layer)
    check_tensors(q, k, v)
    features = features_of(q, k, causal=causal, scale=scale, mask=mask, bias=bias, window=window, softcap=softcap, sinks=sinks)
    need_gpu(q.device)
    with torch.no_grad():
        operands = quantize(q, k, v, found, scales=scales, backend="triton")
    return tuning.tune(operands, found, features, return_lse=return_lse, repeats=repeats)  # type: ignore[arg-type]


def need_gpu(device: torch.device) -> None:
    """Raise UnsupportedError where there is nothing to tune, or nothing can be timed."""
    if device.type != "cuda":
        raise UnsupportedError(
            f"tune: needs a GPU, and q is on {device}; `tokquant compile SCHEME --candidates` compares launches without one"
        )
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError("tune: a CUDA graph is being captured, in which nothing can be timed; tune before")
