"""States to take apart: of a mixing layer and of a look-ahead memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree

from lmn_kernels import LogarithmicMixing, LookAheadMemory, LookAheadState, MemoryState


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def mixing(**options) -> LogarithmicMixing:
    return LogarithmicMixing(16, 2, 2, init="variance_preserving", **options)


def prefilled(layer, length: int = 9, lengths: Tensor | None = None, batch: int = 2) -> MemoryState:
    with torch.no_grad():
        return layer.prefill(torch.randn(batch, length, 16), lengths)[1]


def stream(segments=(5, 5), batch: int = 2, **options) -> tuple[LookAheadMemory, LookAheadState]:
    model, state = LookAheadMemory(16, 3, 2, memory_length=9, **options), None
    with torch.no_grad():
        for length in segments:
            _, state = model(torch.randn(batch, length, 16, dtype=model.r_w_bias.dtype), state)
    assert state is not None
    return model, state


def leaves(state: MemoryState | LookAheadState) -> list[Tensor]:
    return _pytree.tree_leaves(state)


def both() -> list[MemoryState | LookAheadState]:
    return [prefilled(mixing(expand=1), lengths=ints(9, 4)), stream()[1].reset(ints(1))]
