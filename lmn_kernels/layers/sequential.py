"""The sequential form of a layer: one token a row from a state to a state, or several into a pool of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from python_ref import step as reference
from python_ref.around import Around
from python_ref.checks import check_shape, check_tensor, concrete
from python_ref.step import Slots, StepWeights, Turn, Weights

from ..backend import choice, env
from ..backend.transforms import autocasts, transformed, under_autocast
from ..ops.library import OPS
from ..ops.step import check_rows, decode_, keeps
from ..states.memory import MemoryState
from .parameters import Road, survey, weight_and_bias
from .parts import MixingParts, check_input, check_recomputation, fit, merge_stacks_of, node_qv_of
from .step_plan import StepPlan
from .tensor_parallel import check_local


def step(layer: MixingParts, x_t: Tensor, state: MemoryState, obliged: bool = True) -> tuple[Tensor, MemoryState]:
    """`LogarithmicMixing.step`; ``obliged``: see `served_by`."""
    plan: StepPlan | None = None if is_compiling() else layer.__dict__.get("_plan")
    if plan is None or not plan.serves(layer, x_t, state):
        check_tensor("x_t", x_t)
        road = survey(layer)
        if served_by(layer, x_t, state, road, obliged) == "reference":
            return _by_reference(layer, x_t, _check_step(layer, x_t, state, road), road)
        weights, whole = weights_of(layer, road)
        plan = make_plan(layer, weights, "cpp") if whole else None
        if plan is None or not plan.serves(layer, x_t, state):
            return _by_operation(layer, x_t, _check_step(layer, x_t, state, road), weights, whole)
    try:
        return plan.step(x_t, state)
    except (AttributeError, TypeError, ValueError):
        _check_step(layer, x_t, state, survey(layer))  # the same complaint in the layer's own words
        raise
    except RuntimeError:
        # There is no room where others have advanced the state's tensors: its bound was not of them.
        roomy = _check_step(layer, x_t, state, survey(layer))
        if roomy is state:
            raise
        return plan.step(x_t, roomy)


def step_(layer: MixingParts, x: Tensor, state: MemoryState, slots: Tensor | None) -> Tensor:
    """`LogarithmicMixing.step_`."""
    if slots is not None:
        check_tensor("slots", slots)
    plan: StepPlan | None = None if is_compiling() else layer.__dict__.get("_plan")
    with torch.no_grad():
        debugged = isinstance(x, Tensor) and x.is_cuda and env.debug()
        if plan is not None and plan.in_place and not debugged and plan.serves(layer, x, state):
            return plan.step_(x, state, slots)
        road = survey(layer)
        check_input(layer, x, road.weight)
        if autocasts(x.device.type):
            raise RuntimeError("step_: expected no torch.autocast region; cast the layer and x instead")
        backend = served_by(layer, x, state, road)
        if not road.merges or road.called:
            return _pool_by_modules(layer, x, state, slots, road)
        weights, whole = weights_of(layer, road)
        if whole and backend != "reference":
            make_plan(layer, weights, backend)
        if whole:
            return decode_(x, state, weights, slots=slots, backend=backend)
        around = layer.around()
        y = around.after(x, decode_(around.before(x), state, weights, slots=slots, backend=backend))
        return y if slots is None else y.masked_fill((slots < 0)[:, None, None], 0)


def step_weights(layer: MixingParts) -> StepWeights:
    """`LogarithmicMixing.step_weights`."""
    weights, whole = weights_of(layer, survey(layer))
    if not whole:
        raise TypeError(
            "block: expected RMSNorms and a FeedForward without hooks, and dropout that is off (eval()), got others"
        )
    return weights


def weights_of(layer: MixingParts, road: Road) -> tuple[StepWeights, bool]:
    """The layer's weights, and whether they say all of it: what surrounds the mixing may be more than tensors."""
    modules = layer._modules
    summarizer, expander, sva = modules.get("summarizer"), modules.get("expander"), modules["sva"]
    if not road.merges:
        raise TypeError(
            "summarizer: expected a linear one, and an expander, without hooks, wrappers or weights of another kind, "
            "got what must be called, which the reference does alone"
        )
    if road.called:
        raise TypeError(
            f"{road.called[0]}: expected the layer's own, without hooks, wrappers or weights of another kind; others "
            "have no weights to give away, and are called by the layer itself"
        )
    kind, merge, scale = summarizer.step_form()
    q, k, v, out = sva.step_tensors()
    named = Weights(q, k, v, out, merge, scale, None if expander is None else expander.step_tensors())
    expand, around = (0 if expander is None else expander.expand), layer.around_tensors()
    weights = StepWeights(named.flat(), kind, layer.heads, expand)
    if around is None:
        return weights, False
    block, eps = around
    return weights._replace(block=block, eps=eps), True


