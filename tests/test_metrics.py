"""Error metrics, by hand."""

import math

import pytest
import torch

from tokquant.metrics import Errors, errors


def test_every_metric_is_what_its_formula_gives():
    result = errors(torch.tensor([[1.0, 2.0], [0.0, -3.0]]), torch.tensor([[2.0, 2.0], [0.0, -4.0]]))
    assert result.cosine == pytest.approx((2 + 4 + 12) / math.sqrt(14 * 24), rel=1e-15)
    assert result.rel_l1 == 2 / 8
    assert result.rmse == pytest.approx(math.sqrt(2 / 4), rel=1e-15)
    assert result.max_abs == 1.0


def test_the_exact_output_is_what_the_relative_error_refers_to():
    small, large = torch.tensor([1.0]), torch.tensor([4.0])
    assert errors(small, large).rel_l1 == 0.75
    assert errors(large, small).rel_l1 == 3.0


def test_equal_outputs_have_no_error():
    x = torch.randn(2, 3, 4, 5)
    result = errors(x, x.clone())
    assert result.cosine == pytest.approx(1.0, abs=1e-15)
    assert (result.rel_l1, result.rmse, result.max_abs) == (0.0, 0.0, 0.0)


def test_an_opposite_output_has_cosine_minus_one():
    x = torch.randn(7)
    result = errors(-x, x)
    assert result.cosine == pytest.approx(-1.0, abs=1e-15)
    assert result.rel_l1 == pytest.approx(2.0, rel=1e-15)


def test_zeros_for_zeros_are_exact():
    assert errors(torch.zeros(2, 3), torch.zeros(2, 3)) == Errors(cosine=1.0, rel_l1=0.0, rmse=0.0, max_abs=0.0)


@pytest.mark.parametrize(
    "out, exact", [([0.0, 0.0], [3.0, 4.0]), ([3.0, 4.0], [0.0, 0.0])], ids=["zeros given", "zeros expected"]
)
def test_zeros_on_one_side_have_no_direction(out, exact):
    result = errors(torch.tensor(out), torch.tensor(exact))
    assert result.cosine == 0.0
    assert result.max_abs == 4.0
    assert result.rmse == pytest.approx(math.sqrt(12.5), rel=1e-15)
    assert result.rel_l1 == 1.0 if any(exact) else result.rel_l1 > 1e300


def test_sixteen_bit_outputs_are_compared_in_float64():
    # in float16 the square of 1000 is infinite, and the sum of 4096 ones times 16 too
    result = errors(torch.full((4096,), 1016.0, dtype=torch.float16), torch.full((4096,), 1000.0, dtype=torch.float64))
    assert result.rmse == 16.0
    assert result.rel_l1 == 0.016
    assert result.cosine == pytest.approx(1.0, abs=1e-12)


def test_a_value_that_is_not_a_number_shows():
    result = errors(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    assert math.isnan(result.rel_l1) and math.isnan(result.rmse) and math.isnan(result.max_abs)
    assert not result.cosine > 0


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"out: shape \[2, 3\] is not that of exact, \[3, 2\]"):
        errors(torch.zeros(2, 3), torch.zeros(3, 2))


def test_a_shape_that_would_broadcast_is_refused():
    with pytest.raises(ValueError, match="out: shape"):
        errors(torch.zeros(1, 3), torch.zeros(2, 3))
