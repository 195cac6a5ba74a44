"""QuantScheme, the user's declaration: a precision and a granularity for each of Q, K, V and P, and the transforms before."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
import yaml
from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import core_schema

from tokquant import precisions
from tokquant.errors import SchemeError, quote
from tokquant.files import write_atomically
from tokquant.schemes import document
from tokquant.schemes.balance import SchemeBalance
from tokquant.schemes.granularity import OperandGranularity, PGranularity
from tokquant.schemes.strict import Strict

T = TypeVar("T")

ScaleDtype = Literal["fp32", "fp16", "fp8_e4m3"]
SCALE_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn}


class PrecisionOf:
    """Annotates a string that names a precision registered for an operand. The JSON schema lists those registered by then."""

    def __init__(self, role: str):
        self.role = role

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(lambda name: precisions.get(name, self.role).name, handler(source))

    def __get_pydantic_json_schema__(self, core: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": precisions.names(self.role)}


class Operand(Strict):
    """How Q, K or V is quantized; the base of all three."""

    role: ClassVar[str] = ""
    precision: str
    granularity: OperandGranularity = Field(default="token", validate_default=True)
    symmetric: bool = True
    scale: Literal["dynamic", "static"] = "dynamic"
    scale_dtype: ScaleDtype = "fp32"
    smooth: str = "none"

    @property
    def format(self) -> precisions.Precision:
        """The precision itself."""
        return precisions.get(self.precision)

    @property
    def scaled(self) -> bool:
        """Whether there are scales at all: 16 and 32 bit floats have none."""
        return self.format.largest is not None

    def __str__(self) -> str:
        words = [self.precision]
        if self.scaled:
            words += [str(self.granularity)]
            words += [] if self.symmetric else ["asymmetric"]
            words += ["static"] if self.scale == "static" else []
        words += [f"less {self.smooth.replace('_', ' ')}"] if self.smooth != "none" else []
        return " ".join(words)

    def bits_per_value(self, head_dim: int) -> float:
        """Bits of memory for code, scale and zero of a value in a long sequence. Raises SchemeError where no group fits."""
        bits = self.format.stored_bits
        if self.scaled:
            tokens, channels = self.granularity.cover(2**40, head_dim)
            bits += 8 * SCALE_TYPES[self.scale_dtype].itemsize * (1 if self.symmetric else 2) / (tokens * channels)
        return bits

    @model_validator(mode="after")
    def _consistent(self):
        found = []
        if not self.symmetric and (self.format.kind != "int" or self.role == "q"):
            what = "Q" if self.role == "q" else self.precision
            found.append(("symmetric", f"{what} has no zero point; symmetric: false is for integers of K and V"))
        if self.scale == "static":
            if not self.scaled:
                found.append(("scale", f"{self.precision} has no scale that could be static"))
            elif self.granularity.kind not in ("tensor", "head", "channel"):
                found.append(
                    (
                        "scale",
                        f"static scales cannot follow granularity {self.granularity}, which grows with the sequence; "
                        "use tensor, head or channel, or scale: dynamic",
                    )
                )
        if found:
            raise SchemeError(found)
        return self


class Queries(Operand):
    """How Q is quantized.

    `smooth: block_mean` subtracts the mean over 128 queries and adds its product with K back (SageAttention 2).
    """

    role = "q"
    precision: Annotated[str, PrecisionOf("q")]
    smooth: Literal["none", "block_mean"] = "none"


class Keys(Operand):
    """How K is quantized. `smooth: mean` subtracts the mean over tokens, `static` a calibrated offset; softmax is the same."""

    role = "k"
    precision: Annotated[str, PrecisionOf("k")]
    smooth: Literal["none", "mean", "static"] = "none"


class Values(Operand):
    """How V is quantized. `smooth` as for K; it is added back to the output."""

    role = "v"
    precision: Annotated[str, PrecisionOf("v")]
    smooth: Literal["none", "mean", "static"] = "none"


class Probabilities(Strict):
    """How P is quantized. `unit` scales by 1/R against a row's running maximum, `{row_block: n}` against that in n keys."""

    precision: Annotated[str, PrecisionOf("p")]
    granularity: PGranularity = Field(default="unit", validate_default=True)

    @property
    def format(self) -> precisions.Precision:
        """The precision itself."""
        return precisions.get(self.precision)


