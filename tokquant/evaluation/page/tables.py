"""The parts of a page that have a row for each scheme."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from statistics import median

from tokquant.evaluation.page.heat import Scale, heat_map, scrolled
from tokquant.evaluation.page.markup import Markup, tag
from tokquant.evaluation.page.numbers import percent, plain, special, thousandths
from tokquant.evaluation.page.scatter import Point, scatter
from tokquant.evaluation.report import Judged, Report, bits_of_cache

ROLES = "qkvp"
LONGEST_LABEL = 8


def in_short(report: Report) -> Markup:
    """What a reader in a hurry takes away."""
    front = report.front(bits_of_cache)
    if not front:
        return tag(
            "p", "No scheme has an error that is a number: the activations hold values that are not finite.", class_="lead"
        )
    best, smallest = front[-1], front[0]
    fastest = min(report.schemes, key=_ms)
    kept, least = (f"{thousandths(bits_of_cache(each))} bits a value of K and V" for each in (best, smallest))
    times = f"{plain(_ms(fastest))} ms, and torch\u2019s SDPA {plain(fastest.mean(lambda each: each.sdpa_ms))} ms"
    said = [
        _said("Closest to exact", best, f"{percent(best.rel_l1)} off at {kept}"),
        _said("Fewest bits", smallest, f"{least}, {percent(smallest.rel_l1)} off"),
        _said("Fastest here", fastest, f"{times}; {percent(fastest.rel_l1)} off"),
    ]
    return tag("dl", *(part for each in said for part in each), class_="lead")


def _said(what: str, judged: Judged, text: str) -> tuple[Markup, Markup]:
    return tag("dt", what), tag("dd", tag("b", judged.name), f": {text}")


def summary(report: Report) -> Markup:
    """Means over layers, a row for each scheme."""
    heads = (
        "scheme",
        "rel. L1",
        "worst layer",
        "",
        "cosine",
        "RMSE",
        "bits q / k / v",
        "ms",
        "quantize ms",
        "SDPA ms",
        "backend",
    )
    labels = dict(zip(report.layers, short_labels(report.layers), strict=True))
    fronts = {id(each) for cost in (bits_of_cache, _ms) for each in report.front(cost)}

    def row(place: int, judged: Judged) -> Markup:
        found = judged.summary()
        bits = " / ".join(thousandths(found["bits"][role]) for role in "qkv")
        return tag(
            "tr",
            _name(judged, place, id(judged) in fronts),
            _number(percent(found["rel_l1"]), found["rel_l1"]),
            _number(percent(found["worst_rel_l1"]), found["worst_rel_l1"]),
            tag("td", labels[found["worst_layer"]], title=found["worst_layer"], class_="name"),
            *(
                _number(f"{found[key]:{form}}" if isfinite(found[key]) else special(found[key]), found[key])
                for key, form in (("cosine", ".6f"), ("rmse", ".2e"))
            ),
            _number(bits, bits_of_cache(judged)),
            *(_number(f"{found[key]:.2f}", found[key]) for key in ("ms", "quantize_ms", "sdpa_ms")),
            tag("td", found["backend"]),
        )

    note = (
        "Means over layers. Relative L1 is the sum of what the output is off by over the sum of what it is. A filled dot is on "
        "a Pareto front: nothing here errs less with as few bits of K and V, or in as little time. Times are medians of "
        "attention on codes, and of quantization; SDPA\u2019s are in the tensors\u2019 own type, on a CPU in the "
        "faster of fp32 and bf16, taken in turn with the scheme\u2019s."
    )
    rows = [row(place, each) for place, each in enumerate(report.schemes)]
    return _section("Summary", note, table("Schemes, means over layers", heads, rows, "sortable"))


def costs(report: Report) -> Markup:
    """Error against bits, and against time."""
    bits, time = ([*_points(report, cost)] for cost in (bits_of_cache, _ms))
    note = "The stairs are the Pareto front: the least error that a cost buys. Full circles are on it."
    return _section(
        "Error against bits and time",
        note,
        tag(
            "div",
            scatter("Error and bits", "bits a value of K and V, logarithmic", bits),
            scatter("Error and time", "ms of attention on codes, logarithmic", time, mark=("SDPA", _sdpa(report))),
            class_="figures",
        ),
    )


def _points(report: Report, cost: Callable[[Judged], float]) -> list[Point]:
    front = {id(each) for each in report.front(cost)}
    return [Point(each.name, cost(each), each.rel_l1, id(each) in front) for each in report.schemes]


def overview(report: Report, scale: Scale) -> Markup:
    """A heat map of schemes and layers."""
    labels = short_labels(report.layers)
    rows = [
        (_name(each, place), [layer.errors.rel_l1 for layer in each.layers.values()])
        for place, each in enumerate(report.schemes)
    ]
    note = "Relative L1 error in %. The largest of a map has a frame. The same colours stand for the same errors in every map."
    found = heat_map("Error by scheme and layer", "scheme", list(zip(labels, report.layers, strict=True)), rows, scale)
    return _section("Error by layer", note, scale.legend(), found)


def parts(report: Report) -> Markup:
    """What Q, K, V and P each add."""
    if any(each.parts is None for each in report.schemes):
        return Markup("")
    measured = {each.explanation.rows for s in report.schemes for each in s.layers.values() if each.explanation is not None}
    heads = ("scheme", "Q", "K", "V", "P", "all")
    rows = [
        tag("tr", _name(each, place), *part_cells(each.parts or {}), _number(percent(each.rel_l1), each.rel_l1))
        for place, each in enumerate(report.schemes)
    ]
    note = (
        "Relative L1, means over layers. Q, K and V: exact attention in which this operand alone is as its codes say. P: the "
        "output against exact attention on the codes of all three, so the rounding of P with all that a kernel rounds. "
        f"Measured on {' or '.join(str(n) for n in sorted(measured))} queries of each head. Independent errors add like "
        "squares, so the parts sum to more than all. Bars are relative to the largest of their row."
    )
    return _section(
        "Where the error comes from", note, table("What each operand adds to the error", heads, rows, "sortable parts")
    )


def part_cells(found: Mapping[str, float]) -> list[Markup]:
    """A cell for each of Q, K, V and P, with a bar."""
    largest = max((part for part in found.values() if isfinite(part)), default=0.0)
    return [
        tag(
            "td",
            percent(found[role]),
            class_="n bar" + (" most" if found[role] == largest > 0 else ""),
            style=f"--w:{100 * found[role] / largest:.0f}%" if isfinite(found[role]) and largest > 0 else None,
            data_v=f"{found[role]:.6g}",
        )
        for role in ROLES
    ]


def setting(report: Report) -> Markup:
    """What was measured, on what and with what."""
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in report.setting.items()]
    facts = tag("table", tag("caption", "What was measured, and with what"), tag("tbody", *rows), class_="setting")
    layers = [tag("li", name) for name in report.layers]
    return _section(
        "Setting",
        "",
        scrolled("Setting", facts),
        tag("details", tag("summary", f"Layers ({len(layers)})"), tag("ol", *layers, start=0)),
    )


def short_labels(names: Sequence[str]) -> list[str]:
    """Names without what they all begin and end with: `layers.0.attn` and `layers.1.attn` are 0 and 1; else their places."""
    start = _shared_start(names)
    end = _shared_start([name[len(start) :][::-1] for name in names])
    labels = [name[len(start) : len(name) - len(end)] for name in names]
    if len(set(labels)) == len(names) and all(0 < len(label) <= LONGEST_LABEL for label in labels):
        return labels
    return [str(place) for place in range(len(names))]


def _shared_start(texts: Sequence[str]) -> str:
    # a number that only begins alike is not shared: 10 and 11
    first, last = min(texts), max(texts)
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same].rstrip("0123456789")


def _section(title: str, note: str, *content: Markup) -> Markup:
    return tag("section", tag("h2", title), *([tag("p", note, class_="note")] if note else []), *content)


def table(caption: str, heads: Sequence[str], rows: Sequence[Markup], kind: str) -> Markup:
    """A table with a caption and a row of headings, in a part of the page that scrolls."""
    head = tag("tr", *(tag("th", text, scope="col") if text else tag("td") for text in heads))
    return scrolled(caption, tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows), class_=kind))


def _name(judged: Judged, place: int, on_front: bool | None = None) -> Markup:
    dot = (
        []
        if on_front is None
        else [tag("span", "\u25cf" if on_front else "\u25c7", class_="dot", title="on a Pareto front" if on_front else None)]
    )
    return tag("th", *dot, tag("a", judged.name, href=f"#scheme-{place}"), scope="row", data_v=judged.name)


def _number(text: str, value: float) -> Markup:
    return tag("td", text, class_="n", data_v=f"{value:.6g}")


def _ms(judged: Judged) -> float:
    return judged.mean(lambda each: each.ms)


def _sdpa(report: Report) -> float:
    return median(each.mean(lambda layer: layer.sdpa_ms) for each in report.schemes)
