"""The face of the original's module: a memory that the layer keeps, and memory tensors (specification, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from python_ref.checks import check_shape
from python_ref.layout import level_count, stack_height, state_rows
from python_ref.sequences import Sequences

from .sequential import SequentialForm


class OriginalFace(SequentialForm):
    """`reset`, `ptr`, `memory`, `parallel`, `sequential`, `attention`: as code written for the original calls them."""

    def reset(self) -> None:
        """Forget what ``sequential`` and ``forward`` with ``parallelize=False`` have seen."""
        self._stream = None

    @property
    def ptr(self) -> int:
        """Tokens that the layer's own memory has seen; with ``lengths``, what a full row would have seen."""
        return 0 if self._stream is None else self._stream.max_position

    @property
    def memory(self) -> list[Tensor] | None:
        """The layer's own memory, newest node of each level: ``[B, m, 1, E]``; with an expander ``[B, h, m, 1, E]``."""
        if self._stream is None:
            return None
        stacks, base = [self._stream.token[:, None, None, :].expand(-1, 1, self.bank, -1)], 0
        for level in range(1, level_count(self.ptr) + 1):
            height = stack_height(level, self.expand)
            stacks.append(self._stream.nodes[:, base : base + height])
            base += height
        if self.expander is None:
            return [stack[:, 0, :, None] for stack in stacks]
        return [stack[:, :, :, None] for stack in stacks]

    def parallel(self, x: Tensor) -> Tensor:
        """The memory tensor of section 2 for ``x [B, L, E]``: ``[B, L, S, E]``, zeros where nothing is yet.

        Of size B·L·log L·E: for inspection, and for code written for the original. `forward` needs none.
        """
        self._check_input(x)
        batch, length = x.shape[:2]
        sequences = Sequences.equal(batch, length)
        nodes = self._nodes(x.reshape(-1, self.embedding), sequences, None, None)
        layout = self._layout(sequences, x.device)
        sequence = torch.arange(batch, device=x.device)[:, None].expand(-1, length)
        position = torch.arange(1, length + 1, device=x.device).expand(batch, -1)
        row, exists = layout.slots(sequence, position, level_count(length))
        slots = nodes.index_select(1, row.flatten()).unflatten(1, row.shape).permute(1, 2, 3, 0, 4)
        slots = torch.where(exists[..., None, None], slots, 0).flatten(2, 3)
        return torch.cat([x[:, :, None], slots], 2)

    def sequential(self, x_t: Tensor) -> Tensor:
        """Take one token ``x_t [B, 1, E]`` into the layer's own memory and return its slots ``[B, 1, S, E]``."""
        self._check_input(x_t)
        check_shape("x_t", x_t, (None, 1, self.embedding), "[batch, 1, embedding]")
        stream = self._stream if self._stream is not None else self.init_state(x_t.shape[0])
        self._stream = self._advance(x_t[:, 0], self._fit(stream, x_t.shape[0], 1, x_t.device))
        rows = state_rows(level_count(self.ptr), self.expand)
        slots = self._stream.nodes[:, :rows].flatten(1, 2).to(x_t.dtype)
        return torch.cat([x_t, slots], 1)[:, None]

    def attention(self, memory: Tensor, positions: Tensor | None = None) -> Tensor:
        """Attention over a memory tensor ``[B, L, S, E]`` as `parallel` and `sequential` return it.

        Which slots hold something follows from the position, not from zeros in them: row t of several is
        position t+1, and of a single row every slot counts. ``positions`` (``[L]`` or ``[B, L]``) says
        otherwise.
        """
        check_shape("memory", memory, (None, None, None, self.embedding), "[batch, length, slots, embedding]")
        length, count = memory.shape[1:3]
        if positions is None and length == 1:
            return self.sva(memory)
        if positions is None:
            positions = torch.arange(1, length + 1, device=memory.device)
        level, levels = [0], 0
        while len(level) < count:
            levels += 1
            level += [levels] * (self.bank * stack_height(levels, self.expand))
        if len(level) != count:
            raise ValueError(f"memory: expected whole levels of {self.bank} banks, got {count} slots")
        valid = (positions[..., None] >> torch.tensor(level, device=memory.device)) > 0
        return self.sva(memory, valid)
