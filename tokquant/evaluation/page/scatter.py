"""Error against a cost, in SVG: a mark for each scheme, and the Pareto front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokquant.evaluation.page.markup import Markup, tag
from tokquant.evaluation.page.numbers import percent, plain

WIDTH, HEIGHT = 440, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 44
LETTER = 6.3
"""Width of a letter at the size of labels, about."""
LINE = 13
LONGEST = 18


@dataclass(frozen=True)
class Point:
    """A scheme: what it costs, more than zero, and its error as a fraction, zero or more."""

    name: str
    cost: float
    error: float
    on_front: bool


@dataclass(frozen=True)
class Axis:
    """Values above zero -> places between `start` and `end`, by their logarithms."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value; what is beyond an end is at it."""
        low, high, value = (math.log(x) for x in (self.low, self.high, max(value, self.low)))
        return self.start + (self.end - self.start) * min(1.0, (value - low) / (high - low))

    def ticks(self) -> list[float]:
        """Round numbers inside: the fewer of each power of ten, the more powers there are."""
        powers = math.log10(self.high / self.low)
        digits = (1, 1.5, 2, 3, 4, 5, 7) if powers < 0.8 else (1, 2, 5) if powers < 4 else (1,)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def scatter(title: str, across: str, points: Sequence[Point], *, mark: tuple[str, float] | None = None) -> Markup:
    """A figure of `points`; `mark` is a name and a cost for a vertical line. What is not finite is named under it instead."""
    shown = [point for point in points if math.isfinite(point.error) and math.isfinite(point.cost)]
    missing = [point.name for point in points if point not in shown]
    if not shown:
        return tag("figure", tag("figcaption", f"{title}: no scheme has an error and a cost that are numbers."))
    costs = [point.cost for point in shown] + ([mark[1]] if mark else [])
    positive = [point.error for point in shown if point.error > 0] or [1e-3]
    y = Axis(min(positive) / 1.5, max(positive) * 1.6, HEIGHT - BOTTOM, TOP)
    x = Axis(min(costs) / 1.3, max(costs) * 1.3, LEFT, WIDTH - RIGHT)
    marks, labels = _marks(shown, x, y)
    parts = [*_grid(x, y, across)]
    if mark:
        at = f"{x.at(mark[1]):.1f}"
        parts += [
            tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="peer"),
            tag("text", mark[0], x=at, y=HEIGHT - BOTTOM - 5, class_="peer", text_anchor="middle"),
        ]
    drawing = tag(
        "svg",
        tag("title", f"{title}: {len(shown)} schemes"),
        *parts,
        _front([point for point in shown if point.on_front], x, y),
        *marks,
        *labels,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )
    notes = []
    if len(labels) < len(shown):
        notes.append(f"{len(shown) - len(labels)} names had no room: point at a mark, or see the table.")
    if zeros := [point.name for point in shown if point.error == 0]:
        notes.append(f"At the bottom, with no error at all: {', '.join(zeros)}.")
    if missing:
        notes.append(f"Not drawn, for it is not a number: {', '.join(missing)}.")
    return tag("figure", tag("figcaption", tag("strong", title), *(f" {note}" for note in notes)), drawing)


def _grid(x: Axis, y: Axis, across: str) -> list[Markup]:
    bottom = HEIGHT - BOTTOM
    drawn = []
    for tick in y.ticks():
        at = f"{y.at(tick):.1f}"
        drawn += [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"),
            tag("text", f"{100 * tick:.12g} %", x=LEFT - 6, y=at, dy="0.35em", text_anchor="end"),
        ]
    for tick in x.ticks():
        at = f"{x.at(tick):.1f}"
        drawn += [
            tag("line", x1=at, x2=at, y1=TOP, y2=bottom, class_="grid"),
            tag("text", f"{tick:.12g}", x=at, y=bottom + 16, text_anchor="middle"),
        ]
    drawn.append(tag("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="axis"))
    return drawn


def _front(points: Sequence[Point], x: Axis, y: Axis) -> Markup:
    """Stairs: what a cost buys until the next scheme is affordable."""
    if len(points) < 2:
        return Markup("")
    ordered = sorted(points, key=lambda point: point.cost)
    path = f"M{x.at(ordered[0].cost):.1f} {y.at(ordered[0].error):.1f}"
    path += "".join(f"H{x.at(point.cost):.1f}V{y.at(point.error):.1f}" for point in ordered[1:])
    return tag("path", d=path, class_="front")


def _marks(points: Sequence[Point], x: Axis, y: Axis) -> tuple[list[Markup], list[Markup]]:
    """Marks, and the names that have room beside them: those on the front first."""
    places = [(x.at(point.cost), y.at(point.error)) for point in points]
    taken = [(cx - 5, cy - 5, cx + 5, cy + 5) for cx, cy in places]
    marks, labels = [], []
    for point, (cx, cy) in sorted(zip(points, places, strict=True), key=lambda each: not each[0].on_front):
        what = tag("title", f"{point.name}: {percent(point.error)} at {plain(point.cost)}")
        if point.on_front:
            marks.append(tag("circle", what, cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=5, class_="mark"))
        else:
            corners = f"M{cx:.1f} {cy - 5:.1f}l5 5l-5 5l-5 -5z"
            marks.append(tag("path", what, d=corners, class_="mark hollow"))
        name = point.name if len(point.name) <= LONGEST else f"{point.name[: LONGEST - 1]}\u2026"
        for dx, dy, anchor in _AROUND:
            width = LETTER * len(name)
            left = cx + dx - (width if anchor == "end" else width / 2 if anchor == "middle" else 0)
            box = (left, cy + dy - LINE + 3, left + width, cy + dy + 3)
            if _free(box, taken):
                taken.append(box)
                labels.append(
                    tag(
                        "text",
                        name,
                        x=f"{cx + dx:.1f}",
                        y=f"{cy + dy:.1f}",
                        text_anchor=anchor,
                        class_="on" if point.on_front else None,
                    )
                )
                break
    return marks[::-1], labels  # those on the front over the others


_AROUND = [
    (8, 4, "start"), (-8, 4, "end"), (0, -9, "middle"), (0, 18, "middle"), (6, -7, "start"), (6, 15, "start"), (-6, -7, "end"),
    (-6, 15, "end"),
]  # fmt: skip
"""Where a name may be, the best first: its end or middle, from the mark."""


def _free(box: tuple[float, ...], taken: Sequence[tuple[float, ...]]) -> bool:
    left, top, right, bottom = box
    if left < LEFT or right > WIDTH or top < 0 or bottom > HEIGHT - BOTTOM:
        return False
    return all(right < other[0] or left > other[2] or bottom < other[1] or top > other[3] for other in taken)
