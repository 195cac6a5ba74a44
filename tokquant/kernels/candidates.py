"""How a kernel may be launched: every configuration that is worth trying, the one taken without tuning first."""

from dataclasses import dataclass
from typing import Any

from tokquant.kernels.targets import Target


@dataclass(frozen=True)
class Config:
    """How a kernel is launched."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told."""
        # whether a multiplication and an addition contract must not depend on Triton's default, which is about to change
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def __str__(self) -> str:
        return f"{self.block_m} x {self.block_n}, {self.num_warps} warps, {self.num_stages} stages"


def candidates(*, key_tiles: tuple[int, ...], head_dim: int, wide: bool, masked: bool, target: Target) -> tuple[Config, ...]:
    """Configurations for tiles of `head_dim` channels, a power of two.

    Args:
        key_tiles: the tiles of keys that leave the numbers what they are, the first preferred.
        wide: whether a product is float32.
        masked: whether a mask is read, with as many pointers in a tile as scores.
    """
    small = target.shared_bytes < 160 * 1024
    if wide:
        # float32 tiles fill shared memory
        shapes = [(32, 4), (64, 8)]
        stages = [2, 1] if head_dim <= 64 and not small else [1, 2]
    elif masked:
        shapes, stages = [(64, 8), (64, 4), (32, 4)], [1]
    elif head_dim > 128:
        shapes, stages = [(64, 4), (64, 8), (128, 8)], [1, 2]
    elif head_dim > 64:
        shapes, stages = [(128, 8), (64, 4), (64, 8)], [2, 3, 1]
    else:
        shapes, stages = [(128, 4), (128, 8), (64, 4)], [2, 3, 4]
    return tuple(
        Config(block_m, block_n, warps, depth) for block_n in key_tiles for block_m, warps in shapes for depth in stages
    )
