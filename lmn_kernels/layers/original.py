"""The face of the original's module: memory tensors, of size B·L·log L·E (definition, sections 2 and 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from python_ref.checks import check_shape
from python_ref.layout import Layout, level_count, stack_height, state_rows
from python_ref.sequences import Sequences

from ..backend.transforms import transformed
from ..states.memory import MemoryState
from .parallel import pick, tree_of
from .parameters import survey
from .parts import MixingParts, check_input, fit, node_qv_of
from .sequential import advance, prepare


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
    """One token ``x_t [B, 1, E]`` into a stream, or a new one: its slots ``[B, 1, S, E]`` and the stream behind it, the
    nodes of which have no q and v until they are `projected`."""
    plan = None if is_compiling() or stream is None else layer.__dict__.get("_plan")
    if stream is not None and plan is not None and plan.serves(layer, x_t, stream) and plan.fits_shapes(x_t, stream):
        stream = plan.take(x_t, stream)
    else:
        stream = _take(layer, x_t, stream)
    rows = state_rows(level_count(stream.max_position), layer.expand)
    nodes = stream.nodes if rows == stream.nodes.shape[1] else stream.nodes[:, :rows]
    return torch.cat([x_t, nodes.flatten(1, 2).to(x_t.dtype)], 1).unsqueeze(1), stream


def _take(layer: MixingParts, x_t: Tensor, stream: MemoryState | None) -> MemoryState:
    road = survey(layer)
    check_input(layer, x_t, road.weight)
    check_shape("x_t", x_t, (None, 1, layer.embedding), "[batch, 1, embedding]")
    stream = layer.init_state(x_t.shape[0]) if stream is None else stream
    stream = fit(layer, stream, x_t.shape[0], 1, x_t.device, road)
    prepare(layer, x_t, stream, road)
    return advance(layer, x_t[:, 0], stream, road, projects=False)[0]


def projected(layer: MixingParts, stream: MemoryState) -> MemoryState:
    """A stream that `take` has left, with q and v of its nodes."""
    q, v = node_qv_of(layer, stream.nodes, survey(layer)).chunk(2, -1)
    dtype = stream.q.dtype
    return stream.advanced(stream.slots()._replace(q=q.to(dtype).contiguous(), v=v.to(dtype).contiguous()), 0)


def attend_memory(layer: MixingParts, memory: Tensor, positions: Tensor | None) -> Tensor:
    """Attention over a memory tensor ``[B, L, S, E]``; see `LogarithmicMixing.attention`."""
    if positions is None and memory.shape[1:2] == (1,):
        return _attend(layer, memory)  # which looks at the shape itself
    check_shape("memory", memory, (None, None, None, layer.embedding), "[batch, length, slots, embedding]")
    length, count = memory.shape[1:3]
    if positions is None:
        positions = torch.arange(1, length + 1, device=memory.device)
    level, levels = [0], 0
    while len(level) < count:
        levels += 1
        level += [levels] * (layer.bank * stack_height(levels, layer.expand))
    if len(level) != count:
        raise ValueError(f"memory: expected whole levels of {layer.bank} banks, got {count} slots")
    valid = (positions[..., None] >> torch.tensor(level, device=memory.device)) > 0
    return _attend(layer, memory, valid)


def _attend(layer: MixingParts, *given: Tensor) -> Tensor:
    y: Tensor = layer.sva(*given)
    drop = layer._modules.get("drop")
    return y if drop is None else drop(y)


def linked(y: Tensor, stream: MemoryState) -> tuple[Tensor, MemoryState]:
    """What a call returns and the memory that it leaves to the layer, such that a backward pass that reaches them again
    through a later call, where an earlier one has freed their graph, says what to do about it."""
    if is_compiling() or transformed():
        return y, stream
    slots = stream.slots()
    own = [name for name, tensor in slots._asdict().items() if tensor.requires_grad]
    y, *tensors = _Link.apply(y, *(getattr(slots, name) for name in own))  # type: ignore[no-untyped-call]
    return y, stream.advanced(slots._replace(**dict(zip(own, tensors, strict=True))), 0)


class _Link(torch.autograd.Function):
    """The identity of several tensors; what a backward pass frees, it frees here as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *stream: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y.new_empty(0))
        # The caller may write into y, and a view that a function of several results made could not be.
        return (y.clone(), *stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        try:
            ctx.saved_tensors  # noqa: B018
        except RuntimeError as freed:
            if "a second time" not in str(freed):
                raise  # what unpacks saved tensors (a checkpoint) has its own words
            raise RuntimeError(
                "parallelize=False: reset() or detach() the layer between two backward passes: its memory goes back to "
                "calls whose graph an earlier pass has freed (or let that one keep it: retain_graph=True)"
            ) from freed
        return grads
