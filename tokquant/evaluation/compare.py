"""Schemes side by side: errors against the float64 oracle, bits, and times beside torch's SDPA."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokquant import reference
from tokquant.attention import Backend, Scheme, attention, check_one_layer, choose_backend, quantize
from tokquant.bias import Bias
from tokquant.calibration.scales import LayerScales, needed
from tokquant.errors import quote
from tokquant.evaluation.bound import Bound, error_bound
from tokquant.evaluation.explain import Explanation, explain
from tokquant.evaluation.peers import ON_CPU, sdpa
from tokquant.inputs import check_flags, check_tensors, features_of
from tokquant.metrics import Errors, errors, head_errors
from tokquant.schemes import LayerScheme, QuantScheme, SchemeMap, of_layer
from tokquant.timing import interleaved_medians
from tokquant.whole_numbers import whole_number


@dataclass(frozen=True)
class Comparison:
    """What one scheme does to one layer's activations."""

    scheme: LayerScheme
    backend: str
    errors: Errors
    heads: tuple[Errors, ...]
    """Errors of each head of Q."""
    bits: Mapping[str, float]
    """Bits per value of q, k and v as stored: codes, scales and zeros."""
    ms: float
    """Time of attention on codes; the median of interleaved repeats."""
    quantize_ms: float
    """Time of quantizing q, k and v."""
    sdpa_ms: float
    """torch's scaled_dot_product_attention, timed in turn with the scheme: in the tensors' type; on a CPU in the faster of
    float32 and bfloat16, as torch's attention in float16 takes two to four times as long there."""
    row_errors: Tensor
    """The largest error over the channels of each query, `[B, H_q, N_q]` float64: what `bound` bounds."""
    bound: Bound | None = None
    """A certified upper bound on `row_errors`; None unless requested."""
    explanation: Explanation | None = None
    """Where the errors come from; None unless requested."""

    @property
    def tightness(self) -> Tensor | None:
        """Error / bound of each query, from 0 to 1."""
        if self.bound is None:
            return None
        return torch.where(self.row_errors == 0, 0.0, self.row_errors / self.bound.total)


def compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schemes: Sequence[Scheme],
    *,
    layer: str | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Bias | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scales: LayerScales | Sequence[LayerScales | None] | None = None,
    backend: Backend = "auto",
    repeats: int = 5,
    bound: bool = False,
    explained: bool = False,
) -> list[Comparison]:
    """Run each scheme on q `[B, H_q, N_q, D]`, k and v `[B, H_kv, N_k, D]` and measure it.

    Args:
        schemes: QuantSchemes, presets' names, paths or SchemeMaps.
        layer: the layer's name, for SchemeMaps.
        scales: one layer's scales, for the schemes that need them; or a list with the scales of each scheme.
        repeats: timed runs of each.
        bound: also certify the errors, by `error_bound`, which takes as long as a few float64 attentions.
        explained: also measure what Q, K, V and P each add to the errors, and find the worst rows: five further passes of
            float64 attention, over at most 512 queries.
        The rest is as for `attention`.

    Returns: one Comparison a scheme, in order. Raises as `attention` does.
    """
    if isinstance(schemes, str | LayerScheme | SchemeMap) or not isinstance(schemes, Iterable):
        raise TypeError(f"schemes: {quote(schemes)} alone; give a list of them")
    check_flags(bound=bound, explained=explained)
    repeats = whole_number("repeats", repeats, 1)
    resolved = [of_layer(scheme, layer) for scheme in schemes]
    check_tensors(q, k, v)
    arguments = dict(causal=causal, scale=scale, mask=mask, bias=bias, window=window, softcap=softcap, sinks=sinks)
    features = features_of(q, k, **arguments)  # type: ignore[arg-type]
    exact, _ = reference.oracle(q, k, v, features)
    kinds = ON_CPU if q.device.type == "cpu" else (q.dtype,)
    peers = [sdpa(q.to(kind), k.to(kind), v.to(kind), features) for kind in kinds]
    results = []
    for scheme, layer_scales in zip(resolved, _scales_of(resolved, scales), strict=True):
        encode = partial(quantize, q, k, v, scheme, scales=layer_scales, backend=backend)
        codes = encode()
        attend = partial(attention, *codes, scheme, backend=backend, **arguments)  # type: ignore[arg-type]
        out = attend()
        assert isinstance(out, Tensor)
        ms, quantize_ms, *sdpa_ms = interleaved_medians([attend, encode, *peers], repeats, q.device)
        results.append(
            Comparison(
                scheme=scheme,
                backend=choose_backend(backend, q.device),
                errors=errors(out, exact),
                heads=tuple(head_errors(out, exact)),
                bits={role: x.bits_per_value for role, x in zip("qkv", codes, strict=True)},
                ms=ms,
                quantize_ms=quantize_ms,
                sdpa_ms=min(sdpa_ms),
                row_errors=(out.double() - exact).abs().amax(dim=-1),
                bound=error_bound(q, k, v, scheme, scales=layer_scales, **arguments) if bound else None,  # type: ignore[arg-type]
                explanation=explain(q, k, v, codes, out, exact, features) if explained else None,
            )
        )
    return results


def _scales_of(
    schemes: list[LayerScheme], scales: LayerScales | Sequence[LayerScales | None] | None
) -> Sequence[LayerScales | None]:
    if not isinstance(scales, Sequence):
        check_one_layer(scales)
        return [scales if isinstance(scheme, QuantScheme) and needed(scheme) else None for scheme in schemes]
    if len(scales) != len(schemes):
        raise ValueError(
            f"scales: {len(scales)} of them for {len(schemes)} schemes; give one for each, None where it needs none"
        )
    return scales