class Cache(Strict):
    """How a KV cache keeps tokens: in 16 bits at the beginning (`sink`) and the end (`recent`), and `page` tokens per page."""

    sink: Annotated[int, Field(ge=0, le=2**20)] = 0
    recent: Annotated[int, Field(ge=0, le=2**20)] = 0
    page: Annotated[int, Field(ge=16, le=1024)] = 128

    @model_validator(mode="after")
    def _page_is_a_power_of_two(self):
        if self.page & (self.page - 1):
            raise SchemeError([("page", f"{self.page} is not accepted; use a power of two from 16 to 1024")])
        return self


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class QuantScheme(Strict):
    """How attention is quantized: the operands, and the transforms before. Immutable; equal schemes are interchangeable.

    Raises SchemeError, quoting what was written and what would be accepted.
    """

    name: Name = "custom"
    q: Queries
    k: Keys
    v: Values
    p: Probabilities
    rotate: Literal["none", "hadamard"] = "none"
    rotate_v: Literal["none", "hadamard"] = "none"
    balance: SchemeBalance = "none"
    normalizer: Literal["exact", "quantized"] = "exact"
    cache: Cache | None = None

    @property
    def key_tile(self) -> int:
        """Keys of the tile that the results are defined with: n of `row_block`, or at most 128 against a running maximum.

        A kernel may use another tile with `unit` alone; its results then differ within P's rounding.
        """
        if self.p.granularity.size:
            return self.p.granularity.size
        return min(self.v.granularity.size or 128, 128) if self.v.granularity.kind != "group" else 128

    @model_validator(mode="after")
    def _consistent(self):
        if self.q.scale == "static" and self.k.scaled and self.k.granularity.kind == "channel" and self.k.scale == "dynamic":
            raise SchemeError([("q.scale", "K's dynamic scales per channel are multiplied into Q, so Q's cannot be static")])
        kind, size = self.v.granularity.kind, self.v.granularity.size
        if self.v.scaled and kind in ("block", "channel_block") and size and size % self.key_tile:
            raise SchemeError(
                [
                    (
                        "v.granularity",
                        f"{kind} {size} is smaller than P's row_block of {self.key_tile}, so one product would meet several "
                        f"scales; use {{{kind}: {self.key_tile}}}, or p with granularity {{row_block: {size}}}",
                    )
                ]
            )
        return self

    def __repr__(self) -> str:
        return f"<scheme {self.name}: {self}>"

    def __str__(self) -> str:
        operands = [f"{operand.role} {operand}" for operand in (self.q, self.k, self.v)]
        return ", ".join([*operands, f"p {self.p.precision} {self.p.granularity}"])

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> "QuantScheme":
        # layers that are copies share what torch.compile makes; model_copy, which changes its copy, gives no memo
        return self if memo is not None else super().__deepcopy__()

    # ------------------------------------------------------------------ documents

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "QuantScheme":
        """A scheme from the mapping that its YAML document holds; of equal ones the same object. Raises SchemeError."""
        if not isinstance(data, Mapping):
            raise SchemeError(f"a scheme is a mapping with q, k, v and p, not {quote(data)}")
        if odd := [key for key in data if not isinstance(key, str)]:
            raise SchemeError(f"the key {quote(odd[0])}; keys are plain words")
        return _one(cls(**data))

    @classmethod
    def from_yaml(cls, text: str | bytes) -> "QuantScheme":
        """A scheme from a YAML document. Raises SchemeError."""
        return cls.from_data(document.read(text))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "QuantScheme":
        """A scheme from a YAML file, with its name where it has none. Raises SchemeError, also where it cannot be read."""
        return load_document(path, cls.from_data)

    def schemes(self) -> "list[QuantScheme]":
        """A list of itself, as SchemeMap has a list of its schemes."""
        return [self]

    def to_data(self) -> dict[str, Any]:
        """Every field, as plain data that `from_data` reads back to an equal scheme."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The scheme as a YAML document that `from_yaml` reads back to an equal one."""
        return write_yaml({"name": self.name, **self.model_dump(mode="json", exclude_defaults=True)})

    def dump(self, path: str | os.PathLike) -> None:
        """Write the scheme as YAML, atomically."""
        write_atomically(path, self.to_yaml().encode())

    def digest(self) -> str:
        """A hash of what the scheme does, twelve hexadecimal digits; its `name` does not enter."""
        data = self.model_dump(mode="json", exclude={"name"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    def bits_per_value(self, head_dim: int = 128) -> dict[str, float]:
        """Bits of memory per value of q, k and v, for codes, scales and zeros, in a long sequence."""
        return {role: getattr(self, role).bits_per_value(head_dim) for role in "qkv"}


@lru_cache(maxsize=256)
def _one(scheme: QuantScheme) -> QuantScheme:
    """The first of equal schemes: torch.compile tells them apart by identity."""
    return scheme


def load_document(path: str | os.PathLike, parse: Callable[[Any], T]) -> T:
    """Read a YAML file and `parse` its data, named after the file where it has no name.

    Raises SchemeError that names the file, also where it cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = document.read(file.read(document.LARGEST + 1))
        return parse({"name": name_of(path), **data} if isinstance(data, dict) else data)
    except OSError as error:
        raise SchemeError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        if not isinstance(error, SchemeError):  # a path that no file system accepts, with a null byte
            raise SchemeError(f"{quote(str(path), 200)}: {error}") from None
        raise SchemeError([(f"{path}: {place}" if place else str(path), text) for place, text in error.problems]) from None


def name_of(path: Path) -> str:
    """The name of a scheme without one: its file's name, with other characters than names may have replaced."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.stem.lower())
    return stem.lstrip("._-")[:64] or "custom"


def write_yaml(data: Mapping[str, Any]) -> str:
    """A YAML document with a line for each key, and for each entry of `schemes` and `layers`."""
    return yaml.dump(_lines(data), Dumper=_Dumper, sort_keys=False, width=1000)


def _lines(data: Mapping[str, Any]) -> dict[str, Any]:
    # names of layers and schemes are the user's own: one may be `layers`
    return {
        key: {name: _flow(inner) for name, inner in value.items()} if key in ("schemes", "layers") else _flow(value)
        for key, value in data.items()
    }


def _flow(value: Any) -> Any:
    return _Flow(value) if isinstance(value, dict) else value


class _Flow(dict):
    """A mapping written on one line."""


class _Dumper(yaml.SafeDumper):
    pass


# what `document` reads as a number is quoted where it is a name
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"-?[0-9][0-9.]*([eE][-+]?[0-9]+)?$"), list("-0123456789"))
_Dumper.add_representer(_Flow, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True))
