"""Checks of the scheme and scales that a user gives for a model's layers against the layers that the model has."""

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from tokquant.attention import Scheme
from tokquant.calibration.scales import Scales, needed, static
from tokquant.errors import ScalesError, SchemeError, nearest, quote
from tokquant.schemes import HeadSchemes, QuantScheme, SchemeMap, of_layer, read


def scheme_of_layers(scheme: Scheme) -> QuantScheme | SchemeMap:
    """The scheme for all layers, or the map from layers to schemes, that a user gave. Raises SchemeError."""
    return SchemeMap((("*", scheme),)) if isinstance(scheme, HeadSchemes) else read(scheme)


def check_scales_of(scheme: QuantScheme | SchemeMap, scales: object) -> None:
    """Raise TypeError unless `scales` is a Scales or None; ScalesError where no layer's scheme has a static part."""
    if scales is None:
        return
    if not isinstance(scales, Scales):
        raise TypeError(f"scales: a {type(scales).__name__}; give what load_scales or a Calibrator returns")
    if not any(map(needed, scheme.schemes())):
        raise ScalesError(f"scales: scheme {scheme.name!r} has no static part and no use for them")


def check_layers(
    scheme: QuantScheme | SchemeMap, scales: Scales | None, model: nn.Module, names: Collection[str], kind: str
) -> None:
    """Raise SchemeError for a map's pattern that matches none of `names`, the model's layers; `kind` is what errors call these.

    Raise ScalesError for scales of a layer that is not there, or whose scheme does not use them.
    """
    if isinstance(scheme, SchemeMap):
        for pattern, _ in scheme.layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SchemeError(
                    f"scheme map {scheme.name!r}: {quote(pattern)} matches no {kind} of {type(model).__name__}"
                    f"{nearest(pattern, names)}"
                )
    for name in scales or ():
        if name not in names:
            raise ScalesError(f"scales: {type(model).__name__} has no {kind} {quote(name)}{nearest(name, names)}")
        if static(scheme, name) is None:
            own = of_layer(scheme, name).name
            raise ScalesError(f"scales: {name} takes scheme {own!r}, which has no use for them; calibrate for {scheme.name!r}")
