"""`register` and `use`: the two ways to give a diffusers model a scheme."""

import re
import warnings
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from torch import nn

from tokquant.attention import Backend, Scheme, check_backend
from tokquant.calibration.scales import LayerScales, Scales, static
from tokquant.errors import SchemeError, UnsupportedError, quote
from tokquant.integrations.diffusers import surface
from tokquant.integrations.diffusers.attention import function_of
from tokquant.integrations.layers import check_layers, check_scales_of, scheme_of_layers
from tokquant.schemes import LayerScheme, SchemeMap, of_layer

Model = TypeVar("Model", bound=nn.Module)


def register(
    scheme: Scheme = "int8", *, scales: LayerScales | None = None, name: str = "tokquant", backend: Backend = "auto"
) -> None:
    """Make a scheme known to diffusers as an attention backend.

    From then on `model.set_attention_backend(name)`, `attention_backend(name)` and the environment variable
    DIFFUSERS_ATTN_BACKEND accept it, the last if this call precedes the first import of a model. Registering a name again
    replaces its scheme, also in models that use it already.

    Args:
        scheme: a QuantScheme, a preset's name, or the path of a YAML file. `use` takes maps of layers.
        scales: for a static scheme, those of one layer, which are used in all layers. `use` takes scales per layer.
        name: lower-case, and not the name of one of diffusers' own backends.
        backend: as for `tokquant.attention`, except that `auto` always quantizes.

    Raises:
        ImportError: diffusers is not installed. UnsupportedError: a version of diffusers with other backends than supported.
        SchemeError, ScalesError, TypeError, ValueError: arguments that do not fit; nothing is registered then.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_.-]+", name):
        raise ValueError(f"name: {quote(name)}; use lower-case letters, digits, '_', '-' and '.'")
    given = scheme_of_layers(scheme)
    one = given.only() if isinstance(given, SchemeMap) else given
    untold = "and diffusers does not tell a backend which one calls it; use(model, ...) takes them"
    if one is None:
        raise SchemeError(f"scheme: {given.name!r} is a map of layers, {untold}")
    if isinstance(scales, Scales):
        raise TypeError(f"scales: these are of {len(scales)} layers, {untold}")
    surface.add(name, function_of(one, scales, backend))


def unregister(name: str = "tokquant") -> None:
    """Remove a registered backend. Models that still use it raise an error when they run. ValueError for an unknown name."""
    surface.remove(name)


def use(model: Model, scheme: Scheme = "int8", *, scales: Scales | None = None, backend: Backend = "auto") -> Model:
    """Quantize the attention of one model, all layers by one scheme or each by its own. Returns the model.

    Nothing needs to be registered, and other models do not change. `model.reset_attention_backend()` undoes it.

    Args:
        model: `pipe.transformer`, say. Layers have the names of `model.named_modules()`: `transformer_blocks.0.attn`.
        scheme: a QuantScheme, a preset's name, the path of a YAML file, or a SchemeMap of layers.
        scales: for static schemes, those of each layer, by the same names.
        backend: as for `tokquant.attention`, except that `auto` always quantizes.

    Raises:
        SchemeError: as `register`; a layer that no pattern of a map matches, or a pattern that matches no layer.
        ScalesError: scales that are missing, unused, or of a layer that is not there.
        UnsupportedError: as `register`; a model none of whose layers takes a backend. If only some do not, that is a warning.
        ImportError, TypeError, ValueError: as `register`. After an error the model is as it was.
    """
    layers = _layers(model)
    given = scheme_of_layers(scheme)
    check_backend(backend)
    check_scales_of(given, scales)
    check_layers(given, scales, model, layers, "layer")
    chosen: dict[int, tuple[str, Any]] = {}
    for layer, processor in layers.items():
        its_scales = scales[layer] if scales is not None and static(given, layer) else None
        own = _backend(of_layer(given, layer), its_scales, backend)
        first, its = chosen.setdefault(id(processor), (layer, own))
        if its is not own:
            raise SchemeError(
                f"scheme: {layer} shares its processor with {first}, and with it the scheme; set_processor() parts them"
            )
    for processor in layers.values():
        processor._attention_backend = chosen[id(processor)][1]
    return model


_shared: WeakValueDictionary[tuple[LayerScheme, Backend], Any] = WeakValueDictionary()
"""Backends of schemes without scales, kept as long as a model uses them."""


def _backend(scheme: LayerScheme, scales: LayerScales | None, backend: Backend) -> Any:
    """The backend of a scheme. Layers without scales share one, so that torch.compile compiles them only once."""
    made = _shared.get((scheme, backend)) if scales is None else None
    if made is None:
        made = surface.unlisted(function_of(scheme, scales, backend))
        # diffusers' own backends are pickled by their names, which this one has not
        made.__reduce_ex__ = lambda protocol: (_backend, (scheme, scales, backend))
        if scales is None:
            _shared[scheme, backend] = made
    return made


def _layers(model: object) -> dict[str, Any]:
    """The attention processors of a model that can take a backend, by the names of their modules."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: a {type(model).__name__}; give a torch.nn.Module, such as pipe.transformer")
    found = {name: module.processor for name, module in model.named_modules() if getattr(module, "processor", None) is not None}
    layers = {name: processor for name, processor in found.items() if hasattr(processor, "_attention_backend")}
    rest = sorted({type(processor).__name__ for name, processor in found.items() if name not in layers})
    if not layers:
        reason = f"its attention is {', '.join(rest)}" if rest else "it has no attention of diffusers"
        raise UnsupportedError(
            f"model: a {type(model).__name__} takes no backends; {reason}; tokquant.quantized_sdpa reaches what calls torch's"
        )
    if rest:
        count = len(found) - len(layers)
        warnings.warn(
            f"model: {count} of {len(found)} layers stay as they are; {', '.join(rest)} takes no backend", stacklevel=3
        )
    return layers
