"""Statistics for static factors of balance: the largest magnitudes observed, which merge by a maximum."""

import math

import torch
from torch import Tensor

from tokquant.calibration.statistics import Statistics
from tokquant.quantize import check_balance
from tokquant.schemes.balance import ChannelBalance, RopePairBalance
from tokquant.transforms import channel_factors, pair_norms, query_maxima, rope_pair_factors

DIRECTIONS = 16
"""Directions in which the extent of a pair of channels is recorded: enough for its largest distance from any point to 2 %."""


class Maxima(Statistics):
    """Maxima of one layer's Q and K, K without the offset that its frame subtracts: `[H_kv, 1, D]` and the like, float32.

    Args:
        rule: the rule that makes the factors.
        moves: whether K has a calibrated offset, which is known only at the end. The extremes of a channel can be shifted by it
            then. The largest norm of a pair cannot, but the extent of its points in a direction can: so extents in `DIRECTIONS`
            directions are recorded, and give a norm from the true one to 2 % more.
        heads, channels: of K.

    Raises SchemeError where the rule does not fit the head.
    """

    def __init__(self, rule: ChannelBalance | RopePairBalance, moves: bool, heads: int, channels: int):
        check_balance(rule, channels)
        self.rule, self.moves = rule, moves
        channel, pair = (heads, 1, channels), (heads, 1, channels // 2)
        kept = (
            {"q": channel} if isinstance(rule, ChannelBalance) else {"reach": (DIRECTIONS, *pair)} if moves else {"norms": pair}
        )
        self.largest = {
            name: torch.full(shape, -math.inf, dtype=torch.float32, device="cpu")
            for name, shape in {"above": channel, "below": channel, **kept}.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        return self.largest

    def put(self, name: str, value: Tensor) -> None:
        self.largest[name] = value

    def check(self, tokens: int) -> None:
        for name, value in self.largest.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name}: holds a value that is not finite")

    def observe(self, operands: tuple[Tensor, Tensor]) -> None:
        """Add q `[B, H_q, N_q, D]` and k `[B, H_kv, N_k, D]`."""
        q, k = operands
        found = {"above": k.float().amax(dim=2, keepdim=True), "below": -k.float().amin(dim=2, keepdim=True)}
        if isinstance(self.rule, ChannelBalance):
            found["q"] = query_maxima(q, k.shape[1])
        elif self.moves:
            found["reach"] = torch.stack([towards(k, angle).amax(dim=2, keepdim=True) for angle in angles()], dim=1)
        else:
            found["norms"] = pair_norms(k)
        self._add({name: value.amax(dim=0).cpu() for name, value in found.items()})

    def merge(self, other: "Maxima") -> None:
        """Add another's maxima, of as many heads and channels."""
        self._add(other.largest)

    def factors(self, offset: Tensor | None) -> Tensor:
        """K's factors `[H_kv, 1, D]`, with the calibrated offset `[H_kv, 1, D]` where it has one."""
        c: Tensor | float = 0.0 if offset is None else offset.float()
        seen = self.largest
        k_largest = torch.maximum(seen["above"] - c, seen["below"] + c)
        if isinstance(self.rule, ChannelBalance):
            return channel_factors(seen["q"], k_largest, self.rule.alpha)
        if isinstance(c, Tensor):
            reach = torch.stack([each - towards(c, angle) for each, angle in zip(seen["reach"], angles(), strict=True)])
            norms = reach.amax(dim=0) / math.cos(math.pi / DIRECTIONS)
        else:
            norms = seen["norms"]
        return rope_pair_factors(norms, k_largest, self.rule.alpha, self.rule.beta, self.rule.top_k)

    def _add(self, found: dict[str, Tensor]) -> None:
        self.largest = {name: torch.maximum(x, self.largest[name]) for name, x in found.items()}


def angles() -> list[float]:
    """The recorded directions, in radians."""
    return [2 * math.pi * i / DIRECTIONS for i in range(DIRECTIONS)]


def towards(x: Tensor, angle: float) -> Tensor:
    """Each pair of channels (f, f + D/2), as a point in the plane, projected on a direction: `[..., D] -> [..., D/2]`."""
    first, second = x.float().chunk(2, dim=-1)
    return math.cos(angle) * first + math.sin(angle) * second