def make_plan(layer: Any, weights: StepWeights, backend: str) -> StepPlan | None:
    """What the next steps need not find out again; None where it might not hold for them."""
    if is_compiling():
        return None
    layer.__dict__.pop("_plan", None)
    if torch._C._len_torch_dispatch_stack() or not StepPlan.fits(layer, weights):
        return None
    plan = layer.__dict__["_plan"] = StepPlan(layer, weights, backend)
    return plan


def served_by(layer: MixingParts, x_t: Tensor, state: object, road: Road, obliged: bool = True) -> str:
    """The backend of a step. One that the extension is not made for runs on the reference.

    Args:
        obliged: whether a backend asked for by name must serve; where not, the reference takes its place.

    Raises:
        BackendError: the extension was asked for by name, and cannot serve; the message has every reason.
    """
    device, asked = x_t.device, choice.wanted(layer.step_backend, "step")
    if asked == "reference":
        return asked
    given = (x_t, *state.slots()) if isinstance(state, MemoryState) else (x_t,)
    parameters, reasons = list(layer.parameters()), []
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *parameters)):
        reasons.append("gradients are recorded")
    if not is_compiling() and transformed():
        reasons.append("torch.func or forward-mode differentiation is active (use step_backend='reference')")
    if autocasts(device.type):
        reasons.append("torch.autocast is active")
    if not road.merges:
        reasons.append("the summarizer is a callable, or it or the expander has hooks or weights of another kind")
    if any(type(p) not in (Tensor, nn.Parameter) for p in parameters):
        reasons.append("a parameter is of a tensor subclass")
    if road.called:
        reasons.append(f"{', '.join(road.called)} must be called, with hooks, a wrapper or weights of another kind")
    if isinstance(state, MemoryState) and not keeps(device.type, x_t.dtype, state.token.dtype):
        reasons.append(f"the state is kept in {state.token.dtype}")
    if asked == "cpp" and (reasons or not obliged):
        own = choice.why_not(asked, "step", device, x_t.dtype)
        reasons += [] if own is None else [own]
        if reasons and obliged:
            raise choice.BackendError(f"backend='cpp' cannot serve step on {device.type}: {'; '.join(reasons)}")
    return "reference" if reasons else choice.resolve(layer.step_backend, "step", device, x_t.dtype)


def advance(
    layer: MixingParts, x: Tensor, state: MemoryState, road: Road, projects: bool = True
) -> tuple[MemoryState, Turn]:
    """The state after the tokens ``x [B, E]``, which has room for them, and where its rows stand.

    Args:
        projects: whether its nodes get their q and v.
    """
    turn = Turn.of(state.position + 1, state.levels)

    def project(nodes: Tensor) -> tuple[Tensor, ...]:
        if road.joins:
            return tuple(F.linear(nodes, *weight_and_bias(layer.sva._modules[name])) for name in "qv")
        return node_qv_of(layer, nodes, road).chunk(2, -1)

    merge, given = merge_stacks_of(layer, road), project if projects else None
    after = state.advanced(reference.advance(x, state.slots(), merge, given, layer.expand, turn))
    check_recomputation(state, after)
    return after, turn


def _check_step(layer: MixingParts, x_t: Tensor, state: MemoryState, road: Road) -> MemoryState:
    """The state with room for one more token."""
    check_input(layer, x_t, road.weight)
    check_shape("x_t", x_t, (None, 1, layer.embedding), "[batch, 1, embedding]")
    return fit(layer, state, x_t.shape[0], 1, x_t.device, road)


