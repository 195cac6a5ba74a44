"""Folds balance factors into the weights of the Q and K projections, so that nothing is left to multiply at run time.

The factors are those of a static balance, `scales["layer"].tensors["k_balance"]`. FireQ (arXiv 2505.20839, 3.3) folds the
factors that it applies before RoPE, and multiplies by the others after it.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokquant.errors import quote

Rope = Literal["half", "interleaved", "none"]
"""The pairs of channels that RoPE rotates: f and f + D/2 (Llama in transformers), 2f and 2f + 1 (its paper), or no RoPE."""


class Folded(NamedTuple):
    """New weights and biases of the projections, in the types of the old ones."""

    q_weight: Tensor
    k_weight: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None


def fold(
    q_weight: Tensor,
    k_weight: Tensor,
    factors: Tensor,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    rope: Rope = "half",
) -> Folded:
    """Weights that multiply K by the factors and divide Q by them, so that Q K^T stays the same except for rounding.

    Only RoPE, over all channels, may come between the projections and attention. A norm of Q and K would remove the factors
    again. A static offset of K is to be multiplied by the factors too.

    Args:
        q_weight: `[H_q D, hidden]`, as torch.nn.Linear has it.
        k_weight: `[H_kv D, hidden]`, H_q a multiple of H_kv.
        q_bias, k_bias: `[H_q D]` and `[H_kv D]`, if the projections have them.
        factors: `[H_kv, 1, D]`, above zero, equal for both channels of each pair that RoPE rotates, as the first result of
            `split`.
        rope: which channels are pairs.

    Raises TypeError for anything but tensors of floats; ValueError for shapes that do not fit, and for a pair with different
    factors, naming its channels.
    """
    _check_factors(factors, rope)
    given = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for name, x in given.items():
        if not isinstance(x, Tensor | None) or (x is None and name.endswith("weight")):
            raise TypeError(f"{name}: {quote(x)}; give a torch.Tensor")
        if x is not None and not x.dtype.is_floating_point:
            raise TypeError(f"{name}: {x.dtype}; give floating-point weights, which are quantized after they are folded")
    heads, _, d = factors.shape
    for name, weight, bias in (("k", k_weight, k_bias), ("q", q_weight, q_bias)):
        rows = weight.shape[0] if weight.ndim == 2 else 0
        if not rows or rows % (heads * d) or (name == "k" and rows != heads * d):
            wanted = f"{heads * d}, as" if name == "k" else f"a multiple of {heads * d}, as"
            raise ValueError(f"{name}_weight: shape {list(weight.shape)} has not {wanted} factors {list(factors.shape)} say")
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"{name}_bias: shape {list(bias.shape)} is not that of the weight's rows, [{rows}]")
    partner = _partners(d, rope)
    unequal = (factors != factors[..., partner]).nonzero().tolist()
    if unequal:
        head, _, one = unequal[0]
        other = partner[one]
        values = " and ".join(f"{factors[head, 0, channel]:.4g}" for channel in (one, other))
        raise ValueError(
            f"factors: channels {one} and {other} of head {head} have {values}, and RoPE turns them together "
            f"({len(unequal) // 2} such pairs); fold the first part of tokquant.folding.split, and keep the second as k_balance"
        )
    k_factors = factors.detach().double()
    q_factors = 1 / k_factors.repeat_interleave(q_weight.shape[0] // k_weight.shape[0], dim=0)
    return Folded(
        _times(q_weight, q_factors),
        _times(k_weight, k_factors),
        None if q_bias is None else _times(q_bias, q_factors),
        None if k_bias is None else _times(k_bias, k_factors),
    )


def split(factors: Tensor, rope: Rope = "half") -> tuple[Tensor, Tensor]:
    """Split factors `[H_kv, 1, D]` into those to `fold` and those to apply after RoPE, each with 1 in place of the other."""
    _check_factors(factors, rope)
    shared = factors == factors[..., _partners(factors.shape[2], rope)]
    return torch.where(shared, factors, 1.0), torch.where(shared, 1.0, factors)


def _partners(d: int, rope: Rope) -> list[int]:
    """The other channel of each channel's RoPE pair; the channel itself without RoPE."""
    return [{"half": (c + d // 2) % d, "interleaved": c ^ 1, "none": c}[rope] for c in range(d)]


def _check_factors(factors: object, rope: str) -> None:
    if rope not in get_args(Rope):
        raise ValueError(f"rope: {quote(rope)} is not valid; use half, interleaved or none")
    if not isinstance(factors, Tensor):
        raise TypeError(f"factors: {quote(factors)}; give the tensor k_balance of a layer's scales, [H_kv, 1, D]")
    if factors.ndim != 3 or factors.shape[1] != 1 or not factors.numel() or (rope != "none" and factors.shape[2] % 2):
        raise ValueError(f"factors: shape {list(factors.shape)} is not [H_kv, 1, D], D even under RoPE")
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise ValueError("factors: holds a value that is not finite and above zero")


def _times(weight: Tensor, factors: Tensor) -> Tensor:
    """A weight `[rows, hidden]` or bias `[rows]`, each row times its factor, rounded once."""
    by_row = factors.flatten().to(weight.device)
    return (weight.detach() * (by_row[:, None] if weight.ndim == 2 else by_row)).to(weight.dtype)
