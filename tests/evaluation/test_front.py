"""Pareto fronts: exactly those combinations that nothing beats, checked against all combinations."""

from itertools import product

import numpy as np
import pytest

from tokquant.evaluation import front


@pytest.mark.parametrize(("join", "over"), [(np.add, np.sum), (np.maximum, np.max)], ids=["sum", "worst"])
def test_a_front_has_the_best_combination_of_every_budget(join, over):
    rng = np.random.default_rng(0)
    for _ in range(40):
        units, options = rng.integers(1, 5), rng.integers(1, 6)
        cost, error = rng.integers(1, 20, (units, options)).astype(float), rng.random((units, options))
        found = front.merged([front.of_options(c, e) for c, e in zip(cost, error, strict=True)], join)
        every = [tuple(zip(*((cost[u, o], error[u, o]) for u, o in enumerate(each)), strict=True)) for each in
                 product(range(options), repeat=units)]  # fmt: skip
        every = [(sum(c), over(e)) for c, e in every]
        for c, e, choice in zip(found.cost, found.error, found.choice, strict=True):
            picked = np.arange(units), choice
            assert np.isclose(cost[picked].sum(), c) and np.isclose(over(error[picked]), e)
        for budget in range(0, 80, 3):
            within = [e for c, e in every if c <= budget]
            place = found.best(budget)
            assert (place is None) == (not within)
            if place is not None:
                assert np.isclose(found.error[place], min(within))
            enough = [c for c, e in every if e <= budget / 40]
            place = found.cheapest(budget / 40)
            assert (place is None) == (not enough)
            if place is not None:
                assert found.cost[place] == min(enough)


def test_an_option_that_does_not_fit_is_never_taken():
    found = front.of_options(np.array([1.0, 2.0, np.inf]), np.array([np.inf, 0.5, 0.1]))
    assert found.cost.tolist() == [2.0] and found.choice.tolist() == [[1]]


def test_long_fronts_are_thinned_and_stay_near_the_best():
    rng = np.random.default_rng(1)
    cost, error = rng.random((24, 12)), rng.random((24, 12)) ** 3
    units = [front.of_options(c, e) for c, e in zip(cost, error, strict=True)]
    found = front.merged(units, np.add)
    assert len(found) <= front.KEPT + 2 and (np.diff(found.cost) > 0).all() and (np.diff(found.error) < 0).all()
    # a relaxation bounds what any combination can reach: cost + weight * error is least unit by unit
    for weight in (0.5, 1, 2, 5):
        least = (cost + weight * error).min(axis=1).sum()
        assert least - 1e-9 <= (found.cost + weight * found.error).min() <= least * 1.002
