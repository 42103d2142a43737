"""The recall run: its streams, the arithmetic of levels, scores of known answerers, exact resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.errors import InputError
from bench.lm.recall_task import SPLIT, Streams, Task, length_for, lowest_level, test_streams, training_streams
from bench.measure.runner import Context, execute
from bench.runs import recall

TASK = Task(keys=6, values=5, fillers=3, pairs=3)
TINY = recall.Plan(steps=4, tokens=64, shortest=2, longest=3, tests=(4, 4), embedding=8, queries=6)


def _training(seed: int = 0, count: int = 40, length: int = 100) -> Streams:
    return training_streams(TASK, np.random.default_rng(seed), count, length, 12)


def _testing(log: int) -> Streams:
    return test_streams(TASK, np.random.default_rng(log), 30, 1 << log)


# Streams


def _kind(symbol: int) -> str:
    if symbol < TASK.fillers:
        return "filler"
    return "key" if symbol < TASK.fillers + TASK.keys else "value"


@pytest.mark.parametrize("streams", [_training(), *(_testing(log) for log in (0, 1, 2, 3, 5, 8))])
def test_streams_are_what_they_say(streams: Streams) -> None:
    assert (streams.targets >= 0).any(1).all()
    for ids, targets, distances, places in zip(
        streams.ids.tolist(), streams.targets.tolist(), streams.distances.tolist(), streams.places.tolist(), strict=True
    ):
        assert all(_kind(ids[place]) == "value" and _kind(ids[place - 1]) == "key" for place in places)
        bound = {ids[place - 1]: place for place in places}
        assert len(bound) == len({ids[place] for place in places}) == TASK.pairs
        # Nothing but the pairs shows a value, so no answer is shown at a query or behind it.
        assert [at for at, symbol in enumerate(ids) if _kind(symbol) == "value"] == sorted(places)
        asked = [at for at, symbol in enumerate(ids) if _kind(symbol) == "key" and at + 1 not in places]
        assert asked == [at for at, target in enumerate(targets) if target >= 0]
        assert asked == [at for at, distance in enumerate(distances) if distance]
        for at in asked:
            assert at > max(places)
            place = bound[ids[at]]
            assert (targets[at], distances[at]) == (ids[place], at - place)


@pytest.mark.parametrize("log", [0, 1, 2, 4, 7, 14])
def test_a_test_asks_once_at_its_distance(log: int) -> None:
    streams = test_streams(TASK, np.random.default_rng(3), 20, 1 << log)
    assert streams.ids.shape == (20, length_for(1 << log))
    assert ((streams.distances > 0).sum(1) == 1).all()
    assert set(streams.distances[streams.distances > 0].tolist()) == {1 << log}


def test_training_distances_reach_far_and_near() -> None:
    found = _training(count=2000).distances
    counts = torch.bincount(found[found > 0].long().log2().floor().long(), minlength=6)
    assert (counts[:6] > 0.02 * counts.sum()).all(), counts


def test_neither_recency_nor_rank_helps_in_training() -> None:
    # Which pair is asked for, by the rank of its place among the pairs, right behind the last pair and far from it.
    streams = _training(1, 4000)
    row, at = torch.nonzero(streams.targets >= 0, as_tuple=True)
    place = at - streams.distances[row, at]
    rank = (streams.places[row] < place[:, None]).sum(1)
    behind = at - streams.places[row].max(1).values
    for near in (behind <= 2, behind > 16):
        shares = torch.bincount(rank[near], minlength=TASK.pairs) / near.sum()
        assert (shares - TASK.unbound).abs().max() < 0.04, shares


def test_streams_are_a_function_of_the_seed() -> None:
    assert torch.equal(_training(5).ids, _training(5).ids)
    assert not torch.equal(_training(5).ids, _training(6).ids)


# Levels


def _literal(n: int, distance: int) -> int:
    """The slots of position n as the definition lists them, as sets of tokens."""
    pair = {n - distance - 1, n - distance}
    for level in range(1, n.bit_length()):
        block = n // 2**level - 1
        if pair <= set(range(block * 2**level + 1, (block + 1) * 2**level + 1)):
            return level
    return SPLIT


def test_levels_are_those_of_the_definition() -> None:
    pairs = [(n, distance) for n in range(3, 140) for distance in range(1, n - 1)]
    n, distance = torch.tensor(pairs).unbind(1)
    assert lowest_level(n - 1, distance).tolist() == [_literal(*pair) for pair in pairs]


@pytest.mark.parametrize("n", [16385, 20000, 24575])
def test_levels_far_away(n: int) -> None:
    distances = [1, 2, 255, 4095, 4096, 8191, 8192, 16383]
    found = lowest_level(torch.full((len(distances),), n - 1), torch.tensor(distances))
    assert found.tolist() == [_literal(n, distance) for distance in distances]
    assert max(found.tolist()) >= 13


# Scores


class _LookUp(torch.nn.Module):
    """Gives the value behind the first occurrence of a key."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, TASK.symbols)
        for row, symbols in enumerate(ids.tolist()):
            for at, symbol in enumerate(symbols):
                logits[row, at, symbols[symbols.index(symbol) + 1 if _kind(symbol) == "key" else at]] = 1
        return logits


class _Guess(torch.nn.Module):
    """Gives one of the values of the stream, whatever the key."""

    def forward(self, ids: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(ids.sum()))
        noise = torch.rand(*ids.shape, TASK.symbols, generator=generator)
        here = torch.nn.functional.one_hot(ids, TASK.symbols).amax(1, keepdim=True)
        return noise * here * (torch.arange(TASK.symbols) >= TASK.fillers + TASK.keys)


def _score(model: Any, log: int, queries: int) -> float:
    return recall.tally(recall.answers(model, TASK, log, queries, torch.device("cpu")))["accuracy"]


