"""The sequential form: one token a row, from a state to a state (specification, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from python_ref import step as ref_step
from python_ref.checks import check_positive, check_shape, check_tensor, concrete
from python_ref.layout import level_count

from ..backend import choice, env
from ..backend.transforms import autocasts, transformed, under_autocast
from ..ops.library import OPS
from ..ops.step import StepWeights, decode_, keeps
from ..states.memory import MemoryState
from .layer import LayerBase
from .step_plan import StepPlan
from .summarizers import LinearMapSummarizer


class SequentialForm(LayerBase):
    """`init_state`, `step` and `step_` of a layer."""

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
        plan = None if is_compiling() else self.__dict__.get("_plan")
        if plan is None or not plan.serves(self, x_t, state):
            check_tensor("x_t", x_t)
            if self._step_served_by(x_t, state) == "reference":
                fitted = self._check_step(x_t, state)
                y, new_state = self._layer(x_t, lambda h: self._step(h, fitted))
                assert new_state is not None
                return y, new_state
            plan = self._make_plan()
            if plan is not None and not plan.serves(self, x_t, state):
                plan = None
        try:
            return self._step_compiled(x_t, state) if plan is None else plan.step(x_t, state)
        except (AttributeError, TypeError, ValueError):
            self._check_step(x_t, state)  # the same complaint in the layer's own words
            raise

    def _make_plan(self) -> StepPlan | None:
        """What the next steps need not find out again; None where it might not hold for them."""
        self.__dict__.pop("_plan", None)
        if is_compiling() or torch._C._len_torch_dispatch_stack() or self._around() is None:
            return None
        weights = self.step_weights()
        if not StepPlan.fits(self, weights):
            return None
        plan = self.__dict__["_plan"] = StepPlan(self, weights, self.step_backend)
        return plan

    def _apply(self, *args: Any, **options: Any) -> Any:
        self.__dict__.pop("_plan", None)  # which holds on to the parameters, and so would stop a swap of them
        return super()._apply(*args, **options)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.__dict__.pop("_plan", None)
        super()._load_from_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def _check_step(self, x_t: Tensor, state: MemoryState) -> MemoryState:
        """The state with room for one more token."""
        self._check_input(x_t)
        check_shape("x_t", x_t, (None, 1, self.embedding), "[batch, 1, embedding]")
        return self._fit(state, x_t.shape[0], 1, x_t.device)

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
        if slots is not None:
            check_tensor("slots", slots)
        plan = self.__dict__.get("_plan")
        with torch.no_grad():
            debugged = isinstance(x, Tensor) and x.is_cuda and env.debug()
            if plan is not None and not debugged and not is_compiling() and plan.serves(self, x, state):
                return plan.step_(x, state, slots)
            self._check_input(x)
            if autocasts(x.device.type):
                raise RuntimeError("step_: expected no torch.autocast region; cast the layer and x instead")
            backend = self._step_served_by(x, state)
            if backend != "reference":
                self._make_plan()
            around, weights = self._around(), self._mixing_weights()
            if around is not None:
                return decode_(x, state, weights._replace(block=around[0], eps=around[1]), slots=slots, backend=backend)
            y, _ = self._layer(x, lambda h: (decode_(h, state, weights, slots=slots, backend=backend), None))
            return y if slots is None else y.masked_fill((slots < 0)[:, None, None], 0)

    def step_weights(self) -> StepWeights:
        """The layer as `decode_` and `update_` take it: its own parameters, nothing copied.

        Raises:
            TypeError: the summarizer is a callable of the user's, which has no weights, or a part of the block
                is not of the kind that it was made with.
        """
        around = self._around()
        if around is None:
            raise TypeError("block: expected RMSNorms and a FeedForward without hooks, got modules of another kind")
        return self._mixing_weights()._replace(block=around[0], eps=around[1])

    def _mixing_weights(self) -> StepWeights:
        return StepWeights(*self._step_tensors(), self.heads, self.expand)

    def _step_tensors(self) -> tuple[tuple[Tensor, ...], str]:
        modules: dict[str, Any] = self._modules
        summarizer, expander = modules.get("summarizer"), modules.get("expander")
        if not isinstance(summarizer, LinearMapSummarizer):
            raise TypeError("summarizer: expected a linear one, got a callable, which runs on the reference alone")
        if not modules["sva"].has_plain_output():
            raise TypeError("sva.out_proj: expected a Linear with a bias and without hooks; others run in `step` alone")
        kind, merge = summarizer.step_form()
        tensors = modules["sva"].step_tensors() + merge
        return (tensors if expander is None else tensors + expander.step_tensors()), kind

    def _around(self) -> tuple[tuple[Tensor, ...], tuple[float, ...]] | None:
        """What `_layer` puts around the mixing, as `StepWeights` has it; None where only `_layer` knows."""
        return (), ()

    def _step_served_by(self, x_t: Tensor, state: object) -> str:
        """The backend of a step. One that the extension is not made for runs on the reference.

        Raises:
            BackendError: the extension was asked for by name, and cannot serve.
        """
        device, asked = x_t.device, choice.wanted(self.step_backend, "step")
        reason = None
        given = (x_t, *state.slots()) if isinstance(state, MemoryState) else (x_t,)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *self.parameters())):
            reason = "gradients are recorded"
        elif not is_compiling() and transformed():
            reason = "torch.func or forward-mode differentiation is active"
        elif autocasts(device.type):
            reason = "torch.autocast is active"
        elif not isinstance(self._modules.get("summarizer"), LinearMapSummarizer):
            reason = "the summarizer is a callable"
        elif any(type(p) not in (Tensor, nn.Parameter) for p in self.parameters()):
            reason = "a parameter is of a tensor subclass"
        elif not self.sva.has_plain_output():
            reason = "the output projection is not a plain Linear"
        elif isinstance(state, MemoryState) and not keeps(device.type, x_t.dtype, state.token.dtype):
            reason = f"the state is kept in {state.token.dtype}"
        if reason is None:
            return choice.resolve(self.step_backend, "step", device, x_t.dtype)
        if asked == "cpp":
            raise choice.BackendError(f"backend='cpp' cannot serve step on {device.type}: {reason}")
        return "reference"

    def _step_compiled(self, x_t: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        state = self._check_step(x_t, state)
        tensors, kind, heads, expand, _, _ = self._mixing_weights()

        def run(x: Tensor, block: tuple[Tensor, ...] = (), eps: tuple[float, ...] = ()) -> tuple[Tensor, MemoryState]:
            y, position, token, nodes, q, v = OPS.step.default(
                x, *state.slots(), tensors, kind, heads, expand, block, eps
            )
            return y, MemoryState(position, token, nodes, q, v, expand, state.levels, state.max_position + 1)

        around = self._around()
        if around is not None:
            return run(x_t, *around)
        y, advanced = self._layer(x_t, run)
        assert advanced is not None
        return y, advanced

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
