"""Seeded faults in the kernels that write and read pages: each must be seen by the comparisons that these are tested with."""

import linecache
from functools import cache

import pytest
import torch
from factories import scheme
from paged import filled, wrong
from quantized import differences

from tokquant.features import Features
from tokquant.kernels import decode_launch as module
from tokquant.kernels import generate
from tokquant.kernels.decode_plan import DecodePlan
from tokquant.kernels.pages import TritonPages
from tokquant.pages import ReferencePages
from tokquant.schemes import preset

INT4, INT8, KIVI = (preset(name) for name in ("kv-int4", "kv-int8", "kv-int4-kivi"))
UNSIGNED = scheme("int8", "int8 block:32", "int4 block:64", "uint8 row_block:32")
PLAIN, CAUSAL = Features(scale=0.2), Features(scale=0.2, causal=True)
WINDOW = Features(scale=0.2, causal=True, window=(50, None))
BLOCKS = {"lengths": (192, 64)}

# scheme, features, shape, what stands in the kernel that reads, what takes its place
READING = {
    "the page of another tile": (INT8, PLAIN, {}, "tl.load(table + start // PAGE)", "tl.load(table + 0)"),
    "the table of the first sequence": (INT8, PLAIN, {}, "T.table + batch * T.row", "T.table"),
    "pages that a tile spans taken for one": (INT8, PLAIN, {"page": 16}, "% PAGE // GROUP", "// GROUP"),
    "the wrong head of K and V": (INT8, PLAIN, {}, "k_codes = K.codes + kv_head", "k_codes = K.codes + 0 * kv_head"),
    "queries of other heads": (INT8, PLAIN, {"n_q": 5}, "+ index % SHARED_HEADS", "+ index % SHARED_HEADS * 0"),
    "causal off by one": (INT8, CAUSAL, {"n_q": 5}, "(ahead + F.right))", "(ahead + F.right + 1))"),
    "keys beyond the end kept": (INT8, PLAIN, {}, "keep = inside[None, :]", "keep = (j >= 0)[None, :]"),
    "newer keys forgotten": (INT8, WINDOW, {"offset": 30}, "ahead += tl.load(T.newer", "ahead += 0 * tl.load(T.newer"),
    "a window open to the left": (INT8, WINDOW, {}, "(ahead - F.left))", "(ahead - F.left - 9))"),
    "K's channels in their own order": (INT4, PLAIN, {}, "    q_column = k_channel", "    q_column = column"),
    "V's channels in planes": (INT4, PLAIN, {}, "o = o.reshape(BLOCK_M, V_PLANES", "_ = o.reshape(BLOCK_M, V_PLANES"),
    "P not permuted as V is": (INT8, PLAIN, {}, ".permute(0, 1, 3, 2, 4)", ".permute(0, 1, 2, 3, 4)"),
    "high nibbles not scaled back": (INT4, PLAIN, {}, "K_UNIT = tl.constexpr(0.0625)", "K_UNIT = tl.constexpr(0.125)"),
    "a token of nothing with its scale": (INT8, PLAIN, {}, "tl.where(v_scale < 0.0, -32.0,", "tl.where(v_scale < 0.0, 0.0,"),
    "V's weight left in the normalizer": (INT8, PLAIN, {}, "counted *= weight_out[None, :]", "counted *= 1.0"),
    "zeros of V forgotten": (INT4, PLAIN, {}, "(v_zero * weight_out + V_HALF)", "(v_zero * weight_out)"),
    "zeros of K forgotten": (INT4, PLAIN, {}, "(k_zero + K_HALF * k_scale)", "(k_zero + k_scale)"),
    "no rescaling of the normalizer": (INT8, PLAIN, {}, "l * alpha[:, None], BLOCK_M", "l, BLOCK_M"),
    "no rescaling of the zeros": (INT4, PLAIN, {}, "zeros * alpha[:, None], BLOCK_M", "zeros, BLOCK_M"),
    "unsigned P not corrected": (UNSIGNED, PLAIN, BLOCKS, "* CODE_ZERO)", "* 0)"),
    "V's scale of another tile": (UNSIGNED, PLAIN, BLOCKS, "v_block = tl.cast(start", "v_block = 0 * tl.cast(start"),
    "K's scale of another block": (UNSIGNED, PLAIN, BLOCKS, "% PAGE // K_GROUP", "% PAGE // 64"),
    "scales of other channels": (KIVI, PLAIN, BLOCKS, "    k_part = k_channel", "    k_part = column"),
    "scales of other groups": (
        KIVI, PLAIN, BLOCKS,
        "(N, PLANES, D // CHANNELS, CHANNELS // PLANES)",
        "(N, CHANNELS // PLANES, D // CHANNELS, PLANES)",
    ),
    "zeros of other groups": (KIVI, PLAIN, BLOCKS, "at + V_COLUMNS", "at + V_COLUMNS - 1"),
    "runs that begin behind the window": (INT8, WINDOW, {"deterministic": True}, "// step * step", "// step * step + step"),
    "runs that begin before the window": (INT8, WINDOW, {"lengths": (400, 131)}, "- F.left, 0) // step", "- F.left, 0) // n_k"),
    "another run's keys": (INT8, PLAIN, {"deterministic": True}, "begin = split * run", "begin = 0 * split"),
}  # fmt: skip


