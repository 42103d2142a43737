"""The memory of a layer between calls: O(bank · log n) nodes per row, with their cached q and v."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from python_ref.checks import (
    check_device,
    check_float,
    check_ids,
    check_positive,
    check_rows,
    check_shape,
    check_tensor,
    concrete,
)
from python_ref.layout import level_count, state_rows
from python_ref.step import Slots, valid_rows

from . import files

MAX_POSITION = (1 << 62) - 1  # int64 leaves room for the sums of a chunk's arithmetic


@dataclass(frozen=True, eq=False, repr=False)
class MemoryState:
    """What a layer remembers of B sequences, each at its own position (docs/definition.md, section 3).

    Layers never change a state: they return a new one that shares no storage with it, and gradients flow
    through both. Only `restore` and what is named with an underscore behind it (``step_``, ``decode_``,
    ``update_``) write in place, and nothing else ever shares storage with what they write to.
    A state belongs to the parameters that made it: q and v are not projected again when those change.

    Attributes:
        position: ``[B]`` int64, tokens seen.
        token: ``[B, E]`` the newest token, as the mixing layer saw it (behind its norm).
        nodes: ``[B, R, m, E]`` the newest complete node of levels 1, 2, …, D: 1 + i·expand rows for
            level i. Zero, and without effect, where position < 2^i.
        q, v: ``[B, R, m, E]`` their projections; ``[B, R, m, E/P]``, those of this rank's heads, where P ranks share
            them (docs/parallel.md).
        expand: k of the expander, 0 without one.
        levels: D, the levels that there is room for; layers make room as positions grow.
        max_position: upper bound on every position, known without reading the device.
    """

    position: Tensor
    token: Tensor
    nodes: Tensor
    q: Tensor
    v: Tensor
    expand: int
    levels: int
    max_position: int

    @classmethod
    def empty(
        cls,
        batch_size: int,
        embedding: int,
        bank: int,
        *,
        expand: int = 0,
        levels: int = 0,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MemoryState:
        """The state before the first token, with room for ``levels`` levels, q and v of ``width`` (E where None)."""
        batch_size, embedding, bank, expand, levels = (
            check_positive(name, size, 0)
            for name, size in (("batch_size", batch_size), ("embedding", embedding), ("bank", bank),
                               ("expand", expand), ("levels", levels))
        )  # fmt: skip
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        widths = embedding, width or embedding, width or embedding
        shape = batch_size, state_rows(levels, expand), bank
        nodes, q, v = (torch.zeros(*shape, size, dtype=dtype, device=device) for size in widths)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        token = torch.zeros(batch_size, embedding, dtype=dtype, device=device)
        return cls(position, token, nodes, q, v, expand, levels, 0)

    def __repr__(self) -> str:
        rows, _, bank, size = self.nodes.shape
        return (
            f"MemoryState(batch_size={rows}, embedding={size}, bank={bank}, expand={self.expand}, "
            f"levels={self.levels}, max_position={self.max_position}, {self.nodes.dtype}, {self.nodes.device})"
        )

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.slots())

    @property
    def capacity(self) -> int:
        """The last position that there is room for."""
        return min((2 << self.levels) - 1, MAX_POSITION)

    def valid(self) -> Tensor:
        """``[B, R]``: whether a row of ``nodes`` holds a node, that is 2^i ≤ position."""
        return valid_rows(self.position, self.levels, self.expand)

    def with_room(self, max_position: int) -> MemoryState:
        """The same memory with room for all levels below ``max_position``.

        Raises:
            RuntimeError: the state is exhausted: positions would pass 2^62.
        """
        if max_position > MAX_POSITION:
            raise RuntimeError(f"state: expected positions of at most 2^62 - 1, got up to {max_position}: exhausted")
        if max_position >> (self.levels + 1) == 0:
            return self
        levels = level_count(max_position)
        missing = state_rows(levels, self.expand) - state_rows(self.levels, self.expand)
        grown = (torch.nn.functional.pad(part, (0, 0, 0, 0, 0, missing)) for part in (self.nodes, self.q, self.v))
        nodes, q, v = grown
        return replace(self, nodes=nodes, q=q, v=v, levels=levels)

    def reorder(self, index: Tensor) -> MemoryState:
        """Rows ``index [B']`` (int32 or int64, 0 … B-1) of this state, in that order; for beams and slots."""
        check_tensor("index", index)
        check_ids("index", index, tuple(index.shape[:1]), 0, self.batch_size - 1)
        return self._map(lambda tensor: tensor.index_select(0, index))._bounded()

    def reset(self, rows: Tensor | None = None) -> MemoryState:
        """The state with ``rows`` emptied: indices (int32 or int64) or a ``[B]`` bool mask; all where None."""
        if rows is None:
            return replace(self._map(torch.zeros_like), max_position=0)
        gone = check_rows(rows, self.batch_size, self.position.device)
        return self._map(lambda t: t.masked_fill(gone.view(-1, *[1] * (t.dim() - 1)), 0))._bounded()

    def clone(self) -> MemoryState:
        """A copy that shares no storage; gradients flow through."""
        return self._map(torch.clone)

    def detach(self) -> MemoryState:
        """A copy cut off from the graph: truncated back-propagation through time."""
        return self._map(lambda tensor: tensor.detach().clone())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """A copy on a device, its nodes, q and v in a floating dtype; positions stay int64."""
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        return self._map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None, copy=True))

    def snapshot(self) -> MemoryState:
        """A detached copy, to `restore` from."""
        return self.detach()

    def note_tokens(self, tokens: int) -> None:
        """Raise ``max_position`` after an operation that took tokens in place; `capacity` bounds it in any case."""
        if self.position.is_cuda and torch.cuda.is_current_stream_capturing():
            tokens = self.capacity  # nobody is asked how often a graph is replayed
        object.__setattr__(self, "max_position", min(self.max_position + tokens, self.capacity))

    def restore(self, snapshot: MemoryState, rows: Tensor | None = None) -> MemoryState:
        """Write a snapshot into this state's own tensors, whose addresses stay, and return the state.

        Args:
            snapshot: of as many rows as are written.
            rows: ``[B']`` int32 or int64, distinct: which rows of this state to write, for slots of a pool;
                all where None.

        Raises:
            TypeError, ValueError: the snapshot or ``rows`` does not fit, or the snapshot stands at a position that
                this state has no room for; how much room the snapshot has itself does not matter.
            RuntimeError: this state is part of a graph; detach it first.
        """
        if any(tensor.requires_grad for tensor in self.slots()):
            raise RuntimeError("state: expected one outside of any graph to restore into, got one that requires grad")
        if not isinstance(snapshot, MemoryState):
            raise TypeError(f"snapshot: expected a MemoryState, got {type(snapshot).__name__}")
        if snapshot.expand != self.expand:
            raise ValueError(f"snapshot: expected expand={self.expand}, got {snapshot.expand}")
        if snapshot.levels < self.levels:
            snapshot = snapshot.with_room((1 << (self.levels + 1)) - 1)
        elif snapshot.levels > self.levels:
            snapshot = snapshot._narrowed(self.levels)
        count = self.batch_size
        if rows is not None:
            check_tensor("rows", rows)
            check_shape("rows", rows, (None,), "[rows]")
            check_ids("rows", rows, tuple(rows.shape), 0, self.batch_size - 1)
            check_device("rows", rows, self.position.device)
            count = len(rows)
        for name, own, kept in zip(Slots._fields, self.slots(), snapshot.slots(), strict=True):
            check_shape(f"snapshot.{name}", kept, (count, *own.shape[1:]))
            check_device(f"snapshot.{name}", kept, own.device)
        with torch.no_grad():
            for own, kept in zip(self.slots(), snapshot.slots(), strict=True):
                if rows is None:
                    own.copy_(kept)
                else:
                    own.index_copy_(0, rows.long(), kept.to(own.dtype))
        bound = snapshot.max_position if rows is None else max(self.max_position, snapshot.max_position)
        object.__setattr__(self, "max_position", self._last(min(bound, self.capacity)))
        return self

    def check_for(
        self, batch_size: int, embedding: int, bank: int, expand: int, device: torch.device, width: int | None = None
    ) -> None:
        """Whether a layer with these sizes, q and v of ``width`` (E where None), can continue from this state.

        Raises:
            TypeError: a tensor of the state has another kind of dtype.
            ValueError: the state belongs to another layer or batch, or is on another device.
        """
        if self.expand != expand:
            raise ValueError(f"state: expected one with expand={expand}, got {self.expand}")
        if self.position.dtype != torch.int64:
            raise TypeError(f"state.position: expected dtype int64, got {self.position.dtype}")
        for name in ("token", "nodes", "q", "v"):
            check_float(f"state.{name}", getattr(self, name))
        rows = state_rows(self.levels, expand)
        check_shape("state.position", self.position, (batch_size,), "[batch]")
        check_shape("state.token", self.token, (batch_size, embedding), "[batch, embedding]")
        width = embedding if width is None else width
        for name, size in (("nodes", embedding), ("q", width), ("v", width)):
            shape = batch_size, rows, bank, size
            check_shape(f"state.{name}", getattr(self, name), shape, "[batch, rows, bank, embedding]")
        check_device("state", self.nodes, device)

    def check_width(self, width: int) -> None:
        """Whether q and v are as wide as a layer's projections are on this rank.

        Raises:
            ValueError: they are not.
        """
        if self.q.shape[-1] != width:
            raise ValueError(f"state.q: expected {width} features, as many as of sva.q, got {self.q.shape[-1]}")

    def slots(self) -> Slots:
        """The tensors, as the reference takes them."""
        return Slots(self.position, self.token, self.nodes, self.q, self.v)

    def advanced(self, slots: Slots, tokens: int = 1) -> MemoryState:
        """These tensors in place of the state's, after ``tokens`` more tokens for which there is room."""
        return MemoryState(*slots, self.expand, self.levels, self.max_position + tokens)

    def _bounded(self) -> MemoryState:
        """The state with the lowest ``max_position`` that is to be had without reading a device."""
        return replace(self, max_position=self._last(self.max_position))

    def _last(self, bound: int) -> int:
        """The last position there is; the bound where reading positions costs a synchronisation."""
        return _greatest(self.position) if concrete(self.position) else bound

    def _narrowed(self, levels: int) -> MemoryState:
        """The same memory with room for ``levels`` levels alone, which must be all that it holds."""
        last, capacity = self._last(self.max_position), (2 << levels) - 1
        if last > capacity:
            # An upper bound only, where the positions lie on a device: they are read before anything is refused.
            last = _greatest(self.position)
        if last > capacity:
            raise ValueError(
                f"snapshot.position: expected at most {capacity}, for which there is room, got up to {last}"
            )
        rows = state_rows(levels, self.expand)
        nodes, q, v = (part[:, :rows] for part in (self.nodes, self.q, self.v))
        return replace(self, nodes=nodes, q=q, v=v, levels=levels, max_position=last)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        return self.advanced(Slots(*map(function, self.slots())), 0)


