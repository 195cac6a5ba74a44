"""Save calibrated scales to safetensors and load them. The file also holds the scheme, so nothing else is needed to run."""

import json
import os

import safetensors.torch
from torch import Tensor

from tokquant.calibration.scales import Scales
from tokquant.errors import ScalesError, SchemeError, quote
from tokquant.files import write_atomically
from tokquant.schemes.reading import of_data
from tokquant.tensor_files import checksum, read_tensors

FORMAT = "1"
SUFFIXES = (*(f"{role}_{kind}" for role in "qkv" for kind in ("scale", "zero", "offset")), "k_balance")


def save_scales(path: str | os.PathLike, scales: Scales) -> None:
    """Write scales as `<layer>.k_scale`, `<layer>.k_offset` ..., with the scheme and a checksum in the metadata, atomically.

    If layers are named as in the model (`model.layers.0.self_attn`), tensors are named as in vLLM and compressed-tensors.
    """
    check_scales_of_layers(scales)
    tensors = {name: value.contiguous().clone() for name, value in scales.tensors().items()}
    scheme = json.dumps(scales.scheme.to_data())
    metadata = {
        "format": "pt",
        "tokquant.format": FORMAT,
        "tokquant.scheme": scheme,
        "tokquant.sha256": checksum(tensors, scheme),
    }
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def check_scales_of_layers(scales: object) -> None:
    """Raise TypeError unless this is a Scales object, which holds all layers."""
    if not isinstance(scales, Scales):
        raise TypeError(f"scales: {quote(scales)}; give all layers', as Calibrator.scales() or load_scales(path) returns them")


def load_scales(path: str | os.PathLike) -> Scales:
    """Read a file that `save_scales` wrote. Raises ScalesError that names what is wrong: the file, its metadata or a scale."""
    tensors, metadata = read_tensors(path, ScalesError)
    if "tokquant.scheme" not in metadata:
        raise ScalesError(
            f"{path}: has no tokquant scheme in its metadata; it was not written by save_scales "
            "(import_checkpoint_scales reads those of checkpoints)"
        )
    if metadata.get("tokquant.format") != FORMAT:
        version = quote(metadata.get("tokquant.format"))
        raise ScalesError(f"{path}: format {version} is not {FORMAT!r}; this version cannot read it")
    try:
        scheme = of_data(json.loads(metadata["tokquant.scheme"]))
    except (SchemeError, ValueError, TypeError, RecursionError) as error:
        raise ScalesError(f"{path}: its scheme cannot be read: {error}") from None
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, name = key.rpartition(".")
        if not layer or name not in SUFFIXES:
            raise ScalesError(f"{path}: {quote(key)} is no scale; names are <layer>.k_scale and the like")
        layers.setdefault(layer, {})[name] = value
    try:
        scales = Scales(scheme, layers)
    except (ScalesError, SchemeError) as error:
        raise ScalesError(f"{path}: {error}") from None
    if metadata.get("tokquant.sha256") != checksum(tensors, metadata["tokquant.scheme"]):
        raise ScalesError(f"{path}: scales or scheme are not those that were written (checksum differs)")
    return scales
