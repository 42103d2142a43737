"""Contenders that read a token at a time, and what runs make of lengths."""

from __future__ import annotations

import pytest
import torch

from bench.close import assert_close
from bench.contenders.problems import Problem
from bench.contenders.providers import REGISTRY
from bench.contenders.shapes import Shape
from bench.contenders.streams import BitmaskStream, CachedAttention, RecomputedAttention
from bench.measure.comparison import FORWARD
from bench.measure.contender import OURS, Provider
from bench.measure.runner import Context
from bench.runs import crossover, decode, decode_original, paper_fig9, scaling
from lmn_kernels import LogarithmicMemory
from python_ref import definition

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cheap():
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("fused", [False, True])
def test_streams_of_attention_are_causal_attention(fused):
    problem = Problem("layer", Shape("", 1, 20, 16, 2, 1), torch.float64, CPU, "reference")
    provider: Provider = REGISTRY["layer"]["sdpa-math"]
    expected = provider.oracle(problem, None)[0]
    with torch.no_grad():
        for stream in (CachedAttention(problem.layer, 20, fused), RecomputedAttention(problem.layer)):
            got = torch.cat([stream(token) for token in problem.x[0].split(1)])
            assert_close(type(stream).__name__, got, expected, 1e-12)


def test_rows_of_decoding():
    shape = Shape("tiny", 1, 1, 32, 2, 1)
    rows = {row["provider"]: row for row in decode.at_position(shape, torch.float32, 100, turns=2)}
    for name, row in rows.items():
        if "gap" in row:
            assert name.startswith(OURS) and ("C++" in row["gap"] or "extension" in row["gap"]), row
        else:
            assert row["unit"] == "us" and 0 < row["p20"] <= row["median"] <= row["p80"]
            assert row["typical"] <= row["p99"] and row["error"] <= row["tolerance"]
    assert {"reference", "ATen loop", "KV cache", "GRU", "LSTM"} <= set(rows)


def test_a_wrong_stream_is_a_gap(monkeypatch):
    monkeypatch.setattr(CachedAttention, "__call__", lambda self, x: x)
    rows = {row["provider"]: row for row in decode.at_position(Shape("", 1, 1, 32, 2, 1), torch.float32, 64, turns=2)}
    assert rows["KV cache"]["gap"].startswith("gate: error") and "median" not in rows["KV cache"]
    assert "median" in rows["GRU"]


def test_sequential_forms_of_figure_9(monkeypatch, tmp_path):
    context = a_context(tmp_path)
    rows = {row["provider"]: row for row in paper_fig9.sequential_rows(context, {}, 40)}
    assert set(rows) == {"ours", "attention", "attention, cached"}
    assert all(row["median"] > 0 and row["mode"] == "sequential" for row in rows.values())
    monkeypatch.setattr(paper_fig9, "QUICK_SECONDS", 0.0)
    given_up: dict[str, int] = {}
    assert all("of 40 tokens" in row["gap"] for row in paper_fig9.sequential_rows(context, given_up, 40))
    assert all("with 40 tokens" in row["gap"] for row in paper_fig9.sequential_rows(context, given_up, 80))


def test_a_wrong_form_of_figure_9_is_a_gap(monkeypatch, tmp_path):
    monkeypatch.setattr(RecomputedAttention, "__call__", lambda self, x: x)
    rows = {row["provider"]: row for row in paper_fig9.sequential_rows(a_context(tmp_path), {}, 40)}
    assert rows["attention"]["gap"].startswith("gate: error") and "median" not in rows["attention"]
    assert "median" in rows["ours"] and "ratio" in rows["attention, cached"]


def a_context(tmp_path):
    return Context(CPU, torch.float32, "reference", True, tmp_path, tmp_path, {})


def test_slopes_of_power_laws():
    def row(provider: str, length: int, power: float) -> dict:
        return {"provider": provider, "direction": FORWARD, "shape": {"length": length}, "median": length**power}

    lengths = [128, 8192, 16384, 32768]
    rows = [row(name, length, power) for name, power in (("ours", 1.0), ("sdpa", 2.0)) for length in lengths]
    rows += [row("short", 128, 1.0)]
    # Short lengths, where fixed costs dominate, have no say.
    rows[0]["median"] = 1e9
    found = {row["provider"]: row for row in scaling.slopes([*rows, {"provider": "x", "gap": "none"}])}
    assert found["ours"]["slope"] == 1.0 and found["sdpa"]["slope"] == 2.0
    assert found["short"]["slope"] is None
    assert (found["ours"]["from_length"], found["ours"]["to_length"]) == (8192, 32768)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([(0.5, 2), (1.1, 1.2), (3, 4)], 64), ([(1.1, 1.2), (3, 0.9)], None), ([(2, 2), (2, 2)], 32), ([], None)],
)
def test_the_crossover_is_where_ours_beats_everybody_from_then_on(ratios, expected):
    rows = [
        {"provider": name, "shape": {"length": 32 << at}, "ratio": ratio}
        for at, pair in enumerate(ratios)
        for name, ratio in zip(("flash", "cudnn"), pair, strict=True)
    ]
    (row,) = crossover.crossover([*rows, {"provider": OURS, "shape": {"length": 32}, "median": 1.0}])
    assert row["crossover"] == expected


def test_the_originals_algorithm_is_the_definition():
    problem = Problem("layer", Shape("", 2, 21, 16, 2, 2), torch.float64, CPU, "reference")
    layer = LogarithmicMemory(16, 2, 2, dtype=torch.float64)
    stream = BitmaskStream(layer)
    merge = definition.linear_merge(layer.summarizer.weight, layer.summarizer.bias)
    projections = layer.sva.state_dict()
    with torch.no_grad():
        got = torch.cat([stream(token) for token in problem.x.split(1, 1)], 1)
        mixed = problem.x + definition.mix(layer.norm1(problem.x), merge, 2, projections, 2)
        expected = mixed + layer.feedforward(layer.norm2(mixed))
    assert_close("block", got, expected, 1e-12)


def test_rows_of_the_originals_own_calls(monkeypatch):
    rows = decode_original.stream(2, 20, turns=2)
    facts = {row["fact"]: row for row in rows if "fact" in row}
    timed = {row["provider"]: row for row in rows if "fact" not in row}
    for name, row in timed.items():
        if "gap" in row:
            assert name == "ours" and "extension" in row["gap"], row
        else:
            assert row["unit"] == "us" and 0 < row["p20"] <= row["median"] <= row["p80"] and row["error"] <= 1e-5
    assert set(facts) == {"original_over_ours", "original_over_reference", "original_over_attention"}
    assert facts["original_over_reference"]["value"] > 0
    assert all(row["value"] > 0 for row in facts.values() if "gap" not in row)
    monkeypatch.setattr(BitmaskStream, "attention", lambda self, memory: memory[:, :, 0])
    wrong = {row["provider"]: row for row in decode_original.stream(1, 20, turns=2)}
    assert wrong[decode_original.THEIRS]["gap"].startswith("gate: error")
