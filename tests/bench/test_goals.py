"""The goals of docs/costs.md: read off the rows of runs, met at their limits, and missed below them."""

from __future__ import annotations

import pytest

from bench.measure.journal import Row
from bench.report import goals
from bench.report.chapters import crossover
from bench.report.goals import GOALS, goal_rows

LAYERS = {
    "materialised": {"C": 10.5, "D": 15.6}, "materialised, compiled": {"C": 7}, "ours, lean": {"C": 1.21, "D": 1.19},
    "sdpa-flash": {"C": 10.6, "D": 28}, "sdpa-cudnn": {"C": 7, "D": 18}, "gla": {"C": 1.7}, "simple-gla": {"C": 1.5},
    "gated-delta-rule": {"C": 2.3}, "log-linear": {"C": 4},
}  # fmt: skip
PEAKS = {
    "ours": {"C": 1e9, "D": 5e9, "M": 16e9}, "materialised": {"C": 6.4e9, "D": 5e10},
    "ours, lean": {"C": 6.4e9 / 14, "D": 5e10 / 22, "M": 7.5e9},
}  # fmt: skip
CACHED = {(1, 32): 4.7, (1, 128): 16, (1, 1024): 118, (32, 32): 111, (32, 128): 438}


def layer(provider: str, shape: str, **more) -> Row:
    head = {"operation": "layer", "direction": "training", "provider": provider, "shape": {"name": shape}}
    return {**head, "median": 1.0, **more}


def results(worse: float = 1.0) -> dict[str, list[Row]]:
    """Rows at the limits of the notes; ``worse`` by a factor."""
    rows = [layer("ours", name, share=1 / worse, peak_bytes=peak * worse) for name, peak in PEAKS["ours"].items()]
    # In a forward pass, and alone in a graph, other figures stand, which no goal is about.
    rows.insert(0, layer("materialised", "C", direction="forward", ratio=1e9, peak_bytes=1))
    for provider, shapes in LAYERS.items():
        for name, ratio in shapes.items():
            slower = worse if provider == "ours, lean" else 1 / worse
            peak = PEAKS.get(provider, {}).get(name, 1.0)
            rows.append(layer(provider, name, ratio=ratio * slower, peak_bytes=peak * slower**0.5))
    rows.append(layer("ours, lean", "M", peak_bytes=7.5e9 * worse))
    rows += [layer("materialised", "P", mode=mode, ratio=14 / worse) for mode in ("graph", "eager")]
    for name in "CD":
        for way in ("forward", "backward"):
            head = {"operation": "attention", "direction": way, "provider": "ours", "shape": {"name": name}}
            rows.append({**head, "share": 1 / worse})
        head = {"operation": "tree", "direction": "forward", "provider": "one product", "shape": {"name": name}}
        rows.append({**head, "ratio": 0.97 / worse})
    shape = {"embedding": 1024, "heads": 16, "bank": 1}
    decode = [
        {"provider": "KV cache", "shape": {**shape, "batch": b}, "position": k << 10, "ratio": x / worse}
        for (b, k), x in CACHED.items()
    ]
    facts = {"far_over_near": 1.0 * worse, "p99_over_median": 3.0 * worse}
    decode += [{"fact": name, "value": value, "shape": {**shape, "batch": 1}} for name, value in facts.items()]
    return {
        "kernels": rows, "decode": decode,
        "scaling": [{"provider": "ours", "direction": "training", "slope": worse}],
        "crossover": [{"provider": "ours", "crossover": 4096 if worse == 1 else None}],
    }  # fmt: skip


def test_every_goal_is_met_at_the_limits():
    rows = goal_rows(results())
    assert [row["what"] for row in rows if not row["met"]] == []
    measured = {row["what"]: row["measured"] for row in rows}
    assert measured["naive / ours, training at C"] == 10.5 and measured["peak memory at M, GB"] == pytest.approx(16)
    assert measured["peak memory, naive / lean at D"] == pytest.approx(22)
    assert measured["crossover with attention, L at 32k tokens"] == 4096
    assert measured["naive / ours, training at P, both graphs"] == 14
    assert {goal.number for goal in GOALS} == set(range(1, 11))
    assert [goal.bar for goal in GOALS if goal.number == 8] == ["≥ 4", "≥ 12", "≥ 80", "≥ 80", "≥ 300", "≤ 1.2", "≤ 3"]


def test_every_goal_is_missed_where_ours_is_worse():
    rows = goal_rows(results(worse=4.0))
    assert [row["what"] for row in rows if row["met"] is not False] == ["M runs, where naive needs 132 GB"]
    assert next(row["measured"] for row in rows if "crossover" in row["what"]) == "inf"


def test_without_rows_nothing_is_said_and_a_rehearsal_meets_nothing():
    assert all(row["measured"] is None and row["met"] is None for row in goal_rows({}))
    rehearsed = goal_rows(results(), real=False)
    assert all(row["measured"] is not None and row["met"] is None for row in rehearsed)


def test_a_gap_is_no_measurement():
    gone = {run: [{**row, "gap": "gate: wrong"} for row in rows] for run, rows in results().items()}
    left = {row["what"] for row in goal_rows(gone) if row["measured"] is not None}
    assert left <= {"crossover with attention, L at 32k tokens"}


def test_the_chapter_has_a_line_for_every_goal():
    text = goals.chapter(results(worse=4.0))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(GOALS) + 2 and "Not measured: " in text and " inf " in text
    assert sum(" no " in line for line in lines) == len(GOALS) - 1


@pytest.mark.parametrize("found, said", [(4096, "from L = 4,096 on"), (None, "at no length")])
def test_the_chapter_of_the_crossover(found, said):
    shape = {"name": "512", "batch": 8, "length": 512, "embedding": 64, "heads": 4, "bank": 1}
    rows = [{**layer(name, "512"), "shape": shape, "unit": "ms"} for name in ("ours", "sdpa-flash")]
    assert f"Ours beats attention {said}." in crossover([*rows, {"provider": "ours", "crossover": found}])
