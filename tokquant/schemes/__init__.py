"""Schemes: what a user declares, in Python or YAML."""

from tokquant.schemes.granularity import Granularity
from tokquant.schemes.presets import names as preset_names
from tokquant.schemes.presets import preset, resolve
from tokquant.schemes.scheme import Cache, Keys, Operand, Probabilities, QuantScheme, Queries, Values

__all__ = [
    "Cache",
    "Granularity",
    "Keys",
    "Operand",
    "Probabilities",
    "QuantScheme",
    "Queries",
    "Values",
    "preset",
    "preset_names",
    "resolve",
]
