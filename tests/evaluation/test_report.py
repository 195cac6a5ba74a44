"""The report and its page: figures are those of the comparisons, names are text, and nothing is asked of the outside."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from factories import qkv

import tokquant as tq
from tokquant.evaluation.page import render
from tokquant.evaluation.page.heat import STEPS, Scale
from tokquant.evaluation.page.numbers import cell, percent
from tokquant.evaluation.page.tables import short_labels
from tokquant.evaluation.report import bits_of_cache, gather
from tokquant.schemes import SchemeMap, preset

SCHEMES = ["int8", "int-flash", "kv-int4"]
NAMES = ["<script>alert(1)</script>", 'layer "2" & co', "layers.10"]


@pytest.fixture(scope="module")
def compared():
    found = {}
    for place, name in enumerate(NAMES):
        operands = qkv(40, heads=3, seed=place)
        found[name] = tq.compare(*operands, SCHEMES, backend="reference", repeats=1, explained=True)
    return found


@pytest.fixture(scope="module")
def report(compared):
    return gather("a <b>file</b>", {"torch": "2", "<i>odd</i>": "<u>value</u>"}, SCHEMES, compared)


def of(layers):
    """The report of these comparisons, by the schemes that they name."""
    return gather("x", {}, [each.scheme for each in next(iter(layers.values()))], layers)


class Page(HTMLParser):
    """The cells of each table, by caption, and all elements; every element that is opened must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.ids, self.links = [], [], {}, [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        self.links += [value for key, value in attributes if key in ("href", "src")]
        if name not in ("meta", "link"):
            self.open.append(name)
        if name == "tr":
            self.row = []
        if name in ("td", "th", "caption"):
            self.text = ""

    def handle_data(self, data):
        self.text = getattr(self, "text", "") + data

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name
        if name == "caption":
            self.rows = self.tables.setdefault(self.text, [])
        elif name in ("td", "th"):
            self.row.append(self.text)
        elif name == "tr":
            self.rows.append(self.row)


def test_the_page_is_whole_and_asks_for_nothing(report):
    text = render(report)
    page = Page(text)
    assert text.startswith("<!doctype html>") and page.tags[0] == ("html", {"lang": "en"})
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.ids) and len(set(page.ids)) == len(page.ids)
    assert not re.search(r"(?i)https?:|url\(|@import|\bon\w+=", text)
    assert any(attributes.get("content", "").startswith("default-src 'none';") for _, attributes in page.tags)
    assert len(text) < 100_000


def test_names_from_files_are_text(report):
    text = render(report)
    assert "<script>alert" not in text and "<b>file" not in text and "<u>" not in text
    page = Page(text)
    [head] = [rows for caption, rows in page.tables.items() if caption == "int8: error by layer and head of Q"]
    assert [row[0] for row in head[1:]] == NAMES
    assert ["<i>odd</i>", "<u>value</u>"] in page.tables["What was measured, and with what"]
    assert [name for name, _ in page.tags].count("script") == 1


def test_every_figure_is_that_of_the_comparisons(report, compared):
    tables = Page(render(report)).tables
    for place, name in enumerate(SCHEMES):
        each = [found[place] for found in compared.values()]
        mean = sum(x.errors.rel_l1 for x in each) / len(each)
        [row] = [row for row in tables["Schemes, means over layers"] if row[0].endswith(name)]
        worst = max(compared, key=lambda layer: compared[layer][place].errors.rel_l1)
        assert row[1:4] == [percent(mean), percent(compared[worst][place].errors.rel_l1), str(NAMES.index(worst))]
        [row] = [row for row in tables["Error by scheme and layer"] if row[0] == name]
        assert row[1:] == [cell(x.errors.rel_l1) for x in each]
        rows = tables[f"{name}: error by layer and head of Q"]
        assert rows[0] == ["layer", "0", "1", "2"]
        assert [row[1:] for row in rows[1:]] == [[cell(head.rel_l1) for head in x.heads] for x in each]
        [row] = [row for row in tables["What each operand adds to the error"] if row[0] == name]
        parts = [sum(x.explanation.parts[role] for x in each) / len(each) for role in "qkvp"]
        assert row[1:] == [*(percent(part) for part in parts), percent(mean)]
        rows = tables[f"{name}: the rows that are furthest off, at most three of a layer"][1:]
        worst_rows = [(layer, row) for layer, x in compared.items() for row in x[place].explanation.worst]
        worst_rows = sorted(worst_rows, key=lambda found: -found[1].error)[:8]
        assert [(row[0], row[1], row[2], row[3].split(" (")[0]) for row in rows] == [
            (layer, str(row.head), str(row.token), percent(row.error)) for layer, row in worst_rows
        ]
        assert all(
            f"{percent(found.weights[0][1])} on {found.weights[0][0]}" in row[6]
            for (_, found), row in zip(worst_rows, rows, strict=True)
        )


def test_the_same_report_is_the_same_text(report):
    assert render(report) == render(report)


def test_each_scheme_is_written_out(report):
    text = render(report)
    assert all(each.to_json()["written"].splitlines()[1] in text for each in report.schemes)


