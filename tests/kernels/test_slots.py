"""16-bit tokens beside the pages of a cache: what each backend keeps of them, and its attention to them, against float64."""

import numpy as np
import pytest
import torch
from factories import INF, qkv, some_mask

from tokquant.features import Features
from tokquant.kernels.cpu import build
from tokquant.kernels.cpu.slots import CpuSlots
from tokquant.kernels.slots import TritonSlots
from tokquant.reference import oracle
from tokquant.slots import Slots

NAN = float("nan")
KINDS = [
    pytest.param(Slots, id="torch"),
    pytest.param(CpuSlots, id="cpu", marks=pytest.mark.skipif(not build.available(), reason="needs a C++ compiler")),
    pytest.param(TritonSlots, id="triton"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CASES = [
    pytest.param(*kind.values, dtype, id=f"{kind.id}-{dtype}", marks=(*kind.marks, *([pytest.mark.ptx] * compiled)))
    for kind in KINDS
    for dtype in DTYPES
    for compiled in [kind.id == "triton" and dtype == torch.float16]
]
CPU = torch.device("cpu")


def filled(kind, k, v):
    """Slots that hold K and V `[B, H_kv, slots, D]`."""
    (b, heads, count, d), dtype = k.shape, k.dtype
    slots = kind(b, heads, count, d, dtype, CPU)
    for slot in range(count):
        slots.put(slice(None), slot, k[:, :, slot], v[:, :, slot])
    return slots


@pytest.mark.parametrize("d", [64, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_slot_holds_what_was_written_to_it_last(kind, dtype, d):
    _, k, v = qkv(1, 70, d, 2, 2, 3, dtype)
    slots = filled(kind, k, v)
    _, more_k, more_v = qkv(1, 5, d, 2, 2, 1, dtype)
    rows, places = np.array([2, 0, 1, 2, 2]), np.array([0, 15, 63, 64, 69])
    slots.put(rows, places, more_k[0].transpose(0, 1), more_v[0].transpose(0, 1))
    k[rows, :, places], v[rows, :, places] = more_k[0].transpose(0, 1), more_v[0].transpose(0, 1)
    for found, expected in zip(slots.get(np.arange(3)[:, None], np.arange(70)[None]), (k, v), strict=True):
        assert torch.equal(found, expected.transpose(1, 2))
    of_one = slots.fork(np.array([2, 2])).get(np.array([1]), np.array([69, 3]))
    assert all(torch.equal(found, x[2, :, [69, 3]].transpose(0, 1)) for found, x in zip(of_one, (k, v), strict=True))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_tokens_may_begin_anywhere_in_memory(kind):
    slots, tokens = kind(1, 2, 3, 8, torch.float16, CPU), torch.randn(17).half()[1:].view(1, 2, 8)
    slots.put(slice(None), 2, tokens, tokens)
    assert all(torch.equal(found, tokens) for found in slots.get(np.array([0]), np.array([2])))


def case(dtype, n_q, d=80, count=70):
    """Queries, slots, which of them are seen, and what they hold that is no number. The first query of the second sequence
    sees nothing, and some slots none does."""
    q, k, v = qkv(n_q, count, d, 4, 2, 2, dtype)
    attends = some_mask(2, 1, n_q, count)
    attends[:, :, :, 40:45] = False
    k[:, :, 40], k[:, :, 41], v[:, :, 42], v[:, :, 43] = NAN, INF, NAN, -INF
    attends[:, :, -1, 7] = True
    attends[:, :, :-1, 7] = False
    v[0, 1, 7, 3] = NAN  # which the last query alone sees
    attends[1, 0, 0] = False
    return q, k, v, attends


def error(x, expected):
    assert torch.equal(x.isnan(), expected.isnan())
    return (x - expected).nan_to_num(0).abs().max()


@pytest.mark.parametrize(("n_q", "softcap"), [(1, None), (9, 2.0)])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_attention_is_that_to_the_slots_that_are_seen_and_to_the_keys_before(kind, dtype, n_q, softcap):
    q, k, v, attends = case(dtype, n_q)
    features = Features(scale=0.2, softcap=softcap, causal=True, window=(3, 0))  # which `attends` has in it
    seen = dict(scale=0.2, softcap=softcap)
    # a step of P, where it is not float32
    near = 2e-6 if dtype == torch.float32 or kind is not TritonSlots else torch.finfo(dtype).eps
    slots = filled(kind, k, v)

    out, lse = slots.attention(q, attends.numpy(), features)
    expected, expected_lse = oracle(q, k, v, Features(**seen, mask=attends.expand(-1, 4, -1, -1)))
    assert (out[1, :, 0] == 0).all() and (lse[1, :, 0] == -INF).all()
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=1e-5)
    assert error(out, expected) <= near * 4

    _, other_k, other_v = qkv(n_q, 30, 80, 4, 2, 2, dtype)
    other = torch.ones(2, 1, n_q, 30, dtype=torch.bool)
    other[:, :, 0] = False
    before = oracle(q, other_k, other_v, Features(**seen, mask=other.expand(-1, 4, -1, -1)))
    out, lse = slots.attention(q, attends.numpy(), features, (before[0].float(), before[1].float()))
    every = torch.cat([attends, other], dim=-1).expand(-1, 4, -1, -1)
    expected, expected_lse = oracle(q, torch.cat([k, other_k], 2), torch.cat([v, other_v], 2), Features(**seen, mask=every))
    assert (out[1, :, 0] == 0).all() and (lse[1, :, 0] == -INF).all()
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=1e-5)
    assert error(out, expected) <= near * 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_before_and_is_no_number_is_none_after_it(kind):
    q, k, v, attends = case(torch.float32, 3)
    before = torch.randn(q.shape), torch.randn(q.shape[:3])
    for x in before:
        x[1] = NAN  # whose first query sees no slot
    out, lse = filled(kind, k, v).attention(q, attends.numpy(), Features(scale=0.2), before)
    assert lse[1].isnan().all() and out[1].isnan().all()
    assert not lse[0].isnan().any()


@pytest.mark.parametrize("n_q", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_a_sequence_do_not_depend_on_the_others(kind, n_q):
    q, k, v, attends = case(torch.float16, n_q)
    slots, features = filled(kind, k, v), Features(scale=0.2)
    together = slots.attention(q, attends.numpy(), features)
    alone = slots.fork(np.array([1])).attention(q[1:], attends[1:].numpy(), features)
    edge = 1e-6 if kind is Slots else 0  # torch's product of a smaller batch may sum in another order
    torch.testing.assert_close(alone, tuple(both[1:] for both in together), rtol=edge, atol=edge)
