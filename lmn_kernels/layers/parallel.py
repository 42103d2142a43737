"""The parallel form of a layer: whole sequences, or chunks of them, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from python_ref.checks import concrete
from python_ref.layout import Layout, level_count
from python_ref.sequences import Sequences
from python_ref.step import Slots
from python_ref.tree import build_tree_with

from ..backend.choice import BackendError, wanted
from ..backend.transforms import transformed, tree_under_autocast
from ..ops.attention import attend
from ..ops.tree import build_tree
from ..states.memory import MemoryState
from .parameters import Road, may_draw
from .parts import MixingParts, check_recomputation, fit, merge_stacks_of, node_qv_of
from .summarizers import LinearMapSummarizer
from .tensor_parallel import check_local

Named = list[tuple[str, Tensor]]
Version = tuple[str, Tensor, int]


def run(
    layer: MixingParts, x: Tensor, sequences: Sequences, road: Road, state: MemoryState | None, want_state: bool
) -> tuple[Tensor, MemoryState | None]:
    """The layer over ``x [B, L, E]``, with what surrounds the mixing, and the state behind its last tokens."""
    if state is not None:
        state = fit(layer, state, sequences.count, sequences.max_position, x.device, road)
    order = sequences.order
    if order is not None:
        x, sequences = order.take(x), sequences.in_order()
    # Padding is cut off on the way in and on the way out: whatever it holds, NaN included, reaches
    # neither an output nor, multiplied by a zero gradient, a weight.
    padding = None
    if sequences.spans is not None and (is_token := sequences.is_token()) is not None:
        padding = ~is_token.view(*x.shape[:2], 1)
        x = x.masked_fill(padding, 0)
    around = layer.around()
    before = around.before(x)
    if type(before) is not Tensor:
        check_local("norm1", before, "its output must be whole on every rank, as without SequenceParallel")
    mixed, new_state = _mix(layer, before, sequences, road, state, want_state)
    if state is not None or new_state is not None:
        check_recomputation(state, new_state)
    y = around.after(x, mixed)
    y = y if padding is None else y.masked_fill(padding, 0)
    return (y if order is None else order.put_back(y)), new_state


def _mix(
    layer: MixingParts, x: Tensor, sequences: Sequences, road: Road, state: MemoryState | None, want_state: bool
) -> tuple[Tensor, MemoryState | None]:
    longest = sequences.max_position
    if state is not None:
        sequences = _behind(state, sequences)
    flat, nodes = tree_of(layer, x, sequences, road, state)
    if not road.attends:
        y = _by_called_attention(layer, flat, nodes, sequences).view(x.shape)
        node_qv = node_qv_of(layer, nodes, road) if want_state else nodes
    else:
        given = layer, flat, nodes, sequences, road
        if layer.lean and torch.is_grad_enabled() and not transformed():  # torch.func takes no checkpoint
            out, node_qv = _read_again(*given)
        else:
            out, node_qv = _read(*given)
        y = layer.sva.project_out(out).view(x.shape)
    new_state = _state_after(layer, flat, nodes, node_qv, sequences, road, state, longest) if want_state else None
    if state is None or concrete(state.position):
        return y, new_state
    # Where positions are not read, others may have advanced them beyond the room that there is.
    _, length, offset, _, _ = Layout(sequences, layer.expand, flat.device).tables()
    lost = offset + length > state.capacity
    y = y.masked_fill(sequences.rows_of(lost).view(*x.shape[:2], 1), torch.nan)
    return y, None if new_state is None else new_state.spoiled(lost)


def _behind(state: MemoryState, sequences: Sequences) -> Sequences:
    """The tokens behind a state.

    Where positions cannot be read at no cost, there are all the levels that there is room for: those of a bound would
    be others at each power of two, and too few where others have advanced the state's tensors.
    """
    known = concrete(state.position)
    bound = state.max_position if known else state.capacity - sequences.max_position
    return sequences.after(state.position, bound, state.levels)


def _by_called_attention(layer: MixingParts, flat: Tensor, nodes: Tensor, sequences: Sequences) -> Tensor:
    """The attention called over the memory tensor, of size M·log L·E: its hooks, or what replaced it, see all of it."""
    if sequences.count == 0:  # every row is padding
        alone: Tensor = layer.sva(flat[None, :, None])
        return alone
    layout = Layout(sequences, layer.expand, flat.device)
    start, length, offset, _, _ = layout.tables()
    index = torch.arange(sequences.tokens, device=flat.device)
    # Spans ascend, and an empty one stands before the one that begins where it does.
    sequence = (torch.searchsorted(start.contiguous(), index, right=True) - 1).clamp(min=0)
    place = index - start[sequence]
    position = torch.where(place < length[sequence], offset[sequence] + place + 1, 0)
    row, exists = layout.slots(sequence, position, layout.levels)
    valid = exists.repeat_interleave(layer.bank, 1)
    memory = torch.cat([flat[:, None], pick(nodes, row, exists).flatten(1, 2)], 1)
    y: Tensor = layer.sva(memory[None], torch.nn.functional.pad(valid, (1, 0), value=True)[None])
    return y


def pick(nodes: Tensor, row: Tensor, exists: Tensor) -> Tensor:
    """Rows ``row [N, R]`` of nodes ``[m, M, W]`` → ``[N, R, m, W]``; zeros where they do not exist."""
    rows = nodes.index_select(1, row.flatten()).unflatten(1, row.shape).permute(1, 2, 0, 3)
    return torch.where(exists[..., None, None], rows, 0)


def _read(layer: MixingParts, flat: Tensor, nodes: Tensor, sequences: Sequences, road: Road) -> tuple[Tensor, Tensor]:
    """Attention over tokens and nodes, ``[M, E]``; and q and v of the nodes."""
    node_qv, token_qkv = layer.sva.node_qv(nodes, road.joins), layer.sva.token_qkv(flat, road.joins)
    heads = layer.sva.own_heads(layer.heads, token_qkv.shape[-1] // 3)
    out, _ = attend(token_qkv, node_qv, heads, sequences, expand=road.expand, backend=layer.backend)
    return out, node_qv


def _read_again(
    layer: MixingParts, flat: Tensor, nodes: Tensor, sequences: Sequences, road: Road
) -> tuple[Tensor, Tensor]:
    """`_read`, of which nothing is kept: backward reads again."""
    given, draws = (layer, flat, nodes, sequences, road), may_draw(layer.sva)
    read: Callable[..., tuple[Tensor, Tensor]] = _read
    if not is_compiling():
        tensors = [*_inner(layer.sva.named_parameters()), ("x", flat), ("the tree", nodes)]
        if not any(tensor.requires_grad for _, tensor in tensors):
            return _read(*given)
        read = _Reading(tensors, _inner(layer.sva.named_buffers()))
    found: tuple[Tensor, Tensor] = checkpoint(read, *given, use_reentrant=False, preserve_rng_state=draws)
    return found


class _Reading:
    """`_read` of the same values in backward as in forward, or an error: a checkpoint looks at none of them.

    Args:
        tensors: what is read, with names. None may have been written to; autograd's own check is of what it saves.
        buffers: of the modules that read. Those that the forward pass itself updates (spectral_norm's) are, for the
            time, what they were before.
    """

    def __init__(self, tensors: Named, buffers: Named):
        self.tensors = _versions(tensors)
        self.buffers: list[Version] | None = _versions(buffers)
        self.before = [tensor.clone() for _, tensor, _ in self.buffers]
        self.updated: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *given: Any) -> tuple[Tensor, Tensor]:
        if self.buffers is not None:
            found = _read(*given)
            for buffer, before in zip(self.buffers, self.before, strict=True):
                if buffer[1]._version == buffer[2]:
                    self.tensors.append(buffer)
                else:
                    self.updated.append((buffer[1], before))
            self.buffers, self.before = None, []
            return found
        for name, tensor, version in self.tensors:
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name} {list(tensor.shape)} is at version {tensor._version}; expected version {version} instead "
                    "(lean=True reads it again in the backward pass)"
                )
        self._check_same(*given)
        now = [buffer.clone() for buffer, _ in self.updated]
        try:
            _write(self.updated)
            return _read(*given)
        finally:  # a checkpoint leaves as soon as it has all that it needs
            _write([(buffer, value) for (buffer, _), value in zip(self.updated, now, strict=True)])

    def _check_same(self, layer: MixingParts, flat: Tensor, nodes: Tensor, sequences: Sequences, road: Road) -> None:
        """Plain parameters are those of the forward pass; of modules that are called, wrappers may come and go."""
        then = {name: tensor for name, tensor, _ in self.tensors}
        for name, parameter in _inner(layer.sva.named_parameters()) if road.joins else ():
            if then.get(name, parameter) is not parameter:
                raise RuntimeError(
                    f"lean=True: expected {name} of the forward pass, which backward reads again, got another tensor; "
                    "a parameter that is exchanged in between, by torch.func.functional_call too, needs lean=False"
                )


def _inner(named: Iterable[tuple[str, Tensor]]) -> Named:
    """Of what the attention has that which `_read` reads."""
    return [(f"sva.{name}", tensor) for name, tensor in named if not name.startswith("out_proj.")]


def _versions(tensors: Named) -> list[Version]:
    """How often each was written to; one of inference mode does not know, and autograd refuses to keep it."""
    return [(name, tensor, tensor._version) for name, tensor in tensors if not tensor.is_inference()]


@torch.no_grad()
def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in pairs:
        buffer.copy_(value)


def tree_of(
    layer: MixingParts, x: Tensor, sequences: Sequences, road: Road, state: MemoryState | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens of ``x [B, L, E]`` as ``[M, E]``, in autocast's dtype if there is one, and every node above them."""
    linear, expander = (layer.summarizer if road.merges else None), layer.expander
    flat, merge = x.reshape(-1, layer.embedding), None
    # Folding multiplies 1+k matrices of E×E into W; it pays once there are more nodes than that.
    folds = expander is None or flat.shape[0] > layer.embedding
    if (linear is None or not folds) and (asked := wanted(layer.backend, "build_tree")) not in ("auto", "reference"):
        if linear is None:
            raise BackendError(
                f"backend={asked!r} cannot serve build_tree: a callable summarizer (and one with hooks, a wrapper or "
                "weights of its own kind) runs on the reference alone"
            )
        folds = True  # kernels take no other form
    if isinstance(linear, LinearMapSummarizer) and folds:
        merge = linear.merge() if expander is None else expander.fold(linear.merge())
    if torch._C._is_any_autocast_enabled():
        flat, merge = tree_under_autocast(flat, merge)
    token = carried = None
    if state is not None:
        token, carried = state.token.to(flat.dtype), state.nodes.to(flat.dtype)
    if merge is not None:
        return flat, build_tree(flat, merge, sequences, token=token, carried=carried, backend=layer.backend)
    layout = Layout(sequences, layer.expand, flat.device)
    return flat, build_tree_with(merge_stacks_of(layer, road), flat, layer.bank, token, carried, layout)


def _state_after(
    layer: MixingParts,
    flat: Tensor,
    nodes: Tensor,
    node_qv: Tensor,
    sequences: Sequences,
    road: Road,
    state: MemoryState | None,
    longest: int,
) -> MemoryState:
    """The state behind the tokens, of which a sequence has ``longest`` at the most."""
    if state is None:
        levels = level_count(sequences.max_position)
        dtype = torch.promote_types((flat if road.weight is None else road.weight).dtype, torch.float32)
    else:
        levels, dtype = state.levels, state.nodes.dtype
        state.check_width(node_qv.shape[-1] // 2)
    layout = Layout(sequences, layer.expand, flat.device)
    _, length, offset, _, _ = layout.tables()
    row, exists = layout.slots(torch.arange(sequences.count, device=flat.device), offset + length, levels)

    picked = (pick(table, row, exists) for table in (nodes, *node_qv.chunk(2, -1)))
    newest, q, v = (part.to(dtype).contiguous() for part in picked)
    token_row, token_exists = layout.newest_token()
    # The last row stands for no token.
    none = flat.new_zeros(1, layer.embedding)
    tokens = torch.cat([flat, none] if state is None else [flat, state.token.to(flat.dtype), none])
    token = torch.where(token_exists[:, None], tokens.index_select(0, token_row).to(dtype), 0)
    if state is None:
        return MemoryState(offset + length, token, newest, q, v, layer.expand, levels, longest)
    # What no token changed stays as it was, to the bit.
    kept = (exists & (row >= layout.carry_base))[..., None, None]
    newest, q, v = (torch.where(kept, old, new) for old, new in ((state.nodes, newest), (state.q, q), (state.v, v)))
    token = torch.where((length > 0)[:, None], token, state.token)
    return state.advanced(Slots(offset + length, token, newest, q, v), longest)
