"""Checkpoints that include a scheme and its scales: `save_pretrained` writes them, `from_pretrained` applies them."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tokquant.attention import Backend, Scheme
from tokquant.calibration.scales import Scales
from tokquant.errors import ScalesError
from tokquant.integrations.layers import scheme_of_layers
from tokquant.integrations.transformers.registration import NAME, known
from tokquant.integrations.transformers.settings import Setting, place
from tokquant.schemes import QuantScheme, SchemeMap
from tokquant.tensor_files import checksum


@register_quantization_config(NAME)
class TokquantConfig(QuantizationConfigMixin):
    """`from_pretrained(path, quantization_config=TokquantConfig(scheme))`: the model attends by the scheme.

    `save_pretrained` writes the scheme into config.json, and static scales beside the weights, as
    `model.layers.0.self_attn.k_scale`. Loading that again applies them where `tokquant.integrations.transformers` is imported;
    elsewhere the model is loaded without quantization. Weights are not changed, and `backend` is not saved.

    Args: as for `register`. Raises SchemeError, ScalesError, TypeError and ValueError as it does.
    """

    def __init__(
        self,
        scheme: Scheme | dict = "int8",
        scales: Scales | dict | None = None,
        backend: Backend = "auto",
        quant_method: str = NAME,
    ):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.scheme, self.backend = _of_config(scheme) if isinstance(scheme, dict) else scheme_of_layers(scheme), backend
        self.scales = None if isinstance(scales, dict) else scales
        self.saved: dict | None = scales if isinstance(scales, dict) else None
        """Describes the scales in the checkpoint: shape and type of each layer's, and a checksum."""
        if self.saved is None:
            Setting(self.scheme, self.scales, backend)  # raises now for arguments that do not fit

    def to_dict(self) -> dict[str, Any]:
        scales: dict | None = self.saved
        if self.scales is not None:
            layers = {layer: {name: _form(x) for name, x in part.tensors.items()} for layer, part in self.scales.items()}
            scales = {
                "layers": layers,
                "scheme": _written(self.scales.scheme),
                "sha256": checksum(self.scales.tensors()),
            }
        return {"quant_method": NAME, "scheme": _written(self.scheme)} | ({"scales": scales} if scales else {})


@register_quantizer(NAME)
class TokquantQuantizer(HfQuantizer):
    """The hooks that transformers calls while it loads or saves a model with a TokquantConfig."""

    quantization_config: TokquantConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        known()
        if config._attn_implementation is None:
            config._attn_implementation = NAME
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for layer, tensors in (self.quantization_config.saved or {}).get("layers", {}).items():
            try:
                module = model.get_submodule(layer)
            except AttributeError:
                raise ScalesError(
                    f"{layer}: has scales in the checkpoint, and is no module of {type(model).__name__}"
                ) from None
            for name, form in tensors.items():
                # a buffer with an explicit dtype, or it would be cast to the model's
                empty = torch.empty(form["shape"], dtype=getattr(torch, form["dtype"]), device="meta")
                module.register_buffer(name, empty)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        if config.saved is not None:
            layers = {
                layer: {name: _taken(model.get_submodule(layer), name) for name in tensors}
                for layer, tensors in config.saved["layers"].items()
            }
            config.scales = Scales(_of_config(config.saved["scheme"]), layers)
            # tensors that the checkpoint lacks are left uninitialized
            if checksum(config.scales.tensors()) != config.saved["sha256"]:
                raise ScalesError(
                    "scales: those of the checkpoint are missing, or are not those that were saved (checksum differs)"
                )
            config.saved = None
        setting = Setting(config.scheme, config.scales, config.backend)
        setting.check(model)
        place(model, setting)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
        scales = self.quantization_config.scales
        own = {} if scales is None else scales.tensors()
        return model.state_dict() | {name: x.contiguous() for name, x in own.items()}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _written(scheme: QuantScheme | SchemeMap) -> dict[str, Any]:
    """As in a config.json. A map is written as text: transformers sorts keys, but the order of a map's patterns matters."""
    return {"map": scheme.to_yaml()} if isinstance(scheme, SchemeMap) else scheme.model_dump(mode="json", exclude_defaults=True)


def _of_config(written: dict[str, Any]) -> QuantScheme | SchemeMap:
    return SchemeMap.from_yaml(written["map"]) if "map" in written else QuantScheme(**written)


def _form(x: Tensor) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}


def _taken(module: torch.nn.Module, name: str) -> Tensor:
    """Remove and return a buffer: left in the module, it would be cast together with the model."""
    value = module.get_buffer(name)
    del module._buffers[name]
    return value
