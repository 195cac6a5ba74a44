"""Schemes for ranges of a layer's heads."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tokquant.errors import SchemeError, quote
from tokquant.schemes.scheme import QuantScheme
from tokquant.whole_numbers import whole_number


@dataclass(frozen=True)
class HeadSchemes:
    """The schemes of a layer whose heads do not all have the same one: consecutive ranges of heads of K and V.

    A head of Q has the scheme of its head of K and V. Raises SchemeError for invalid parts.
    """

    parts: tuple[tuple[int, QuantScheme], ...]
    """(heads of K and V, scheme) of each range, in order."""

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
        """Heads of K and V in all ranges."""
        return sum(heads for heads, _ in self.parts)

    @property
    def name(self) -> str:
        """The parts' names."""
        return " + ".join(dict.fromkeys(scheme.name for _, scheme in self.parts))

    def slices(self) -> Iterator[tuple[slice, QuantScheme]]:
        """Each range of heads of K and V with its scheme."""
        start = 0
        for heads, scheme in self.parts:
            yield slice(start, start + heads), scheme
            start += heads

    def __str__(self) -> str:
        return "; ".join(f"heads {s.start}-{s.stop - 1}: {scheme.name}" for s, scheme in self.slices())


LayerScheme = QuantScheme | HeadSchemes


def parts_of(scheme: LayerScheme) -> Iterable[tuple[int | None, QuantScheme]]:
    """(heads, scheme) of each range of a layer; heads is None where one scheme has them all."""
    return scheme.parts if isinstance(scheme, HeadSchemes) else ((None, scheme),)
