"""The part of a page that goes into each scheme: written out, by layer and head, and its worst rows."""

from tokquant.evaluation.explain import WorstRow
from tokquant.evaluation.page.heat import Scale, heat_map
from tokquant.evaluation.page.markup import Markup, join, tag
from tokquant.evaluation.page.numbers import percent, plain
from tokquant.evaluation.page.tables import ROLES, part_cells, table
from tokquant.evaluation.report import Judged, Report

ROWS = 8
"""Worst rows that are shown of a scheme."""


def schemes(report: Report, scale: Scale) -> Markup:
    """A fold for each scheme, the first one open."""
    folds = [_fold(each, place, scale) for place, each in enumerate(report.schemes)]
    return tag("section", tag("h2", "Each scheme"), *folds)


def _fold(judged: Judged, place: int, scale: Scale) -> Markup:
    heads = range(max(len(each.heads) for each in judged.layers.values()))
    maps = heat_map(
        f"{judged.name}: error by layer and head of Q",
        "layer",
        [(str(head), f"head {head}") for head in heads],
        [(_layer(name), [head.rel_l1 for head in each.heads]) for name, each in judged.layers.items()],
        scale,
    )
    shown = [
        tag("p", str(judged.scheme), class_="note"),
        tag("pre", judged.scheme.to_yaml().rstrip(), tabindex=0, aria_label=f"{judged.name} in YAML", role="region"),
        tag("h3", "By layer and head"),
        maps,
    ]
    if judged.parts is not None:
        shown += [tag("h3", "Where the error comes from, by layer"), _parts(judged), tag("h3", "The worst rows"), _rows(judged)]
    title = tag("summary", tag("b", judged.name), f" {percent(judged.rel_l1)}")
    return tag("details", title, tag("div", *shown, id=f"scheme-{place}"), open="" if place == 0 else None)


def _layer(name: str) -> Markup:
    return tag("th", name, scope="row")


def _parts(judged: Judged) -> Markup:
    rows = []
    for name, each in judged.layers.items():
        assert each.explanation is not None
        bits = " / ".join(plain(each.bits[role]) for role in "qkv")
        cells = part_cells(each.explanation.parts)
        rows.append(
            tag("tr", _layer(name), *cells, tag("td", percent(each.errors.rel_l1), class_="n"), tag("td", bits, class_="n"))
        )
    caption = f"{judged.name}: what each operand adds to the error of a layer"
    return table(caption, ("layer", *ROLES.upper(), "all", "bits q / k / v"), rows, "parts")


def _rows(judged: Judged) -> Markup:
    rows = judged.worst_rows(ROWS)
    if not rows:
        return tag("p", "No row is off at all.")
    note = (
        "How far a row of the output is off, relative to what the rows of its head hold on average; size is what the row "
        "itself holds, relative to that too. Entropy is of its weights, in bits: 2 to that power is about how many keys it "
        "looks at. In brackets, the mean over the head."
    )
    numbers = ("off by (head)", "entropy (head)", "size", "largest weights: share on key")
    heads = ("layer", "head", "token", *numbers, *ROLES.upper())
    caption = f"{judged.name}: the rows that are furthest off, at most three of a layer"
    return join(tag("p", note, class_="note"), table(caption, heads, [_row(name, row) for name, row in rows], "parts"))


def _row(layer: str, row: WorstRow) -> Markup:
    token = str(row.token) + (f" of sequence {row.batch}" if row.batch else "")
    entropies = (f"{plain(row.entropy)} ({plain(row.usual_entropy)})", f"\u00d7{plain(row.size)}")
    figures = (str(row.head), token, f"{percent(row.error)} ({percent(row.usual_error)})", *entropies)
    cells = [tag("td", text, class_="n") for text in figures]
    largest = ", ".join(f"{percent(share)} on {key}" for key, share in row.weights)
    return tag("tr", _layer(layer), *cells, tag("td", largest, class_="wide"), *part_cells(row.parts))
