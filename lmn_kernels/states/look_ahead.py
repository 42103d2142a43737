"""What a look-ahead memory keeps between segments: an explicit state, cut off from every graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
)

from . import files


@dataclass(frozen=True, eq=False, repr=False)
class LookAheadState:
    """The memory of B streams, M rows each, oldest first (LaMemo, section 1).

    Nothing in it requires a gradient. Modules never change a state, they return a new one, whose tensors may be views
    of what the segment computed.

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

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]
    start: Tensor
    tokens: int
    is_even: bool

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
    def nbytes(self) -> int:
        """Bytes of all tensors; storage may be twice as large, where they are views of what a segment computed."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.outputs, *self.lse, self.start))

    def reorder(self, index: Tensor) -> LookAheadState:
        """Rows ``index [B']`` (int32 or int64, 0 … B-1) of the batch, in that order; for beams and slots."""
        check_tensor("index", index)
        check_ids("index", index, tuple(index.shape[:1]), 0, self.batch_size - 1)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def reset(self, rows: Tensor | None = None) -> LookAheadState:
        """The state with the memory of ``rows`` emptied: indices (int32, int64) or a ``[B]`` bool mask; all if None."""
        if rows is None:
            empty = self._map(lambda t: t.new_empty(len(t), 0, *t.shape[2:]) if t.dim() > 1 else torch.zeros_like(t))
            return replace(empty, tokens=0, is_even=True)
        gone = check_rows(rows, self.batch_size, self.start.device)
        # What is left of the rows is read, and has no effect: it must be finite.
        cleared = self._map(lambda t: t.masked_fill(gone.view(-1, *[1] * (t.dim() - 1)), 0))
        return replace(cleared, start=self.start.masked_fill(gone, self.length), is_even=False)

    def clone(self) -> LookAheadState:
        """A copy that shares no storage."""
        return self._map(torch.clone)

    def detach(self) -> LookAheadState:
        """The same state: no gradient flows between segments in any case."""
        return self._map(torch.Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LookAheadState:
        """The state on a device, inputs and outputs in a floating dtype, ``lse`` in that or float32 if it is less."""
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return replace(
            self,
            inputs=tuple(t.to(device=device, dtype=dtype) for t in self.inputs),
            outputs=tuple(t.to(device=device, dtype=dtype) for t in self.outputs),
            lse=tuple(t.to(device=device, dtype=wide) for t in self.lse),
            start=self.start.to(device=device),
        )

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
        return replace(kept, start=(self.start - dropped).clamp(min=0))

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
                check_float(f"state.{name}[{layer}]", part)
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
        return replace(self, inputs=inputs, outputs=outputs, lse=lse, start=function(self.start))
