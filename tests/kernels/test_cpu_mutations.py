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
    "keys beyond the end kept": ("int8", ODD, "where(at < keys, s", "where(at < 999, s"),
    "the wrong head of K": ("int8", CAUSAL, "page * a.k_page + kv_head * a.k_head", "page * a.k_page"),
    "the wrong head of V": ("int8", CAUSAL, "page * a.v_page + kv_head * a.v_head", "page * a.v_page"),
    "slopes of another head": ("int8", CASES["alibi to both sides, sinks"], "int(kv_head * shared + ", "int(0 * shared + "),
    "K not counted from the lowest": ("int8", ODD, "t.start[i] += (K_LOWEST + FLIPPED) * a.q", "t.start[i] += a.q"),
    "sums of another query": ("int8", ODD, "sum + t.start[g + i + r]", "sum + t.start[g + i]"),
    "no rescaling of the accumulator": ("int8", ODD, "load(acc) * alpha[i + r] + product", "load(acc) + product"),
    "no rescaling of the normalizer": ("int8", ODD, "t.l[g + i] * alpha[i] + sum_of", "t.l[g + i] + sum_of"),
    "P cut instead of rounded": ("int8", ODD, "store_codes(&t.p[i][j], p)", "store_codes(&t.p[i][j], p - 0.5f)"),
    "P against the running maximum": ("int8", ODD, "maximum(now, m - 64.f)", "m + 3.f"),
    "V's scale of another tile": ("int8", ODD, "inner / V_SCALE_TOKENS * V_COLUMNS", "0"),
    "V's mean forgotten": ("int8", ODD, "acc[d] += a.v_mean[kv * WIDE + d] * (l / total)", "acc[d] += 0"),
    "a polynomial of too low a degree": ("int8", ODD, "all(0.001331027247942984f)", "all(0)"),
    "half to even by too many bits": ("fp8", ODD, "rounded<3, -6>", "rounded<4, -6>"),
    "half to even by too few bits": ("fp8", ODD, "rounded<3, -6>", "rounded<2, -6>"),
    "V's weight left in the normalizer": ("kv-int8", ODD, "p *= inverse", "p *= 1"),
    "zeros of K forgotten": (ZEROS, ODD, "s += a.q_sum[row + g + i]", "s += 0 * a.q_sum[row + g + i]"),
    "V's rotation not undone": (ZEROS, ODD, "hadamard(acc);", ";"),
    "a sink that adds to the output": ("int8", CASES["sinks"], "total += std::exp2", "total += 0 * std::exp2"),
    "the block means of other queries": ("int4", ((150, 40, 32, 2, 2, 1), {}), "+ t.query[0] / 128) * D", ") * D"),
    "factors of another key": (
        "int8", CASES["low rank, boolean mask"],
        "y + (start / LANES + at) * RANK * LANES",
        "y + start / LANES * RANK * LANES",
    ),
    "ALiBi to one side": ("int8", CASES["alibi to both sides, sinks"], "* magnitude(to_floats(counted", "* (to_floats(counted"),
    "the unit of unpacked values forgotten": ("kv-int4", ODD, "product *= V_UNIT", "product *= 1"),
    "the place of another head's query": ("kv-int4", ((3, 301, 48, 4, 1, 2), {"causal": True}), "(first + i) % a.n_q", "i"),
    "chunks of other keys": ("kv-int8", ((1, 4500, 32, 2, 1, 1), {}), "from = chunk * CHUNK", "from = 0"),
    "chunks merged without their references": ("kv-int8", ((1, 4500, 32, 2, 1, 1), {}), "own[WIDE] - t.r[i]", "0.f"),
    "scales of other groups": (
        "kv-int4-kivi", ((20, 301, 64, 2, 1, 1), {}),
        "token * V_COLUMNS + panel * LANES",
        "token * V_COLUMNS + 0 * LANES",
    ),
    "nibbles in another order": ("kv-int4", ODD, "uint32_t(i * BITS)", "uint32_t((1 - i) * BITS)"),
    "a block of queries left out": ("int8", CAUSAL, "(of_head - 1 - block % of_head) * BLOCK", "(of_head - 1) * BLOCK"),
}  # fmt: skip
OF_BFLOAT = {
    "two channels in another order": ("fp8", ODD, "{number(i), d + 1 < D", "{number(i ^ 2), d + 1 < D"),
    "two tokens in another order": (
        "fp8",
        ODD,
        "numbers[2] = {number(i), number(i + 1)}",
        "numbers[2] = {number(i + 1), number(i)}",
    ),
    "a last key of two forgotten": ("fp8", ODD, "(keys + 1) / 2", "keys / 2"),
}
if build.available() and build.instructions() == "avx512_bf16":
    MUTATIONS |= OF_BFLOAT
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
