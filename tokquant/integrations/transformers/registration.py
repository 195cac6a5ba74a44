"""`register` and `use`: the two ways to give a transformers model a scheme."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tokquant.attention import Backend, Scheme
from tokquant.calibration.scales import Scales
from tokquant.errors import UnsupportedError, quote
from tokquant.integrations.transformers.attention import attend
from tokquant.integrations.transformers.masks import mask
from tokquant.integrations.transformers.settings import ATTRIBUTE, IMPLEMENTATIONS, Observer, Setting, held_by, place

NAME = "tokquant"
RESERVED = ("flash", "sdpa", "flex_attention", "eager", "/", "|", ":", "@")
"""Parts of a name by which transformers takes it for another implementation, or for a kernel to download."""

Model = TypeVar("Model", bound=PreTrainedModel)


def register(scheme: Scheme = "int8", *, scales: Scales | None = None, name: str = NAME, backend: Backend = "auto") -> None:
    """Make `attn_implementation=name` known to transformers, with a scheme for models that `use` gave none of their own.

    Args:
        scheme: a QuantScheme, a preset's name, a path, or a SchemeMap of modules' names, `model.layers.0.self_attn`.
        scales: those of a static scheme, for modules of the same names.
        name: another name, to have several schemes at a time. Registering a name again replaces its scheme.
        backend: as for `tokquant.attention`, except that `auto` always quantizes.

    Raises: SchemeError, ScalesError, TypeError and ValueError for what does not fit; nothing is registered then.
    """
    if not isinstance(name, str) or not name or any(part in name for part in RESERVED):
        raise ValueError(f"name: {quote(name)} means something else to transformers; leave out {', '.join(RESERVED)}")
    _register(name, Setting(scheme, scales, backend))


def use(model: Model, scheme: Scheme = "int8", *, scales: Scales | None = None, backend: Backend = "auto") -> Model:
    """Quantize the attention of one model by a scheme; other models do not change. Returns the model.

    `model.set_attn_implementation("sdpa")` undoes it; a second call replaces the first; a copy of the model keeps the scheme.

    Args: as for `register`. Names are those of `model.named_modules()`.

    Raises: SchemeError where a pattern of a map matches no module, ScalesError where scales are of a module that is not there
    or has no use for them, UnsupportedError for a model that does not look up its attention; else as `register`. The model is
    then as it was.
    """
    return _use(model, Setting(scheme, scales, backend))


def observe(model: Model, observer: Observer) -> Model:
    """Make a model's attention exact, and pass the name, q, k and v of each call to `observer`."""
    return _use(model, Setting("none", observe=observer))


def _use(model: Model, setting: Setting) -> Model:
    check_model(model)
    setting.check(model)
    if not model._can_set_attn_implementation():
        raise UnsupportedError(
            f"model: {type(model).__name__} has its attention written out and looks up no other; it cannot be replaced"
        )
    known()
    model.set_attn_implementation(NAME)
    place(model, setting)
    return model


def check_model(model: object) -> None:
    """Raise TypeError for what is no model of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: a {type(model).__name__}; give a transformers.PreTrainedModel{held_by(model)}")


@contextmanager
def kept(model: PreTrainedModel) -> Iterator[None]:
    """Restore the model's attention on exit. Raises TypeError for what is no model of transformers."""
    check_model(model)
    models = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    implementations = [each.config._attn_implementation for each in models]
    places = [(module, module.__dict__.get(ATTRIBUTE)) for module in model.modules()]
    try:
        yield
    finally:
        for each, implementation in zip(models, implementations, strict=True):
            each.set_attn_implementation(implementation)
        for module, place in places:
            if place is None:
                module.__dict__.pop(ATTRIBUTE, None)
            else:
                setattr(module, ATTRIBUTE, place)


def known() -> None:
    """Register the implementation, if it is not yet, for models with a scheme of their own; others get none."""
    if NAME not in IMPLEMENTATIONS:
        _register(NAME, None)


def _register(name: str, setting: Setting | None) -> None:
    AttentionInterface.register(name, partial(attend, setting, name == NAME))
    # without a mask function under this name transformers makes no masks at all
    AttentionMaskInterface.register(name, mask)
    IMPLEMENTATIONS.add(name)
