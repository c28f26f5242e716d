"""The measure by which all other tests judge must itself be right."""

from __future__ import annotations

import math

import pytest
import torch

from tests.closeness import assert_close, relative_error


def test_relative_error_by_hand():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    error = relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    assert error == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.nan]),
        ([1.0, math.inf], [1.0, -math.inf]),
        ([1.0, math.inf], [1.0, 2.0]),
        ([1.0, 2.0], [0.0, 0.0]),
    ],
)
def test_wrong_special_values_are_infinitely_far(result, expected):
    assert relative_error(torch.tensor(result), torch.tensor(expected)) == math.inf


def test_equal_special_values_are_close():
    value = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert relative_error(value, value.clone()) == 0


def test_scale_measures_what_should_be_zero():
    assert relative_error(torch.tensor([1e-6]), torch.tensor([0.0]), scale=1.0) == pytest.approx(
        1e-6
    )


def test_other_shape_is_infinitely_far():
    assert relative_error(torch.ones(2), torch.ones(1, 2)) == math.inf


def test_assert_close_names_the_worst_place():
    with pytest.raises(AssertionError, match=r"result: relative L2 error .* worst at \(1,\): 5"):
        assert_close(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]), 1e-6, "result")
