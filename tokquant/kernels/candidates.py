"""The launch configurations that tuning may choose among; the first is the untuned one."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tokquant.kernels.targets import Target

Loop = Literal["portable", "hopper"]


@dataclass(frozen=True)
class Config:
    """A launch configuration."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    """Warps of a block, of all roles."""
    num_stages: int
    """Depth of the software pipeline."""
    loop: Loop = "portable"
    """Which main loop: the one that runs everywhere, or that of `hopper.py`."""

    @property
    def roles(self) -> int:
        """Warp-specialized parts of a block: in the loop for Hopper up to two that compute and one that copies."""
        return 3 if self.loop == "hopper" and self.block_m == 128 else 1

    def tiles(self) -> dict[str, int]:
        """The kernel's constexpr arguments, which follow the others, by name."""
        tiles = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        # Triton's compiler makes the stages; a Gluon kernel makes them itself
        return tiles if self.loop == "portable" else tiles | {"STAGES": self.num_stages}

    def options(self) -> dict[str, Any]:
        """Options of Triton's compiler. It is given the warps of the first role; the kernel itself starts the others."""
        # explicit, as results must not depend on Triton's default for contracting a multiplication and an addition
        return {"num_warps": self.num_warps // self.roles, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def __str__(self) -> str:
        loop = "" if self.loop == "portable" else f", {self.loop} loop"
        return f"{self.block_m} x {self.block_n}, {self.num_warps} warps, {self.num_stages} stages{loop}"


Table = tuple[tuple[int, int, int], ...]
"""Launches as (block_m, num_warps, num_stages)."""

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
    """Configurations for tiles of `head_dim` channels, a power of two, that should fit shared memory.

    Args:
        key_tiles: values of block_n that do not change results, the preferred one first.
        wide: whether a product is float32, whose tiles fill shared memory.
        masked: whether a mask or bias is read for each pair, with a tile of pointers as large as that of scores.
        biased: whether there is a bias of another kind, or means to add, for which four warps lack registers.
        crowded: whether each key has so many values (scale, zero, weight) that these fill registers.
        decoded: whether keys or values are decoded to 16 bits before their product.
        bytes_of_tokens: bytes of shared memory for a query, and for a key with its value.
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
        # wgmma and tcgen05 need a buffer more than the stages in flight; so does Triton 3.6 for decoded operands on NVIDIA
        every_stage = target.name in ("sm_90", "sm_100") or (decoded and target.backend == "cuda")
        stages = config.num_stages if every_stage else max(1, config.num_stages - 1)
        return config.block_m * bytes_of_tokens[0] + stages * config.block_n * bytes_of_tokens[1]

    # an upper estimate; the system reserves a kilobyte of each block
    fitting = [config for config in every if shared_bytes(config) <= target.shared_bytes - 1024]
    # else without a pipeline, which takes less than estimated, as no tile is buffered in shared memory
    single_stage = dict.fromkeys(replace(config, num_stages=1) for config in sorted(every, key=shared_bytes))
    return tuple(fitting or list(single_stage)[:3])
