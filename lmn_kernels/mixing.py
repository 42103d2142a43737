"""The mixing layer: tree, projections and attention, without norms or feed-forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from python_ref import step as ref_step
from python_ref.layout import Layout, level_count, stack_height, state_rows
from python_ref.tree import LinearMerge, build_tree_with

from . import _backend
from ._checks import check_device, check_float, check_positive, check_shape, check_tensor, concrete
from ._library import _OPS
from .attention import SingleVectorAttention
from .decoding import StepWeights, decode_
from .functional import attend, autocasts, build_tree, under_autocast
from .sequences import Sequences
from .state import MemoryState
from .summarizers import Expander, LinearMapSummarizer, make_summarizer

Mix = Callable[[Tensor], tuple[Tensor, MemoryState | None]]


class LogarithmicMixing(nn.Module):
    """Each position attends to itself and to O(log n) summaries of all that came before it.

    Takes the place of self-attention in any block: causal, linear in length when training, O(log n) a
    token when streaming. Sections 1 to 4 and 6 of the specification; paper sections 3.1 to 3.5.

    Args:
        embedding: E.
        heads: H, a divisor of E.
        bank: m, trees side by side, each with its own summarizer.
        parallelize: where False, ``forward`` continues from a memory that the layer keeps, as the
            original's does, gradients included; `reset` empties it.
        summarizer: ``"linear"``, ``"conv"`` (groups = bank), ``"conv_mixed"`` (groups = 1),
            ``"depthwise_separable"``, or any callable ``(left, right) → node`` on ``[..., m, E]`` that is
            finite and differentiable at zero (places without a node hold zeros).
        expand: k of the expander, or None without one.
        init: ``"original"``, or ``"variance_preserving"``: a node varies as much as its children.
        backend: of the parallel form: ``"auto"``, ``"reference"`` or ``"triton"``.
        step_backend: of the sequential form: ``"auto"``, ``"reference"`` or ``"cpp"``; where None the
            reference if ``backend`` is the reference, else ``"auto"``.
        lean: keep only tokens and nodes for backward, and project and attend again there: about half the
            memory for a fifth to a third more arithmetic.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    sva: SingleVectorAttention
    expander: Expander | None
    summarizer: Callable[[Tensor, Tensor], Tensor]
    _stream: MemoryState | None

    def __init__(
        self,
        embedding: int,
        heads: int = 1,
        bank: int = 1,
        parallelize: bool = True,
        *,
        summarizer: str | Callable[[Tensor, Tensor], Tensor] = "linear",
        expand: int | None = None,
        init: str = "original",
        backend: str = "auto",
        step_backend: str | None = None,
        lean: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("embedding", embedding), ("heads", heads), ("bank", bank)):
            check_positive(name, value)
        _backend.check_name(backend)
        self.embedding = embedding
        self.heads = heads
        self.bank = bank
        self.parallelize = parallelize
        self.backend = backend
        self.step_backend = step_backend or ("reference" if backend == "reference" else "auto")
        _backend.check_name(self.step_backend, "step_backend")
        self.lean = lean
        self.summarizer = make_summarizer(summarizer, embedding, bank, init, device, dtype)
        self.sva = SingleVectorAttention(embedding, heads, device=device, dtype=dtype)
        self.expander = None
        if expand is not None:
            check_positive("expand", expand, 0)
            self.expander = Expander(embedding, expand, init, device=device, dtype=dtype)
        self.reset()

    @property
    def expand(self) -> int:
        """k of the expander; 0 without one."""
        return self.expander.expand if self.expander is not None else 0

    def extra_repr(self) -> str:
        return f"embedding={self.embedding}, heads={self.heads}, bank={self.bank}, backend={self.backend!r}"

    # Parallel form

    def forward(
        self,
        x: Tensor,
        *,
        state: MemoryState | None = None,
        return_state: bool = False,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MemoryState]:
        """The layer over whole sequences, or over a chunk that continues from a state.

        Args:
            x: ``[B, L, E]``, a floating dtype, any strides; B = 0 and L = 0 are valid.
            state: what came before; None for nothing. Rows may stand at different positions.
            return_state: whether to return the memory after the last token, too.
            lengths: ``[B]`` int32 or int64: rows are right-padded to L.
            cu_seqlens: ``[S+1]`` int32 or int64: ``x [1, L, E]`` packs S documents; states have S rows.
            max_length: with ``cu_seqlens``, an upper bound on a document's length (saves work).
            attention_mask: ``[B, L]``, nonzero on one run of tokens per row: left or right padding.

        Returns:
            ``y [B, L, E]``, 0 on padding; with ``return_state``, ``(y, state)``.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            RuntimeError: the state is exhausted.
        """
        self._check_input(x)
        sequences = self._sequences(x, lengths, cu_seqlens, max_length, attention_mask)
        if not self.parallelize and state is None and not return_state:
            y, self._stream = self._run(x, sequences, self._stream, True)
            return y
        y, new_state = self._run(x, sequences, state, return_state)
        if not return_state:
            return y
        assert new_state is not None
        return y, new_state

    def prefill(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        """The layer over a prompt ``x [B, L, E]``, right-padded to ``lengths [B]``: ``(y, state)`` to `step` from."""
        self._check_input(x)
        y, state = self._run(x, self._sequences(x, lengths, None, None, None), None, True)
        assert state is not None
        return y, state

    def _check_input(self, x: Tensor) -> None:
        check_float("x", x)
        check_shape("x", x, (None, None, self.embedding), "[batch, length, embedding]")
        weight = self.sva.q.weight
        check_device("x", x, weight.device)
        if x.dtype != weight.dtype and not autocasts(x.device.type):
            raise TypeError(f"x: expected dtype {weight.dtype} of the layer (or torch.autocast), got {x.dtype}")

    @staticmethod
    def _sequences(
        x: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        max_length: int | None,
        attention_mask: Tensor | None,
    ) -> Sequences:
        batch, length = x.shape[:2]
        masks = {"lengths": lengths, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        given = {name: value for name, value in masks.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: expected at most one of them, got {len(given)}")
        for name, value in given.items():
            check_tensor(name, value)
            check_device(name, value, x.device)
        if max_length is not None:
            if cu_seqlens is None:
                raise ValueError(f"max_length: expected None without cu_seqlens, got {max_length!r}")
            check_positive("max_length", max_length, 0)
        if lengths is not None:
            return Sequences.padded(batch, length, lengths)
        if attention_mask is not None:
            check_shape("attention_mask", attention_mask, (batch, length), "[batch, length]")
            return Sequences.masked(attention_mask)
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"x: expected shape [1, tokens, embedding] with cu_seqlens, got {list(x.shape)}")
            return Sequences.packed(length, cu_seqlens, max_length)
        return Sequences.equal(batch, length)

    def _run(
        self, x: Tensor, sequences: Sequences, state: MemoryState | None, want_state: bool
    ) -> tuple[Tensor, MemoryState | None]:
        if state is not None:
            state = self._fit(state, sequences.count, sequences.max_position, x.device)
        is_token = sequences.is_token()
        if is_token is None:
            return self._layer(x, lambda h: self._mix(h, sequences, state, want_state))
        # Padding is cut off on the way in and on the way out: whatever it holds, NaN included, reaches
        # neither an output nor, multiplied by a zero gradient, a weight.
        padding = ~is_token.view(*x.shape[:2], 1)
        x = x.masked_fill(padding, 0)
        y, new_state = self._layer(x, lambda h: self._mix(h, sequences, state, want_state))
        return y.masked_fill(padding, 0), new_state

    def _layer(self, x: Tensor, mix: Mix) -> tuple[Tensor, MemoryState | None]:
        """What surrounds the mixing: nothing here, norms and residuals in a block."""
        return mix(x)

    def _fit(self, state: MemoryState, batch: int, tokens: int, device: torch.device) -> MemoryState:
        if not isinstance(state, MemoryState):
            raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
        state.check_for(batch, self.embedding, self.bank, self.expand, device)
        return state.with_room(state.max_position + tokens)

    def _mix(
        self, x: Tensor, sequences: Sequences, state: MemoryState | None, want_state: bool
    ) -> tuple[Tensor, MemoryState | None]:
        flat = x.reshape(-1, self.embedding)
        flat = under_autocast(flat)
        token = carried = None
        if state is not None:
            sequences = sequences.after(state.position, state.max_position, state.levels)
            token, carried = state.token.to(flat.dtype), state.nodes.to(flat.dtype)
        nodes = self._nodes(flat, sequences, token, carried)
        if self.lean and torch.is_grad_enabled():
            out, node_qv = checkpoint(self._read, flat, nodes, sequences, use_reentrant=False, preserve_rng_state=False)
        else:
            out, node_qv = self._read(flat, nodes, sequences)
        y = self.sva.out_proj(out).view(x.shape)
        if not want_state:
            return y, None
        return y, self._state_after(flat, nodes, node_qv, sequences, state)

    def _read(self, flat: Tensor, nodes: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Attention over tokens and nodes, ``[M, E]``; and q and v of the nodes."""
        node_qv = self.sva.node_qv(nodes)
        token_qkv = self.sva.token_qkv(flat)
        out, _ = attend(token_qkv, node_qv, self.heads, sequences, expand=self.expand, backend=self.backend)
        return out, node_qv

    def _nodes(self, flat: Tensor, sequences: Sequences, token: Tensor | None, carried: Tensor | None) -> Tensor:
        summarizer, named = self.summarizer, _backend.wanted(self.backend) not in ("auto", "reference")
        if isinstance(summarizer, LinearMapSummarizer):
            # Folding multiplies 1+k matrices of E×E into W; it pays once there are more nodes than that.
            # Kernels take the folded form alone.
            if self.expander is None or named or flat.shape[0] > self.embedding:
                merge = summarizer.merge()
                if self.expander is not None:
                    merge = self.expander.fold(merge)
                scale = None if merge.scale is None else under_autocast(merge.scale)
                merge = LinearMerge(under_autocast(merge.weight), under_autocast(merge.bias), scale)
                return build_tree(flat, merge, sequences, token=token, carried=carried, backend=self.backend)
        elif named:
            raise _backend.BackendError(
                f"backend={_backend.wanted(self.backend)!r} cannot serve build_tree: "
                "a callable summarizer runs on the reference alone"
            )
        layout = self._layout(sequences, flat.device)
        return build_tree_with(self._merge, flat, self.bank, token, carried, layout)

    def _layout(self, sequences: Sequences, device: torch.device) -> Layout:
        return Layout(
            sequences.tokens,
            sequences.count,
            self.expand,
            sequences.max_position,
            sequences.spans,
            sequences.carried_levels,
            device,
        )

    def _merge(self, left: Tensor, right: Tensor) -> Tensor:
        """Stacks ``[P, h, m, E]`` of two nodes → the stack ``[P, h+k, m, E]`` of their summary."""
        if self.expander is not None:
            left, right = self.expander(left), self.expander(right)
        return self.summarizer(left, right)

    def _state_after(
        self, flat: Tensor, nodes: Tensor, node_qv: Tensor, sequences: Sequences, state: MemoryState | None
    ) -> MemoryState:
        if state is None:
            levels = level_count(sequences.max_position)
            dtype = torch.promote_types(self.sva.q.weight.dtype, torch.float32)
        else:
            levels, dtype = state.levels, state.nodes.dtype
        layout = self._layout(sequences, flat.device)
        _, length, offset, _, _ = layout.tables()
        row, exists = layout.slots(torch.arange(sequences.count, device=flat.device), offset + length, levels)

        def pick(table: Tensor) -> Tensor:
            rows = table.index_select(1, row.flatten()).unflatten(1, row.shape)
            return torch.where(exists[..., None, None], rows.permute(1, 2, 0, 3).to(dtype), 0).contiguous()

        newest, (q, v) = pick(nodes), (pick(half) for half in node_qv.chunk(2, -1))
        token_row, token_exists = layout.newest_token()
        # The last row stands for no token.
        none = flat.new_zeros(1, self.embedding)
        tokens = torch.cat([flat, none] if state is None else [flat, state.token.to(flat.dtype), none])
        token = torch.where(token_exists[:, None], tokens.index_select(0, token_row).to(dtype), 0)
        position = offset + length
        if state is not None:
            # What no token changed stays as it was, to the bit.
            kept = (exists & (row >= layout.carry_base))[..., None, None]
            newest, q, v = (
                torch.where(kept, old, new)
                for old, new in ((state.nodes, newest), (state.q, q), (state.v, v))
            )
            token = torch.where((length > 0)[:, None], token, state.token)
        return MemoryState(position, token, newest, q, v, self.expand, levels, sequences.max_position)

    # Sequential form

    def init_state(
        self,
        batch_size: int,
        *,
        max_position: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MemoryState:
        """An empty state, with room for ``max_position`` tokens (more room is made as it is needed).

        Args:
            batch_size: B.
            max_position: tokens to make room for at once.
            dtype: of the nodes; float32 at least where None.
            device: that of the parameters where None.
        """
        weight = self.sva.q.weight
        check_positive("max_position", max_position, 0)
        return MemoryState.empty(
            batch_size,
            self.embedding,
            self.bank,
            expand=self.expand,
            levels=level_count(max_position),
            dtype=torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype,
            device=weight.device if device is None else device,
        )

    def step(self, x_t: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """One token a row: ``x_t [B, 1, E]`` → ``y_t [B, 1, E]`` and the new state (section 3).

        The old state stays as it was. Differentiable in x_t, the parameters and the state.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            RuntimeError: the state is exhausted.
        """
        self._check_input(x_t)
        check_shape("x_t", x_t, (None, 1, self.embedding), "[batch, 1, embedding]")
        fitted = self._fit(state, x_t.shape[0], 1, x_t.device)
        mix = self._step if self._step_served_by(x_t) == "reference" else self._step_compiled
        y, new_state = self._layer(x_t, lambda h: mix(h, fitted))
        assert new_state is not None
        return y, new_state

    def step_(self, x: Tensor, state: MemoryState, slots: Tensor | None = None) -> Tensor:
        """T tokens a row, ``x [B, T, E]`` → ``y [B, T, E]``, into a pool of states, in place; for serving.

        No gradients are recorded. Positions are read on their device alone, so that a step can be captured
        in a CUDA graph and replayed.

        Args:
            x: the tokens.
            state: P slots with room for them: ``init_state(P, max_position=…)``.
            slots: ``[B]`` int32 or int64: the slot of each row, distinct, or -1 for a row that takes no part;
                None for row b in slot b.

        Returns:
            ``y``; 0 for rows whose slot is -1.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            RuntimeError: a row has no room for its tokens (CUDA: its output is NaN instead).
        """
        self._check_input(x)
        weights, backend = self.step_weights(), self.step_backend
        if autocasts(x.device.type):
            raise RuntimeError("step_: expected no torch.autocast region; cast the layer and x instead")
        with torch.no_grad():
            y, _ = self._layer(x, lambda h: (decode_(h, state, weights, slots=slots, backend=backend), None))
            return y if slots is None else y.masked_fill((slots < 0)[:, None, None], 0)

    def step_weights(self) -> StepWeights:
        """The layer as `decode_` and `update_` take it: its own parameters, nothing copied.

        Raises:
            TypeError: the summarizer is a callable of the user's, which has no weights.
        """
        if not isinstance(self.summarizer, LinearMapSummarizer):
            raise TypeError("summarizer: expected a linear one, got a callable, which runs on the reference alone")
        kind, merge = self.summarizer.step_form()
        tensors = (*self.sva.step_tensors(), *merge)
        if self.expander is not None:
            tensors = (*tensors, *self.expander.step_tensors())
        return StepWeights(tensors, kind, self.heads, self.expand)

    def _step_served_by(self, x_t: Tensor) -> str:
        """The backend of a step, which records gradients, casts, or calls a callable on the reference alone."""
        asked = _backend.wanted(self.step_backend)
        recorded = torch.is_grad_enabled() and (x_t.requires_grad or any(p.requires_grad for p in self.parameters()))
        if recorded or autocasts(x_t.device.type) or not isinstance(self.summarizer, LinearMapSummarizer):
            if asked == "cpp":
                raise _backend.BackendError(
                    "backend='cpp' cannot serve step: gradients are recorded, torch.autocast is active, "
                    "or the summarizer is a callable"
                )
            return "reference"
        return _backend.resolve(self.step_backend, "step", x_t.device, x_t.dtype)

    def _step_compiled(self, x_t: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        tensors, *rest = self.step_weights()
        y, position, token, nodes, q, v = _OPS.step.default(
            x_t, state.position, state.token, state.nodes, state.q, state.v, list(tensors), *rest
        )
        return y, MemoryState(position, token, nodes, q, v, state.expand, state.levels, state.max_position + 1)

    def _step(self, x_t: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        x = under_autocast(x_t[:, 0])
        state = self._advance(x, state)
        mixed = ref_step.attend_state(self.sva.token_qkv(x), state.slots(), self.heads, state.levels, self.expand)
        return self.sva.out_proj(mixed)[:, None], state

    def _advance(self, x: Tensor, state: MemoryState) -> MemoryState:
        """The state after the tokens ``x [B, E]``, which has room for them."""
        position, chain = state.position + 1, state.levels
        if concrete(position):
            lowest = position & -position
            chain = int(lowest.max()).bit_length() - 1 if lowest.numel() else 0
        new = ref_step.advance(x, state.slots(), self._merge, self.sva.node_qv, self.expand, chain)
        return MemoryState(*new, state.expand, state.levels, state.max_position + 1)

    # The original's face

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
