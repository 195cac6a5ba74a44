"""How a kernel may be launched: every configuration that is worth trying, the one taken without tuning first."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tokquant.kernels.targets import Target

Loop = Literal["portable", "hopper"]


@dataclass(frozen=True)
class Config:
    """How a kernel is launched."""

    block_m: int
    block_n: int
    num_warps: int
    """Of a block."""
    num_stages: int
    loop: Loop = "portable"
    """Which main loop: the one that runs everywhere, or that of `hopper.py`."""

    @property
    def roles(self) -> int:
        """How many parts of a block go ways of their own: in the loop for Hopper two that compute beside one that copies."""
        return 3 if self.loop == "hopper" and self.block_m == 128 else 1

    def tiles(self) -> dict[str, int]:
        """What a kernel is given behind its arguments, by name."""
        tiles = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        # Triton's compiler knows of stages; in Gluon they are the kernel's own
        return tiles if self.loop == "portable" else tiles | {"STAGES": self.num_stages}

    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told. Of several roles it knows the first; the kernel adds the others."""
        # whether a multiplication and an addition contract must not depend on Triton's default, which is about to change
        return {"num_warps": self.num_warps // self.roles, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def __str__(self) -> str:
        loop = "" if self.loop == "portable" else f", {self.loop} loop"
        return f"{self.block_m} x {self.block_n}, {self.num_warps} warps, {self.num_stages} stages{loop}"


Table = tuple[tuple[int, int, int], ...]
"""Queries, warps and stages."""

WIDE: Table = ((32, 8, 1), (32, 4, 1), (32, 4, 2), (16, 4, 1), (64, 8, 1))
MASKED = ((64, 8, 1), (64, 4, 1), (32, 4, 1))
SMALL = ((128, 4, 2), (128, 4, 3), (128, 8, 2), (64, 4, 2), (64, 4, 3), (32, 4, 2))
MIDDLE = ((128, 8, 2), (128, 8, 3), (64, 4, 2), (64, 4, 3), (64, 8, 2), (32, 4, 2))
CROWDED = ((64, 4, 2), (64, 4, 3), (128, 8, 2), (128, 8, 3), (64, 8, 2), (32, 4, 2))
LARGE = ((64, 8, 1), (64, 8, 2), (64, 4, 1), (128, 8, 1), (32, 4, 1))
WITHOUT_ASYNCHRONOUS_COPIES = ((128, 4, 1), (128, 8, 1), (64, 4, 1), (64, 4, 2), (32, 4, 1))


def candidates(
    *,
    key_tiles: tuple[int, ...],
    head_dim: int,
    wide: bool,
    masked: bool,
    biased: bool,
    crowded: bool,
    decoded: bool,
    bytes_of_tokens: tuple[int, int],
    target: Target,
) -> tuple[Config, ...]:
    """Configurations for tiles of `head_dim` channels, a power of two.

    Args:
        key_tiles: the tiles of keys that leave the numbers what they are, the first preferred.
        wide: whether a product is float32, whose tiles fill shared memory.
        masked: whether something is read for each pair, with as many pointers in a tile as scores.
        biased: whether there is a bias of another kind, or means to add, for which four warps have no registers left.
        bytes_of_tokens: of shared memory, for a query and for a key with its value.
        crowded: whether keys have so many values of their own (scale, zero, weight) that these fill registers.
        decoded: whether keys or values are decoded to 16 bits before their product.
    """
    table: Table
    if wide:
        table = WIDE
    elif masked:
        table = MASKED
    elif head_dim > 128:
        table = LARGE
    elif target.backend == "hip":
        table = WITHOUT_ASYNCHRONOUS_COPIES
    elif crowded:
        table = CROWDED
    else:
        table = MIDDLE if head_dim > 64 or biased else SMALL
    every = [Config(block_m, block_n, warps, stages) for block_n in key_tiles for block_m, warps, stages in table]

    def shared_bytes(config: Config) -> int:
        # wgmma and tcgen05 keep all stages beside the one in use, and so does Triton 3.6 of what is decoded on NVIDIA
        whole = target.name in ("sm_90", "sm_100") or (decoded and target.backend == "cuda")
        stages = config.num_stages if whole else max(1, config.num_stages - 1)
        return config.block_m * bytes_of_tokens[0] + stages * config.block_n * bytes_of_tokens[1]

    # an estimate from above; a kilobyte is the block's own
    fitting = [config for config in every if shared_bytes(config) <= target.shared_bytes - 1024]
    # one stage takes less than estimated, as nothing waits in shared memory for its turn
    alone = dict.fromkeys(replace(config, num_stages=1) for config in sorted(every, key=shared_bytes))
    return tuple(fitting or list(alone)[:3])
