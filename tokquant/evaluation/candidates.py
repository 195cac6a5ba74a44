"""The default candidates of a search: the presets, and every pairing of a few ways to quantize K with a few for V.

The errors of K and of V hardly depend on each other, so pairs fill the gaps between presets, each made for one purpose.
"""

from typing import Any

from tokquant.calibration.scales import needed
from tokquant.errors import SchemeError
from tokquant.schemes import QuantScheme, preset, preset_names

KEYS: dict[str, dict[str, Any]] = {
    "int8": {"k": {"precision": "int8", "scale_dtype": "fp16", "smooth": "mean"}},
    "int8-block": {"k": {"precision": "int8", "granularity": {"block": 128}, "smooth": "mean"}},
    "int4": {
        "k": {"precision": "int4", "symmetric": False, "scale_dtype": "fp16", "smooth": "mean"},
        "rotate": "hadamard",
    },
}

INT8, INT4 = {"precision": "int8", "smooth": "mean"}, {"precision": "int4", "symmetric": False, "scale_dtype": "fp16"}
FP16 = {"precision": "fp16"}


def _p(precision: str, keys: int) -> dict[str, Any]:
    return {"precision": precision, "granularity": {"row_block": keys}}


VALUES: dict[str, dict[str, Any]] = {
    "int8-32": {"v": {**INT8, "granularity": {"channel_block": 32}}, "p": _p("uint8", 32)},
    "int8-64": {"v": {**INT8, "granularity": {"channel_block": 64}}, "p": _p("uint8", 64)},
    "int8-128": {"v": {**INT8, "granularity": {"channel_block": 128}}, "p": _p("uint8", 128)},
    "int8-group": {"v": {"precision": "int8", "granularity": {"group": 32}, "scale_dtype": "fp16"}, "p": FP16},
    "int4": {"v": INT4, "p": _p("int8", 128)},
    "int4-group": {"v": {**INT4, "granularity": {"group": 32}}, "p": FP16},
    "fp16": {"v": FP16, "p": FP16},
}


def default(head_dim: int) -> list[QuantScheme]:
    """Every candidate that quantizes, fits heads of this many channels, and needs no calibration."""
    pairs = [
        QuantScheme(name=f"k-{keys}-v-{values}", q={"precision": "int8"}, **KEYS[keys], **VALUES[values])  # type: ignore[arg-type]
        for keys in KEYS
        for values in VALUES
    ]
    presets = (preset(name) for name in preset_names() if name != "none")
    return [scheme for scheme in (*presets, *pairs) if not needed(scheme) and fits(scheme, head_dim)]


def fits(scheme: QuantScheme, head_dim: int) -> bool:
    """Whether the scheme's groups divide this many channels."""
    try:
        scheme.bits_per_value(head_dim)
    except SchemeError:
        return False
    return True