def serves_alone(layer: MixingParts, x_t: Tensor) -> bool:
    """Whether the reference serves such tokens on a CPU whatever state they meet, so that a plan of it is in nobody's
    way."""
    if torch.is_grad_enabled() or transformed() or not concrete(x_t):
        return False
    asked = choice.wanted(layer.step_backend, "step")
    chosen, reason = choice.choose(asked, "step", x_t.device, x_t.dtype)
    return chosen == "reference" or (asked == "auto" and reason is not None)


def prepare(layer: MixingParts, x_t: Tensor, state: MemoryState, road: Road) -> None:
    """Make a plan for tokens like these, which are not stepped with now."""
    weights = None if torch.is_grad_enabled() else plain_weights(layer, x_t, road)
    if weights is None:
        return
    if serves_alone(layer, x_t):
        make_plan(layer, weights, "reference")
    elif served_by(layer, x_t, state, road, obliged=False) == "cpp":
        make_plan(layer, weights, "cpp")


def plain_weights(layer: MixingParts, x_t: Tensor, road: Road) -> StepWeights | None:
    """The weights, where they are plain tensors that say all of the layer, and nothing casts."""
    same = road.weight is not None and x_t.dtype == road.weight.dtype
    if not same or not road.merges or road.called or is_compiling() or autocasts(x_t.device.type):
        return None
    weights, whole = weights_of(layer, road)
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (*weights.tensors, *weights.block))
    return weights if whole and plain else None


def _by_reference(layer: MixingParts, x_t: Tensor, state: MemoryState, road: Road) -> tuple[Tensor, MemoryState]:
    weights = plain_weights(layer, x_t, road)
    if weights is None:
        return _by_modules(layer, x_t, state, road)
    if serves_alone(layer, x_t):
        make_plan(layer, weights, "reference")
    y, slots = reference.TokenStep(weights, layer.bank)(x_t[:, 0], state.slots(), state.levels)
    after = state.advanced(slots)
    check_recomputation(state, after)
    return after.spoil(y[:, None])


def _by_modules(layer: MixingParts, x_t: Tensor, state: MemoryState, road: Road) -> tuple[Tensor, MemoryState]:
    around = layer.around()
    before = around.before(x_t)
    if type(before) is not Tensor:
        check_local("norm1", before, "its output must be whole on every rank, as without SequenceParallel")
    x = under_autocast(before[:, 0])
    if road.attends:
        own = layer.sva.token_qkv(x, road.joins).chunk(3, -1)
        width = own[0].shape[-1]
        state.check_width(width)
        state, turn = advance(layer, x, state, road)
        heads = layer.sva.own_heads(layer.heads, width)
        mixed = reference.attend_state(own, state.slots(), heads, state.levels, layer.expand, turn)
        return state.spoil(around.after(x_t, layer.sva.project_out(mixed)[:, None]))
    state, _ = advance(layer, x, state, road)
    valid = state.valid().repeat_interleave(layer.bank, 1)
    nodes = state.nodes.flatten(1, 2).masked_fill(~valid[..., None], 0).to(x.dtype)
    valid = torch.nn.functional.pad(valid, (1, 0), value=True)
    y = layer.sva(torch.cat([x[:, None], nodes], 1)[:, None], valid[:, None])
    return state.spoil(around.after(x_t, y))


def _pool_by_modules(layer: MixingParts, x: Tensor, state: MemoryState, slots: Tensor | None, road: Road) -> Tensor:
    """`step_` with the layer's own modules, where they are more than their weights."""
    if not isinstance(state, MemoryState):
        raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
    state = fit(layer, state, state.batch_size, 0, x.device, road)
    check_rows(x, state, slots)

    def take(given: Tensor, old: Slots) -> tuple[Tensor, Slots]:
        y_t, new = _by_modules(layer, given[:, None], state.advanced(old, 0), road)
        return y_t[:, 0], new.slots()

    y = reference.each_token_(x, slots, state.slots(), state.levels, take)
    state.note_tokens(x.shape[1])
    return y


def _by_operation(
    layer: MixingParts, x_t: Tensor, state: MemoryState, weights: StepWeights, whole: bool
) -> tuple[Tensor, MemoryState]:
    around = Around() if whole else layer.around()
    y, *slots = OPS.step.default(around.before(x_t), *state.slots(), *weights)
    return around.after(x_t, y), state.advanced(Slots(*slots))