def test_look_up_is_right_and_guessing_is_chance() -> None:
    for log in (0, 3, 6):
        assert _score(_LookUp(), log, 64) == 1.0
        assert _score(_Guess(), log, 1000) == pytest.approx(TASK.unbound, abs=0.05)


def test_tally_counts_levels() -> None:
    row = recall.tally(torch.tensor([[1, 3], [0, SPLIT], [1, 4], [1, 3]]))
    assert row == {"accuracy": 0.75, "queries": 4, "level": 3.333, "levels": {"0": 1, "3": 2, "4": 1}}
    assert recall.tally(torch.tensor([[1, SPLIT]]))["level"] is None


# The run


def _context(folder: Path, **options: Any) -> Context:
    return Context(
        torch.device("cpu"), torch.float32, "reference", True, folder / "results", folder / "scratch", options
    )


def _contestant(path: Path, name: str = "logmem-2", plan: recall.Plan = TINY, origin: str = "here") -> Any:
    return recall.Contestant(name, plan, 7, torch.device("cpu"), path, {"commit": origin})


def _figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "gap")} for row in rows]


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "SAVE_EVERY", 0.0)


def _interrupt(name: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let what is called ``name`` raise KeyboardInterrupt instead of its call number ``calls``; returns the undoing."""
    owner: Any = recall.Contestant if name == "update" else recall
    real, left = getattr(owner, name), calls

    def fails(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(owner, name, fails)
    return lambda: monkeypatch.setattr(owner, name, real)


@pytest.mark.parametrize(("name", "calls"), [("update", 2), ("answers", 3)])
def test_interrupted_and_resumed_is_uninterrupted(
    name: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _eager: None
) -> None:
    whole = _contestant(tmp_path / "whole.pt")
    expected = _figures(whole.finish())
    undo = _interrupt(name, calls, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        _contestant(tmp_path / "part.pt").finish()
    undo()
    resumed = _contestant(tmp_path / "part.pt")
    resumed.load()
    assert (resumed.step, len(resumed.answers)) == ((2, 0) if name == "update" else (TINY.steps, 3))
    assert _figures(resumed.finish()) == expected
    # Few queries may agree by chance; parameters do not.
    assert all(
        torch.equal(left, right)
        for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )


def test_other_code_or_plan_begins_anew(tmp_path: Path, _eager: None) -> None:
    path = tmp_path / "it.pt"
    _contestant(path).finish()
    for other in (
        _contestant(path, origin="elsewhere"),
        _contestant(path, plan=dataclasses.replace(TINY, lr=1.0)),
        _contestant(path, name="logmem-1"),
    ):
        other.load()
        assert other.step == 0
    path.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="scratch"):
        _contestant(path).load()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    plan = dataclasses.replace(TINY, steps=60, tokens=512, loads=(1,), tests=(4,), embedding=16, longest=2)
    contestant = _contestant(tmp_path / "it.pt", plan=plan)
    losses = [contestant.update() for _ in range(60)]
    assert sum(losses[-10:]) / 10 < sum(losses[:3]) / 3 - 0.3


def test_distances_beyond_the_reach_are_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recall.VARIANTS, "gpt2", recall.Variant("gpt2", reach=3))
    plan = dataclasses.replace(TINY, steps=1, longest=5)
    contestant = _contestant(tmp_path / "it.pt", "gpt2", plan)
    # Twice the length is four times the time.
    monkeypatch.setattr(contestant, "_pass_seconds", lambda length: length**2 * 1e-3)
    rows = [row for row in contestant.finish() if row["by"] == "distance"]
    assert [row["distance"] for row in rows] == 2 * [1, 2, 4, 8, 16, 32]
    assert [row["distance"] for row in rows if "gap" in row] == 2 * [16, 32]
    assert "quadratic" in rows[-1]["gap"] and "accuracy" not in rows[-1]
    assert contestant.predict(5) > contestant.predict(4) > 0
    assert rows[0]["position_parameters"] == length_for(8) * plan.embedding


def test_whole_run(tmp_path: Path) -> None:
    context = _context(tmp_path, steps=1, seed=3, variants=None)
    journal = execute("recall", recall, context, fresh=False)
    assert list(journal.cases) == list(recall.VARIANTS)
    assert not list((tmp_path / "scratch").rglob("*.pt"))
    rows = [row for case in journal.cases.values() for row in case]
    loads = len(recall.QUICK.loads)
    for name in recall.VARIANTS:
        mine = [row for row in rows if row["variant"] == name]
        distances = [row for row in mine if row["by"] == "distance"]
        assert len(distances) == loads * (recall.QUICK.longest + 1)
        assert all(
            row["seed"] == 3 and row["steps"] == 1 and row["queries"] == recall.QUICK.tests[0] for row in distances
        )
        # The same queries, by another name.
        levels = [row for row in mine if row["by"] == "level"]
        for tallied in (distances, levels):
            right = math.fsum(row["accuracy"] * row["queries"] for row in tallied)
            assert right == pytest.approx(sum(row["accuracy"] * row["queries"] for row in distances), abs=0.1)
        assert sum(row["queries"] for row in levels) == sum(row["queries"] for row in distances)
    text = recall.show(rows)
    assert all(name in text for name in recall.VARIANTS) and f"2^{recall.QUICK.longest}" in text


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    named = [case.name for case in recall.cases(_context(tmp_path, variants="gpt2, logmem-4,gpt2"))]
    assert named == ["gpt2", "logmem-4"]
    for options, word in (({"variants": "gpt3"}, "variants"), ({"steps": 0}, "steps")):
        with pytest.raises(InputError, match=word):
            recall.cases(_context(tmp_path, **options))
