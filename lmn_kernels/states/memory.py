"""The memory of a layer between calls: O(bank · log n) nodes per row, with their cached q and v."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

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
from python_ref.layout import last_position, level_count, state_rows
from python_ref.step import Slots, valid_rows

from .base import Place, State, check_states, register

MAX_POSITION = (1 << 62) - 1  # int64 leaves room for the sums of a chunk's arithmetic
# A bound is kept as so much more: torch.compile takes 0 and 1 for constants, and would make a graph for each.
OFFSET = 2


class MemoryState(State):
    """What a layer remembers of B sequences, each at its own position (docs/definition.md, section 3).

    Layers never change a state: they return a new one that shares no storage with it, and gradients flow
    through both. Only `restore` and what is named with an underscore behind it (``step_``, ``decode_``,
    ``update_``) write in place, and nothing else ever shares storage with what they write to.
    A state belongs to the parameters that made it: q and v are not projected again when those change.
    It is a pytree, whose leaves are its tensors, and it can be pickled, copied and loaded with ``weights_only=True``.

    Attributes:
        position: ``[B]`` int64, tokens seen.
        token: ``[B, E]`` the newest token, as the mixing layer saw it (behind its norm).
        nodes: ``[B, R, m, E]`` the newest complete node of levels 1, 2, …, D: 1 + i·expand rows for
            level i. Zero, and without effect, where position < 2^i.
        q, v: ``[B, R, m, E]`` their projections; ``[B, R, m, E/P]``, those of this rank's heads, where P ranks share
            them (docs/parallel.md).
        expand: k of the expander, 0 without one.
        levels: D, the levels that there is room for; layers make room as positions grow.
        max_position: the furthest position on a CPU; elsewhere an upper bound on it, known without reading the device.
    """

    FIELDS = ("position", "token", "nodes", "q", "v", "expand", "levels", "max_position")

    position: Tensor
    token: Tensor
    nodes: Tensor
    q: Tensor
    v: Tensor
    expand: int
    levels: int
    _bound: int

    def __init__(
        self,
        position: Tensor,
        token: Tensor,
        nodes: Tensor,
        q: Tensor,
        v: Tensor,
        expand: int,
        levels: int,
        max_position: int,
    ):
        bound = max_position + OFFSET
        self._set(position=position, token=token, nodes=nodes, q=q, v=v, expand=expand, levels=levels, _bound=bound)

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
    def max_position(self) -> int:
        # Others may write into the same tensors: a tree that was taken apart and put together, a graph, a replay.
        return _greatest(self.position) if concrete(self.position) else self._bound - OFFSET

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def device(self) -> torch.device:
        return self.nodes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.slots())

    @property
    def capacity(self) -> int:
        """The last position that there is room for."""
        return min(last_position(self.levels), MAX_POSITION)

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
        known = self.max_position
        own = self.position.clone(), self.token.clone()
        return MemoryState(*Slots(*own, *grown), self.expand, levels, known)

    @staticmethod
    def cat(states: Iterable[MemoryState]) -> MemoryState:
        """The rows of several states of one layer behind each other, with the most room that one of them has.

        Raises:
            TypeError: an element is no MemoryState.
            ValueError: there is none, or they differ in expand, bank, embedding, dtype or device.
        """
        found = check_states(states, MemoryState, _kind)
        deep = max(state.levels for state in found)
        last = max(state.max_position for state in found)
        roomy = [state.with_room(last_position(deep)).slots() for state in found]
        return MemoryState(*Slots(*map(torch.cat, zip(*roomy, strict=True))), found[0].expand, deep, last)

    def reset(self, rows: Tensor | None = None) -> MemoryState:
        """The state with ``rows`` emptied: indices (int32 or int64) or a ``[B]`` bool mask; all where None."""
        if rows is None:
            return self._map(torch.zeros_like).replace(max_position=0)
        gone = check_rows(rows, self.batch_size, self.position.device)
        return self._map(lambda t: t.masked_fill(gone.view(-1, *[1] * (t.dim() - 1)), 0))

    def detach(self) -> MemoryState:
        """A copy cut off from the graph: truncated back-propagation through time."""
        return self._map(lambda tensor: tensor.detach().clone())

    def to(self, *place: Any, **options: Any) -> MemoryState:
        """A copy elsewhere: the arguments of `torch.Tensor.to`, ``device``, ``dtype``, both or a tensor that has both.

        Nodes, q, v and the token take the floating dtype; positions stay int64.

        Raises:
            TypeError: the arguments say no such place, or the dtype is not a floating one.
        """
        where = Place.of(place, **options)
        return self._map(lambda tensor: where.take(tensor, copy=True))

    def snapshot(self) -> MemoryState:
        """A detached copy, to `restore` from."""
        return self.detach()

    def note_tokens(self, tokens: int) -> None:
        """Raise ``max_position`` after an operation that took tokens in place; `capacity` bounds it in any case."""
        if is_compiling() or (self.position.is_cuda and torch.cuda.is_current_stream_capturing()):
            # Nobody is asked how often a graph is replayed; and one that read the bound would be of that bound alone.
            self._set(_bound=self.capacity + OFFSET)
        else:
            self._set(_bound=min(self._bound + tokens, self.capacity + OFFSET))

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
            snapshot = snapshot.with_room(last_position(self.levels))
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
        self._set(_bound=min(bound, self.capacity) + OFFSET)
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
        # A program that is exported with a state takes others, at any position.
        last = self.capacity if is_exporting() else self._bound - OFFSET + tokens
        return MemoryState(*slots, self.expand, self.levels, last)

    def spoil(self, y: Tensor) -> tuple[Tensor, MemoryState]:
        """``y [B, T, E]`` and this state behind it, NaN in rows beyond their room, where nobody reads positions."""
        if concrete(self.position):
            return y, self
        lost = self.position > self.capacity
        return y.masked_fill(lost[:, None, None], torch.nan), self.spoiled(lost)

    def spoiled(self, rows: Tensor) -> MemoryState:
        """The state with NaN in the nodes of ``rows [B]`` bool, so that nothing sound is made of them."""
        nodes, q, v = (part.masked_fill(rows[:, None, None, None], torch.nan) for part in self.slots()[2:])
        return self.replace(nodes=nodes, q=q, v=v)

    def _narrowed(self, levels: int) -> MemoryState:
        """The same memory with room for ``levels`` levels alone, which must be all that it holds."""
        last, capacity = self.max_position, last_position(levels)
        if last > capacity:
            # An upper bound only, where the positions lie on a device: they are read before anything is refused.
            last = _greatest(self.position)
        if last > capacity:
            raise ValueError(
                f"snapshot.position: expected at most {capacity}, for which there is room, got up to {last}"
            )
        rows = state_rows(levels, self.expand)
        nodes, q, v = (part[:, :rows] for part in (self.nodes, self.q, self.v))
        return self.replace(nodes=nodes, q=q, v=v, levels=levels, max_position=last)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        return self.advanced(Slots(*map(function, self.slots())), 0)


def _greatest(position: Tensor) -> int:
    return int(position.max()) if position.numel() else 0


def _kind(state: MemoryState) -> dict[str, Any]:
    """What states have in common whose rows can stand in one."""
    bank, embedding = state.nodes.shape[2:]
    dtype, device = state.nodes.dtype, state.device
    return {"expand": state.expand, "bank": bank, "embedding": embedding, "dtype": dtype, "device": device}


class _Room(NamedTuple):
    """What a state is beside its tensors. Trees of states at different positions are of one kind."""

    expand: int
    levels: int
    max_position: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Room) and self[:2] == other[:2]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:2])


register(
    MemoryState,
    Slots._fields,
    lambda state: _Room(state.expand, state.levels, state._bound - OFFSET),
    lambda tensors, room: MemoryState(*tensors, *room),
    lambda room: _Room(*room),
)
