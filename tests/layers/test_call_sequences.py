"""Any sequence of calls on states and pools, compiled or not, against the definition token by token."""

from __future__ import annotations

import copy
import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.close import TOLERANCE, error
from lmn_kernels import LogarithmicMemory, LogarithmicMixing, MemoryState, load_states, save_states
from lmn_kernels.backend.choice import why_not
from python_ref.definition import BitmaskMemory, attention
from tests.support.variants import definition_of

F64 = torch.float64
# Names of options, and the layer that they make. Small: a sequence of calls is checked at each of its tokens.
LAYERS: dict[str, Callable[[torch.dtype], LogarithmicMixing]] = {
    "linear": lambda dtype: LogarithmicMixing(4, 2, 2, init="variance_preserving", dtype=dtype),
    "conv_mixed": lambda dtype: LogarithmicMixing(
        4, 1, 2, summarizer="conv_mixed", init="variance_preserving", dtype=dtype
    ),
    "expander": lambda dtype: LogarithmicMixing(
        4, 2, 1, expand=1, summarizer="depthwise_separable", init="variance_preserving", dtype=dtype
    ),
    "block": lambda dtype: LogarithmicMemory(4, 2, 2, init="variance_preserving", dtype=dtype),
}
ROWS, ROOM = 3, 127


class Rows:
    """What each row of a state has seen, by the definition; in float64, whatever the layer's dtype."""

    def __init__(self, layer: LogarithmicMixing, rows: list[BitmaskMemory]):
        self.layer, self.rows = layer, rows

    @classmethod
    def fresh(cls, layer: LogarithmicMixing, count: int) -> Rows:
        merge, _ = definition_of(layer)
        return cls(layer, [BitmaskMemory(merge, layer.bank) for _ in range(count)])

    def picked(self, index: list[int]) -> Rows:
        return Rows(self.layer, [copy.copy(self.rows[i]) for i in index])

    def position(self) -> list[int]:
        return [row.position for row in self.rows]

    def take(self, row: int, x: Tensor) -> Tensor:
        """Outputs ``[T, E]`` for the tokens ``x [T, E]`` of one row."""
        found, (_, projections), around = [], definition_of(self.layer), self.layer.around()
        for token in x[:, None]:
            slots = self.rows[row].update(around.before(token))
            mixed = attention(slots, projections, self.layer.heads)
            found.append(around.after(token, mixed))
        return torch.cat(found) if found else x


class Calls:
    """A layer's calls, each as it is and compiled."""

    def __init__(self, name: str, dtype: torch.dtype):
        torch.manual_seed(7)
        self.layer = LAYERS[name](dtype)
        self.exact = copy.deepcopy(self.layer).double()
        self.dtype = dtype
        layer = self.layer
        self.chunk = lambda x, state: layer(x, state=state, return_state=True)
        self.step = lambda x, state: layer.step(x, state)
        self.step_ = lambda x, state, slots: layer.step_(x, state, slots)
        # The graphs are made by tracing; what would compile them further takes nothing that the trace did not see.
        self.traced: set[str] = set()  # which were called so
        self.compiled = {
            name: torch.compile(getattr(self, name), backend="eager") for name in ("chunk", "step", "step_")
        }


