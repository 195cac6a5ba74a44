"""Which scheme, scales and backend apply to a module of a model, and under which name."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tokquant.attention import Backend, check_backend
from tokquant.calibration.scales import LayerScales, Scales, needed
from tokquant.errors import ScalesError
from tokquant.integrations.layers import check_layers, check_scales_of, scheme_of_layers
from tokquant.operators import untraced
from tokquant.schemes import LayerScheme, QuantScheme, SchemeMap, of_layer

ATTRIBUTE = "_tokquant"
"""The attribute of a module that holds its Place."""

IMPLEMENTATIONS: set[str] = set()
"""Names under which tokquant's attention is registered."""

Observer = Callable[[str, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Setting:
    """A scheme or a map of them, as `register` and `use` take it. Raises SchemeError, ScalesError and ValueError."""

    scheme: Any
    scales: Scales | None = None
    backend: Backend = "auto"
    observe: Observer | None = None
    """Is called with the name, q, k and v of each attention."""

    def __post_init__(self):
        object.__setattr__(self, "scheme", scheme_of_layers(self.scheme))
        check_backend(self.backend)
        check_scales_of(self.scheme, self.scales)
        fixed = [scheme.name for scheme in self.scheme.schemes() if needed(scheme)]
        if fixed and self.scales is None:
            raise ScalesError(
                f"scales: scheme {fixed[0]!r} is static; calibrate it (`tokquant calibrate --model`) and give its scales"
            )

    @property
    def by_name(self) -> bool:
        """Whether what applies to a layer depends on its name."""
        return isinstance(self.scheme, SchemeMap) or self.scales is not None or self.observe is not None

    def of(self, name: str) -> tuple[LayerScheme, LayerScales | None]:
        """Scheme and scales of the module of this name. Raises SchemeError or ScalesError where it has none."""
        scheme = of_layer(self.scheme, name)
        static = isinstance(scheme, QuantScheme) and needed(scheme)
        return scheme, self.scales[name] if static and self.scales is not None else None

    def check(self, model: nn.Module) -> None:
        """Raise SchemeError or ScalesError unless every pattern and all scales are of modules of `model` that use them."""
        check_layers(self.scheme, self.scales, model, [name for name, _ in model.named_modules() if name], "module")

    def __deepcopy__(self, memo: dict) -> "Setting":
        return self  # shared by copies of a model


@dataclass(frozen=True, eq=False)
class Place:
    """A module's name in its model, and the model's own setting."""

    name: str
    setting: Setting | None = None


def place(model: nn.Module, setting: Setting) -> None:
    """Store in every module of a model its name, and the setting that applies."""
    for name, module in model.named_modules():
        setattr(module, ATTRIBUTE, Place(name, setting))


def held_by(model: object) -> str:
    """For an error: where a wrapper (a compiled model, a PeftModel, a SentenceTransformer) holds a transformers model."""
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    name = next((name for name, part in parts if isinstance(part, PreTrainedModel)), None)
    return "" if name is None else f"; this one holds such a model: model.get_submodule({name!r})"


def own(model: nn.Module) -> Setting | None:
    """The setting that `use` or a checkpoint gave a model; None where it has none."""
    found: Place | None = model.__dict__.get(ATTRIBUTE)
    return found.setting if found else None


def place_of(module: nn.Module, registered: Setting | None, yields: bool, by_name: bool = False) -> tuple[Place, Setting]:
    """The place of an attention module and the setting that applies: the model's own, if it has one and `registered` yields.

    If neither the setting nor the caller (`by_name`) needs a name, it may be that of the class. It is read where it is needed,
    because a graph that read it belongs to one layer before torch 2.12. Raises ValueError if no setting
    applies, or if a name is needed and there is none.
    """
    found: Place | None = module.__dict__.get(ATTRIBUTE)
    setting = found.setting if found and found.setting and yields else registered
    if setting is None:
        raise ValueError(
            "tokquant: this model has no scheme; call tokquant.integrations.transformers.use(model, scheme) first; "
            "if use() changed another model of the same config object, make this one from a copy of the config"
        )
    if found is None and (setting.by_name or by_name):
        _name_modules(module)
        found = module.__dict__[ATTRIBUTE]
    return found or Place(type(module).__name__), setting


@untraced("the search for a module's name, which use(model, ...) spares,")
def _name_modules(module: nn.Module) -> None:
    """Store their names in all modules of the model that this module is part of. Raises ValueError if it is part of none."""
    for name, each in _model_of(module).named_modules():
        each.__dict__.setdefault(ATTRIBUTE, Place(name))


def _model_of(module: nn.Module) -> PreTrainedModel:
    """The outermost transformers model that a module is part of. A module has no link to it, so search all live models."""
    alive = (x for x in gc.get_objects() if issubclass(type(x), PreTrainedModel))
    found = [model for model in alive if any(each is module for each in model.modules())]
    if not found:
        raise ValueError(
            f"tokquant: this {type(module).__name__} is in no transformers model, so it has no name to find its scheme by; "
            "call tokquant.integrations.transformers.use(model, scheme)"
        )
    return max(found, key=lambda model: sum(1 for _ in model.modules()))
