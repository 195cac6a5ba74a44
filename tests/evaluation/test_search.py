"""Search: maps that keep their budget, beat single schemes, and hold on activations that were not seen."""

from itertools import product

import numpy as np
import pytest
import torch

import tokquant as tq
from tests.factories import qkv, scheme
from tokquant.activations import Activations, sample
from tokquant.evaluation.candidates import default
from tokquant.evaluation.costs import measure
from tokquant.evaluation.plot import draw
from tokquant.evaluation.sampling import runs
from tokquant.schemes import HeadSchemes

FEW = ["int8", "int8-fast", "kv-int4", "int8-fp16", "fp8"]


def halves(rows: slice) -> dict:
    """The sample's layers, these tokens of them."""
    return {name: tuple(x[:, :, rows] for x in layer) for name, layer in Activations(sample()).items()}


SEEN, UNSEEN = halves(slice(0, 256)), halves(slice(256, 512))


@pytest.mark.parametrize("budget", ["bits=8.5", "bits=7", "kv_bits=6"])
def test_a_map_keeps_its_cost_and_beats_every_single_scheme_of_no_more(budget):
    found = tq.search(SEEN, budget=budget, held_out=UNSEEN, rows=None)
    limit = float(budget.partition("=")[2])
    assert found.cost <= limit and found.cost == pytest.approx(sum(each.cost for each in found.layers))
    assert found.error == pytest.approx(sum(each.error for each in found.layers) / len(found.layers))
    rivals = {name: point for name, point in found.singles.items() if point[0] <= limit}
    assert len(rivals) > 3
    assert all(found.error < error for _, error in rivals.values())
    assert all(found.held_out["searched"] < found.held_out[name] for name in rivals)


def test_a_map_near_int8_fp16_in_every_layer_takes_far_fewer_bits():
    more = dict(relative_to="int8-fp16", rows=None, held_out=UNSEEN)
    found = tq.search(SEEN, budget="rel_l1=1.3", over="worst", **more)
    assert found.error <= 1.3 and all(each.error <= 1.3 for each in found.layers)
    assert found.cost < 0.8 * found.singles["int8-fp16"][0]
    assert found.held_out["searched"] <= 1.5  # the worst layer of others is a little worse


def test_the_errors_of_a_map_are_those_that_compare_measures():
    found = tq.search(SEEN, FEW, budget="bits=7.5", rows=None)
    for each in found.layers:
        [measured] = tq.compare(*SEEN[each.layer], [found.map], layer=each.layer, backend="reference", repeats=1)
        assert measured.errors.rel_l1 == pytest.approx(each.error, rel=1e-6)


