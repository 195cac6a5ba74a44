"""Seeded faults in C++ kernels that quantize: each must be seen by the comparison with the definition, or of pages with it."""

import math
from functools import cache

import pytest
import torch
from factories import qkv, scheme
from test_cpu_quantize import check_pages, differing

from tokquant.calibration.scales import LayerScales
from tokquant.kernels.cpu import build, generate, launch
from tokquant.schemes import preset

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")


def k(words, **rest):
    return scheme(k=words, **rest)


def v(words, p="int8 row_block:32"):
    return scheme(v=words, p=p)


EACH = "for (int d = 0; d < WIDE; d += LANES) store(to + d, load(to + d)"

# name: scheme, what stands in the kernel, what takes its place
MUTATIONS = {
    "the clamp lost": (k("int8 tensor static"), "where(y > LARGEST,", "where(y > 2 * LARGEST,"),
    "rounding cut": (k("int8"), "where(x == x, x, all(0))", "where(x == x, x - 0.5f, all(0))"),
    "NaN with a code": (k("int8 static head"), "where(x == x, x, all(0))", "x"),
    "a division by the reciprocal": (k("int8"), "y = y / over(t.scale, i, d)", "y = y * (1.f / over(t.scale, i, d))"),
    "the mean not subtracted": (k("int8 mean"), "y = y - load(offset", "y = y - 0 * load(offset"),
    "a group of zeros with a scale of zero": (k("int8"), "where(highest == 0, all(1)", "where(highest == 0, all(0)"),
    "NaN dropped": (k("int8"), "as_ints(magnitude(x)); }\n", "as_ints(magnitude(where(x == x, x, all(0)))); }\n"),
    "a NaN that is no minimum": (k("int4 asymmetric"), "where(highest != highest, all(NAN), lowest)", "lowest"),
    "rounded within the rotation": (
        k("int8", rotate="hadamard"), "butterflies<1>(to);", f"{EACH} * 3.f); butterflies<1>(to); {EACH} / 3.f);",
    ),
    "scales of all parts": (k("int8 block:256"), "least(SCALE_TOKENS / PART, parts)", "parts"),
    "a scale in e4m3 rounded to the nearest": (k("int8 scale=fp8_e4m3"), "where(from_e4m3(code) < x, code + 1, code)", "code"),
    "a scale below the smallest": (k("int8 scale=fp16"), "where(scale < SCALE_SMALLEST, all(SCALE_SMALLEST), scale)", "scale"),
    "the zero of another token": (k("int4 asymmetric"), "y - over(t.zero, i, d)", "y - over(t.zero, 0, d)"),
    "the scale of another group": (k("int4 group:16"), "row[d / SCALE_CHANNELS]", "row[0]"),
    "nibbles swapped": (k("int4"), "x << (BITS * part % 32)", "x << (BITS * (PARTS - 1 - part) % 32)"),
    "nibbles in the order of tokens": (v("int4"), "8 * (j % 4) + BITS * (j / 4)", "BITS * j"),
    "not counted from the lowest": (scheme("int8", "int8"), "code ^= 1 << (BITS - 1);", "code += 1 << (BITS - 3);"),
    "sums of all tiles": (v("int8", "uint8 row_block:32"), "std::memset(t.sum, 0, sizeof t.sum);\n    }", "}"),
    "a token of nothing that weighs": (v("int8"), "= !any", "= false"),
    "half to even lost": (k("fp8_e4m3 head static"), "+ (bits >> CUT & 1u)", "+ 1"),
    "subnormals cut": (k("fp8_e4m3 head static"), "magnitude(x) + shift", "magnitude(x) * 0.9f + shift"),
    "the block mean of other queries": (scheme("int8 block_mean"), "most(token, 0) / OFFSET_TOKENS", "0"),
    "the offset of another head": (k("int8 mean"), "(head * a.offset_rows", "(0 * a.offset_rows"),
}  # fmt: skip

# role, of which the kernels for pages are changed
PAGES = {
    "the page of another sequence": ("k", "a.table[batch * a.pages + token / a.page]", "a.table[token / a.page]"),
    "neighbours in a word overwritten": ("v", "if (!WHOLE && ~written)", "if (false)"),
    "scales of another page": ("v", "at.page * a.scale_page", "0 * a.scale_page"),
    "tokens counted from a panel's first": ("k", "turn(a, batch, head, token - first,", "turn(a, batch, head, 0,"),
}
# each costs a second or two to build: most are left to the slow run
CHOSEN = [pytest.param(name, marks=[] if place % 3 == 0 else pytest.mark.slow) for place, name in enumerate(MUTATIONS)]


@pytest.fixture(autouse=True)
def quantized_by_torch():
    """Here by kernels."""


@pytest.fixture
def changed(monkeypatch):
    """Puts other text into kernels; what it returns holds whether it was there."""

    def change(old, new, render=generate.render):
        found = []

        def mutated(plan):
            text = render(plan)
            found.append(old in text)
            return text.replace(old, new)

        monkeypatch.setattr(generate, "render", mutated)
        return found

    return change


def agrees(made) -> bool:
    """Whether kernels give what the definition gives, for ragged lengths and a value of each kind."""
    q, k, v = qkv(270, 290, 32, batch=2)
    k[0, 1, 17, 3], k[0, 1, 18, 4], k[1, 1, 19, 4] = math.inf, math.nan, -math.nan
    q[0, 1, 4], k[0, 0, 5], v[0, 0, 7], v[1, 1, 89] = 0, 0, 0, 0
    k[0, 0, 9] *= 1e-4
    k[0, 1, 20, 4] = torch.tensor(0x7FC00055).to(torch.int32).view(torch.float32)
    # ties of e4m3, also below its normal numbers
    k[1, 1, 30], k[1, 1, 31] = 2.0**-6 * torch.arange(1, 65, 2), 2.0**-16 * torch.arange(32)
    # ties, and what is one once it is divided
    ties, steps = torch.linspace(-63.5, 63.5, 32)[1:].round() + 0.5, torch.linspace(0.01, 9, 290)[:, None]
    k[1, 0, :, :1], k[1, 0, :, 1:] = 127 * steps, ties * steps
    scales = None
    if made.k.scale == "static":
        shape = (1, 1, 1) if made.k.granularity.kind == "tensor" else (2, 1, 1)
        scales = LayerScales("layer", {"k_scale": torch.full(shape, 2.0**-6)})
    return not differing(q, k, v, made, scales)


agrees_as_it_is = cache(agrees)


@pytest.fixture(autouse=True)
def nothing_loaded():
    """A changed text has the plan of the one that it was."""
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


@pytest.mark.parametrize("name", CHOSEN)
def test_a_seeded_fault_is_seen(name, changed):
    made, old, new = MUTATIONS[name]
    assert agrees_as_it_is(made), "the kernels as they are"
    launch.load.cache_clear()
    found = changed(old, new)
    assert not agrees(made)
    assert any(found), "the text to change is there"


@pytest.mark.parametrize("name", PAGES)
def test_a_seeded_fault_in_pages_is_seen(name, changed):
    role, old, new = PAGES[name]
    found = changed(old, new)
    with pytest.raises(AssertionError):
        check_pages(preset("kv-int4"), role, 64)
    assert any(found), "the text to change is there"
