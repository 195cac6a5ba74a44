"""Seeded faults: each of these changes to a kernel's text must be seen by the comparison that kernels are tested with."""

import linecache
from functools import cache

import pytest
from factories import CASES, bounds, exact_operands, qkv, scheme

import tokquant as tq
from tokquant.inputs import features_of
from tokquant.kernels import generate
from tokquant.kernels.plan import Plan
from tokquant.reference import oracle
from tokquant.schemes import preset

ODD, CAUSAL, TILES, TAIL = "odd lengths", "causal", "tiles", "a tail"
ALL = CASES | {
    CAUSAL: ((90, 330, 32, 4, 2, 2), {"causal": True}),
    TILES: ((40, 300, 32, 2, 2, 1), {}),
    TAIL: ((37, 70, 48, 2, 2, 1), {}),
}
INT4 = scheme("int4", "int4", "int4 block:64", "uint8 row_block:64")
ZEROS = scheme("int8", "int8 head asymmetric", "int4 channel asymmetric mean", "uint8 row_block:64", rotate_v="hadamard")

# name: scheme, case, what stands in the kernel, what takes its place
MUTATIONS = {
    "causal counted from the first key": (preset("int8"), CAUSAL, "i[:, None] + (n_k - n_q + F.right)", "i[:, None] + F.right"),
    "causal off by one": (preset("int8"), CAUSAL, "n_q + F.right))", "n_q + F.right + 1))"),
    "the edge taken for a whole tile": (
        preset("int8"), CAUSAL,
        "F.right + 1, 0) // BLOCK_N",
        "F.right + BLOCK_N, 0) // BLOCK_N",
    ),
    "a window open to the left": (preset("int8"), "causal window", "n_q - F.left)", "n_q - F.left - BLOCK_N)"),
    "keys beyond the end kept": (preset("int8"), ODD, "keep = inside[None, :]", "keep = (j >= 0)[None, :]"),
    "a boolean mask turned round": (preset("int8"), "boolean mask", "tl.where(mask != 0", "tl.where(mask == 0"),
    "an additive mask before log2(e)": (
        preset("int8"), "additive mask of heads",
        "c = tl.full([BLOCK_M], 1.4426950408889634",
        "c = tl.full([BLOCK_M], 1.0",
    ),
    "softcap not multiplied back": (preset("int8"), "softcap and scale", "s = F.softcap * tanh", "s = tanh"),
    "K's offset lost under a softcap": (
        preset("int8"), "softcap and scale",
        "s += (tl.load(Q.logit_offset",
        "s -= (tl.load(Q.logit_offset",
    ),
    "K's offset not given back to the LSE": (preset("int8"), ODD, "599453, lowered)", "599453, -lowered)"),
    "a sink that adds to the output": (preset("int8"), "sinks", "total += tl.exp2(sink", "total += 0 * tl.exp2(sink"),
    "the wrong head of K and V": (preset("int8"), CAUSAL, "kv_head = head // SHARED_HEADS", "kv_head = head % 2"),
    "sums of another head of V": (preset("int8"), CAUSAL, "kv = batch * (heads // SHARED_HEADS) + kv_head", "kv = 0 * batch"),
    "no rescaling of the accumulator": (preset("int8"), TILES, "acc = acc * alpha[:, None] + pv", "acc = acc + pv"),
    "no rescaling of the normalizer": (preset("int8"), TILES, "l = l * alpha +", "l = l +"),
    "P against the running maximum": (preset("int8"), TILES, "return tl.maximum(largest, m - 64)", "return m + 3"),
    "P cut instead of rounded": (
        preset("int-flash"), TILES,
        "(p + 12582912.0).to(tl.int32",
        "(p - 0.5 + 12582912.0).to(tl.int32",
    ),
    "a code of P beyond the largest": (
        preset("int-flash"), TILES,
        "LOG2_LARGEST = tl.constexpr(6.98",
        "LOG2_LARGEST = tl.constexpr(7.08",
    ),
    "unsigned P not corrected": (preset("int8"), ODD, "pv += tl.load(correction_at", "pv += 0 * tl.load(correction_at"),
    "V's scale of another tile": (preset("int8"), TILES, "(start // V_GROUP) * V.scale_row", "0 * V.scale_row"),
    "K's scale of another token": (preset("int8"), ODD, "(j // GROUP) * stride", "(j // 2 // GROUP) * stride"),
    "swapped nibbles": (
        INT4, ODD,
        "tl.join((tile & 0xF).to(tl.int8), (tile >> 4).to(tl.int8))",
        "tl.join((tile >> 4).to(tl.int8), (tile & 0xF).to(tl.int8))",
    ),
    "V's tail not cleared": (INT4, TAIL, "v = tl.where((j < n_v)[:, None], v, 0)", "v = v"),
    "packed tokens of V in another order": (INT4, ODD, ".permute(0, 3, 1, 2)", ".permute(0, 1, 3, 2)"),
    "K's channels in their own order, Q's in planes": (
        preset("kv-int4"), ODD,
        "values.permute(0, 2, 1).reshape",
        "values.reshape",
    ),
    "P not permuted as V is": (preset("int8"), ODD, ".permute(0, 1, 3, 2, 4)", ".permute(0, 1, 2, 3, 4)"),
    "channels beyond head_dim summed": (
        scheme("int4", "int4", "int8 head", "int8"), ODD,
        "q = tl.where(held[None, :], q, 0.0)",
        "q = q",
    ),
    "zeros of K forgotten": (ZEROS, ODD, "s += (q_sum * q_scale)", "s += 0 * (q_sum * q_scale)"),
    "zeros of V of another channel": (ZEROS, ODD, "tl.load(V.zero + at, mask", "tl.load(V.zero + at // 2, mask"),
    "V's rotation not undone": (ZEROS, ODD, "o = hadamard(o, BLOCK_M, D_TILE, V_STAGES) * V_NORM", "o = o"),
    "V's mean forgotten": (preset("int8"), ODD, "o += (l * inverse_total)[:, None] * mean", "o += 0 * mean"),
    "V's weight left in the normalizer": (preset("kv-int8"), ODD, "counted *= load_row(V", "counted *= 1 + 0 * load_row(V"),
    "ALiBi's sign": (preset("int8"), "alibi, causal", "s += (slope * ahead)", "s -= (slope * ahead)"),
    "ALiBi to one side": (preset("int8"), "alibi to both sides, sinks", "slope * tl.abs(", "slope * ("),
    "ALiBi counted from the first key": (
        preset("int8"), "alibi to both sides, sinks",
        "consecutive(start - (first + n_k - n_q)",
        "consecutive(start - first",
    ),
    "ALiBi's other half not given back": (preset("int8"), "alibi, causal", "lowered -= slope", "lowered -= 0 * slope"),
    "a key vector of another tile": (preset("int8"), "a bias of keys, window", "key_bias + j", "key_bias + j % BLOCK_N"),
    "factors that share Q's scale": (
        preset("int8"), "low rank, boolean mask",
        "tl.dot(q_factors, tl.trans(k_factors), s)",
        "tl.dot(q_factors, tl.trans(k_factors)) * q_scale[:, None] + s",
    ),
    "the factors of another key": (
        preset("int8"), "low rank, boolean mask",
        "(j - start)[:, None] * F.k_factors_row",
        "(j - start + 1)[:, None] * F.k_factors_row",
    ),
    "a bias without log2(e)": (
        preset("int8"), "a bias of keys, window",
        "c = tl.full([BLOCK_M], 1.4426950408889634",
        "c = tl.full([BLOCK_M], 1.0",
    ),
    "a dense bias for every head": (
        preset("int8"), "dense bias, everything",
        "batch * F.bias_batch + head * F.bias_head",
        "batch * F.bias_batch",
    ),
}  # fmt: skip


