"""The schemes and scales of a model's layers where a layer is the module that calls torch's attention."""

from contextlib import suppress
from typing import Any

from torch import nn

from tokquant.attention import check_scales
from tokquant.calibration.scales import LayerScales, static
from tokquant.calibration.watching import LayerNames
from tokquant.errors import ScalesError, SchemeError, UnsupportedError
from tokquant.integrations.layers import check_layers, check_scales_of
from tokquant.schemes import LayerScheme, QuantScheme, SchemeMap, of_layer

SchemeAndScales = tuple[LayerScheme, LayerScales | None]


class ModuleSchemes:
    """The scheme and scales of each attention that modules of `model` run, named as `LayerNames` names it.

    Raises TypeError for what is no module; SchemeError and ScalesError for a pattern, or scales, of no module of the model.
    """

    def __init__(self, model: nn.Module, scheme: QuantScheme | SchemeMap, scales: Any):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: a {type(model).__name__}; give a torch.nn.Module")
        check_scales_of(scheme, scales)
        self.names, self._scheme, self._scales = LayerNames(model), scheme, scales
        modules = self.names.of_modules()
        given = [*(scheme.layers if isinstance(scheme, SchemeMap) else ()), *((name, None) for name in scales or ())]
        numbers = {name.rpartition(":")[2] for name, _ in given if ":" in name}
        layers = [*modules, *(f"{name}:{number}" for name in modules for number in numbers)]
        check_layers(scheme, scales, model, layers, "module")
        # found beforehand, as torch.compile does not trace how; most modules never attend, and need nothing
        self._known: dict[str, SchemeAndScales] = {}
        for layer in layers:
            with suppress(SchemeError, ScalesError):
                self._known[layer] = self._find(layer)

    def of(self, layer: str | None) -> SchemeAndScales:
        """The scheme and scales of a layer. Raises SchemeError or ScalesError if it lacks them, UnsupportedError for None."""
        if layer is None:
            raise UnsupportedError(f"model: none of {type(self.names.model).__name__}'s modules runs, so the layer is unknown")
        return self._known.get(layer) or self._find(layer)

    def _find(self, layer: str) -> SchemeAndScales:
        scheme = of_layer(self._scheme, layer)
        scales = self._scales[layer] if self._scales is not None and static(scheme, layer) else None
        if isinstance(scheme, QuantScheme):
            check_scales(scheme, scales)
        return scheme, scales
