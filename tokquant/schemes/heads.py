"""Layers whose heads take different schemes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tokquant.errors import SchemeError, quote
from tokquant.schemes.scheme import QuantScheme
from tokquant.whole_numbers import whole_number


@dataclass(frozen=True)
class HeadSchemes:
    """A layer whose heads have different schemes: each part has the heads of K and V that follow those of the part before.

    Queries take the scheme of the head of K and V that they share. Raises SchemeError for invalid parts.
    """

    parts: tuple[tuple[int, QuantScheme], ...]
    """(heads, scheme): how many heads of K and V, in order."""

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(self.parts) if isinstance(self.parts, Iterable) else (self.parts,))
        found = []
        for part in self.parts or [()]:
            heads, scheme = part if isinstance(part, tuple) and len(part) == 2 else (None, None)
            try:
                found.append((whole_number("heads", heads, 1), scheme))
            except ValueError:
                scheme = None
            if not isinstance(scheme, QuantScheme):
                raise SchemeError([("heads", f"{quote(part)} is no part; give (heads, scheme), such as (6, preset('int8'))")])
        object.__setattr__(self, "parts", tuple(found))

    @property
    def heads(self) -> int:
        """Of K and V."""
        return sum(heads for heads, _ in self.parts)

    @property
    def name(self) -> str:
        """The parts' names."""
        return " + ".join(dict.fromkeys(scheme.name for _, scheme in self.parts))

    def slices(self) -> Iterator[tuple[slice, QuantScheme]]:
        """The heads of K and V of each part."""
        start = 0
        for heads, scheme in self.parts:
            yield slice(start, start + heads), scheme
            start += heads

    def __str__(self) -> str:
        return "; ".join(f"heads {s.start}-{s.stop - 1}: {scheme.name}" for s, scheme in self.slices())


LayerScheme = QuantScheme | HeadSchemes


def parts_of(scheme: LayerScheme) -> Iterable[tuple[int | None, QuantScheme]]:
    """(heads, scheme) of each part of a layer; None where one scheme has them all."""
    return scheme.parts if isinstance(scheme, HeadSchemes) else ((None, scheme),)
