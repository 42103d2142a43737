"""The mixing layer: tree, projections and attention, without norms or feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from python_ref.checks import check_device, check_positive, check_shape, check_tensor
from python_ref.layout import level_count
from python_ref.sequences import Sequences

from ..backend.transforms import under_autocast
from ..ops.attention import attend
from ..states.memory import MemoryState
from .original import OriginalFace


class LogarithmicMixing(OriginalFace):
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
                torch.where(kept, old, new) for old, new in ((state.nodes, newest), (state.q, q), (state.v, v))
            )
            token = torch.where((length > 0)[:, None], token, state.token)
        return MemoryState(position, token, newest, q, v, self.expand, levels, sequences.max_position)