@cache
def pages(s, **shape):
    """Pages, a token of zeros in them, in which many faults are looked for."""
    write = TritonPages.write

    def with_a_token_of_zeros(store, k, v, *rest):
        v[:, :, 3] = 0
        write(store, k, v, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonPages, "write", with_a_token_of_zeros)
        return filled(s, **{"lengths": (200, 131), "d": 64, "kv_heads": 2} | shape)


def misread(s, features, *, offset=None, deterministic=False, **shape) -> str:
    offset = None if offset is None else torch.tensor([offset, 0], dtype=torch.int32)
    return wrong(pages(s, **shape), features, offset, deterministic=deterministic)


misread_as_it_is = cache(misread)


@pytest.mark.parametrize("name", READING)
def test_a_seeded_fault_in_reading_is_seen(name, monkeypatch):
    s, features, options, old, new = READING[name]
    monkeypatch.setattr(module, "RUN", 128)
    assert not misread_as_it_is(s, features, **options), "the kernel as it is"
    with mutated(monkeypatch, DecodePlan, old, new):
        assert misread(s, features, **options)


# scheme, what stands in the kernels that write, what takes its place
WRITING = {
    "from the beginning of a tile": (INT8, "first += start // TOKENS * TOKENS", "first += 0 * start"),
    "what was there overwritten": (INT8, "here = here & (i >= start)", "here = here & (i >= 0)"),
    "the page of another tile": (INT8, "first // PAGE, mask=first < own", "0, mask=first < own"),
    "V's tokens not permuted": (INT8, "((column & 2) << 2) | ((column & 12) >> 1) | (column & 1)", "column"),
    "a scale in another page": (INT4, "scale_at = home * Y.scale_batch", "scale_at = 0 * home"),
    "the scale of another token": (INT4, "group = group % PAGE_GROUPS", "group = group % PAGE_GROUPS // 2"),
    "a token of nothing that weighs": (INT8, "tl.where(weightless, -scale, scale)", "tl.where(weightless, scale, scale)"),
}


def miswritten(s) -> bool:
    torch.manual_seed(0)
    found = [filled(s, (45, 20), d=32, page=32, step=13, kinds=(kind,)) for kind in (TritonPages, ReferencePages)]
    zeros = torch.zeros(2, 2, 1, 32)
    for case in found:
        case.store.write(zeros, zeros, case.table, torch.tensor([44, 19], dtype=torch.int32))
    pairs = [zip(*(x.store.read(x.table[b], n) for x in found), strict=True) for b, n in enumerate((45, 20))]
    signs = (found[0].store._v.sides[..., 0, :] < 0).sum() == 4
    return any(differences(*pair) for both in pairs for pair in both) or not signs


miswritten_as_it_is = cache(miswritten)


@pytest.mark.parametrize("name", WRITING)
def test_a_seeded_fault_in_writing_is_seen(name, monkeypatch):
    s, old, new = WRITING[name]
    assert not miswritten_as_it_is(s), "the kernels as they are"
    with mutated(monkeypatch, generate.QuantizePlan, old, new):
        assert miswritten(s)


class mutated:
    """Kernels of one kind with other text."""

    def __init__(self, monkeypatch, kind, old, new):
        self.monkeypatch, self.kind, self.old, self.new, self.found = monkeypatch, kind, old, new, []

    def __enter__(self):
        render = generate.render

        def changed(plan, *loop):
            text = render(plan, *loop)
            if not isinstance(plan, self.kind):
                return text
            self.found.append(self.old in text)
            return text.replace(self.old, self.new)

        self.monkeypatch.setattr(generate, "render", changed)
        generate.load.cache_clear()
        linecache.clearcache()

    def __exit__(self, *_):
        generate.load.cache_clear()
        assert any(self.found), "the text to change is there"
