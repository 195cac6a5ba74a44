"""How does the error depend on the size of a model: its width, its heads, their head_dim, and how peaked its attention is?

Random Llamas of four layers with transformers' initialization, 512 random tokens of 1000, by width, in heads of 64 channels.
Their attention is nearly uniform, and less so the wider they are; so the weights of Q and K are scaled until logits have a
standard deviation of 2, by width and, at width 512, by head_dim; and of 1/2 to 8, at width 256. Attention's own error is that
on the exact Q, K and V of each layer; the others are of the whole model, quantized in all layers, beside eager attention.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from axes import in_percent
from matplotlib.figure import Figure
from study import Case, Rows, grouped
from torch import Tensor

import tokquant as tq
from tokquant.evaluation.logits import Agreement

LAYERS, VOCABULARY, SEEDS = 4, 1000, 3
SCHEMES = ("int8-fp16", "int8", "int-flash", "fp8", "kv-int4")
SWEEPS = {
    "width, as initialized": [(128, 64, 0.0), (256, 64, 0.0), (512, 64, 0.0), (1024, 64, 0.0)],
    "width": [(128, 64, 2.0), (256, 64, 2.0), (512, 64, 2.0), (1024, 64, 2.0)],
    "head_dim": [(512, 32, 2.0), (512, 64, 2.0), (512, 128, 2.0), (512, 256, 2.0)],
    "logits": [(256, 64, 0.5), (256, 64, 1.0), (256, 64, 2.0), (256, 64, 4.0), (256, 64, 8.0)],
}


@dataclass(frozen=True)
class Row:
    """One scheme in one model, medians over seeds."""

    sweep: str
    width: int
    head_dim: int
    heads: int
    parameters: int
    logits: float
    """Standard deviation of logits that the weights of Q and K in the first layer are scaled to give; 0 where not scaled."""
    deviation: float
    """The standard deviation of a row's logits as measured: the mean over rows and layers."""
    looked_at: float
    """2^entropy of a row over the keys that it sees: 1 is uniform. Mean over rows and layers."""
    scheme: str
    seeds: int
    attention: float
    """Relative L1 error of attention on exact operands, mean over layers."""
    state: float
    """Relative error of the last hidden state, |x - exact| / |exact|."""
    kl: float
    """KL divergence of the next token's distribution, in nats."""
    top1: float
    """Share of tokens whose most likely next token is the same."""


def measure(small: bool) -> Iterator[Row]:
    """Every scheme in every model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for sweep, sizes in SWEEPS.items():
        for width, head_dim, logits in sizes[1:2] if small else sizes:
            seeds = range(1 if small else SEEDS)
            found = [one(width, head_dim, logits, 128 if small else 512, seed) for seed in seeds]
            for scheme in SCHEMES:
                each = [of_seed[scheme] for of_seed in found]
                parameters, deviation, looked_at, *figures = map(statistics.median, zip(*each, strict=True))
                model = width, head_dim, width // head_dim, int(parameters), logits
                yield Row(sweep, *model, deviation, looked_at, scheme, len(each), *figures)


@cache
def one(width: int, head_dim: int, logits: float, tokens: int, seed: int) -> dict[str, tuple[float, ...]]:
    """By scheme, what a Row has of a seed: parameters, facts of the weights, errors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokquant.integrations.transformers import record, use

    torch.manual_seed(seed)
    heads = width // head_dim
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    config = LlamaConfig(**sizes, num_attention_heads=heads, head_dim=head_dim, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(VOCABULARY, (1, tokens + 1))
    ids, targets = ids[:, :-1], ids[0, 1:]
    if logits:
        gain = (logits / (width * config.initializer_range**2)) ** 0.5
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.data *= gain
    cases = [Case(*operands, rows=None, causal=True) for operands in record(model, [ids]).values()]
    deviation, looked_at = (statistics.mean(x) for x in zip(*map(weight_facts, cases), strict=True))
    right, right_logits = outputs(model, ids)
    found = {}
    for name in SCHEMES:
        own = statistics.mean(case.errors(tq.preset(name)).rel_l1 for case in cases)
        state, predicted = outputs(use(model, name, backend="reference"), ids)
        agreement = Agreement()
        agreement.add(predicted, right_logits, targets)
        far = ((state - right).norm() / right.norm()).item()
        found[name] = (model.num_parameters(), deviation, looked_at, own, far, agreement.kl, agreement.top1)
    return found


@torch.no_grad()
def outputs(model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden state and the logits, of the one sequence."""
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


def weight_facts(case: Case) -> tuple[float, float]:
    """Standard deviation of logits in a row, and 2^entropy over the keys it sees; means over the later half of rows."""
    n, found = case.q.shape[2], []
    for p in case.weights([slice(n // 2, n)]):
        logits, kept = p.log(), p > 0
        seen = kept.sum(dim=3)
        mean = torch.where(kept, logits, 0.0).sum(dim=3) / seen
        square = torch.where(kept, logits.square(), 0.0).sum(dim=3) / seen
        keys = torch.special.entr(p).sum(dim=3).exp() / seen
        found.append(torch.stack([(square - mean.square()).clamp_min(0).sqrt(), keys]).flatten(1, 2))
    deviation, looked_at = torch.cat(found, dim=2).flatten(1).mean(dim=1).tolist()
    return deviation, looked_at


def table(rows: Rows) -> str:
    """A table for each sweep."""
    lines = []
    for (sweep,), those in grouped(rows, "sweep"):
        lines += [
            f"\nby {sweep}\n",
            "| width | head_dim | logits | keys looked at | scheme | attention | state | KL | top-1 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in those:
            model = f"{row['width']} | {row['head_dim']} | {row['deviation']:.3f} | {row['looked_at']:.1%}"
            errors = f"{row['attention']:.2%} | {row['state']:.3%} | {row['kl']:.1e} | {row['top1']:.2%}"
            lines.append(f"| {model} | {row['scheme']} | {errors} |")
    return "\n".join(lines)


def draw(rows: Rows) -> Figure:
    """Errors of attention and of the whole model, a panel for each sweep."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    labels = {"width": "width", "head_dim": "head_dim", "logits": "std of the logits"}
    for axes, (sweep, label) in zip(figure.subplots(1, 3, sharey=True), labels.items(), strict=True):
        those = [row for row in rows if row["sweep"] == sweep]
        for number, (_, own) in enumerate(grouped(those, "scheme")):
            x = [row[sweep] for row in own]
            axes.loglog(x, [100 * row["attention"] for row in own], "-", color=f"C{number}", label=own[0]["scheme"])
            axes.loglog(x, [100 * row["state"] for row in own], "--", color=f"C{number}", lw=1)
        axes.set_xticks(x, [f"{each:g}" for each in x])
        in_percent(axes, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("relative error")
    handles, names = figure.axes[0].get_legend_handles_labels()
    kinds = [figure.axes[0].plot([], [], style, color="#808080")[0] for style in ("-", "--")]
    figure.legend([*handles, *kinds], [*names, "attention", "the model"], loc="outside lower center", ncols=7, fontsize=8)
    return figure
