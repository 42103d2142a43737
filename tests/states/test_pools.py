"""A pool that has lived long: what counts is where a request stands, not how deep a room it once had."""

from __future__ import annotations

import pytest
import torch

from bench.close import TOLERANCE, assert_close
from lmn_kernels import LogarithmicMemory, LogarithmicMixing

VALUE = TOLERANCE[torch.float32][0]
ONE = torch.tensor([0])


def test_a_request_goes_back_into_a_pool_that_served_many_before_it():
    layer, x = LogarithmicMemory(16, 2, 2, init="variance_preserving"), torch.randn(1, 40, 16)
    with torch.no_grad():
        whole, pool = layer(x), layer.init_state(2, max_position=64)
        for _ in range(10):
            pool.restore(layer.init_state(1), ONE)
            for t in range(20):
                layer.step_(x[:, t : t + 1], pool, ONE)
            assert pool.max_position == 20
        _, state = layer(x[:, 20:30], state=pool.reorder(ONE), return_state=True)
        assert state.max_position == 30
        assert pool.restore(state, ONE) is pool and pool.max_position == 30
        assert_close("y", layer.step_(x[:, 30:], pool, ONE), whole[:, 30:], VALUE)


@pytest.mark.parametrize("expand", [None, 1])
def test_a_deep_snapshot_of_an_early_position_fits_a_shallow_pool(expand):
    layer, x = LogarithmicMixing(16, 2, 2, expand=expand, init="variance_preserving"), torch.randn(1, 9, 16)
    with torch.no_grad():
        _, state = layer.prefill(x[:, :5])
        deep, pool = state.with_room(10_000), layer.init_state(3, max_position=7)
        pool.restore(deep, torch.tensor([1]))
        assert pool.levels == 2 and pool.max_position == 5
        assert_close("y", layer.step_(x[:, 5:7], pool, torch.tensor([1])), layer(x)[:, 5:7], VALUE)
        _, late = layer.prefill(x)
        with pytest.raises(ValueError, match="snapshot.position: expected at most 7, .* got up to 9"):
            pool.restore(late, torch.tensor([0]))


def test_bounds_fall_with_the_rows_that_they_were_of():
    layer, x = LogarithmicMixing(16, 2), torch.randn(2, 100, 16)
    _, state = layer.prefill(x, torch.tensor([100, 3]))
    assert state.max_position == 100
    assert state.reset(ONE).max_position == 3 and state.reorder(torch.tensor([1, 1])).max_position == 3
    assert state.reset(torch.tensor([True, True])).max_position == 0 and state.reset().max_position == 0
    pool = state.snapshot()
    pool.restore(layer.init_state(1), ONE)
    assert pool.max_position == 3 and state.max_position == 100


@pytest.mark.parametrize("view", ["detach", "to", "clone", "snapshot"])
def test_what_a_pool_gives_away_stays_when_the_pool_goes_on(view):
    layer, x = LogarithmicMixing(16, 2, 2, init="variance_preserving"), torch.randn(2, 164, 16)
    with torch.no_grad():
        _, start = layer.prefill(x[:, :50])
        pool = start.with_room(300)
        alias = pool.to("cpu") if view == "to" else getattr(pool, view)()
        layer.step_(x[:, 50:100], pool)
        assert (alias.position == 50).all() and alias.max_position == 50
        for state, first in ((alias, 50), (pool, 100)):
            y, _ = layer(x[:, first:], state=state, return_state=True)
            assert_close("y", y, layer(x)[:, first:], VALUE)


def test_a_row_without_a_token_keeps_its_newest_one_to_the_bit():
    """Of a state that is wider than the tokens."""
    layer = LogarithmicMixing(16, 2, 2, dtype=torch.bfloat16)
    _, state = layer.prefill(torch.randn(2, 5, 16).bfloat16())
    state = state.to(dtype=torch.float32)
    object.__setattr__(state, "token", torch.randn(2, 16))  # what no bfloat16 holds
    x = torch.randn(2, 3, 16).bfloat16()
    _, after = layer(x, state=state, lengths=torch.tensor([3, 0]), return_state=True)
    assert torch.equal(after.token[1], state.token[1]) and torch.equal(after.token[0], x[0, 2].float())
    assert torch.equal(after.nodes[1, :2], state.nodes[1]) and after.position.tolist() == [8, 5]


def test_an_expander_of_another_width_takes_the_place_of_the_first():
    layer, other = (LogarithmicMixing(8, 2, expand=k, dtype=torch.float64) for k in (1, 2))
    layer.expander = other.expander
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    assert layer.expand == 2
    y, state = layer(x, return_state=True)
    expected = LogarithmicMixing(8, 2, expand=2, dtype=torch.float64)
    expected.load_state_dict(layer.state_dict())
    assert_close("y", y, expected(x), TOLERANCE[torch.float64][0])
    assert_close("step", layer.step(x[:, :1], state)[0], expected.step(x[:, :1], state)[0], TOLERANCE[torch.float64][0])
