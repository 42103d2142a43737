"""Generated streams for measuring exact recall: key-value pairs among filler, and keys asked for again.

A stream holds `Task.pairs` pairs, a key directly followed by its value, once each; keys and values are drawn without
repetition. Behind the last pair keys come again: there the model must give the value as the next symbol. The stream
goes on with something else, so an answer is never shown.

In training the key that is asked for is drawn uniformly, whatever the place, so who knows which values came, when, and
not with which key is right with ``1 / pairs`` (`Task.unbound`). With one pair nothing is left to bind.
The *distance* of a query is its position less the value's: 1 where it follows the value directly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.extras import numpy as np

# Positions of a stream beside its distance: for other pairs, and for a query to stand at any remainder.
ROOM = 32
# No slot holds the pair: its key is in one and its value in another.
SPLIT = 0


@dataclass(frozen=True)
class Task:
    """The alphabet: fillers first, then keys, then values.

    Attributes:
        keys, values, fillers: how many symbols of each there are.
        pairs: how many pairs a stream holds.
    """

    keys: int = 4
    values: int = 8
    fillers: int = 2
    pairs: int = 2

    @property
    def symbols(self) -> int:
        return self.fillers + self.keys + self.values

    @property
    def chance(self) -> float:
        """Accuracy of who gives any value."""
        return 1 / self.values

    @property
    def unbound(self) -> float:
        """Accuracy of who knows the values of a stream, and not which key had which."""
        return 1 / self.pairs


@dataclass(frozen=True)
class Streams:
    """A batch of streams.

    Attributes:
        ids: ``[B, L]`` symbols.
        targets: ``[B, L]`` the value where a key is asked for, -1 elsewhere.
        distances: ``[B, L]`` positions from the value to the query, 0 elsewhere.
        places: ``[B, pairs]`` 0-based positions of the values; each key is one before.
    """

    ids: Tensor
    targets: Tensor
    distances: Tensor
    places: Tensor


def length_for(distance: int) -> int:
    """Length of a stream with queries at ``distance``."""
    return distance + distance // 32 + ROOM


def training_streams(task: Task, generator: np.random.Generator, count: int, length: int, queries: int) -> Streams:
    """Streams with up to ``queries`` queries each behind their last pair; a key may be asked for repeatedly.

    Each stream has a scale, even in log2; up to that far from one position, the pairs are before it and the queries
    behind it, both again even in log2.
    """
    end = generator.integers(length // 2, length * 3 // 4, (count, 1))
    least = 2 * task.pairs
    scale = (least * np.exp(generator.random((count, 1)) * np.log((length // 2 - 2) / least))).astype(np.int64)
    backs = _backs(task, generator, count, scale)
    ids, keys, values = _fill(task, generator, length, end - backs)
    left = np.minimum(length - 1 - end, scale)
    at = end + np.minimum(np.exp(generator.random((count, queries)) * np.log(left + 1)).astype(np.int64), left)
    asked = np.full((count, length), -1)
    # Two at one position: the later wins, and no more is left of the earlier.
    asked[np.arange(count)[:, None], at] = generator.integers(0, task.pairs, (count, queries))
    return _ask(ids, keys, values, end - backs, asked)


def test_streams(task: Task, generator: np.random.Generator, count: int, distance: int) -> Streams:
    """Streams with one query each, at ``distance``, behind every pair; the other pairs are nearer or farther."""
    length = length_for(distance)
    slack = length - distance - ROOM // 2
    at = length - 1 - generator.integers(0, slack, (count, 1))
    # From 1 to the distance, even in log2.
    after = np.minimum(np.exp(generator.random((count, 1)) * np.log(distance + 1)).astype(np.int64), distance)
    end = at - after
    most = distance - after + ROOM // 2 - 2
    backs = _backs(task, generator, count, most, distance - after)
    ids, keys, values = _fill(task, generator, length, end - backs)
    asked = np.full((count, length), -1)
    asked[np.arange(count), at[:, 0]] = 0
    return _ask(ids, keys, values, end - backs, asked)


# pytest takes what is named so for a test wherever it is imported.
test_streams.__test__ = False  # type: ignore[attr-defined]


def _backs(
    task: Task, generator: np.random.Generator, count: int, most: int | np.ndarray, first: np.ndarray | None = None
) -> np.ndarray:
    """Positions ``[count, pairs]`` counted backwards: even in log2 from 0 to ``most``, two or more apart."""
    most = np.broadcast_to(most, (count, 1))
    backs = np.zeros((count, task.pairs), np.int64)
    wrong: np.ndarray = np.ones(count, bool)
    while wrong.any():
        drawn = np.exp(generator.random((count, task.pairs)) * np.log(most + 1)).astype(np.int64) - 1
        drawn = np.minimum(drawn, most)
        if first is not None:
            drawn[:, :1] = first
        backs[wrong] = drawn[wrong]
        wrong = np.asarray((np.diff(np.sort(backs, 1), axis=1) < 2).any(1))
    return backs


def _fill(
    task: Task, generator: np.random.Generator, length: int, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Filler ``[B, L]`` with pairs in it, values at ``places``; the keys and the values ``[B, pairs]``."""
    count = len(places)
    ids = generator.integers(0, task.fillers, (count, length))
    keys = task.fillers + np.argsort(generator.random((count, task.keys)), 1)[:, : task.pairs]
    values = task.fillers + task.keys + np.argsort(generator.random((count, task.values)), 1)[:, : task.pairs]
    rows = np.arange(count)[:, None]
    ids[rows, places - 1] = keys
    ids[rows, places] = values
    return ids, keys, values


def _ask(ids: np.ndarray, keys: np.ndarray, values: np.ndarray, places: np.ndarray, asked: np.ndarray) -> Streams:
    row, at = np.nonzero(asked >= 0)
    pair = asked[row, at]
    targets, distances = np.full(ids.shape, -1), np.zeros_like(ids)
    ids[row, at] = keys[row, pair]
    targets[row, at] = values[row, pair]
    distances[row, at] = at - places[row, pair]
    return Streams(*(torch.from_numpy(array) for array in (ids, targets, distances, places)))


def lowest_level(positions: Tensor, distances: Tensor) -> Tensor:
    """The lowest level whose slot holds key and value, as the position of a query sees it; `SPLIT` where none does.

    Args:
        positions: of the queries, counted from 0.
        distances: from the values.

    At n = position + 1 the slot of level i ends at n with its last i bits cleared, and holds 2^i tokens.
    """
    n = positions + 1
    value = n - distances
    found = torch.full_like(n, SPLIT)
    for level in range(int(n.max()).bit_length() - 1 if n.numel() else 0, 0, -1):
        end = n >> level << level
        holds = (value <= end) & (value - 1 > end - (1 << level)) & (end > 0)
        found = torch.where(holds, level, found)
    return found
