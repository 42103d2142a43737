"""The mixing layer: tree, projections and attention, without norms or feed-forward.

The class holds its parts and every public method; what they do stands in `parallel` (whole sequences), `sequential`
(steps) and `original` (memory tensors), as functions of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from python_ref.around import Around
from python_ref.checks import check_positive
from python_ref.layout import level_count
from python_ref.sequences import Sequences
from python_ref.step import StepWeights

from ..backend.choice import check_name
from ..states.memory import MemoryState
from . import original, parallel, sequential
from .parameters import drops_nothing, expand_of, survey
from .parts import check_input, check_own_memory, make_dropout, width_of
from .projections import SingleVectorAttention
from .summarizers import Expander, make_summarizer


class LogarithmicMixing(nn.Module):
    """Each position attends to itself and to O(log n) summaries of all that came before it.

    Takes the place of self-attention in any block: causal, linear in length when training, O(log n) a
    token when streaming. Sections 1 to 4 and 6 of the definition (docs/definition.md); paper sections 3.1 to 3.5.

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
        backend: of the parallel form: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cpp"``.
        step_backend: of the sequential form: ``"auto"``, ``"reference"`` or ``"cpp"``; where None the
            reference if ``backend`` is the reference, else ``"auto"``.
        lean: keep only tokens and nodes for backward, and project and attend again there: about half the
            memory for a fifth to a third more arithmetic. What it reads again must not have changed until then.
        dropout: of what ``out_proj`` returns, in every form and in training mode alone; in a block also of what
            the feed-forward returns.
        bias: of q, k, v and ``out_proj``; in a block also of the feed-forward's two layers.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    sva: SingleVectorAttention
    expander: Expander | None
    drop: nn.Module | None
    summarizer: Callable[[Tensor, Tensor], Tensor]
    _stream: MemoryState | None
    _expand: int
    _ahead = 0  # tokens that `summarize_table` has counted and no memory has seen
    _bare = False  # whether `sequential` made the stream, which has no use for q and v of nodes
    _bias = True

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
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        embedding = check_positive("embedding", embedding)
        heads, bank = check_positive("heads", heads), check_positive("bank", bank)
        if step_backend is None:
            step_backend = "reference" if backend == "reference" else "auto"
        check_name(backend, "backend", "attend")
        check_name(step_backend, "step_backend", "step")
        self.embedding = embedding
        self.heads = heads
        self.bank = bank
        self.parallelize = parallelize
        self.backend = backend
        self.step_backend = step_backend
        self.lean = lean
        self.summarizer = make_summarizer(summarizer, embedding, bank, init, device, dtype)
        self.sva = SingleVectorAttention(embedding, heads, bias=bias, device=device, dtype=dtype)
        self.drop = make_dropout(dropout)
        self.expander, self._expand = None, 0
        if expand is not None:
            self._widen(expand, init, device, dtype)
        self._stream, self._bias = None, bias

    def _widen(self, expand: int, init: str, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self._expand = check_positive("expand", expand, 0)
        self.expander = Expander(self.embedding, self._expand, init, device=device, dtype=dtype)

    @property
    def expand(self) -> int:
        """k of the expander; 0 without one."""
        return expand_of(self)

    def extra_repr(self) -> str:
        rate = getattr(self._modules.get("drop"), "p", 0)
        return (
            f"embedding={self.embedding}, heads={self.heads}, bank={self.bank}, expand={self.expand}, "
            f"backend={self.backend!r}, step_backend={self.step_backend!r}, lean={self.lean}"
            f"{f', dropout={rate}' if rate else ''}{'' if self._bias else ', bias=False'}"
        )

    def around(self) -> Around:
        """What surrounds the mixing, as the modules compute it: dropout here, norms and residuals in a block."""
        return Around(drop=self._modules.get("drop"))

    def around_tensors(self) -> tuple[tuple[Tensor, ...], tuple[float, ...]] | None:
        """The same as tensors, as `StepWeights` has it: ``block`` and ``eps``; None where only the modules know."""
        return ((), ()) if drops_nothing(self._modules.get("drop")) else None

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

        One token, ``[B, 1, E]``, behind a state or of the layer's own stream is a `step`, and ``step_backend`` says
        what serves it; the reference takes the place of a named one that cannot.

        Args:
            x: ``[B, L, E]``, a floating dtype, any strides; B = 0 and L = 0 are valid.
            state: what came before; None for nothing. Rows may stand at different positions.
            return_state: whether to return the memory after the last token, too.
            lengths: ``[B]`` int32 or int64: rows are right-padded to L.
            cu_seqlens: ``[S+1]`` int32 or int64: ``x [1, L, E]`` packs S documents; states have S rows.
            max_length: with ``cu_seqlens``, an upper bound on a document's length (saves work).
            attention_mask: ``[B, L]``, bool or integers, nonzero at tokens: padding on either side, and gaps.

        Returns:
            ``y [B, L, E]``, 0 on padding; with ``return_state``, ``(y, state)``.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            RuntimeError: the state is exhausted.
        """
        streams = not self.parallelize and state is None and not return_state
        if streams:
            check_own_memory()
        whole = lengths is None and cu_seqlens is None and max_length is None and attention_mask is None
        if whole and (streams or state is not None) and isinstance(x, Tensor) and x.shape[1:2] == (1,):
            before = self._before(x) if state is None else state
            y, after = sequential.step(self, x, before, obliged=False)
            if streams:
                return self._keep(y, after)
            return (y, after) if return_state else y
        road = survey(self)
        check_input(self, x, road.weight)
        sequences = Sequences.of(x, lengths, cu_seqlens, max_length, attention_mask)
        state = self._own() if streams else state
        y, new_state = parallel.run(self, x, sequences, road, state, return_state or streams)
        if streams and new_state is not None:
            return self._keep(y, new_state)
        return y if new_state is None else (y, new_state)

    def _before(self, x: Tensor) -> MemoryState:
        """The layer's own memory, or an empty one for the rows of x."""
        stream = self._own()
        return self.init_state(x.shape[0]) if stream is None else stream

    def _own(self, projects: bool = True) -> MemoryState | None:
        """The layer's own memory, with q and v of its nodes where these are wanted."""
        if self._ahead:
            raise RuntimeError(
                f"ptr: expected {self.ptr - self._ahead}, the tokens that the memory has seen, got {self.ptr}: "
                "summarize_table() moved it on; reset() puts both to 0"
            )
        if projects and self._bare and self._stream is not None:
            self._stream = original.projected(self, self._stream)
            self._bare = False
        return self._stream

    def _keep(self, y: Tensor, stream: MemoryState) -> Tensor:
        """Make a memory the layer's own, and return what the call that made it returns."""
        if y.requires_grad:
            y, stream = original.linked(y, stream)
        self.__dict__["_stream"] = stream  # without the price of a module's attribute
        return y

    def prefill(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        """The layer over a prompt ``x [B, L, E]``, right-padded to ``lengths [B]``: ``(y, state)`` to `step` from."""
        road = survey(self)
        check_input(self, x, road.weight)
        y, state = parallel.run(self, x, Sequences.of(x, lengths), road, None, True)
        assert state is not None
        return y, state

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
        road = survey(self)
        weight = road.weight
        if weight is None:  # those that a wrapper keeps elsewhere still have a dtype
            weight = next((p for p in self.parameters() if p.is_floating_point()), None)
        own = torch.get_default_dtype() if weight is None else weight.dtype
        if device is None and weight is not None and not weight.is_meta:
            device = weight.device
        max_position = check_positive("max_position", max_position, 0)
        return MemoryState.empty(
            batch_size,
            self.embedding,
            self.bank,
            expand=self.expand,
            levels=level_count(max_position),
            width=None if road.joins else width_of(self),
            dtype=torch.promote_types(own, torch.float32) if dtype is None else dtype,
            device=device,
        )

    def step(self, x_t: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """One token a row: ``x_t [B, 1, E]`` → ``y_t [B, 1, E]`` and the new state (section 3).

        The old state stays as it was. Differentiable in x_t, the parameters and the state.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            RuntimeError: the state is exhausted.
        """
        return sequential.step(self, x_t, state)

    def step_(self, x: Tensor, state: MemoryState, slots: Tensor | None = None) -> Tensor:
        """T tokens a row, ``x [B, T, E]`` → ``y [B, T, E]``, into a pool of states, in place; for serving.

        No gradients are recorded. The extension reads positions on their device alone: with it (on CUDA:
        ``step_backend="cpp"``) a step can be captured in a CUDA graph and replayed.

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
        return sequential.step_(self, x, state, slots)

    def step_weights(self) -> StepWeights:
        """The layer as `decode_` and `update_` take it: its own parameters, nothing copied.

        Raises:
            TypeError: a part must be called, since it is of another kind than the layer makes, or has hooks, a
                wrapper or weights of another kind; the message names it.
        """
        return sequential.step_weights(self)

    def reset(self) -> None:
        """Forget what ``sequential`` and ``forward`` with ``parallelize=False`` have seen."""
        self._stream, self._ahead, self._bare = None, 0, False

    def detach(self) -> None:
        """Cut the layer's own memory off from its graph, and keep its numbers: between two backward passes."""
        if self._stream is not None:
            self._stream = self._stream.detach()

    @property
    def ptr(self) -> int:
        """Tokens that the furthest row of the layer's own memory has seen (off a CPU: that it may have seen)."""
        return self._ahead + (0 if self._stream is None else self._stream.max_position)

    @ptr.setter
    def ptr(self, position: int) -> None:
        if position != 0:
            raise ValueError(f"ptr: expected 0, which forgets the memory as reset() does, got {position!r}")
        self.reset()

    @property
    def memory(self) -> list[Tensor] | None:
        """The layer's own memory, newest node of each level: ``[B, m, 1, E]``; with an expander ``[B, h, m, 1, E]``."""
        return None if self._stream is None else original.stacks(self, self._stream)

    @memory.setter
    def memory(self, memory: None) -> None:
        if memory is not None:
            raise ValueError("memory: expected None, which forgets it as reset() does; streams are moved as states")
        self.reset()

    def parallel(self, x: Tensor) -> Tensor:
        """The memory tensor of section 2 for ``x [B, L, E]``: ``[B, L, S, E]``, zeros where nothing is yet.

        Of size B·L·log L·E: for inspection, and for code written for the original. `forward` needs none.
        """
        return original.memory_of(self, x)

    def summarize_table(self) -> list[bool]:
        """Which levels 1, 2, … the next token completes (section 3); counts it in `ptr`, as the original does.

        A memory that has not seen the token takes no other: `reset` before it goes on.
        """
        position = self.ptr + 1
        self._ahead += 1
        changed = (position - 1) ^ position
        return [bool(changed >> level & 1) for level in range(1, position.bit_length())]

    def sequential(self, x_t: Tensor) -> Tensor:
        """Take one token ``x_t [B, 1, E]`` into the layer's own memory and return its slots ``[B, 1, S, E]``."""
        check_own_memory()
        slots = self._keep(*original.take(self, x_t, self._own(projects=False)))
        self.__dict__["_bare"] = True
        return slots

    def attention(self, memory: Tensor, positions: Tensor | None = None) -> Tensor:
        """Attention over a memory tensor ``[B, L, S, E]`` as `parallel` and `sequential` return it.

        Which slots hold something follows from the position, not from zeros in them: row t of several is
        position t+1, and of a single row every slot counts. ``positions`` (``[L]`` or ``[B, L]``) says
        otherwise.
        """
        return original.attend_memory(self, memory, positions)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_plan"}  # a copy makes its own
        if self._stream is not None:
            kept["_stream"] = self._stream.detach()  # a copy has its numbers, not its graph
        return kept
