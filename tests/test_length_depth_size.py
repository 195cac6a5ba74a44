"""The page on length, depth and size says what the studies found: in its tables, and where its sentences quote figures."""

import json
import math
import re
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "length-depth-size.md").read_text()
SQUEEZED = re.sub(r"\s+", " ", PAGE)


def rows(study, *names):
    """The rows of a study, by what they have under these names."""
    read = json.loads((ROOT / "benchmarks" / "results" / f"paper-{study}.json").read_text())["rows"]
    found = {tuple(row[name] for name in names): row for row in read}
    assert len(found) == len(read)
    return found


LENGTH = rows("length", "data", "tokens", "scheme")
DEPTH = rows("depth", "model", "logits", "layers", "quantized", "scheme")
SIZE = rows("size", "sweep", "width", "head_dim", "logits", "scheme")
SCHEMES = list(dict.fromkeys(key[-1] for key in DEPTH))


def table(first):
    """Lines of the table whose first column has this title: `(group, label)` -> percentages by the column's title."""
    head, found, group = None, {}, ""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells and cells[0] == first:
            head = cells
        elif cells is None or head is None:
            head = None
        elif not cells[0].startswith("-"):
            *named, label = cells[0].split(": ")
            group = named[0] if named else group
            figures = {
                title.replace("`", ""): float(cell.removesuffix(" %")) for title, cell in zip(head[1:], cells[1:], strict=True)
            }
            found[group, label] = figures
    assert found
    return found


def near(written, exact, places=2):
    assert written == pytest.approx(100 * exact, abs=0.6 * 10**-places)


def test_errors_by_length_are_those_of_the_run():
    written = table("keys")
    assert len(written) == 9
    for (data, tokens), figures in written.items():
        for scheme, figure in figures.items():
            near(figure, LENGTH[data, 1024 * int(tokens.removesuffix("k")), scheme]["rel_l1"])


def test_errors_by_depth_are_those_of_the_run():
    written = table("layers")
    assert len(written) == 11
    for (group, layers), figures in written.items():
        stack = ("MiniLM", 0.0) if group == "MiniLM" else ("attention and MLP", float(group.removeprefix("logits of ")))
        for scheme, figure in figures.items():
            near(figure, DEPTH[*stack, int(layers), "all", scheme]["rel_l2"])


def test_layers_of_a_trained_model_add_by_squares():
    written = table("quantized")
    for scheme in SCHEMES:
        alone = [DEPTH["MiniLM", 0.0, 6, str(layer), scheme]["rel_l2"] for layer in range(1, 7)]
        for layer, error in enumerate(alone, 1):
            near(written["", f"layer {layer}"][scheme], error)
        every = DEPTH["MiniLM", 0.0, 6, "all", scheme]["rel_l2"]
        near(written["", "root of the sum of squares"][scheme], math.hypot(*alone))
        near(written["", "all"][scheme], every)
        within = re.search(r"what all six do to within (\d+) %", SQUEEZED)
        assert abs(every / math.hypot(*alone) - 1) <= float(within[1]) / 100
        cosine = re.search(rf"0\.\d+ by `{scheme}`", SQUEEZED)
        if cosine:
            assert float(cosine[0].split()[0]) == pytest.approx(DEPTH["MiniLM", 0.0, 6, "all", scheme]["cosine"], abs=6e-5)


def test_errors_by_size_are_those_of_the_run():
    written = table("model")
    models = {
        "as initialized": lambda label: (FLAT, int(label.split()[1]), 64, 0.0),
        "logits of 2": lambda label: (
            ("width", int(label.split()[1]), 64, 2.0) if "width" in label else ("head_dim", 512, int(label.split()[1]), 2.0)
        ),
        "width 256": lambda label: ("logits", 256, 64, 0.5 if label.endswith("1/2") else float(label.split()[-1])),
    }
    assert len(written) == 9
    for (group, label), figures in written.items():
        of_model = models[group](label)
        near(figures.pop("keys"), SIZE[*of_model, "int8"]["looked_at"], 1)
        for title, figure in figures.items():
            scheme, _, measure = title.partition(", ")
            name = {"": "attention", "state": "state", "same": "top1"}[measure]
            near(figure, SIZE[*of_model, scheme][name], 1 if measure == "same" else 2)


def errs(data, thousands, scheme="int8", name="rel_l1", places=2):
    return f"{100 * LENGTH[data, 1024 * thousands, scheme][name]:.{places}f} %"


def drifts(logits, name="rel_l2", layers=64, model="attention and MLP"):
    return f"{100 * DEPTH[model, logits, layers, 'all', 'int8'][name]:.2f} %"


def sized(sweep, width, head_dim, logits, scheme="int8", name="attention", places=2):
    return f"{100 * SIZE[sweep, width, head_dim, logits, scheme][name]:.{places}f} %"


