"""Factors of balance multiplied into the weights that make Q and K, so that nothing is left to do at run time.

The factors are those of a static balance, `scales["layer"].tensors["k_balance"]`. FireQ (arXiv 2505.20839, 3.3) folds those
that it takes before RoPE, and multiplies the others in after it.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokquant.errors import quote

Rope = Literal["half", "interleaved", "none"]
"""Which channels RoPE turns together: f and f + D/2 (Llama in transformers), 2f and 2f + 1 (its paper), or there is no RoPE."""


class Folded(NamedTuple):
    """New weights and biases of the projections, in the types of the old."""

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
    """Weights whose K is multiplied by the factors and whose Q is divided by them; Q K^T stays what it was, to rounding.

    RoPE, which turns all channels, is the only thing that may come between the projections and attention: not a norm of Q
    and K, which would take the factors out again. A static offset of K moves along: it is multiplied by the factors.

    Args:
        q_weight: `[H_q D, hidden]`, as torch.nn.Linear has it.
        k_weight: `[H_kv D, hidden]`, H_q a multiple of H_kv; q_bias and k_bias `[H_q D]` and `[H_kv D]` where there are some.
        factors: `[H_kv, 1, D]`, above zero, equal over each pair of channels that RoPE turns together; `split` gives such.
        rope: which channels are pairs.

    Raises TypeError for what is no tensor of floats, and ValueError for shapes that do not fit and for factors that a pair
    does not share, naming its channels.
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
    apart = (factors != factors[..., partner]).nonzero().tolist()
    if apart:
        head, _, one = apart[0]
        other = partner[one]
        values = " and ".join(f"{factors[head, 0, channel]:.4g}" for channel in (one, other))
        raise ValueError(
            f"factors: channels {one} and {other} of head {head} have {values}, and RoPE turns them together "
            f"({len(apart) // 2} such pairs); fold the first part of tokquant.folding.split, and keep the second as k_balance"
        )
    of_keys = factors.detach().double()
    of_queries = 1 / of_keys.repeat_interleave(q_weight.shape[0] // k_weight.shape[0], dim=0)
    return Folded(
        _times(q_weight, of_queries),
        _times(k_weight, of_keys),
        None if q_bias is None else _times(q_bias, of_queries),
        None if k_bias is None else _times(k_bias, of_keys),
    )


def split(factors: Tensor, rope: Rope = "half") -> tuple[Tensor, Tensor]:
    """Factors `[H_kv, 1, D]` as those that can be folded before RoPE and those that are left for after it, 1 elsewhere."""
    _check_factors(factors, rope)
    shared = factors == factors[..., _partners(factors.shape[2], rope)]
    return torch.where(shared, factors, 1.0), torch.where(shared, 1.0, factors)


def _partners(d: int, rope: Rope) -> list[int]:
    """The channel that each is turned together with; itself where there is no RoPE."""
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
    """Rows of a weight `[rows, hidden]` or bias `[rows]` times factors of as many elements, rounded once."""
    by_row = factors.flatten().to(weight.device)
    return (weight.detach() * (by_row[:, None] if weight.ndim == 2 else by_row)).to(weight.dtype)