@dataclass
class Run:
    """One sequence of calls.

    Attributes:
        state, rows: the state that calls go on from, and what its rows have seen.
        kept: a snapshot, and what its rows had seen.
    """

    calls: Calls
    state: MemoryState
    rows: Rows
    kept: tuple[MemoryState, Rows] | None = None
    done: list[str] = field(default_factory=list)

    def tokens(self, draw: random.Random, rows: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(draw.randrange(1 << 16))
        return torch.randn(rows, count, self.calls.layer.embedding, generator=generator, dtype=self.calls.dtype)

    def check(self, name: str, y: Tensor, x: Tensor, rows: list[int], lengths: list[int] | None = None) -> None:
        """Whether ``y`` is what the tokens of x give in ``rows``, which go on."""
        tolerance = TOLERANCE[self.calls.dtype][0] * (1 if self.calls.dtype == F64 else 5)
        for b, row in enumerate(rows):
            length = x.shape[1] if lengths is None else lengths[b]
            expected = self.rows.take(row, x[b, :length].double())
            assert not y[b, length:].any(), f"{self.done}: {name}: an output on padding"
            if length:
                assert torch.isfinite(y[b]).all(), f"{self.done}: {name}: row {b} is not finite"
                measured = error(y[b, :length], expected)
                assert measured <= tolerance, f"{self.done}: {name}: row {b} is off by {measured:.3g}"

    def called(self, draw: random.Random, name: str, x: Tensor, *more: Tensor) -> Any:
        """A call of the layer, in some cases a compiled one; of few kinds, as a graph takes longer than all else."""
        usual = len(x) > 1 and x.shape[1] == (1 if name == "step" else 3)
        compiled = usual and draw.random() < 0.7 and not torch.is_grad_enabled()
        if not compiled:
            return getattr(self.calls, name)(x, self.state, *more)
        self.state = self.state.with_room(ROOM)
        self.calls.traced.add(name)
        return self.calls.compiled[name](x, self.state, *more)

    # Each call that a sequence is made of.

    def prefill(self, draw: random.Random) -> None:
        batch = draw.randint(1, ROWS)
        lengths = [draw.randint(0, 9) for _ in range(batch)]
        x = self.tokens(draw, batch, max(lengths))
        self.rows = Rows.fresh(self.calls.exact, batch)
        y, self.state = self.calls.layer.prefill(x, torch.tensor(lengths))
        self.check("prefill", y, x, list(range(batch)), lengths)

    def chunk(self, draw: random.Random) -> None:
        x = self.tokens(draw, self.state.batch_size, draw.choice([1, 3, 8]))
        y, self.state = self.called(draw, "chunk", x)
        self.check("chunk", y, x, list(range(len(x))))

    def ragged_chunk(self, draw: random.Random) -> None:
        x = self.tokens(draw, self.state.batch_size, draw.randint(0, 6))
        lengths = [draw.randint(0, x.shape[1]) for _ in range(len(x))]
        y, self.state = self.calls.layer(x, state=self.state, return_state=True, lengths=torch.tensor(lengths))
        self.check("ragged chunk", y, x, list(range(len(x))), lengths)

    def step(self, draw: random.Random) -> None:
        x = self.tokens(draw, self.state.batch_size, 1)
        y, self.state = self.called(draw, "step", x)
        self.check("step", y, x, list(range(len(x))))

    def step_(self, draw: random.Random) -> None:
        self.make_room(3)
        batch = draw.randint(1, self.state.batch_size)
        slots = draw.sample(range(self.state.batch_size), batch)
        slots[0] = draw.choice([slots[0], slots[0], -1])
        x = self.tokens(draw, batch, draw.choice([1, 3]))
        y = self.called(draw, "step_", x, torch.tensor(slots))
        taken = [b for b, slot in enumerate(slots) if slot >= 0]
        assert not y[[b for b, slot in enumerate(slots) if slot < 0]].any()
        self.check("step_", y[taken], x[taken], [slots[b] for b in taken])

    def make_room(self, tokens: int) -> None:
        """Room for so many more tokens, as whoever serves from a pool must see to."""
        self.state = self.state.detach().with_room(max(self.rows.position(), default=0) + tokens)

    def reorder(self, draw: random.Random) -> None:
        index = [draw.randrange(self.state.batch_size) for _ in range(draw.randint(1, ROWS))]
        self.state, self.rows = self.state.reorder(torch.tensor(index)), self.rows.picked(index)

    def reset(self, draw: random.Random) -> None:
        gone = [draw.random() < 0.5 for _ in range(self.state.batch_size)]
        rows = draw.choice([torch.tensor(gone), torch.tensor(gone).nonzero().flatten()])
        self.state = self.state.reset(rows)
        fresh = Rows.fresh(self.calls.exact, len(gone)).rows
        self.rows.rows = [new if g else old for g, new, old in zip(gone, fresh, self.rows.rows, strict=True)]

    def snapshot(self, draw: random.Random) -> None:
        self.kept = self.state.snapshot(), self.rows.picked(list(range(self.state.batch_size)))

    def restore(self, draw: random.Random) -> None:
        """Rows of the snapshot into slots of the state."""
        if self.kept is None:
            return self.snapshot(draw)
        kept, rows = self.kept
        self.state = self.state.detach().with_room(max(rows.position()))
        count = draw.randint(1, min(kept.batch_size, self.state.batch_size))
        source = draw.sample(range(kept.batch_size), count)
        target = draw.sample(range(self.state.batch_size), count)
        returned = self.state.restore(kept.reorder(torch.tensor(source)), torch.tensor(target))
        assert returned is self.state
        for to, row in zip(target, rows.picked(source).rows, strict=True):
            self.rows.rows[to] = row

    def copied(self, draw: random.Random) -> None:
        """A copy goes on; what it was copied from is written over."""
        old, kind = self.state.detach(), draw.choice(["detach", "clone", "to", "deepcopy", "snapshot"])
        if kind == "to":
            self.state = old.to("cpu", self.calls.dtype)
        else:
            self.state = copy.deepcopy(old) if kind == "deepcopy" else getattr(old, kind)()
        for tensor in old.slots():
            tensor.fill_(0 if tensor.dtype == torch.int64 else torch.nan)

    def saved(self, draw: random.Random) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            if draw.random() < 0.5:
                save_states(path, [self.state])
                [self.state] = load_states(path)
            else:
                torch.save(self.state.detach(), path)
                self.state = torch.load(path, weights_only=True)


KINDS = (
    "prefill", "chunk", "ragged_chunk", "step", "step_", "reorder", "reset", "snapshot", "restore", "copied", "saved",
)  # fmt: skip


@functools.cache
def calls_of(name: str, dtype: torch.dtype) -> Calls:
    """One layer for all its sequences, whose graphs they share."""
    return Calls(name, dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", LAYERS)
@settings(deadline=None, derandomize=True, database=None, max_examples=250)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 1 << 16)), min_size=1, max_size=12), st.booleans())
def test_no_sequence_of_calls_gives_a_wrong_number(name, dtype, sequence, records):
    """2,000 in all: on the reference (float64), and on the extension where it is built (float32)."""
    calls = calls_of(name, dtype)
    run = Run(calls, calls.layer.init_state(2, max_position=ROOM), Rows.fresh(calls.exact, 2))
    # Every graph is used: none is given up for eager calls.
    traced = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with torch.set_grad_enabled(records), traced:
        for kind, seed in [*sequence, ("step", 0)]:
            run.done.append(kind)
            getattr(run, kind)(random.Random(seed))
            assert run.state.position.tolist() == run.rows.position(), run.done
            assert run.state.max_position >= max(run.rows.position(), default=0), run.done


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_who_serves_these_calls(name, dtype):
    """Calls of the same seeds are compiled ones, too; steps without gradients are the extension's where it is built."""
    calls = calls_of(name, dtype)
    run = Run(calls, calls.layer.init_state(2, max_position=ROOM), Rows.fresh(calls.exact, 2))
    with torch.no_grad():
        for seed in range(8):
            for kind in ("chunk", "step", "step_"):
                getattr(run, kind)(random.Random(seed))
        assert calls.traced == {"chunk", "step", "step_"}
        x = torch.randn(2, 1, 4, dtype=dtype)
        calls.layer.step(x, run.state)
        assert calls.layer.__dict__["_plan"].serves(calls.layer, x, run.state)
    served = "reference" if why_not("cpp", "step", torch.device("cpu"), dtype) else "cpp"
    assert calls.layer.__dict__["_plan"].in_place == (served == "cpp")
