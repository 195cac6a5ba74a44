"""The public functions `tune` and `tune_decode`: they check arguments and call `tokquant.tuning`."""

from typing import Any

import torch
from torch import Tensor

from tokquant.attention import quantize, scheme_of
from tokquant.bias import Bias
from tokquant.calibration.scales import LayerScales
from tokquant.errors import UnsupportedError
from tokquant.inputs import check_beside_cache, check_tensors, features_of
from tokquant.kv_cache import KVCache
from tokquant.schemes import QuantScheme, SchemeMap, resolve
from tokquant.tuning.planner import KEEP
from tokquant.tuning.trials import Tuned, tune_attention, tune_pages


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
    keep: int | None = KEEP,
    repeats: int = 20,
) -> Tuned:
    """Find the fastest launch of the kernel that `attention` uses for this call, and store it for calls of similar shape.

    First a performance model ranks all candidates by their machine code (`tokquant.tuning.planner`). Then the best `keep` of
    each loop and the untuned launch run in turn on the GPU, `repeats` times each, with a cold cache. The result is stored in
    the cache folder (`tokquant cache list`), by kernel, device, Triton version and shape. Causality, masks, biases and so on
    each make another kernel. Sequences of different lengths (`attention_varlen`) use the entries of a batch.

    For 16-bit tensors, quantization with that launch is then timed in turn with torch's scaled_dot_product_attention, if torch
    can do the same: no window, softcap, sinks, mask, bias, LSE or static scales, N_q equal to N_k if causal, and no operand of
    the scheme in 32 bits. If quantizing takes over 5 % longer, `attention` of tensors with `backend="auto"` uses torch at this
    shape, rounded to powers of two, and warns. `backend="triton"` always quantizes, and so does everything else in tokquant.

    Args:
        keep: how many launches of each loop to time (there are two loops on an H100 or H200); None times all that run.
        repeats: timed runs of each launch; the median counts.
        The rest is as for `attention`.

    Returns: the stored entry (`whole_ms` and `sdpa_ms` are the two times), every trial in the planner's order with its
    predicted and measured time or why it was left out, and `rank`, the planner's rank of the fastest launch.

    Raises as `attention`; UnsupportedError without a GPU.
    """
    resolved = resolve(scheme_of(scheme, layer, scales))
    check_tensors(q, k, v)
    features = features_of(q, k, causal=causal, scale=scale, mask=mask, bias=bias, window=window, softcap=softcap, sinks=sinks)
    need_gpu(q.device)
    with torch.no_grad():
        operands = quantize(q, k, v, resolved, scales=scales, backend="triton")
        settings: dict[str, Any] = dict(return_lse=return_lse, keep=keep, repeats=repeats, tensors=(q, k, v))
        return tune_attention(operands, resolved, features, **settings)  # type: ignore[arg-type]


def tune_decode(
    q: Tensor,
    cache: KVCache,
    *,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    keep: int | None = KEEP,
    repeats: int = 20,
) -> Tuned:
    """Like `tune`, for `decode`: finds warps, stages, and among how many programs the keys are split.

    Give a cache as full as it will be. `decode(..., deterministic=True)` ignores the result.

    Args:
        q, cache, scale, window, softcap: as for `decode`. Its sinks and counts use the same kernel.
        keep, repeats: as for `tune`.

    Raises as `decode`; ValueError if the cache has no packed tokens, UnsupportedError without a GPU.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: a {type(cache).__name__}; give a tokquant.KVCache")
    check_beside_cache("q", q, (cache.batch, cache.kv_heads, cache.head_dim), cache.dtype, cache.device, queries=True)
    features = features_of(q, q, causal=True, scale=scale, window=window, softcap=softcap)
    need_gpu(q.device)
    return tune_pages(cache.launch(q, features), keep=keep, repeats=repeats)


def need_gpu(device: torch.device) -> None:
    """Raise UnsupportedError without a GPU, or while a CUDA graph is captured, when nothing can be timed."""
    if device.type != "cuda":
        raise UnsupportedError(
            f"tune: needs a GPU, and q is on {device}; `tokquant compile SCHEME --candidates` compares launches without one"
        )
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError("tune: a CUDA graph is being captured, in which nothing can be timed; tune before")
