"""The public function `attention_varlen`, for sequences of different lengths that are concatenated."""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from tokquant.attention import RUN, Backend, Scheme, check_heads, check_scales, choose_backend, quantized, ranges, scheme_of
from tokquant.autocast import joined
from tokquant.bias import Bias
from tokquant.calibration.scales import LayerScales
from tokquant.errors import quote
from tokquant.features import Features
from tokquant.inputs import check_flags, check_tensors, features_of
from tokquant.kernels import launch, varlen
from tokquant.operators import operator
from tokquant.schemes import HeadSchemes, QuantScheme
from tokquant.transfer import refuse_capture
from tokquant.whole_numbers import whole_number

Spans = list[tuple[slice, slice]]


# a CUDA graph cannot hold this operator, as lengths are read on the CPU
@operator(
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scheme: Scheme,
    *,
    layer: str | None = None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Bias | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scales: LayerScales | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` for concatenated sequences, each with its own means and scales; on a GPU all at once.

    Args:
        q: `[T_q, H_q, D]`, the tokens of all sequences. k, v: `[T_k, H_kv, D]`.
        scheme, layer: as for `attention`.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 `[B + 1]`: sequence b has the tokens from entry b to entry b + 1. The first
            entry is 0 and the last T. They are read on the CPU, so a call waits if a GPU still computes them.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences; computed if None.
        bias: as for `attention`, with T_q and T_k in place of N_q and N_k; not a dense one.
        The rest is as for `attention`. There is no mask: if you need one, call `attention` for each sequence.

    Returns: `[T_q, H_q, D]` in q's type; with `return_lse` also `[T_q, H_q]` float32. Each sequence's result equals that
    of `attention` on it alone.

    Raises: as `attention`.
    """
    check_flags(return_lse=return_lse, deterministic=deterministic)
    resolved = scheme_of(scheme, layer, scales)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: a {type(x).__name__}; give a torch.Tensor [tokens, heads, head_dim]")
        if x.ndim != 3:
            raise ValueError(f"{name}: shape {list(x.shape)} has {x.ndim} dimensions; give [tokens, heads, head_dim]")
        if 0 in x.shape:
            raise ValueError(f"{name}: shape {list(x.shape)} is empty; give at least one of tokens, heads and head_dim")
    if k.shape != v.shape:
        raise ValueError(f"v: shape {list(v.shape)} is not that of k, {list(k.shape)}")
    refuse_capture(q.device, "cu_seqlens: lengths, which are read on the CPU,")
    whole = [x.transpose(0, 1)[None] for x in (q, k, v)]
    check_tensors(*whole)
    if isinstance(resolved, HeadSchemes):
        check_heads(resolved, k.shape[1], scales)
    else:
        check_scales(resolved, scales)
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q)
    starts_k = _starts("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k)
    if len(starts_q) != len(starts_k):
        raise ValueError(f"cu_seqlens_k: {len(starts_k) - 1} sequences, and cu_seqlens_q has {len(starts_q) - 1}")
    features = features_of(*whole[:2], causal=causal, scale=scale, bias=bias, window=window, softcap=softcap, sinks=sinks)
    chosen = choose_backend(backend, q.device)
    if features.bias is not None:
        features.bias.of_sequence(slice(0), slice(0))  # raises ValueError for a dense bias
    starts = [torch.tensor(each, dtype=torch.int32, device="cpu") for each in (starts_q, starts_k)]
    spans = [(slice(*q_ends), slice(*k_ends)) for q_ends, k_ends in zip(pairwise(starts_q), pairwise(starts_k), strict=True)]
    shared = spans, (starts[0], starts[1]), scales, chosen, return_lse, deterministic
    if isinstance(resolved, HeadSchemes):
        q, k, v = whole
        results = [
            _attend([q[:, rows], k[:, heads], v[:, heads]], part, features.of_heads(rows), *shared)
            for rows, heads, part in ranges(resolved, q, k)
        ]
        out, lse = (None if x[0] is None else joined(x, dim=1) for x in zip(*results, strict=True))
    else:
        out, lse = _attend(whole, resolved, features, *shared)
    out = out[0].transpose(0, 1)  # type: ignore[index]
    return (out, lse[0].transpose(0, 1)) if return_lse else out  # type: ignore[index]


def _attend(
    whole: list[Tensor],
    scheme: QuantScheme,
    features: Features,
    spans: Spans,
    starts: varlen.Starts,
    scales: LayerScales | None,
    chosen: str,
    return_lse: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output and LSE of heads that share a scheme."""
    settings = scheme, features, return_lse, deterministic
    if chosen == "triton" and launch.available(whole[0].device):
        q, k, v = (x.detach() for x in whole)
        if (operands := varlen.together(q, k, v, starts, scheme, scales)) is not None:
            return varlen.attention(operands, starts, *settings)
    parts: list[launch.Operands | None] = []
    for queries, keys in spans:
        qkv = whole[0][:, :, queries], whole[1][:, :, keys], whole[2][:, :, keys]
        empty = any(0 in x.shape for x in qkv)
        parts.append(None if empty else quantized(*qkv, scheme, scales, chosen))  # type: ignore[arg-type]
    if chosen == "triton" and any(part is not None for part in parts):
        return varlen.attention(varlen.one_after_another(parts, starts, scheme), starts, *settings)
    out = torch.zeros_like(whole[0])
    lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float32, device=out.device)
    for part, (queries, keys) in zip(parts, spans, strict=True):
        if part is not None:
            bias = features.bias and features.bias.of_sequence(queries, keys)
            result = RUN[chosen](*part, scheme, replace(features, bias=bias), True, deterministic)
            out[:, :, queries], lse[:, :, queries] = result
    return out, lse


def _starts(name: str, given: object, tokens: int, longest_name: str, longest: int | None) -> list[int]:
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        kind = given.dtype if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise TypeError(f"{name}: {kind}; give a torch.int32 tensor [sequences + 1]")
    if given.ndim != 1 or len(given) < 2:
        raise ValueError(f"{name}: shape {list(given.shape)}; give [sequences + 1], of at least one sequence")
    starts = given.tolist()
    if starts[0] != 0 or starts[-1] != tokens or any(end < first for first, end in pairwise(starts)):
        raise ValueError(f"{name}: {quote(starts)} does not rise from 0 to the {tokens} tokens given")
    actual = max(end - first for first, end in pairwise(starts))
    if longest is not None and whole_number(longest_name, longest, 0) < actual:
        raise ValueError(f"{longest_name}: {quote(longest)} is less than the longest sequence, {actual}")
    return starts
