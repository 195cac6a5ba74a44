"""Schemes: the user's declaration of how attention is quantized, in Python or YAML."""

from tokquant.schemes.granularity import Granularity
from tokquant.schemes.heads import HeadSchemes, LayerScheme
from tokquant.schemes.maps import SchemeMap
from tokquant.schemes.presets import names as preset_names
from tokquant.schemes.presets import preset
from tokquant.schemes.reading import of_layer, read, resolve
from tokquant.schemes.scheme import Cache, Keys, Operand, Probabilities, QuantScheme, Queries, Values

__all__ = [
    "Cache",
    "Granularity",
    "HeadSchemes",
    "Keys",
    "LayerScheme",
    "Operand",
    "Probabilities",
    "QuantScheme",
    "Queries",
    "SchemeMap",
    "Values",
    "of_layer",
    "preset",
    "preset_names",
    "read",
    "resolve",
]
