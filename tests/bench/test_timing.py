"""Clocks: contenders take turns, and what is said of their times."""

from __future__ import annotations

import pytest
import torch

from bench.measure import timing


def test_contenders_take_turns():
    calls: list[str] = []
    clock = timing.Clock(torch.device("cpu"))
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    taken = timing.take_turns(works, clock, budget=0.0)
    assert [len(seconds) for seconds in taken.values()] == [timing.LEAST] * 2
    assert calls == ["a", "b"] * (timing.LEAST + timing.WARM_UP)
    assert len(timing.take_turns(works, clock, budget=1e3)["a"]) == timing.MOST


def test_spread_and_ratio():
    found = timing.spread([0.001 * n for n in range(1, 101)])
    assert (found.median, found.repeats) == (50.5, 100)
    assert timing.spread([0.001, 0.002, 0.003], "us").row() == {
        "median": 2000.0, "p20": 1400.0, "p80": 2600.0, "repeats": 3, "unit": "us"
    }  # fmt: skip
    assert found.p20 == pytest.approx(20, abs=1) and found.p80 == pytest.approx(80, abs=1)
    # Both slow down together: the ratio of pairs does not move, that of the medians would.
    assert timing.pair_ratio([2, 4, 40], [1, 2, 20]) == 2