def _greatest(position: Tensor) -> int:
    return int(position.max()) if position.numel() else 0


def save_states(path: str | os.PathLike[str], states: Sequence[MemoryState]) -> None:
    """Write the states of a model's layers to one safetensors file, whole or not at all.

    Raises:
        TypeError: an element is no state.
        OSError: the file cannot be written; an older file of that name is left as it was.
        ImportError: safetensors is not installed (``pip install lmn-kernels[state]``).
    """
    for index, state in enumerate(states):
        if not isinstance(state, MemoryState):
            raise TypeError(f"states[{index}]: expected a MemoryState, got {type(state).__name__}")
    sizes = [{"expand": s.expand, "levels": s.levels, "max_position": s.max_position} for s in states]
    tensors = {f"{n}.{name}": part for n, state in enumerate(states) for name, part in state.slots()._asdict().items()}
    files.save(path, "states", tensors, sizes)


def load_states(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> list[MemoryState]:
    """Read what `save_states` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no state file, or one of a layout version that this package does not know.
        ImportError: safetensors is not installed (``pip install lmn-kernels[state]``).
    """

    def build(sizes: list[dict[str, int]], tensor: Callable[[str], Tensor]) -> list[MemoryState]:
        return [
            MemoryState(**{name: tensor(f"{layer}.{name}") for name in Slots._fields}, **size)  # type: ignore[arg-type]
            for layer, size in enumerate(sizes)
        ]

    return files.load(path, "states", device, build)