@pytest.mark.parametrize("metric", ["rmse", "max_abs", "cosine"])
def test_every_metric_can_be_the_budget(metric):
    every = tq.search(SEEN, FEW, budget="bits=32", metric=metric, over="worst")
    limit = every.front[len(every.front) // 2][1]
    text = f"{metric}={1 - limit if metric == 'cosine' else limit}"
    found = tq.search(SEEN, FEW, budget=text, over="worst")
    assert found.metric == metric and found.error <= limit * (1 + 1e-6)
    assert found.cost == pytest.approx(min(cost for cost, error in found.front if error <= limit * (1 + 1e-6)))


def test_heads_may_take_schemes_of_their_own_which_errs_less():
    whole = tq.search(SEEN, budget="kv_bits=5", rows=None)
    found = tq.search(SEEN, budget="kv_bits=5", heads=True, rows=None)
    assert found.error < whole.error and found.cost <= 5
    assert any(isinstance(each.scheme, HeadSchemes) for each in found.layers)
    for each in found.layers:
        [measured] = tq.compare(*SEEN[each.layer], [found.map], layer=each.layer, backend="reference", repeats=1)
        assert measured.errors.rel_l1 == pytest.approx(each.error, rel=1e-6)


def test_some_queries_stand_for_all():
    assert runs(100, None) == runs(100, 100) == [slice(0, 100)]
    spread = runs(1000, 96)
    assert [x.stop - x.start for x in spread] == [32, 32, 32] and spread[0].start == 0 and spread[-1].stop == 1000
    assert runs(1000, 5) == [slice(995, 1000)]
    few, every = (tq.search(SEEN, FEW, budget="bits=9", rows=rows, causal=True) for rows in (64, None))
    for name, (_, error) in every.singles.items():
        assert few.singles[name][1] == pytest.approx(error, rel=0.5)


def test_a_static_candidate_is_calibrated_in_passing():
    found = tq.search(SEEN, ["kv-fp8", "int8"], budget="kv_bits=8.1")
    assert {each.scheme.name for each in found.layers} == {"kv-fp8"}


def test_time_is_measured_here():
    layers = {name: SEEN[name] for name in list(SEEN)[:2]}
    found = tq.search(layers, ["int8", "fp8"], budget="ms=1e6")
    assert found.unit == "ms" and 0 < found.cost < 1e6


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("features", "kernel", "pairs"),
    [
        ({"causal": True}, {"causal": True}, 64 * 65 // 2),  # the first 32 of 96 queries see none of 64 keys
        ({"window": (3, 1)}, {"window": True}, 1 + 2 + 3 + 4 + 60 * 5 + 4),
        ({"softcap": 30.0, "bias": tq.bias.alibi(tq.bias.alibi_slopes(4))}, {"softcap": True, "bias": "alibi"}, 96 * 64),
    ],
    ids=["causal", "a window", "softcap and ALiBi"],
)
def test_predicted_time_is_of_the_kernel_and_the_scores_that_features_leave(features, kernel, pairs):
    layers = {"x": qkv(96, 64, d=64, heads=4, kv_heads=2)}
    found = tq.search(layers, ["int8"], budget="ms=1e6", target="sm_90", **features)
    made = tq.compile("int8", head_dim=64, shared_heads=2, target="sm_90", **kernel)
    assert found.cost == pytest.approx(4 * 4 * pairs * 64 / made.prediction.serial_tops / 1e9)


def test_candidates_that_do_not_fit_are_passed_over():
    q, k, v = qkv(64, d=48)
    names = {each.name for each in default(48)}
    assert "int8" in names and "kv-int4-kivi" not in names
    found = tq.search({"x": (q, k, v)}, ["int8", "kv-int4-kivi"], budget="bits=32")
    assert "kv-int4-kivi" not in found.singles
    why = "v.granularity: a group of 32 channels does not divide head_dim 48; use group: 16"
    assert found.unfit == {"kv-int4-kivi": f"x: {why}"}
    huge = {"x": (q, k, v * 1e9)}
    found = tq.search(huge, ["kv-int8", "int8"], budget="bits=32")
    assert "kv-int8" not in found.singles and "does not fit scale_dtype fp16" in found.unfit["kv-int8"]


def test_layers_of_which_no_scheme_fits_all_are_searched_and_drawn(tmp_path):
    q, k, v = qkv(64, d=48)
    layers = {"a": (q, k, v), "b": (*qkv(64, d=32)[:2], qkv(64, d=32)[2] * 1e9)}
    groups = scheme("int8", "int8", "int8 group:32", "fp16", name="groups")  # of channels, which 48 is no multiple of
    found = tq.search(layers, ["kv-int8", groups], budget="bits=32")  # scales in fp16 do not hold 1e9
    assert [each.scheme.name for each in found.layers] == ["kv-int8", "groups"] and not found.singles
    pytest.importorskip("matplotlib")
    draw(found, tmp_path / "front.svg")
    assert "one scheme for all layers" in (tmp_path / "front.svg").read_text()


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_errors_are_counted_only_in_those_of_a_scheme_that_fits_and_errs(scale):
    layers = {"a": qkv(64, d=32), "b": tuple(x * scale for x in qkv(64, d=48))}
    group = "kv-int4-kivi" if scale else "int8-fp16"  # groups of 32 channels do not divide 48; nothing errs on zeros
    with pytest.raises(ValueError, match=f"relative_to: '{group}' (does not fit|has no error).* in layer 'b'"):
        tq.search(layers, ["int8", "kv-int4"], budget="bits=9", relative_to=group)


def test_errors_are_counted_in_those_of_a_map_layer_by_layer():
    few = {name: SEEN[name] for name in ("layers.0", "layers.1")}
    other = tq.SchemeMap((("layers.0", tq.preset("int8")), ("*", tq.preset("fp8"))), "other")
    found = tq.search(few, FEW, budget="bits=9", relative_to=other)
    for each, name in zip(found.layers, ("int8", "fp8"), strict=True):
        layer = {each.layer: SEEN[each.layer]}
        plain = tq.search(layer, [each.scheme], budget="bits=9").error / tq.search(layer, [name], budget="bits=9").error
        assert each.error == pytest.approx(plain)


ALIAS = tq.preset("kv-int4").model_copy(update={"name": "int8"})
WHOLE = scheme("int8", "int8 tensor", "int8", "fp16", name="whole")


@pytest.mark.parametrize("heads", [False, True])
def test_what_is_found_is_the_best_of_all_combinations(heads):
    layers = {f"l.{i}": (x[0] * (1 + i), *x[1:]) for i in range(3) for x in [qkv(64, d=32, heads=4, kv_heads=2, seed=i)]}
    names = ["int8", "kv-int4", "int8-fp16"]
    table = measure(layers, [tq.preset(name) for name in names], heads=heads)
    costs, errors = np.concatenate(table.cost), np.concatenate(table.error)
    every = [[x[range(len(x)), pick].sum() for x in (costs, errors)] for pick in product(range(3), repeat=len(costs))]
    for limit in (7.2, 8.0, 9.1):
        found = tq.search(layers, names, budget=f"bits={limit}", heads=heads)
        assert found.error == pytest.approx(min(error for cost, error in every if cost <= limit) / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "bits"}, "budget: 'bits' is not valid; write bits=8.5"),
        ({"budget": "bit=8"}, "did you mean 'bits'"),
        ({"budget": "bits=-1"}, "budget: 'bits=-1' is not valid"),
        ({"budget": "bits=3"}, "no combination of these candidates keeps bits=3; bits are at least"),
        ({"budget": "rel_l1=1e-9"}, "keeps rel_l1=1e-9; the mean rel_l1 is at least"),
        ({"budget": "cosine=0.9999999999"}, "the mean cosine is at most 0.9"),
        ({"budget": "bits=8", "metric": "rel_l2"}, "metric: 'rel_l2' is not valid; use rel_l1"),
        ({"budget": "bits=8", "over": "median"}, "over: 'median' is not valid"),
        ({"budget": "bits=8", "heads": True, "over": "worst"}, "heads: the worst rel_l1 of a layer is not a sum"),
        ({"budget": "bits=8", "target": "sm_90"}, "target: 'sm_90' says whose time is predicted, and the cost is bits"),
        ({"budget": "bits=8", "candidates": "int8"}, "candidates: 'int8'; give a list of schemes"),
        ({"budget": "bits=8", "candidates": ["int9"]}, "no preset 'int9'"),
        (
            {"budget": "bits=8", "candidates": [tq.SchemeMap((("*", WHOLE),))]},
            "candidates: 'custom' is a scheme map",
        ),
        ({"budget": "bits=8", "candidates": ["int8", ALIAS]}, "candidates: two are called 'int8'"),
        ({"budget": "bits=8", "name": "int8"}, "name: 'int8', of the map or its file, is a candidate's"),
        ({"budget": "bits=8", "cost": "kv_bits"}, "cost: 'kv_bits', and the budget is bits=8; leave cost out"),
        ({"budget": "rmse=8", "metric": "cosine"}, "metric: 'cosine', and the budget is rmse=8; leave metric out"),
        ({"budget": "bits=8", "rows": 0}, "rows: 0 is not a whole number from 1, or None for all"),
        ({"budget": "bits=8", "heads": True, "candidates": ["kv-fp8"]}, "heads: candidate 'kv-fp8' is static"),
        ({"budget": "bits=8", "heads": True, "candidates": [WHOLE]}, "heads: candidate 'whole' has a scale per tensor"),
        ({"budget": "bits=8", "activations": {}}, "activations: there are no layers"),
        ({"budget": "bits=8", "activations": "a.safetensors"}, "activations: 'a.safetensors'; give .*Activations"),
        ({"budget": "bits=8", "activations": {"a": qkv()[:2]}}, "activations of 'a': a tuple|activations of 'a': .* is not"),
        ({"budget": "bits=8", "activations": {"a": (torch.ones(2, 2),) * 3}}, "activations of 'a': q: shape"),
        ({"budget": "bits=8", "activations": {"a": (qkv()[0].double(),) * 3}}, "activations of 'a': q: torch.float64"),
        ({"budget": "bits=8", "activations": {"a": (*qkv()[:2], qkv()[2].sqrt())}}, "activations of 'a': v: .*not finite"),
        ({"budget": "bits=8", "held_out": {"layers.1": SEEN["layers.1"]}}, "held_out: lacks layer 'layers.0'"),
    ],
)
def test_what_cannot_be_searched_is_said(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tq.search(**{"activations": {"layers.0": SEEN["layers.0"]}, "candidates": FEW, **changes})
