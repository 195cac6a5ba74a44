"""Granularity: how many tokens and how many channels of one head share a scale."""

import math
import operator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from tokquant.errors import SchemeError, nearest, quote

PLAIN = ("token", "tensor", "head", "channel")
SIZED = ("block", "channel_block", "group")
WHOLE = 2**30
"""Stands for the whole sequence, as tokens under one scale."""


@dataclass(frozen=True)
class Granularity:
    """Which values share a scale: `kind` is one of the table's, of which the last three have a `size`.

    | kind          | one scale for                          | shape of the scales of `[B, H, N, D]` |
    |---------------|----------------------------------------|---------------------------------------|
    | tensor        | everything, batch included             | `[1, 1, 1, 1]`                        |
    | head          | a head                                 | `[B, H, 1, 1]`                        |
    | token         | a token of a head                      | `[B, H, N, 1]`                        |
    | channel       | a channel of a head                    | `[B, H, 1, D]`                        |
    | block         | `size` tokens                          | `[B, H, ceil(N / size), 1]`           |
    | channel_block | one channel of `size` tokens           | `[B, H, ceil(N / size), D]`           |
    | group         | `size` channels of a token             | `[B, H, N, D / size]`                 |
    """

    kind: str
    size: int | None = None

    def cover(self, n: int, d: int) -> tuple[int, int]:
        """Tokens and channels under one scale, for n tokens of d channels. Raises SchemeError where groups do not fit."""
        match self.kind, self.size or 0:
            case "token", _:
                return 1, d
            case "block", size:
                return size, d
            case "channel_block", size:
                return size, 1
            case "group", size:
                if d % size:
                    fits = f"group: {math.gcd(size, d)}" if math.gcd(size, d) > 1 else "token"
                    raise SchemeError(f"a group of {size} channels does not divide head_dim {d}; use {fits}")
                return 1, size
            case "channel", _:
                return n, 1
        return n, d

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Shape of the scales of a tensor `[B, H, N, D]`."""
        b, h, n, d = shape
        if self.kind == "tensor":
            return (1, 1, 1, 1)
        tokens, channels = self.cover(n, d)
        return (b, h, -(-n // tokens), d // channels)

    def written(self) -> str | dict[str, int]:
        """As it is written in a scheme: `"token"` or `{"block": 128}`."""
        return self.kind if self.size is None else {self.kind: self.size}

    def __str__(self) -> str:
        return self.kind if self.size is None else f"{self.kind} {self.size}"


def parse(value: object) -> Granularity:
    """The granularity that was written in a scheme. Raises SchemeError."""
    if isinstance(value, Granularity):
        value = value.written()
    if isinstance(value, str) and value in PLAIN:
        return Granularity(value)
    if isinstance(value, dict) and len(value) == 1:
        [(kind, size)] = value.items()
        if kind in SIZED:
            return Granularity(kind, _power_of_two(kind, size))
    kind = next(iter(value), None) if isinstance(value, dict) and value else value
    if isinstance(kind, str) and kind in SIZED and not isinstance(value, dict):
        raise SchemeError(f"{quote(value)} needs a size: {{{kind}: 32}}")
    raise SchemeError(
        f"no granularity {quote(value)}; use one of {', '.join(PLAIN)}, {{block: n}}, {{channel_block: n}}, {{group: g}}"
        + nearest(kind, PLAIN + SIZED)
    )


def parse_p(value: object) -> Granularity:
    """The granularity of P: `unit` or `{row_block: n}`. Raises SchemeError."""
    if isinstance(value, Granularity):
        value = value.written()
    if value == "unit":
        return Granularity("unit")
    if isinstance(value, dict) and list(value) == ["row_block"]:
        return Granularity("row_block", _power_of_two("row_block", value["row_block"]))
    raise SchemeError(f"no granularity {quote(value)} for P; use unit or {{row_block: n}}")


def _power_of_two(kind: str, size: Any) -> int:
    try:
        number = operator.index(size)
    except TypeError:
        number = 0
    if not 16 <= number <= 2**20 or number & (number - 1):
        raise SchemeError(f"{kind} of {quote(size)}: use a power of two from 16 (16, 32, 64, 128 ...)")
    return number


def _schema(plain: tuple[str, ...], sized: tuple[str, ...]) -> dict[str, Any]:
    size = {"type": "integer", "minimum": 16, "description": "a power of two"}
    objects = [
        {"type": "object", "properties": {kind: size}, "required": [kind], "additionalProperties": False} for kind in sized
    ]
    return {"anyOf": [{"type": "string", "enum": list(plain)}, *objects]}


_serialize = PlainSerializer(lambda granularity: granularity.written())
OperandGranularity = Annotated[Granularity, BeforeValidator(parse), _serialize, WithJsonSchema(_schema(PLAIN, SIZED))]
PGranularity = Annotated[Granularity, BeforeValidator(parse_p), _serialize, WithJsonSchema(_schema(("unit",), ("row_block",)))]
