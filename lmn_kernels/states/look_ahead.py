"""What a look-ahead memory keeps between segments: an explicit state, cut off from every graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from python_ref.checks import (
    check_device,
    check_float,
    check_positive,
    check_rows,
    check_shape,
    concrete,
)

from . import files
from .base import Place, State, check_states, check_wide, register


class LookAheadState(State):
    """The memory of B streams, M rows each, oldest first (LaMemo, section 1).

    Nothing in it requires a gradient. Modules never change a state, they return a new one, whose tensors may be views
    of what the segment computed. A state is a pytree, and it can be pickled, copied and loaded with
    ``weights_only=True``.

    Attributes:
        inputs: ``[B, M, E]``, what a layer read in earlier segments: of the first layer alone where the memory looks
            ahead, as the others compute theirs anew; of every layer for Transformer-XL.
        outputs: ``[B, M, H, D]`` of every layer that goes on with them: what attention gave the rows so far, before
            the output projection; of this rank's heads, where ranks share them (docs/parallel.md).
        lse: ``[B, M, H]`` with each of ``outputs``, the log-sum-exp of the scores so far; float32 at least, whatever
            the model's dtype.
        start: ``[B]`` int64: rows before it hold nothing of that stream.
        tokens: length of the newest segment, 0 before the first.
        is_even: whether every ``start`` is 0, known without reading the device.
    """

    FIELDS = ("inputs", "outputs", "lse", "start", "tokens", "is_even")

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]
    start: Tensor
    tokens: int
    is_even: bool

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        lse: tuple[Tensor, ...],
        start: Tensor,
        tokens: int,
        is_even: bool,
    ):
        self._set(inputs=inputs, outputs=outputs, lse=lse, start=start, tokens=tokens, is_even=is_even)

    def __repr__(self) -> str:
        kept = self.inputs[0]
        return (
            f"LookAheadState(batch_size={self.batch_size}, length={self.length}, embedding={kept.shape[2]}, "
            f"inputs={len(self.inputs)}, outputs={len(self.outputs)}, tokens={self.tokens}, is_even={self.is_even}, "
            f"{kept.dtype}, {kept.device})"
        )

    @property
    def batch_size(self) -> int:
        return self.start.shape[0]

    @property
    def length(self) -> int:
        """M, rows of memory."""
        return self.inputs[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.start.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; storage may be twice as large, where they are views of what a segment computed."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.outputs, *self.lse, self.start))

    def reorder(self, index: Tensor) -> LookAheadState:
        return super().reorder(index)._trimmed()

    @staticmethod
    def cat(states: Iterable[LookAheadState]) -> LookAheadState:
        """The streams of several states of one model behind each other, with the longest memory that one of them has.

        Raises:
            TypeError: an element is no LookAheadState.
            ValueError: there is none; they differ in what they keep, in dtype or device; or their newest segments, of
                those that had one, were of different lengths.
        """
        found = check_states(states, LookAheadState, _kind)
        tokens = {state.tokens for state in found if state.tokens}
        if len(tokens) > 1:
            raise ValueError(f"states: expected newest segments of one length, got {sorted(tokens)}")
        length = max(state.length for state in found)
        parts = [[part for _, part in sorted(state._grown(length).tensors().items())] for state in found]
        together = dict(zip(sorted(found[0].tensors()), map(torch.cat, zip(*parts, strict=True)), strict=True))
        even = all(state.is_even and state.length == length for state in found)
        return LookAheadState.from_tensors(together, max(tokens, default=0), even)._trimmed()

    def reset(self, rows: Tensor | None = None) -> LookAheadState:
        """The state with the memory of ``rows`` emptied: indices (int32, int64) or a ``[B]`` bool mask; all if None.

        Rows of memory that no stream holds any more are dropped where that is known without reading a device.
        """
        if rows is None:
            empty = self._map(lambda t: t.new_empty(len(t), 0, *t.shape[2:]) if t.dim() > 1 else torch.zeros_like(t))
            return empty.replace(tokens=0, is_even=True)
        gone = check_rows(rows, self.batch_size, self.start.device)
        # What is left of the rows is read, and has no effect: it must be finite.
        cleared = self._map(lambda t: t.masked_fill(gone.view(-1, *[1] * (t.dim() - 1)), 0))
        return cleared.replace(start=self.start.masked_fill(gone, self.length), is_even=False)._trimmed()

    def detach(self) -> LookAheadState:
        """The same state: no gradient flows between segments in any case."""
        return self._map(torch.Tensor.detach)

    def to(self, *place: Any, **options: Any) -> LookAheadState:
        """The state elsewhere: the arguments of `torch.Tensor.to`, device, dtype, both, or a tensor.

        ``inputs`` and ``outputs`` take the dtype, ``lse`` that or float32 if it is less; ``start`` stays int64.

        Raises:
            TypeError: the arguments say no such place, or the dtype is not a floating one.
        """
        where = Place.of(place, **options)
        lse = tuple(where.take(part, least=torch.float32) for part in self.lse)
        return self.replace(lse=())._map(where.take).replace(lse=lse)

    def last(self, length: int) -> LookAheadState:
        """The newest ``length`` ≥ 0 rows of the memory, or all where there are fewer."""
        length = check_positive("length", length, 0)
        dropped = self.length - length
        if dropped <= 0:
            return self

        def newest(tensor: Tensor) -> Tensor:
            # A view costs nothing, but keeps all of its storage.
            return tensor[:, dropped:].clone() if dropped > length else tensor[:, dropped:]

        kept = self._map(lambda tensor: newest(tensor) if tensor.dim() > 1 else tensor)
        return kept.replace(start=(self.start - dropped).clamp(min=0))._known()

    def check_for(self, batch_size: int, embedding: int, layers: int, heads: Sequence[int | None], size: int) -> None:
        """Whether a model with these sizes can go on from this state: inputs of ``layers``, and outputs of ``heads``.

        One of ``heads`` is there for each layer that has outputs; None for any number.

        Raises:
            TypeError: a tensor has another kind of dtype.
            ValueError: the state belongs to another model or batch.
        """
        cached = len(heads)
        if (len(self.inputs), len(self.outputs), len(self.lse)) != (layers, cached, cached):
            raise ValueError(
                f"state: expected inputs of {layers} and outputs of {cached} layers, got those of {len(self.inputs)} "
                f"and {len(self.outputs)}"
            )
        check_shape("state.start", self.start, (batch_size,), "[batch]")
        rows = batch_size, self.length
        for name, parts, shapes, axes in (
            ("inputs", self.inputs, [(*rows, embedding)] * layers, "[batch, memory, embedding]"),
            ("outputs", self.outputs, [(*rows, own, size) for own in heads], "[batch, memory, heads, head size]"),
            ("lse", self.lse, [(*rows, own) for own in heads], "[batch, memory, heads]"),
        ):
            for layer, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
                (check_wide if name == "lse" else check_float)(f"state.{name}[{layer}]", part)
                check_shape(f"state.{name}[{layer}]", part, shape, axes)
                check_device(f"state.{name}[{layer}]", part, self.start.device)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name: ``inputs.0``, ``outputs.0``, ``lse.0``, …, ``start``."""
        lists = {"inputs": self.inputs, "outputs": self.outputs, "lse": self.lse}
        named = {f"{name}.{layer}": part for name, parts in lists.items() for layer, part in enumerate(parts)}
        return named | {"start": self.start}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], tokens: int, is_even: bool) -> LookAheadState:
        """The state whose `tensors` these are."""

        def parts(name: str) -> tuple[Tensor, ...]:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            return tuple(tensors[f"{name}.{layer}"] for layer in range(count))

        return cls(parts("inputs"), parts("outputs"), parts("lse"), tensors["start"], tokens, is_even)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all.

        Raises:
            OSError: the file cannot be written; an older file of that name is left as it was.
            ImportError: safetensors is not installed (``pip install lmn-kernels[state]``).
        """
        tensors = self.tensors()
        sizes = {"tensors": list(tensors), "tokens": self.tokens, "is_even": self.is_even}
        files.save(path, "look_ahead_state", tensors, sizes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> LookAheadState:
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no file of such a state, or one of a layout version that this package does not know.
            ImportError: safetensors is not installed (``pip install lmn-kernels[state]``).
        """

        def build(sizes: dict[str, Any], tensor: Callable[[str], Tensor]) -> LookAheadState:
            named = {name: tensor(name) for name in sizes["tensors"]}
            return cls.from_tensors(named, sizes["tokens"], sizes["is_even"])

        return files.load(path, "look_ahead_state", device, build)

    def _map(self, function: Callable[[Tensor], Tensor]) -> LookAheadState:
        inputs, outputs, lse = (tuple(map(function, parts)) for parts in (self.inputs, self.outputs, self.lse))
        return self.replace(inputs=inputs, outputs=outputs, lse=lse, start=function(self.start))

    def _grown(self, length: int) -> LookAheadState:
        """The same memory with ``length`` rows, those before it holding nothing."""
        missing = length - self.length
        if not missing:
            return self
        longer = self._map(lambda t: F.pad(t, (0, 0) * (t.dim() - 2) + (missing, 0)) if t.dim() > 1 else t + missing)
        return longer.replace(is_even=False)

    def _trimmed(self) -> LookAheadState:
        """The same memory without rows that no stream holds; the empty state where none holds any."""
        if self.is_even or not concrete(self.start) or not len(self.start):
            return self
        unheld = int(self.start.min())
        return self.reset() if unheld >= self.length else self.last(self.length - unheld)

    def _known(self) -> LookAheadState:
        """The state, even if every stream holds all rows and that can be read at no cost."""
        if self.is_even or not concrete(self.start) or bool(self.start.any()):
            return self
        return self.replace(is_even=True)


def _kind(state: LookAheadState) -> dict[str, Any]:
    """What states have in common whose streams can stand in one."""
    return {
        name: [tuple(part.shape[2:]) for part in parts]
        for name, parts in (("inputs", state.inputs), ("outputs", state.outputs), ("lse", state.lse))
    } | {"dtype": state.inputs[0].dtype, "device": state.device}


register(
    LookAheadState,
    ("inputs", "outputs", "lse", "start"),
    lambda state: (state.tokens, state.is_even),
    lambda tensors, context: LookAheadState(*tensors, *context),
    tuple,
)
