"""Every store of pages keeps the codes of quantizing all at once, and attends to them as the emulation does."""

from dataclasses import replace

import pytest
import torch
from plain_cache import SCHEMES, block_of, features, scales_for

import tokquant as tq
from tokquant import reference
from tokquant.kv_cache import STORES
from tokquant.pages import stored_parts
from tokquant.quantize import quantize_operands

H, D = 2, 32
ROWS = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
"""Pages of two sequences, in no order."""

# the others' kernels take minutes to build or to interpret; tests/kernels/ has what is particular to their pages
BACKENDS = [pytest.param(name, marks=[pytest.mark.slow] * (name != "reference")) for name in STORES]

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("s", SCHEMES.values(), ids=SCHEMES),
]


@pytest.fixture(autouse=True)
def kept_by_torch():
    """Not here."""


def store_of(backend, s, pages=6):
    scales = scales_for(s, H, D)
    page = s.cache.page if s.cache else 128
    sizes = dict(kv_heads=H, head_dim=D, dtype=torch.float32, device=torch.device("cpu"), pages=pages, page=page)
    try:
        return STORES[backend](s, **sizes, scales=scales), scales, page
    except tq.UnsupportedError as error:
        pytest.skip(str(error))


def same(found, expected):
    """Codes, scales and zeros alike; other layouts' codes by what they stand for."""
    one, other = stored_parts(found), stored_parts(expected)
    assert one.keys() == other.keys() and found.shape == expected.shape
    for name in one:
        assert torch.equal(one[name], other[name]), name


def written(backend, s, lengths):
    """A store with two sequences of such lengths, its scales, and the sequences."""
    store, scales, _ = store_of(backend, s)
    k, v = (torch.randn(2, H, max(lengths), D) + 0.5 for _ in range(2))
    step, first = block_of(s), torch.zeros(2, dtype=torch.int32)
    # in three parts, the second of one block
    for start, n in ((0, step), (step, step), (2 * step, max(lengths) - 2 * step)):
        counts = torch.tensor([min(max(length - start, 0), n) for length in lengths], dtype=torch.int32)
        given = (x[:, :, start : start + n] for x in (k, v))
        store.write(*given, ROWS, first, None if bool((counts == n).all()) else counts)
        first = first + counts
    return store, scales, [[x[b : b + 1, :, :n] for x in (k, v)] for b, n in enumerate(lengths)]


def check(store, rows, s, scales, sequences):
    """What is read is what quantizing each sequence at once gives."""
    for row, (k, v) in zip(rows, sequences, strict=True):
        for found, right in zip(store.read(row, k.shape[2]), quantize_operands(k, k, v, s, scales)[1:], strict=True):
            same(found, right)


def lengths_of(s):
    page = s.cache.page if s.cache else 128
    return [3 * page, page + block_of(s)]


def test_what_is_written_is_read_as_codes_of_one_shot(backend, s):
    store, scales, sequences = written(backend, s, lengths_of(s))
    check(store, ROWS, s, scales, sequences)


def test_pages_keep_what_they_hold_when_the_pool_grows_or_one_is_copied(backend, s):
    store, scales, sequences = written(backend, s, lengths_of(s))
    store.grow(11)
    store.copy(5, 10)
    moved = ROWS.clone()
    moved[0, 0] = 10
    check(store, moved, s, scales, sequences)
    check(store, ROWS, s, scales, sequences)


def test_canonical_codes_go_back_into_pages(backend, s):
    _, scales, sequences = written(backend, s, lengths_of(s))
    other, *_ = store_of(backend, s)
    for row, (k, v) in zip(ROWS, sequences, strict=True):
        other.store(row, 0, *quantize_operands(k, k, v, s, scales)[1:])
    check(other, ROWS, s, scales, sequences)


@pytest.mark.parametrize("given", [{}, {"window": (11, None)}, {"softcap": 2.0, "window": (70, 0)}], ids=str)
def test_attention_is_the_emulation_on_codes_of_one_shot(backend, s, given):
    lengths = lengths_of(s)
    store, scales, sequences = written(backend, s, lengths)
    for n_q, offset in ((1, None), (1, [0, 5]), (7, [3, 0]), (20, [20, 25])):
        q = torch.randn(2, 2 * H, n_q, D)
        newer = None if offset is None else torch.tensor(offset, dtype=torch.int32)
        out, lse = store.attention(q, ROWS, torch.tensor(lengths, dtype=torch.int32), features(D, **given), offset=newer)
        assert out.dtype == lse.dtype == torch.float32
        for b, (k, v) in enumerate(sequences):
            place = lengths[b] + (offset or [0, 0])[b] - n_q + torch.arange(n_q)[:, None]
            key, left = torch.arange(lengths[b]), given.get("window", (lengths[b] + 99, 0))[0]
            mask = ((key <= place) & (key >= place - left)).expand(1, 2 * H, -1, -1)
            asked = replace(features(D, **given), causal=False, window=None, mask=mask)
            expected = reference.attention(*quantize_operands(q[b : b + 1], k, v, s, scales), s, asked)
            torch.testing.assert_close((out[b], lse[b]), (expected[0][0], expected[1][0]), rtol=2e-3, atol=2e-3)


def test_a_sequence_with_nothing_packed_gives_zero(backend, s):
    store, *_ = written(backend, s, lengths_of(s))
    out, lse = store.attention(torch.randn(2, H, 3, D), ROWS, torch.tensor([0, block_of(s)], dtype=torch.int32), features(D))
    assert not out[0].any() and bool((lse[0] == -torch.inf).all()) and bool(lse[1, :, -1].isfinite().all())


def test_bits_are_those_of_the_pages(backend, s):
    store, _, page = store_of(backend, s)
    assert store.nbytes * 8 == store.bits_per_value * 6 * page * H * D * 2
    assert store.bits_per_value == pytest.approx(sum(s.bits_per_value(D)[role] for role in "kv") / 2)