@cache
def compared(s, case):
    """Operands, what attention is asked for, and what its results may be: many faults are looked for in one case."""
    shape, given = ALL[case]
    operands = tq.quantize(*qkv(*shape), s, backend="triton")
    features = features_of(*operands[:2], **given)
    emulated = tq.attention(*operands, s, backend="reference", **given)
    return operands, given, oracle(*exact_operands(*operands), features), bounds(operands, s, features), emulated


def agrees(s, case) -> bool:
    """What `test_attention_kernels` asks of every kernel, as one answer."""
    operands, given, (exact, exact_lse), (largest, largest_lse), expected = compared(s, case)
    out, lse = tq.attention(*operands, s, return_lse=True, backend="triton", **given)
    kept = exact_lse.isfinite()
    if (out - expected).abs().mean() > 1e-4 * operands[2].dequantize().abs().max():
        return False
    return bool(((out - exact).abs() <= largest).all()) and bool(((lse - exact_lse).abs() <= largest_lse)[kept].all())


@cache
def agrees_as_it_is(s, case) -> bool:
    generate.load.cache_clear()
    return agrees(s, case)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_seeded_fault_is_seen(name, monkeypatch):
    s, case, old, new = MUTATIONS[name]
    assert agrees_as_it_is(s, case), "the kernel as it is"
    render, found = generate.render, []

    def mutated(plan, *loop):
        text = render(plan, *loop)
        if not isinstance(plan, Plan):  # the kernels that quantize have faults of their own
            return text
        found.append(old in text)
        return text.replace(old, new)

    monkeypatch.setattr(generate, "render", mutated)
    generate.load.cache_clear()
    linecache.clearcache()
    seen = not agrees(s, case)
    generate.load.cache_clear()
    assert all(found) and found, "the text to change is there"
    assert seen
