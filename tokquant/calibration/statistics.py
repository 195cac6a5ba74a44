"""Statistics of activations, in memory that does not grow with their number."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

REDUCED = {"tensor": (0, 2), "head": (2,), "channel": ()}
"""The dimensions of `[H, 1, D]` that a static scale of each granularity covers."""


@dataclass(frozen=True)
class Change:
    """A correction of observed values, known after calibration: `(x + shift) * factor`, float32 `[H, D]`, factors > 0."""

    shift: Tensor
    factor: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to values `[H, D]` or `[H, D, n]`."""
        shape = (*self.shift.shape, *[1] * (x.ndim - 2))
        return (x + self.shift.reshape(shape)) * self.factor.reshape(shape)


def groups(low: Tensor, high: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Reduce extremes of channels `[H, D]` to those under each scale: `[H, 1, D]`, `[H, 1, 1]` or `[1, 1, 1]` by `kind`."""
    low, high, dim = low[:, None], high[:, None], REDUCED[kind]
    return (low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)) if dim else (low, high)


class Statistics:
    """Statistics of one operand of one layer, on the CPU. Subclasses add `observe` and `merge`."""

    KEPT: ClassVar[tuple[str, ...]]
    """Names of the attributes, tensors, that are its whole state."""

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, by name."""
        return {name: getattr(self, name) for name in self.KEPT}

    def put(self, name: str, value: Tensor) -> None:
        """Set one tensor of the state, as read from a file."""
        setattr(self, name, value)

    def check(self, tokens: int) -> None:
        """Raise ValueError unless the state, as read from a file, could come from this many tokens."""


class Mean(Statistics):
    """The sum of each channel, float64 `[H, D]`."""

    KEPT = ("sum",)

    def __init__(self, heads: int, channels: int):
        self.sum = torch.zeros(heads, channels, dtype=torch.float64, device="cpu")

    def observe(self, x: Tensor) -> None:
        """Add `[B, H, N, D]`."""
        self.sum += x.sum(dim=(0, 2), dtype=torch.float64).cpu()

    def merge(self, other: "Mean") -> None:
        """Add another's sums."""
        self.sum += other.sum

    def check(self, tokens: int) -> None:
        if not bool(self.sum.isfinite().all()):
            raise ValueError("sum: holds a value that is not finite")


class Extremes(Statistics):
    """The minimum and the maximum of each channel, float32 `[H, D]`."""

    KEPT: ClassVar[tuple[str, ...]] = ("low", "high")

    def __init__(self, heads: int, channels: int):
        self.low = torch.full((heads, channels), float("inf"), dtype=torch.float32, device="cpu")
        self.high = torch.full((heads, channels), float("-inf"), dtype=torch.float32, device="cpu")

    def observe(self, x: Tensor) -> None:
        """Add float32 `[B, H, N, D]`."""
        self._widen(*batch_extremes(x))

    def merge(self, other: "Extremes") -> None:
        """Widen by another's extremes."""
        self._widen(other.low, other.high)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def extremes(self, kind: str, change: Change) -> tuple[Tensor, Tensor]:
        """The range under each scale of the granularity `kind`, in the scales' shape, float32."""
        return groups(change(self.low), change(self.high), kind)

    def check(self, tokens: int) -> None:
        if not bool((self.low.isfinite() & self.high.isfinite() & (self.low <= self.high)).all()):
            raise ValueError("low, high: not finite, or a low above its high")


class MovingExtremes(Extremes):
    """Exponential moving averages of the batches' extremes: `m <- decay * m + (1 - decay) * x`, float64 `[H, D]`.

    After n batches from 0 the weights add up to `1 - decay^n`, which is divided out (Adam's bias correction, arXiv 1412.6980).
    As the recurrence is linear, another's batches are appended by `m <- decay^n_other * m + m_other`.
    """

    KEPT = ("low", "high", "batches")

    def __init__(self, heads: int, channels: int, decay: float):
        self.decay = decay
        self.low, self.high = (torch.zeros(heads, channels, dtype=torch.float64, device="cpu") for _ in range(2))
        self.batches = torch.zeros(1, dtype=torch.int64, device="cpu")

    def observe(self, x: Tensor) -> None:
        """Add a batch, float32 `[B, H, N, D]`."""
        low, high = ((1 - self.decay) * extreme.double() for extreme in batch_extremes(x))
        self._append(low, high, 1)

    def merge(self, other: Extremes) -> None:
        """Add another's batches, as if they had come after these."""
        assert isinstance(other, MovingExtremes)
        self._append(other.low, other.high, int(other.batches))

    def _append(self, low: Tensor, high: Tensor, batches: int) -> None:
        kept = self.decay**batches
        self.low, self.high, self.batches = kept * self.low + low, kept * self.high + high, self.batches + batches

    def extremes(self, kind: str, change: Change) -> tuple[Tensor, Tensor]:
        """The range under each scale, from the averages of its channels."""
        weight = 1 - self.decay ** int(self.batches)
        return groups(change((self.low / weight).float()), change((self.high / weight).float()), kind)

    def check(self, tokens: int) -> None:
        super().check(tokens)
        if not 1 <= self.batches <= tokens:
            raise ValueError(f"batches: {int(self.batches)} of {tokens} tokens")


def batch_extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum and the maximum of each channel of `[B, H, N, D]`, on the CPU."""
    return x.amin(dim=(0, 2)).cpu(), x.amax(dim=(0, 2)).cpu()
