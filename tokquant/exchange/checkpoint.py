"""Imports attention scales from a checkpoint that llm-compressor, ModelOpt or the like has written."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokquant.calibration.scales import Scales
from tokquant.errors import ScalesError, SchemeError, quote
from tokquant.exchange.compressed_tensors import attention_blocks, differences, fp8_scheme, from_compressed_tensors
from tokquant.exchange.shards import Found, Scale, find, names, read, read_json
from tokquant.schemes import QuantScheme, resolve

ATTENTION = re.compile(r"(?P<layer>.+)\.(?:k|qkv)_proj\.weight(?:_packed)?")
"""The weights by which an attention layer is recognized."""


def import_checkpoint_scales(path: str | os.PathLike, scheme: QuantScheme | str | None = None) -> Scales:
    """The attention scales of a checkpoint: a safetensors file, or a folder of shards. Nothing else is read from them.

    Scales are taken as they are, `[1]` or `[]` per tensor and `[H, 1, 1]` per head, and become float32 `[1, 1, 1]` and
    `[H, 1, 1]`; layers have the names of their attention modules (`model.layers.0.self_attn`). The scheme is what they imply,
    that of `kv-fp8` per head or per tensor, with codes for Q where there is a q_scale; a config.json beside them is taken
    into account. With `scheme`, which may say more of P and Q, scales of Q that it does not use are left out.

    Raises ScalesError naming the file and the tensor: one that was never set (-1), is not a scale, has a shape that is none of
    these or has no partner, a layer without scales, a zero point other than 0, and what `scheme` or config.json contradict.
    """
    path = Path(path)
    files = names(path)
    found = find(files)
    if not found:
        raise ScalesError(f"{path}: holds no scales of attention; they are named <layer>.k_scale, <layer>.k_proj.k_scale ...")
    scales = read(found)
    _check_whole(found, scales, files)
    implied = fp8_scheme(_granularity(list(scales.values())), q=any(scale.at.role == "q" for scale in scales.values()))
    _check_config(path if path.is_dir() else path.parent, implied)
    chosen = implied if scheme is None else resolve(scheme)
    _check_scheme(path, chosen, implied)
    layers: dict[str, dict[str, Tensor]] = {}
    for (layer, role), scale in scales.items():
        if role != "q" or chosen.q.scale == "static":
            layers.setdefault(layer, {})[f"{role}_scale"] = scale.value
    try:
        return Scales(chosen, layers)
    except ScalesError as error:
        raise ScalesError(f"{path}: {error}") from None


def _granularity(scales: list[Scale]) -> str:
    """The granularity that all these scales have. Raises ScalesError where they differ."""
    first = scales[0]
    for scale in scales:
        if scale.granularity != first.granularity:
            raise scale.at.error(
                f"is one per {scale.granularity}, and {first.at.name} one per {first.granularity}; use one for all"
            )
    return first.granularity


def _check_whole(found: list[Found], scales: Mapping[tuple[str, str], Scale], files: Mapping[str, Path]) -> None:
    """Raise ScalesError unless all layers with scales have the same ones, and every attention layer of that kind has them."""
    roles = sorted({"k", "v"} | {role for _, role in scales})
    for each in found:
        for role in roles:
            if (each.layer, role) not in scales:
                raise each.error(f"the layer has no {role}_scale beside it")
    scaled = {each.layer for each in found}
    alike = {re.sub(r"\d+", "#", layer) for layer in scaled}
    for name, file in files.items():
        match = ATTENTION.fullmatch(name)
        if match and match["layer"] not in scaled and re.sub(r"\d+", "#", match["layer"]) in alike:
            raise ScalesError(f"{file}: {match['layer']}.k_scale: missing, and others like that layer have theirs")


def _check_config(folder: Path, implied: QuantScheme) -> None:
    """Raise ScalesError where config.json, or ModelOpt's hf_quant_config.json, contradicts the scheme that the scales imply."""
    for path, key in ((folder / "config.json", "quantization_config"), (folder / "hf_quant_config.json", "quantization")):
        config = read_json(path).get(key) if path.is_file() else None
        if not isinstance(config, Mapping):
            continue
        algorithm = config.get("kv_cache_quant_algo")
        if algorithm not in (None, "FP8"):
            raise ScalesError(f"{path}: kv_cache_quant_algo {quote(algorithm)} is not read; use FP8")
        if not attention_blocks(config):
            continue
        try:
            written = from_compressed_tensors(config)
        except SchemeError as error:
            raise ScalesError(f"{path}: {error}") from None
        if written.k.granularity != implied.k.granularity:
            there, here = written.k.granularity, implied.k.granularity
            raise ScalesError(f"{path}: says that scales are one per {there}, and those of the checkpoint are one per {here}")


def _check_scheme(path: Path, scheme: QuantScheme, implied: QuantScheme) -> None:
    """Raise ScalesError where K, V or a static Q of `scheme` differ from what the scales imply. P may be anything."""
    free: dict[str, Any] = {"p": implied.p, "normalizer": implied.normalizer, "cache": implied.cache}
    if scheme.q.scale != "static":
        free["q"] = implied.q
    for place, written, accepted in differences(scheme.model_copy(update=free), implied):
        raise ScalesError(f"{path}: scheme {scheme.name!r} has {place} {written}, and these scales are for {accepted}")
