"""Errors of an output against the exact one, computed in float64 over all elements."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Errors:
    """Errors of an output x against the exact output o: three as the SageAttention papers define them, and the largest."""

    cosine: float
    """sum(o x) / (|o| |x|)."""
    rel_l1: float
    """sum |o - x| / sum |o|, a fraction."""
    rmse: float
    """sqrt(mean (o - x)^2)."""
    max_abs: float
    """max |o - x|."""


def errors(out: Tensor, exact: Tensor) -> Errors:
    """Compare two tensors of the same shape. Raises ValueError if the shapes differ."""
    if out.shape != exact.shape:
        raise ValueError(f"out: shape {list(out.shape)} is not that of exact, {list(exact.shape)}")
    x, o = out.double().flatten(), exact.double().flatten()
    difference = (x - o).abs()
    norms = x.norm() * o.norm()
    return Errors(
        cosine=float(torch.equal(x, o)) if norms == 0 else (torch.dot(x, o) / norms).item(),
        rel_l1=(difference.sum() / o.abs().sum().clamp_min(torch.finfo(torch.float64).tiny)).item(),
        rmse=difference.square().mean().sqrt().item(),
        max_abs=difference.max().item(),
    )


def head_errors(out: Tensor, exact: Tensor) -> list[Errors]:
    """`errors` of each head of `[B, H, N, D]`."""
    return [errors(out[:, head], exact[:, head]) for head in range(exact.shape[1])]


def row_errors(out: Tensor, exact: Tensor) -> Tensor:
    """sum |o - x| of each row of `[B, H, N, D]`, over the mean of sum |o| of its head's rows: `[B, H, N]`, float64.

    Their mean over a head's rows is its `rel_l1`. A row that is close to zero does not get a large error for that.
    """
    x, o = out.double(), exact.double()
    mean_row = o.abs().sum(dim=3).mean(dim=(0, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (x - o).abs().sum(dim=3) / mean_row
