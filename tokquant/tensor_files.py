"""Opens, reads and checks safetensors files, with errors that name the file, and computes checksums of tensors."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from tokquant.errors import quote

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""


def open_tensors(path: str | os.PathLike, error_type: type[Exception]) -> Any:
    """Open a safetensors file, as a context manager that closes it. Only its header is read yet.

    Raises `error_type`, naming the file, if there is none or it is cut short.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise error_type(f"{path}: Is a directory")
        return safetensors.safe_open(path, framework="pt")
    except OSError as error:
        raise error_type(f"{path}: {error.strerror or str(error).removesuffix(f': {path}')}") from None
    except safetensors.SafetensorError as error:
        raise error_type(f"{path}: not a safetensors file, or not a whole one ({error})") from None


def read_tensors(path: str | os.PathLike, error_type: type[Exception]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file. Raises as `open_tensors`."""
    with open_tensors(path, error_type) as file:
        metadata = file.metadata() or {}
        # copies, because safetensors maps the file into memory: tensors would change with it, and crash if it is cut short
        return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping


def check_forms(tensors: dict[str, Tensor], expected: Mapping[str, Form], of: str, right: str) -> None:
    """Raise ValueError unless these are the expected tensors, with the expected shapes and types.

    Messages name the kind of file by `of`, as in "a cache", and introduce what was expected by `right`, as in "a cache has".
    """
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{quote(name)} is missing")
        if name not in expected:
            raise ValueError(f"{quote(name)} does not belong to {of} of this scheme")
        found = (tuple(tensors[name].shape), tensors[name].dtype)
        if found != expected[name]:
            written, wanted = (f"{list(shape)} of {kind}" for shape, kind in (found, expected[name]))
            raise ValueError(f"{quote(name)} is {written}; {right} {wanted}")


def checksum(tensors: dict[str, Tensor], scheme: str = "") -> str:
    """SHA-256 of the tensors' names, types, shapes and bytes, and of the text of their scheme."""
    digest = hashlib.sha256(scheme.encode())
    for name in sorted(tensors):
        value = tensors[name].cpu()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        # a copy, because an empty tensor or one of size 1 may have strides of 0, which torch cannot view as bytes
        flat = value.flatten().clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
