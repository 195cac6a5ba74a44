"""Instruction sets that kernels are written for, and how compilers are told and asked of them."""

from dataclasses import dataclass

from tokquant.errors import nearest, quote


@dataclass(frozen=True)
class Instructions:
    """A set, whose products are in the file of its name."""

    flags: tuple[str, ...] = ()
    """What a compiler is told. No -march=native: a cache folder may be shared by machines."""
    macros: tuple[str, ...] = ()
    """What a compiler defines for a processor that has it."""
    register: int = 16
    """Bytes."""
    bfloats: bool = False
    """Whether there is a product of two numbers of bfloat16 a lane."""
    tables: bool = False
    """Whether lanes choose among the 16 of a register."""


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_HAS_AVX2 = ("__AVX2__", "__FMA__", "__F16C__")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_HAS_AVX512 = ("__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__", "__AVX512VNNI__")

INSTRUCTIONS = {
    "avx512_bf16": Instructions(
        ("-mavx512bf16", *_AVX512, *_AVX2), ("__AVX512BF16__", *_HAS_AVX512, *_HAS_AVX2), 64, bfloats=True, tables=True
    ),
    "avx512_vnni": Instructions((*_AVX512, *_AVX2), (*_HAS_AVX512, *_HAS_AVX2), 64, tables=True),
    "avx_vnni": Instructions(("-mavxvnni", *_AVX2), ("__AVXVNNI__", *_HAS_AVX2), 32),
    "avx2": Instructions(_AVX2, _HAS_AVX2, 32),
    "neon_i8mm": Instructions(("-march=armv8.2-a+dotprod+i8mm",), ("__ARM_FEATURE_DOTPROD", "__ARM_FEATURE_MATMUL_INT8")),
    "neon_dotprod": Instructions(("-march=armv8.2-a+dotprod",), ("__ARM_FEATURE_DOTPROD",)),
    "portable": Instructions(),
}
"""The fastest first."""


def of_macros(found: set[str]) -> tuple[str, ...]:
    """The sets of a processor, the fastest first, by what a compiler defines for it."""
    return tuple(name for name, one in INSTRUCTIONS.items() if found.issuperset(one.macros))


def chosen(name: str, of: str) -> str:
    """A name of a set as it was given, in `of`. Raises ValueError for one that is none."""
    if name not in INSTRUCTIONS:
        raise ValueError(f"{of}: {quote(name)} is not valid; use one of {', '.join(INSTRUCTIONS)}{nearest(name, INSTRUCTIONS)}")
    return name
