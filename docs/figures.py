"""The pictures of these pages, `python docs/figures.py`: from the activations that ship, and normal tensors where it says so.

The same tensors give the same files: nothing is timed, and no date is written. Backgrounds are transparent and every colour can
be read on white and on black.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import tokquant as tq
from tokquant import reference
from tokquant.activations import Activations, sample
from tokquant.evaluation import plot
from tokquant.inputs import features_of
from tokquant.metrics import errors
from tokquant.schemes import preset_names
from tokquant.schemes.granularity import parse

GREY, BLUE, ORANGE, GREEN, PURPLE = "#808080", "#3b8eea", "#e0823d", "#2ea36f", "#b06fd8"
STYLE = Path(__file__).with_name("tokquant.mplstyle")
SEVEN = ListedColormap([BLUE, ORANGE, GREEN, "#d9b64a", PURPLE, "#6fb7c9", "#d86f8e"])
LEFT = ("fp8", "kv-fp8", "int8-fp8", "kv-int8")
"""Presets whose names stand to the left of their points, as others' stand to the right of nearly the same."""
Layers = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def attention(layers: Layers) -> Figure:
    """Q, K, P, V and the output of 64 tokens of one head, and the tile of keys that a kernel has in hand."""
    q, k, v = (x[:1, :1, 64:128].double() for x in layers["layers.0"])
    p, _ = reference.weights(q, k, features_of(q, k), slice(0, 64))
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplot_mosaic(
        [[".", "k", "."], ["q", "p", "o"], [".", "v", "."]], height_ratios=[1, 2, 1], width_ratios=[1, 2, 1]
    )
    for place, title, x in (("q", "Q", q), ("k", "K transposed", k.mT), ("v", "V transposed", v.mT), ("o", "O = P V", p @ v)):
        _image(axes[place], x[0, 0], title, cmap="PuOr", vmin=-x.abs().max(), vmax=x.abs().max())
    _image(axes["p"], p[0, 0].sqrt(), "P, a row for each query (square roots)", cmap="Blues")
    for place in "kpv":
        axes[place].add_patch(Rectangle((31.5, -0.5), 16, 64 if place == "p" else 32, fill=False, color=ORANGE, lw=2))
    return figure


