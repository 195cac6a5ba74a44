"""explain: parts and worst rows, against attention written out."""

import math

import pytest
import torch
from factories import dense_logits, qkv, scheme

import tokquant as tq
from tokquant.evaluation import explain as explaining
from tokquant.inputs import features_of
from tokquant.metrics import errors, head_errors, row_errors

EVERYTHING = {"causal": True, "softcap": 3.0, "sinks": torch.tensor([-2.0, 0.0, 1.0, 3.0])}


def explained(made, operands, **features):
    [found] = tq.compare(*operands, [made], backend="reference", repeats=1, explained=True, **features)
    return found


@pytest.mark.parametrize("role, words", [("q", "int4"), ("k", "int4"), ("v", "int4"), ("p", "int8 row_block:16")])
@pytest.mark.parametrize("features", [{}, EVERYTHING], ids=["plain", "causal with softcap and sinks"])
def test_where_one_operand_is_quantized_all_the_error_is_its_own(role, words, features):
    found = explained(scheme(**{role: words}), qkv(40, 70, heads=4, kv_heads=2), **features)
    parts = dict(found.explanation.parts)
    assert parts.pop(role) == pytest.approx(found.errors.rel_l1, rel=1e-3)
    assert max(parts.values()) < 1e-4 * found.errors.rel_l1


@pytest.mark.parametrize(
    "made",
    [
        scheme("int4 block_mean", "int4 mean"),
        scheme("int8", "int4 channel asymmetric mean"),
        scheme("int4", "int4 mean", rotate="hadamard", balance="channel"),
    ],
    ids=["block means of Q", "K folded into Q", "rotated and balanced"],
)
@pytest.mark.parametrize("features", [{}, EVERYTHING], ids=["plain", "causal with softcap and sinks"])
def test_codes_in_any_frame_leave_p_nothing_to_explain(made, features):
    found = explained(made, qkv(40, 70, heads=4, kv_heads=2, dtype=torch.float32), **features)
    parts = found.explanation.parts
    assert parts["v"] == 0 and parts["p"] < 2e-3 * found.errors.rel_l1, "what is left is the 16 bits of K beside block means"
    assert parts["q"] > 0 and max(parts["q"], parts["k"]) < 1.2 * found.errors.rel_l1


def test_the_worst_row_is_found_with_its_weights_entropy_and_size():
    q, k, v = qkv(40, heads=2)
    q[0, 1, 23] = 40 * k[0, 1, 7]
    v[0, 1, 7] = 25.0
    found = explained(scheme(v="int4 head"), (q, k, v), causal=True)
    row = found.explanation.worst[0]
    features = features_of(q, k, causal=True)
    p = dense_logits(q, k, features).softmax(dim=-1)
    exact = p @ v.double()
    out = tq.attention(q, k, v, scheme(v="int4 head"), causal=True, backend="reference")
    off = row_errors(out, exact)
    assert off[row.batch, row.head, row.token] == off.max() == pytest.approx(row.error, rel=1e-6)
    weights = p[row.batch, row.head, row.token]
    assert [key for key, _ in row.weights] == weights.topk(3).indices.tolist()
    assert [share for _, share in row.weights] == pytest.approx(weights.topk(3).values.tolist(), rel=1e-9)
    assert row.entropy == pytest.approx(-sum(x * math.log2(x) for x in weights.tolist() if x), rel=1e-9, abs=1e-12)
    sizes = exact[:, row.head].abs().sum(dim=2)
    assert row.size == pytest.approx((sizes[row.batch, row.token] / sizes.mean()).item(), rel=1e-9)
    assert row.parts["v"] == pytest.approx(row.error, rel=1e-3)
    assert [x.error for x in found.explanation.worst] == pytest.approx(off.flatten().topk(3).values.tolist(), rel=1e-6)


def test_heads_and_rows_average_to_what_a_head_errs():
    q, _, v = qkv(30, heads=3, batch=2)
    out, exact = v + 0.1 * q, v.double()
    for head, found in enumerate(head_errors(out, exact)):
        assert found == errors(out[:, head], exact[:, head])
        assert row_errors(out, exact)[:, head].mean().item() == pytest.approx(found.rel_l1, rel=1e-12)


def test_a_long_sequence_is_measured_on_runs_from_its_first_row_to_its_last(monkeypatch):
    monkeypatch.setattr(explaining, "ROWS", 96)
    found = explained(scheme(k="int4"), qkv(200, heads=1), causal=True)
    assert found.explanation.rows == 96
    assert found.explanation.parts["k"] == pytest.approx(found.errors.rel_l1, rel=0.3)


def test_an_exact_scheme_has_no_worst_row():
    q = k = torch.zeros(1, 1, 8, 32)
    found = explained(tq.preset("none"), (q, k, torch.zeros_like(q)))
    assert found.explanation.worst == () and set(found.explanation.parts.values()) == {0.0}


def test_what_is_not_a_number_comes_first():
    q, k, v = qkv(20, heads=1)
    v[0, 0, 12, 3] = math.nan
    found = explained(scheme(v="fp16"), (q, k, v), causal=True)
    assert math.isnan(found.explanation.worst[0].error) and found.explanation.worst[0].token >= 12
    assert math.isnan(found.explanation.parts["v"])
