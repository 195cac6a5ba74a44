"""Observes Q, K and V of a model's attention, for calibration or for a file of activations."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokquant.integrations.transformers.registration import kept, observe
from tokquant.integrations.transformers.settings import Observer


@contextmanager
def observing(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Inside, attention is exact (preset `none`), and each call passes its module's name, q, k and v to `observer`.

    K is as it would be cached, after RoPE; K and V have their own number of heads, as `Calibrator.observe` expects. Afterwards
    the model's attention is as before. Raises as `use`.
    """
    with kept(model):
        observe(model, observer)
        yield


def run_observed(model: PreTrainedModel, windows: Iterable[Tensor], observer: Observer) -> None:
    """Run a model on token ids `[B, N]` of any lengths, `observing` it. Raises as that does, and as `check_window`."""
    with observing(model, observer), torch.no_grad():
        for ids in windows:
            check_window(ids)
            model(input_ids=ids.to(model.device), use_cache=False)


def check_window(ids: object) -> None:
    """Raise TypeError or ValueError unless these are token ids `[B, N]`."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"windows: one is a {type(ids).__name__}; give tensors of token ids [B, N]")
    if ids.ndim != 2 or not ids.numel() or ids.dtype.is_floating_point:
        raise ValueError(f"windows: one of shape {list(ids.shape)} and {ids.dtype}; give token ids [B, N]")


def record(model: PreTrainedModel, windows: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Q, K and V of each attention of a model, on the CPU, as `tokquant.activations.save` takes them.

    Args:
        windows: token ids `[B, N]`, all of one length.

    Returns: for each module `[sum of B, H, N, D]`. Raises ValueError where lengths differ or there is no window; else as `use`.
    """
    found: dict[str, list[tuple[Tensor, ...]]] = {}

    def keep(name: str, *operands: Tensor) -> None:
        found.setdefault(name, []).append(tuple(x.cpu().clone() for x in operands))

    run_observed(model, windows, keep)
    if not found:
        raise ValueError("windows: there are none, or nothing in the model attends; give at least one")
    lengths = {operands[0].shape[2] for parts in found.values() for operands in parts}
    if len(lengths) > 1:
        raise ValueError(f"windows: of {' and '.join(map(str, sorted(lengths)))} tokens; give windows of one length")
    joined = {name: tuple(torch.cat(each) for each in zip(*parts, strict=True)) for name, parts in found.items()}
    return joined  # type: ignore[return-value]
