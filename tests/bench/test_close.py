"""The checker must catch what it is there to catch."""

import pytest
import torch

from bench.close import assert_close, assert_same_gradients


def test_accepts_rounding():
    x = torch.randn(100, dtype=torch.float64)
    assert_close("x", (x.float()).double(), x, 1e-6)


@pytest.mark.parametrize(
    ("name", "got", "expected"),
    [
        ("shape that broadcasts", torch.ones(1, 3), torch.ones(3)),
        ("one wrong value of many", torch.cat([torch.ones(999), torch.tensor([1.5])]), torch.ones(1000)),
        ("nan", torch.tensor([1.0, float("nan")]), torch.ones(2)),
        ("infinity", torch.tensor([1.0, float("inf")]), torch.ones(2)),
        ("zeros for values", torch.zeros(5), torch.ones(5)),
        ("values for zeros", torch.full((5,), 1e-3), torch.zeros(5)),
        ("not a tensor", None, torch.ones(1)),
    ],
)
def test_rejects(name, got, expected):
    with pytest.raises(AssertionError):
        assert_close(name, got, expected, 1e-4)


def test_gradients_reject_what_should_vanish():
    with pytest.raises(AssertionError, match="nearly zero"):
        got, expected = [torch.ones(3), torch.full((3,), 1e-3)], [torch.ones(3), torch.zeros(3)]
        assert_same_gradients(["a", "b"], got, expected, 1e-6)


def test_gradients_reject_zero_for_small():
    with pytest.raises(AssertionError):
        got, expected = [torch.ones(3), torch.zeros(3)], [torch.ones(3), torch.full((3,), 1e-6)]
        assert_same_gradients(["a", "b"], got, expected, 1e-6)