SINK, FLAT = "sink and local", "width, as initialized"
SENTENCES = [
    f"`int-flash` goes from {errs('normal', 1, 'int-flash')} to {errs('normal', 256, 'int-flash')} on normal data, "
    f"`int8` from {errs('normal', 1)} to {errs('normal', 256)}.",
    f"{errs('hot keys', 256, 'int-flash')} at 256k keys, where `int8` errs {errs('hot keys', 256)}.",
    f"{errs('normal', 1, name='row_steps')} at 1k and {errs('normal', 256, name='row_steps')} at 256k (the dotted line",
    f"gives {errs('normal', 1, name='block_steps')} at 1k and {errs('normal', 256, name='block_steps')} at 256k.",
    f"that is {errs('hot keys', 256, name='lost', places=0)} of the weight at 256k, with a sink "
    f"{errs(SINK, 256, name='lost', places=0)};",
    f"takes {errs(SINK, 256, name='first', places=0)} of the weight at 256k",
    f"`int8-fp8` rises to {errs(SINK, 256, 'int8-fp8')}; with `row_block: 128` for P it errs "
    f"{errs(SINK, 256, 'int8-fp8-row-block')}, and on normal data {errs('normal', 256, 'int8-fp8-row-block')} for "
    f"{errs('normal', 256, 'int8-fp8')}.",
    f"`kv-int8` errs {errs('hot keys', 1, 'kv-int8')} at 1k",
    f"and {errs('hot keys', 256, 'kv-int8')} at 256k. `int8`, with twice the levels, {errs('hot keys', 1)} and "
    f"{errs('hot keys', 256)}.",
    f"`int8` {errs('position', 1)} and {errs('position', 64)}, `int-flash` {errs('position', 1, 'int-flash')} and "
    f"{errs('position', 64, 'int-flash')}.",
    *(
        f"| {label} | {' | '.join(errs(data, 256, f'int-flash{end}') for end in ('', '-exact-sum', '-row-block'))} |"
        for label, data in (("hot keys, values of mean zero", "hot keys"), ("sink and local, values with a mean", SINK))
    ),
    f"with logits of standard deviation 4 `int8` ends at {drifts(4.0)}, with 1 at {drifts(1.0)}.",
    f"`int8` to {drifts(1.0, 'alone')} and {drifts(4.0, 'alone')}.",
    f"{drifts(4.0, layers=32, model='attention only')} by `int8` after 32 layers of logits of 4, and "
    f"{drifts(4.0, model='attention only')} after 64.",
    f"by `int8` is {sized('width', 128, 64, 2.0)} at width 128 and {sized('width', 1024, 64, 2.0)} at 1024, and "
    f"{sized('head_dim', 512, 32, 2.0)} at head_dim 32 and {sized('head_dim', 512, 256, 2.0)} at 256",
    f"from 1/2 to 8 it goes from {sized('logits', 256, 64, 0.5)} to {sized('logits', 256, 64, 8.0)}, and the last state's from "
    f"{sized('logits', 256, 64, 0.5, name='state')} to {sized('logits', 256, 64, 8.0, name='state')}.",
    f"queries look at {sized(FLAT, 128, 64, 0.0, name='looked_at', places=1)} of their keys at width 128",
    f"and at {sized(FLAT, 1024, 64, 0.0, name='looked_at', places=1)} at 1024.",
    f"errs {sized(FLAT, 1024, 64, 0.0, name='state')} by `int8`, and {sized('width', 1024, 64, 2.0, name='state')} with logits",
    f"{sized('width', 128, 64, 2.0, name='state')} at width 128 and {sized('width', 1024, 64, 2.0, name='state')} at 1024 by",
    f"({sized('head_dim', 512, 32, 2.0, 'kv-int4')} at 32, {sized('head_dim', 512, 256, 2.0, 'kv-int4')} at 256)",
    f"{sized('logits', 256, 64, 8.0)} and {sized('logits', 256, 64, 8.0, 'int8-fp16')} at 8.",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_quote_the_runs(sentence):
    assert sentence in SQUEEZED


def test_a_place_in_a_sequence_is_the_length_that_it_sees():
    schemes = {scheme for _, _, scheme in LENGTH}
    within = int(re.search(r"of a sequence of that length do, within (\d+) %", SQUEEZED)[1])
    for tokens, scheme in product((1024, 4096, 16384, 65536), schemes):
        assert LENGTH["position", tokens, scheme]["rel_l1"] == pytest.approx(
            LENGTH["normal", tokens, scheme]["rel_l1"], rel=within / 100
        )


def test_blocks_stay_where_rows_grow():
    for data, scheme in product(
        ("normal", "hot keys", "sink and local"), ("int8", "int8-fast", "int-flash-row-block", "kv-int8")
    ):
        assert LENGTH[data, 262144, scheme]["rel_l1"] < 1.2 * LENGTH[data, 1024, scheme]["rel_l1"]
        assert LENGTH[data, 262144, "int-flash"]["rel_l1"] > 3 * LENGTH[data, 1024, "int-flash"]["rel_l1"]
    assert max(row["peak_gb"] for row in LENGTH.values()) <= float(re.search(r"at most ([\d.]+) GB", SQUEEZED)[1]) + 0.05


def test_depth_levels_off_and_peaked_attention_passes_errors_on():
    low, high = map(float, re.search(r"to a power of (-?\d\.\d) to (\d\.\d)", SQUEEZED.replace("−", "-")).groups())
    for logits, scheme in product((1.0, 4.0), SCHEMES):
        first, last = (DEPTH["attention and MLP", logits, layers, "all", scheme] for layers in (16, 64))
        power = math.log(last["rel_l2"] / first["rel_l2"]) / math.log(4)
        assert low - 0.05 <= power <= high + 0.05
        # above what independent errors that no layer changes would come to, and these fall
        assert last["rel_l2"] > 2 * last["alone"] and last["alone"] < first["alone"]
