"""Exports scales in the formats that vLLM, users of ModelOpt and SGLang read."""

import json
import os
import re
from typing import Any

import safetensors.torch
from torch import Tensor

from tokquant.calibration.scales import Scales
from tokquant.errors import ScalesError, SchemeError, nearest, quote
from tokquant.exchange.compressed_tensors import expressible
from tokquant.export import check_scales_of_layers
from tokquant.files import write_atomically
from tokquant.schemes import QuantScheme
from tokquant.whole_numbers import whole_number

FORMATS = ("compressed-tensors", "modelopt", "sglang")


def export_checkpoint_scales(
    path: str | os.PathLike,
    scales: Scales,
    format: str = "compressed-tensors",
    *,
    model_type: str | None = None,
    tp_size: int = 1,
) -> None:
    """Write fp8 scales, `real = code * scale` in float32, in the format of an inference engine, atomically.

    | format             | names                                              | scales                                     |
    |--------------------|----------------------------------------------------|--------------------------------------------|
    | compressed-tensors | `<layer>.k_scale`, `.v_scale`, `.q_scale`          | `[1]` per tensor, `[H, 1, 1]` per head     |
    | modelopt           | `<layer>.k_proj.k_scale`, `<layer>.v_proj.v_scale` | `[]` per tensor                            |
    | sglang (JSON)      | numbers of layers                                  | per tensor, the larger of K's and V's      |

    `sglang` is the file of `--quantization-param-path`: it takes the model's `model_type` ("llama") and `tp_size`, the number
    of tensor-parallel ranks, which get the same numbers.

    Raises SchemeError for what the format cannot express, ScalesError for layers whose names it cannot, and ValueError.
    """
    check_scales_of_layers(scales)
    if format not in FORMATS:
        raise ValueError(f"format: {quote(format)} is not valid; use {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    if format != "sglang" and (model_type is not None or tp_size != 1):
        raise ValueError(f"model_type and tp_size: only format sglang has them, not {format}")
    scheme = expressible(scales.scheme)
    if format == "compressed-tensors":
        tensors = scales.tensors()
    else:
        _check_kv_per_tensor(scheme, format)
        if format == "sglang":
            write_atomically(path, json.dumps(_sglang(scales, model_type, tp_size), indent=2).encode())
            return
        tensors = {
            f"{layer}.{name[0]}_proj.{name}": value for layer, part in scales.items() for name, value in part.tensors.items()
        }
    if scheme.k.granularity.kind == "tensor":
        # ModelOpt writes scalars; vLLM reads either shape
        tensors = {name: value.reshape([] if format == "modelopt" else [1]) for name, value in tensors.items()}
    written = {name: _float32(value) for name, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(written, {"format": "pt"}))


def _check_kv_per_tensor(scheme: QuantScheme, format: str) -> None:
    found = []
    if scheme.q.scaled:
        found.append(("q.precision", f"{scheme.q.precision} cannot be expressed in {format}, which has K and V only; use fp16"))
    for operand in (scheme.k, scheme.v):
        if operand.granularity.kind != "tensor":
            text = f"{operand.granularity} cannot be expressed in {format}; use tensor, or format compressed-tensors"
            found.append((f"{operand.role}.granularity", text))
    if found:
        raise SchemeError(found)


def _sglang(scales: Scales, model_type: str | None, tp_size: int) -> dict[str, Any]:
    if not isinstance(model_type, str) or not model_type:
        raise ValueError(f"model_type: {quote(model_type)} is not valid; sglang needs that of config.json, such as 'llama'")
    tp_size = whole_number("tp_size", tp_size, 1, 1024)
    factors: dict[int, float] = {}
    for layer, part in scales.items():
        numbers = re.findall(r"\d+", layer)
        if len(numbers) != 1:
            raise ScalesError(f"{layer}: sglang counts layers, and this name has not one number, as model.layers.0.self_attn")
        # K and V share one scale: with the larger neither is clipped, and fp8 loses precision only in the smallest values
        factors[int(numbers[0])] = max(_float32(value).item() for value in part.tensors.values())
    if sorted(factors) != list(range(len(scales))):
        raise ScalesError(f"sglang needs every layer from 0 on, once; there are {', '.join(list(scales)[:8])}")
    ranked = {str(number): factors[number] for number in sorted(factors)}
    return {
        "model_type": model_type,
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {str(rank): ranked for rank in range(tp_size)}},
    }


def _float32(value: Tensor) -> Tensor:
    return value.detach().float().cpu().clone()
