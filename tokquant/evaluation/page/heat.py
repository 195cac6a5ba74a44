"""Heat maps: tables whose cells hold their number, on one scale of colours for all."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokquant.evaluation.page.markup import Markup, tag
from tokquant.evaluation.page.numbers import cell

STEPS = 12
"""Colours, of which page.css has one each."""

WIDEST = 500.0
"""Most between the ends of a scale: what is smaller takes its first colour."""


@dataclass(frozen=True)
class Scale:
    """Errors -> colours, in equal ratios from the smallest to the largest."""

    low: float
    high: float

    @classmethod
    def over(cls, errors: Iterable[float]) -> "Scale":
        """The scale that holds these; what is zero or not finite does not count."""
        found = [error for error in errors if 0 < error < math.inf]
        high = max(found, default=1.0)
        return cls(max(min(found, default=1.0), high / WIDEST), high)

    def step(self, error: float) -> str:
        """The class of a cell."""
        if not math.isfinite(error):
            return "hx"
        if error <= self.low or self.high <= self.low:
            return "h0"
        return f"h{min(STEPS - 1, int(STEPS * math.log(error / self.low) / math.log(self.high / self.low)))}"

    def legend(self) -> Markup:
        """The colours with the error that each begins at."""
        ratio = self.high / self.low
        edges = [self.low * ratio ** (step / STEPS) for step in range(STEPS if ratio > 1 else 1)]
        cells = [tag("td", cell(edge), class_=f"h{step}") for step, edge in enumerate(edges)]
        return tag(
            "table",
            tag("caption", f"Colours: relative L1 error in %, from each number up; the largest is {cell(self.high)}."),
            tag("tbody", tag("tr", *cells)),
            class_="heat legend",
        )


def heat_map(
    caption: str,
    corner: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[Markup, Sequence[float]]],
    scale: Scale,
) -> Markup:
    """A table of errors; columns are labels with what they are in full, rows headings with their errors."""
    head = tag("tr", tag("th", corner, scope="col"), *(tag("th", label, scope="col", title=full) for label, full in columns))
    largest = max((e for _, errors in rows for e in errors if math.isfinite(e)), default=0.0)

    def td(error: float) -> Markup:
        mark = " most" if error == largest > 0 else ""
        return tag("td", cell(error), class_=scale.step(error) + mark)

    body = [tag("tr", heading, *(td(error) for error in errors)) for heading, errors in rows]
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_="heat")
    return scrolled(caption, table)


def scrolled(label: str, *content: Markup) -> Markup:
    """What may be wider than the page, in a part of it that scrolls by itself, by keyboard too."""
    return tag("div", *content, class_="scroll", tabindex=0, role="region", aria_label=label)