def granularities(layers: Layers) -> Figure:
    """Which values of `[N, D]` share a scale: those of one colour that touch."""
    n, d = 32, 32
    names = ["token", {"block": 16}, {"channel_block": 16}, {"group": 16}, "channel", "head"]
    figure = Figure(figsize=(5.4, 4), layout="constrained")
    for axes, granularity in zip(figure.subplots(2, 3).flat, map(parse, names), strict=True):
        tokens, channels = granularity.cover(n, d)
        row, column = np.arange(n)[:, None] // tokens, np.arange(d)[None, :] // channels
        number = row * (d // channels) + column
        # neighbours differ: seven colours, one on for the next channel and three for the next token
        _image(axes, (3 * row + column) % 7, str(granularity), cmap=SEVEN, vmin=0, vmax=6)
        axes.set_xlabel(f"{number.max() + 1} scale{'s' if number.max() else ''}")
    return figure


def smoothing(layers: Layers) -> Figure:
    """K of one head as it is and less its mean over the tokens, in the same colours, and the step of int8 per token."""
    k = layers["layers.3"][1][0, 1].float()
    smooth = k - k.mean(dim=0)
    largest = k.abs().max()
    figure = Figure(figsize=(6.4, 3), layout="constrained")
    left, right, steps = figure.subplots(1, 3)
    for axes, x, title in ((left, k, "K"), (right, smooth, "K less its mean")):
        picture = _image(axes, x[:96], title, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
        axes.set(xlabel="channel", ylabel="token" if axes is left else "")
    figure.colorbar(picture, ax=right)
    for x, label, colour in ((k, "K", BLUE), (smooth, "less its mean", ORANGE)):
        steps.hist(x.abs().amax(dim=1) / 127, bins=24, histtype="step", label=label, color=colour)
    steps.set(xlabel="step of a token's int8 codes", ylabel="tokens")
    steps.legend(fontsize=7)
    return figure


def levels(layers: Layers, longest: int) -> Figure:
    """One row of P beside the least that its codes can say, and what P costs by the number of keys."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    row, cost = figure.subplots(1, 2)
    p = row_that_loses_most(*layers["layers.2"][:2])
    tiles = p.unflatten(0, (-1, 128)).amax(dim=1)
    edges = np.arange(len(tiles) + 1) * 128
    row.semilogy(p, ".", ms=3, color=GREY, label="P of one query, by key", rasterized=True)
    row.plot(edges[[0, -1]], [p.max() / 254] * 2, color=BLUE, label="half a step of int8, unit")
    row.step(edges, [*tiles / 254, tiles[-1] / 254], where="post", color=ORANGE, label="half a step of int8, row_block 128")
    row.set(xlabel="key", title="What lies below the line becomes 0", ylim=(None, 30 * float(p.max())))
    row.legend(fontsize=7, loc="upper right")
    for label, found in p_errors(longest).items():
        cost.loglog(list(found), [100 * error for error in found.values()], "o-", ms=3, label=label)
    cost.set(xlabel="keys", ylabel="relative L1 error of the output, %", title="Normal tensors, D = 64", ylim=(0.5, 10))
    cost.set_xticks(list(found), map(str, found), rotation=45)
    cost.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    cost.minorticks_off()
    cost.legend(fontsize=7)
    return figure


def row_that_loses_most(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The row of P, `[N_k]`, of which the most lies below half a step of 127 levels against the row's maximum."""
    p, _ = reference.weights(q, k.double(), features_of(q, k), slice(0, q.shape[2]))
    lost = (p * (p < p.amax(dim=-1, keepdim=True) / 254)).sum(dim=-1)
    return p.flatten(0, 2)[lost.argmax()]


def p_errors(longest: int) -> dict[str, dict[int, float]]:
    """Relative L1 error of schemes that differ in P, and in what V is with it, by the number of keys, for 128 queries."""
    int8 = {"precision": "int8"}
    found: dict[str, dict[int, float]] = {}
    for label, v, p in (
        ("int8 P, unit", "head", {"precision": "int8"}),
        ("int8 P, row_block 128", "head", {"precision": "int8", "granularity": {"row_block": 128}}),
        ("uint8 P, row_block 128", {"channel_block": 128}, {"precision": "uint8", "granularity": {"row_block": 128}}),
        ("fp16 P and V", None, {"precision": "fp16"}),
    ):
        values = {"precision": "int8", "granularity": v} if v else {"precision": "fp16"}
        scheme = tq.QuantScheme(q=int8, k=int8, v=values, p=p)
        torch.manual_seed(0)
        q, k, v_of_all = torch.randn(1, 1, 128, 64), *(torch.randn(1, 1, longest, 64) for _ in "kv")
        found[label] = {}
        for n in (2**i for i in range(8, longest.bit_length())):
            some = q, k[:, :, :n], v_of_all[:, :, :n]
            out = tq.attention(*some, scheme, backend="reference")
            found[label][n] = errors(out, reference.oracle(*some, features_of(*some[:2]))[0]).rel_l1
    return found


def presets(layers: Layers) -> Figure:
    """The error of every preset but `none` on the activations, mean over layers, against the bits that K and V take."""
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, (bits, error) in preset_errors(layers).items():
        side = {"ha": "right", "xytext": (-5, -2)} if name in LEFT else {"xytext": (5, -2)}
        axes.plot(bits, 100 * error, "o", color=BLUE if name.startswith("kv-") else ORANGE)
        axes.annotate(name, (bits, 100 * error), textcoords="offset points", fontsize=8, **side)
    axes.set(xlabel="bits a value of K and V, scales included (head_dim 128)", ylabel="relative L1 error, %", yscale="log")
    axes.set(xlim=(2, 15))
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return figure


def preset_errors(layers: Layers) -> dict[str, tuple[float, float]]:
    """(bits of K and V, relative L1 error): static presets are calibrated on the activations themselves."""
    found = {}
    for name in (name for name in preset_names() if name != "none"):
        scheme, scales = tq.preset(name), None
        if "static" in (scheme.k.scale, scheme.v.scale):
            calibrator = tq.Calibrator(scheme)
            for layer, tensors in layers.items():
                calibrator.observe(layer, *tensors)
            scales = calibrator.scales()
        each = []
        for layer, (q, k, v) in layers.items():
            out = tq.attention(q, k, v, scheme, scales=scales and scales[layer], backend="reference")
            each.append(errors(out, reference.oracle(q, k, v, features_of(q, k))[0]).rel_l1)
        bits = scheme.bits_per_value()
        found[name] = (bits["k"] + bits["v"]) / 2, sum(each) / len(each)
    return found


def search(layers: Layers) -> Figure:
    """The front of a search: error against bits."""
    return plot.figure(tq.search(layers, budget="bits=8", name="bits-8"))


FIGURES: tuple[Callable[..., Figure], ...] = (attention, granularities, smoothing, levels, presets, search)


def _image(axes: Axes, x: torch.Tensor, title: str, **colours):
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8)
    axes.spines[:].set_visible(False)
    return axes.imshow(np.asarray(x), interpolation="none", **colours)


def write(folder: Path, layers: Layers, longest: int = 16384) -> Iterator[Path]:
    """Draw every figure as `<name>.svg` in the folder; `longest` is the most keys of the one that counts them."""
    for draw in FIGURES:
        with matplotlib.style.context(STYLE):
            figure = levels(layers, longest) if draw is levels else draw(layers)
            path = folder / f"{draw.__name__}.svg"
            figure.savefig(path, metadata={"Date": None})
            yield path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "figures", help="folder for the SVG files")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for path in write(folder, dict(Activations(sample()))):
        print(f"{path}: {path.stat().st_size / 1024:.0f} kB")