def test_one_scheme_one_layer_one_head_is_a_page(compared):
    one = compared[NAMES[2]][0]
    page = Page(render(of({"only": [replace(one, heads=one.heads[:1])]})))
    assert page.tables["int8: error by layer and head of Q"] == [["layer", "0"], ["only", cell(one.heads[0].rel_l1)]]


@pytest.mark.parametrize("value, shown", [(math.nan, "NaN"), (math.inf, "∞"), (0.0, "0")])
def test_errors_that_are_zero_or_no_number_are_a_page(compared, value, shown):
    sound, other = compared[NAMES[2]][:2]
    wrong = replace(
        sound,
        errors=replace(sound.errors, rel_l1=value),
        heads=tuple(replace(head, rel_l1=value) for head in sound.heads),
        explanation=replace(sound.explanation, parts=dict.fromkeys("qkvp", value), worst=()),
    )
    for schemes in ([wrong], [wrong, other]):
        text = render(of({"only": schemes}))
        assert Page(text).tables["Error by scheme and layer"][1][1] == shown
        assert "No row is off at all" in text and not re.search(r'="[^"]*nan', text.replace('data-v="nan"', ""))


def test_a_page_without_explanations_leaves_their_parts_out(compared):
    bare = {name: [replace(x, explanation=None) for x in found] for name, found in compared.items()}
    text = render(of(bare))
    assert Page(text) and "worst rows" not in text and "Where the error" not in text


def test_the_front_is_what_nothing_beats(report):
    front = report.front(bits_of_cache)
    for each in report.schemes:
        beaten = any(
            other.rel_l1 <= each.rel_l1 and bits_of_cache(other) <= bits_of_cache(each) and other is not each
            for other in report.schemes
        )
        assert (each in front) is not beaten


def test_schemes_of_one_name_are_told_apart(compared):
    report = of({"only": [compared[NAMES[2]][0]] * 3})
    assert [each.name for each in report.schemes] == ["int8", "int8 (2)", "int8 (3)"]


def test_what_is_no_report_is_refused(compared):
    with pytest.raises(ValueError, match="nothing to report"):
        gather("x", {}, [], {})
    with pytest.raises(ValueError, match=r"\[1\] comparisons of 3 schemes"):
        of({"a": compared[NAMES[0]], "b": compared[NAMES[1]][:1]})


def test_colours_go_up_in_equal_ratios():
    scale = Scale.over([0.001, 0.1, math.nan, 0.0, math.inf])
    steps = [scale.step(0.001 * 1.01 * 100 ** (step / STEPS)) for step in range(STEPS)]
    assert steps == [f"h{step}" for step in range(STEPS)]
    assert [scale.step(x) for x in (0.0, 0.1, math.nan, math.inf)] == ["h0", f"h{STEPS - 1}", "hx", "hx"]
    assert Scale.over([]).step(0.0) == Scale.over([0.5]).step(0.5) == "h0"


@pytest.mark.parametrize(
    "names, labels",
    [
        (["layers.0.attn", "layers.1.attn", "layers.10.attn"], ["0", "1", "10"]),
        (["layers.10", "layers.11"], ["10", "11"]),
        (["down.attention", "mid.attention"], ["down", "mid"]),
        (["only"], ["0"]),
        (["a", "ab"], ["0", "1"]),
        (["encoder.attention.self", "decoder.cross_attention"], ["0", "1"]),
    ],
)
def test_layers_are_labelled_by_what_they_differ_in(names, labels):
    assert short_labels(names) == labels


@pytest.mark.parametrize(
    "fraction, long, short",
    [(0.01234, "1.23 %", "1.2"), (0.0, "0.00 %", "0"), (1e-6, "0.000 %", "<.01"), (5.0, "500 %", "500"),
     (0.123, "12.3 %", "12"), (1e6, "1.0e+08 %", ">999"), (-math.inf, "−∞", "−∞")],
)  # fmt: skip
def test_percentages_are_as_long_as_there_is_room(fraction, long, short):
    assert (percent(fraction), cell(fraction)) == (long, short)


def test_maps_and_ranges_of_heads_are_reported_under_the_names_of_maps():
    both = tq.HeadSchemes(((1, preset("int8")), (2, preset("kv-int4"))))
    schemes = SchemeMap((("a", preset("int8")), ("*", both)), "mine")
    layers = {}
    for name in ("a", "b"):
        operands = qkv(40, heads=3)
        layers[name] = tq.compare(*operands, [schemes], layer=name, backend="reference", repeats=1, explained=True, bound=True)
    report = gather("x", {}, [schemes], layers)
    [judged] = report.schemes
    assert judged.name == "mine" and "layers:" in judged.to_json()["written"] and Page(render(report))
    assert judged.parts["k"] > 3 * layers["a"][0].explanation.parts["k"] / 2
    assert judged.bound["total"] > judged.bound["error"] and 0 < judged.bound["tightness"]["median"] < 1
    alone = tq.compare(*qkv(40, heads=3), ["kv-int4"], backend="reference", repeats=1, explained=True)[0].heads
    assert [x.rel_l1 for x in layers["b"][0].heads[1:]] == pytest.approx([x.rel_l1 for x in alone[1:]], rel=1e-5)
