"""Compares a language model's logits under schemes with those of 16-bit attention, for prompts and token by token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokquant.attention import Backend, Scheme
from tokquant.calibration.scales import Scales
from tokquant.errors import SchemeError, UnsupportedError, quote
from tokquant.evaluation.logits import Agreement
from tokquant.integrations.layers import scheme_of_layers
from tokquant.integrations.transformers.cache import TokquantCache
from tokquant.integrations.transformers.recording import check_window
from tokquant.integrations.transformers.registration import check_model, kept, use
from tokquant.schemes import LayerScheme, QuantScheme, SchemeMap
from tokquant.whole_numbers import whole_number


@dataclass(frozen=True)
class Evaluation:
    """The result for one scheme."""

    scheme: QuantScheme | SchemeMap
    prefill: Agreement
    """All tokens of each window at once."""
    decode: Agreement | None
    """The last tokens of each window one by one through a TokquantCache; None where not asked for, or not possible."""
    refusal: str = ""
    """Why it is not possible: the scheme depends on later tokens, or the model has layers that a TokquantCache cannot hold."""


def evaluate(
    model: PreTrainedModel,
    windows: Iterable[Tensor],
    schemes: Sequence[Scheme],
    *,
    scales: Sequence[Scales | None] | None = None,
    decoded: int = 64,
    backend: Backend = "auto",
) -> tuple[Agreement, list[Evaluation]]:
    """Compare the logits of a causal language model by each scheme with those of eager attention in the model's own type.

    Args:
        windows: token ids `[1, N]`, N at least 2.
        scales: those of each scheme, None where it needs none.
        decoded: tokens of each window that are also predicted one by one, after the others as a prompt; 0 for none.

    Returns: eager attention's own figures, and one Evaluation a scheme, in order. Afterwards the model attends as before.

    Raises: as `use`. ValueError for a model that predicts no next token, for no window, or one of another shape, and for
    `decoded` below 0.
    """
    if isinstance(schemes, str | LayerScheme | SchemeMap):
        raise TypeError(f"schemes: {quote(schemes)} alone; give a list of them")
    check_model(model)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"model: {type(model).__name__} predicts no next token of its input; give a causal language model")
    decoded = whole_number("decoded", decoded, 0)
    chosen = [scheme_of_layers(scheme) for scheme in schemes]
    fixed = list(scales) if scales is not None else [None] * len(chosen)
    if len(fixed) != len(chosen):
        raise ValueError(f"scales: {len(fixed)} for {len(chosen)} schemes; give one for each, None where it needs none")
    baseline = Agreement()
    with kept(model), torch.no_grad():
        found = [_begin(model, *each, decoded, backend) for each in zip(chosen, fixed, strict=True)]
        for ids in windows:
            check_window(ids)
            ids = ids.to(model.device)
            if ids.shape[0] != 1 or ids.shape[1] < 2:
                raise ValueError(f"windows: one of shape {list(ids.shape)}; give [1, N] of two tokens or more")
            targets, first = ids[0, 1:], max(ids.shape[1] - 1 - decoded, 0)
            model.set_attn_implementation("eager")
            exact = model(input_ids=ids, use_cache=False).logits[0, :-1]
            baseline.add(exact, exact, targets)
            for result, own in zip(found, fixed, strict=True):
                use(model, result.scheme, scales=own, backend=backend)
                result.prefill.add(model(input_ids=ids, use_cache=False).logits[0, :-1], exact, targets)
                if result.decode is not None:
                    cache = TokquantCache(model, result.scheme, scales=own, backend=backend)
                    logits = _one_by_one(model, ids, first, cache)
                    result.decode.add(logits, exact[first:], targets[first:])
    if not baseline.tokens:
        raise ValueError("windows: there are none; give at least one")
    return baseline, found


def _begin(
    model: PreTrainedModel, scheme: QuantScheme | SchemeMap, scales: Scales | None, decoded: int, backend: Backend
) -> Evaluation:
    use(model, scheme, scales=scales, backend=backend)
    if not decoded:
        return Evaluation(scheme, Agreement(), None)
    try:
        TokquantCache(model, scheme, scales=scales, backend=backend)
    except (SchemeError, UnsupportedError) as error:
        return Evaluation(scheme, Agreement(), None, str(error))
    return Evaluation(scheme, Agreement(), Agreement())


def _one_by_one(model: PreTrainedModel, ids: Tensor, first: int, cache: TokquantCache) -> Tensor:
    """Logits `[N - 1 - first, vocabulary]` of all tokens but the last from token `first` on, each in a step of its own."""
    if first:
        model(input_ids=ids[:, :first], past_key_values=cache, use_cache=True, logits_to_keep=1)
    steps = range(first, ids.shape[1] - 1)
    return torch.cat([model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits[0] for t in steps])
