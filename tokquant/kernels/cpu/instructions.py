"""The instruction sets that kernels are written for, their compiler flags, and the macros that show a processor has them."""

from dataclasses import dataclass

from tokquant.errors import nearest, quote


@dataclass(frozen=True)
class Instructions:
    """An instruction set. Its products are in the header of its name."""

    flags: tuple[str, ...] = ()
    """Compiler flags. Never -march=native, because machines may share a cache folder."""
    macros: tuple[str, ...] = ()
    """Macros that a compiler defines for a processor with this set."""
    register: int = 16
    """Bytes of a register."""
    bfloats: bool = False
    """Whether one instruction computes two bfloat16 products per lane."""
    tables: bool = False
    """Whether each lane can look up one of the 16 numbers of a register."""


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


def of_macros(defined: set[str]) -> tuple[str, ...]:
    """The sets of a processor for which a compiler defines these macros, the fastest first."""
    return tuple(name for name, instructions in INSTRUCTIONS.items() if defined.issuperset(instructions.macros))


def check_name(name: str, variable: str) -> str:
    """Return `name` if there is such a set. Raises ValueError naming the environment variable that it comes from."""
    if name not in INSTRUCTIONS:
        names = ", ".join(INSTRUCTIONS)
        raise ValueError(f"{variable}: {quote(name)} is not valid; use one of {names}{nearest(name, INSTRUCTIONS)}")
    return name
