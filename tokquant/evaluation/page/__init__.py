"""A report as one page: HTML, CSS, SVG and a little script in one file, which asks for nothing else and needs no script."""

from importlib import resources

from tokquant.evaluation.page import details, tables
from tokquant.evaluation.page.heat import Scale
from tokquant.evaluation.page.markup import Markup, tag
from tokquant.evaluation.report import Report

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render(report: Report) -> str:
    """The page of a report; the same text for the same report."""
    heads = [head.rel_l1 for each in report.schemes for layer in each.layers.values() for head in layer.heads]
    scale = Scale.over([*heads, *(layer.errors.rel_l1 for each in report.schemes for layer in each.layers.values())])
    title = f"{_count(len(report.schemes), 'scheme')} on {report.input}"
    body = [
        tag("header", tag("h1", title), tag("p", "tokquant: attention in few bits, against float64")),
        tables.in_short(report),
        tables.summary(report),
        tables.costs(report),
        tables.overview(report, scale),
        tables.parts(report),
        details.schemes(report, scale),
        tables.setting(report),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"tokquant: {title}"),
        tag("style", _file("page.css")),
    ]
    page = tag("html", tag("head", *head), tag("body", tag("main", *body), tag("script", _file("page.js"))), lang="en")
    return f"<!doctype html>\n{page}\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _file(name: str) -> Markup:
    return Markup(resources.files(__name__).joinpath(name).read_text(encoding="utf-8"))
