"""Seeded faults: each of these changes to a C++ kernel's text must be seen by the comparison that kernels are tested with."""

import pytest
from factories import CASES, SCHEMES, qkv
from test_cpu_kernels import differs

import tokquant as tq
from tokquant.kernels.cpu import build, generate, launch
from tokquant.schemes import preset

pytestmark = pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")

ODD = ((37, 301, 48, 2, 2, 1), {})
CAUSAL = ((90, 330, 32, 4, 2, 2), {"causal": True})
ZEROS = SCHEMES["zeros of k a head, of v a channel"]

# name: scheme, case, what stands in the kernel, what takes its place
MUTATIONS = {
    "causal off by one": ("int8", CAUSAL, "least(TILE, own + a.right)", "least(TILE, own + a.right + 1)"),
    "keys beyond the end kept": ("int8", ODD, "s = at < keys ? s : all(NOTHING)", "s = at < 999 ? s : all(NOTHING)"),
    "the wrong head of K and V": ("int8", CAUSAL, "head / (a.heads / a.kv_heads)", "head % a.kv_heads"),
    "Q not held higher": ("int8", ODD, "uint8_t(codes[d]) ^ 128", "uint8_t(codes[d])"),
    "sums of another key": ("int8", ODD, "(w * (STEPS + 1) + STEPS) * 64", "(w * (STEPS + 1) + STEPS - 1) * 64"),
    "no rescaling of the accumulator": ("int8", ODD, "load(acc) * alpha[i + r] + product", "load(acc) + product"),
    "no rescaling of the normalizer": ("int8", ODD, "t.l[g + i] * alpha[i] + sum_of", "t.l[g + i] + sum_of"),
    "P cut instead of rounded": ("int8", ODD, "store_bytes(&t.p[i][j], p)", "store_bytes(&t.p[i][j], p - 0.5f)"),
    "P against the running maximum": ("int8", ODD, "maximum(now, m - 64.f)", "m + 3.f"),
    "V's scale of another tile": ("int8", ODD, "(kv * tiles + start / TILE) * WIDE + ", "(kv * tiles) * WIDE + "),
    "V's mean forgotten": ("int8", ODD, "acc[d] += a.v_mean[kv * WIDE + d] * (l / total)", "acc[d] += 0"),
    "a polynomial of too low a degree": ("int8", ODD, "all(0.001331027247942984f)", "all(0)"),
    "half to even by too many bits": ("fp8", ODD, "rounded<3, -6>", "rounded<4, -6>"),
    "half to even by too few bits": ("fp8", ODD, "rounded<3, -6>", "rounded<2, -6>"),
    "V's weight left in the normalizer": ("kv-int8", ODD, "p *= inverse", "p *= 1"),
    "zeros of K forgotten": (ZEROS, ODD, "s += a.q_sum[row + g + i]", "s += 0 * a.q_sum[row + g + i]"),
    "V's rotation not undone": (ZEROS, ODD, "hadamard(acc);", ";"),
    "a sink that adds to the output": ("int8", CASES["sinks"], "total += std::exp2", "total += 0 * std::exp2"),
    "the block means of other queries": ("int4", ((150, 40, 32, 2, 2, 1), {}), "+ first / 128) * D", ") * D"),
    "factors of another key": (
        "int8", CASES["low rank, boolean mask"],
        "y + (panel + at) * RANK * LANES",
        "y + panel * RANK * LANES",
    ),
    "ALiBi to one side": ("int8", CASES["alibi to both sides, sinks"], "* magnitude(to_floats(counted", "* (to_floats(counted"),
    "a block of queries left out": ("int8", CAUSAL, "(blocks - 1 - block) * BLOCK", "(blocks - 1) * BLOCK"),
}  # fmt: skip
# each costs a second to build: every other one is left to the slow run
CHOSEN = [pytest.param(name, marks=[] if place % 2 == 0 else pytest.mark.slow) for place, name in enumerate(MUTATIONS)]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_seeded_fault_is_seen(name, monkeypatch):
    chosen, (shape, given), old, new = MUTATIONS[name]
    s = preset(chosen) if isinstance(chosen, str) else chosen
    operands = tq.quantize(*qkv(*shape), s, backend="cpu")
    render, found = generate.render, []

    def mutated(plan):
        text = render(plan)
        found.append(old in text)
        return text.replace(old, new)

    launch.load.cache_clear()
    monkeypatch.setattr(generate, "render", mutated)
    with monkeypatch.context() as patch:
        seen = differs(operands, s, given, patch)
    launch.load.cache_clear()
    assert all(found) and found, "the text to change is there"
    assert seen
