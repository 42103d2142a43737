"""The face of the original's module: memory tensors, of size B·L·log L·E (definition, sections 2 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from python_ref.checks import check_shape
from python_ref.layout import Layout, level_count, stack_height, state_rows
from python_ref.sequences import Sequences

from ..states.memory import MemoryState
from .parallel import pick, tree_of
from .parameters import survey
from .parts import MixingParts, check_input, fit
from .sequential import advance


def stacks(layer: MixingParts, stream: MemoryState) -> list[Tensor]:
    """The newest node of each level: ``[B, m, 1, E]``; with an expander ``[B, h, m, 1, E]``."""
    found, base = [stream.token[:, None, None, :].expand(-1, 1, layer.bank, -1)], 0
    for level in range(1, level_count(stream.max_position) + 1):
        height = stack_height(level, layer.expand)
        found.append(stream.nodes[:, base : base + height])
        base += height
    if layer.expander is None:
        return [stack[:, 0, :, None] for stack in found]
    return [stack[:, :, :, None] for stack in found]


def memory_of(layer: MixingParts, x: Tensor) -> Tensor:
    """The memory tensor of every position of ``x [B, L, E]``: ``[B, L, S, E]``, zeros where nothing is yet."""
    road = survey(layer)
    check_input(layer, x, road.weight)
    batch, length = x.shape[:2]
    sequences = Sequences.equal(batch, length)
    _, nodes = tree_of(layer, x, sequences, road)
    layout = Layout(sequences, layer.expand, x.device)
    sequence = torch.arange(batch, device=x.device).repeat_interleave(length)
    position = torch.arange(1, length + 1, device=x.device).repeat(batch)
    slots = pick(nodes, *layout.slots(sequence, position, level_count(length))).flatten(1, 2)
    return torch.cat([x[:, :, None], slots.unflatten(0, (batch, length))], 2)


def take(layer: MixingParts, x_t: Tensor, stream: MemoryState | None) -> tuple[Tensor, MemoryState]:
    """One token ``x_t [B, 1, E]`` into a stream, or a new one: its slots ``[B, 1, S, E]`` and the stream behind it."""
    road = survey(layer)
    check_input(layer, x_t, road.weight)
    check_shape("x_t", x_t, (None, 1, layer.embedding), "[batch, 1, embedding]")
    stream = layer.init_state(x_t.shape[0]) if stream is None else stream
    stream = advance(layer, x_t[:, 0], fit(layer, stream, x_t.shape[0], 1, x_t.device, road), road)
    rows = state_rows(level_count(stream.max_position), layer.expand)
    slots = stream.nodes[:, :rows].flatten(1, 2).to(x_t.dtype)
    return torch.cat([x_t, slots], 1)[:, None], stream


def attend_memory(layer: MixingParts, memory: Tensor, positions: Tensor | None) -> Tensor:
    """Attention over a memory tensor ``[B, L, S, E]``; see `LogarithmicMixing.attention`."""
    check_shape("memory", memory, (None, None, None, layer.embedding), "[batch, length, slots, embedding]")
    length, count = memory.shape[1:3]
    if positions is None and length == 1:
        alone: Tensor = layer.sva(memory)
        return alone
    if positions is None:
        positions = torch.arange(1, length + 1, device=memory.device)
    level, levels = [0], 0
    while len(level) < count:
        levels += 1
        level += [levels] * (layer.bank * stack_height(levels, layer.expand))
    if len(level) != count:
        raise ValueError(f"memory: expected whole levels of {layer.bank} banks, got {count} slots")
    valid = (positions[..., None] >> torch.tensor(level, device=memory.device)) > 0
    y: Tensor = layer.sva(memory, valid)
    return y
