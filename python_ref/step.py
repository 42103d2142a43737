"""One token per row (section 3): the bitmask rule, and attention over the cached slots.

A state holds, per row, the position n, the newest token, and the newest node of levels 1 … D with its
q and v. The invariant: the rows of level i hold ``node(i, (n >> i) - 1)`` and count once 2^i ≤ n. On a
new token, level i is summarised again iff bit i of ``(n-1) XOR n`` is set, that is iff 2^i divides n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .around import Around
from .checks import concrete
from .layout import constant, stack_height, state_rows
from .precision import no_autocast
from .tree import LinearMerge, expand_stack, merge_stacks

Merge = Callable[[Tensor, Tensor], Tensor]


class Slots(NamedTuple):
    """The tensors of a state: ``position [B]`` int64, ``token [B, E]``, ``nodes, q, v [B, R, m, E]``."""

    position: Tensor
    token: Tensor
    nodes: Tensor
    q: Tensor
    v: Tensor


def valid_rows(position: Tensor, levels: int, expand: int) -> Tensor:
    """``[B, R]``: whether a row of ``nodes`` holds a node, that is 2^i ≤ position."""
    level = [i for i in range(1, levels + 1) for _ in range(stack_height(i, expand))]
    return (position[:, None] >> constant(tuple(level), position.device)) > 0


def update(
    x: Tensor,
    position: Tensor,
    token: Tensor,
    nodes: Tensor,
    merge: Merge,
    expand: int,
    chain: int,
) -> list[tuple[Tensor, Tensor]]:
    """Summarise again what the new tokens complete.

    Args:
        x: ``[B, E]`` the new tokens.
        position: ``[B]`` int64, n after them.
        token: ``[B, E]`` the tokens before them.
        nodes: ``[B, R, m, E]`` the newest nodes before them, level after level.
        merge: two stacks ``[B, h, m, E]`` → ``[B, h+k, m, E]``.
        expand: k.
        chain: highest level that any row may complete; what is above stays.

    Returns:
        For levels 1 … chain: ``changed [B]`` and the level's stack ``[B, 1+i·k, m, E]``.
    """
    bank, base, levels = nodes.shape[2], 0, []
    left = token[:, None, None, :].expand(-1, 1, bank, -1)
    new = x[:, None, None, :].expand(-1, 1, bank, -1)
    crossed = (position - 1) ^ position
    for level in range(1, chain + 1):
        height = stack_height(level, expand)
        old = nodes[:, base : base + height]
        changed = (crossed >> level & 1).bool()
        new = torch.where(changed[:, None, None, None], merge(left, new), old)
        levels.append((changed, new))
        left, base = old, base + height
    return levels


def advance(x: Tensor, old: Slots, merge: Merge, project: Callable[[Tensor], Tensor], expand: int, chain: int) -> Slots:
    """The state after the tokens ``x [B, E]``; it shares no storage with the old one.

    Args:
        merge, expand, chain: those of `update`.
        project: nodes ``[…, E]`` → their q and v ``[…, 2E]``.
    """
    position = old.position + 1
    levels = update(x, position, old.token.to(x.dtype), old.nodes.to(x.dtype), merge, expand, chain)
    token = x.to(old.token.dtype, copy=True)
    if not levels:
        return Slots(position, token, old.nodes.clone(), old.q.clone(), old.v.clone())
    count = state_rows(chain, expand)
    fresh = torch.cat([stack for _, stack in levels], 1)
    height = [stack_height(level, expand) for level in range(1, chain + 1)]
    changed = torch.cat([flag[:, None].expand(-1, h) for (flag, _), h in zip(levels, height, strict=True)], 1)
    new_q, new_v = project(fresh).chunk(2, -1)

    def over(new: Tensor, kept: Tensor) -> Tensor:
        new = torch.where(changed[..., None, None], new.to(kept.dtype), kept[:, :count])
        return torch.cat([new, kept[:, count:]], 1)

    return Slots(position, token, over(fresh, old.nodes), over(new_q, old.q), over(new_v, old.v))


def attend_slots(k: Tensor, q: Tensor, v: Tensor, valid: Tensor, heads: int) -> Tensor:
    """Section 4 for one position per row.

    Args:
        k: ``[B, E]`` of the current token.
        q, v: ``[B, S, E]`` of the slots.
        valid: ``[B, S]``, at least one True in each row.
        heads: H.

    Returns:
        ``[B, E]`` in the dtype of ``k``; computed in float32 at least.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    q, v = (part.to(wide).unflatten(-1, (heads, -1)) for part in (q, v))
    with no_autocast(k.device):
        score = torch.einsum("bshd,bhd->bhs", q, k.to(wide).unflatten(-1, (heads, -1))) * q.shape[-1] ** -0.5
        weight = torch.softmax(score.masked_fill(~valid[:, None], -math.inf), -1)
        v = v.masked_fill(~valid[:, :, None, None], 0)  # which may be NaN, and 0 · NaN is NaN
        return torch.einsum("bhs,bshd->bhd", weight, v).flatten(1).to(k.dtype)


def attend_state(qkv: Tensor, state: Slots, heads: int, levels: int, expand: int) -> Tensor:
    """`attend_slots` of the newest tokens, q, k and v of which are ``qkv [B, 3E]``, over a state."""
    q, k, v = qkv.chunk(3, -1)
    valid = valid_rows(state.position, levels, expand).repeat_interleave(state.nodes.shape[2], 1)
    own_q, own_v = q[:, None].to(state.q.dtype), v[:, None].to(state.v.dtype)
    slots_q, slots_v = torch.cat([own_q, state.q.flatten(1, 2)], 1), torch.cat([own_v, state.v.flatten(1, 2)], 1)
    return attend_slots(k, slots_q, slots_v, F.pad(valid, (1, 0), value=True), heads)


class Linear(NamedTuple):
    """Weight and bias of a projection, a summarizer or an expander."""

    weight: Tensor
    bias: Tensor


class Weights(NamedTuple):
    """A mixing layer's parameters by name, as they lie.

    Attributes:
        q, k, v, out: the projections, ``[E, E]`` and ``[E]``.
        summarizer: as `merge_of` takes it.
        scale: ``[2, G, C]`` of a separable summarizer, or None.
        expander: weight ``[E, E, 1+k]`` and bias ``[E]`` of its transposed convolution, or None.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    summarizer: Linear
    scale: Tensor | None = None
    expander: Linear | None = None

    def flat(self) -> tuple[Tensor, ...]:
        """The list that an operation's schema takes; csrc/register.cpp reads it in this order."""
        pairs = (*self.q, *self.k, *self.v, *self.out, *self.summarizer)
        return (*pairs, *(() if self.scale is None else (self.scale,)), *(self.expander or ()))


class StepWeights(NamedTuple):
    """A mixing layer as the step's operations take it; see `LogarithmicMixing.step_weights`.

    Attributes:
        tensors: `Weights.flat`; `named` is the way back.
        summarizer: how the summarizer's weight lies: ``"linear"`` ``[G, 2C, C]``, ``"pair"`` ``[G·C, C, 2]``
            or ``"separable"`` ``[G, C, C]`` with a scale ``[2, G, C]``, for G groups of C = m·E/G features.
        heads: H.
        expand: k of the expander, 0 without one.
        block: what a block puts around the mixing, as `Around.of_tensors` takes it.
        eps: of each norm.
    """

    tensors: tuple[Tensor, ...]
    summarizer: str
    heads: int
    expand: int
    block: tuple[Tensor, ...] = ()
    eps: tuple[float, ...] = ()

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (*self.tensors, *self.block))
        return f"StepWeights({self.summarizer}, heads={self.heads}, expand={self.expand}, tensors of {shapes})"

    def named(self) -> Weights:
        """The tensors by name.

        Raises:
            ValueError: no summarizer lies so, or there are more or fewer tensors than one takes.
        """
        if self.summarizer not in ("linear", "pair", "separable"):
            raise ValueError(f"summarizer: expected linear, pair or separable, got {self.summarizer!r}")
        scaled = self.summarizer == "separable"
        plain = 10 + scaled
        if len(self.tensors) not in (plain, plain + 2):
            raise ValueError(f"weights: expected {plain} or {plain + 2} tensors, got {len(self.tensors)}")
        q, k, v, out, summarizer = (Linear(*self.tensors[i : i + 2]) for i in range(0, 10, 2))
        expander = Linear(*self.tensors[plain:]) if len(self.tensors) > plain else None
        return Weights(q, k, v, out, summarizer, self.tensors[10] if scaled else None, expander)


def merge_of(weights: Weights, summarizer: str, bank: int) -> Merge:
    """The merge of two stacks ``[P, h, m, E]`` that a summarizer's tensors stand for, expander included.

    ``"linear"``: weight ``[G, 2C, C]``; ``"pair"``: weight ``[G·C, C, 2]``, that of `torch.nn.Conv1d`;
    ``"separable"``: weight ``[G, C, C]`` and a scale ``[2, G, C]``. The bias has G·C elements each time.
    """
    weight, bias = weights.summarizer
    size = bank * weights.q.weight.shape[0]
    if summarizer == "pair":
        groups = size // weight.shape[1]
        weight = weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2)
    groups, features = weight.shape[0], weight.shape[2]
    scale = None if weights.scale is None else weights.scale.reshape(2, groups, features)
    linear = LinearMerge(weight[:, None], bias.reshape(groups, features), scale)
    expander = weights.expander
    if expander is None:
        return lambda left, right: merge_stacks(linear, left, right)
    return lambda left, right: merge_stacks(linear, expand_stack(left, *expander), expand_stack(right, *expander))


def chain_of(position: Tensor, levels: int) -> int:
    """The highest level that any row completes at ``position [B]``; what there is room for where reading it costs."""
    if not concrete(position):
        return levels
    return int((position & -position).max()).bit_length() - 1 if position.numel() else 0


def check_room(position: Tensor, tokens: int, levels: int) -> None:
    """Whether so many levels have room for ``tokens`` more behind ``position [N]``.

    Raises:
        RuntimeError: they have not.
    """
    last, capacity = (int(position.max()) + tokens if position.numel() else 0), (2 << levels) - 1
    if last > capacity:
        raise RuntimeError(
            f"state: exhausted: expected positions of at most {capacity}, got {last}; state.with_room(n) makes more"
        )


def each_token_(
    x: Tensor,
    slots: Tensor | None,
    state: Slots,
    levels: int,
    take: Callable[[Tensor, Slots], tuple[Tensor | None, Slots]],
) -> Tensor:
    """``take`` one token after the other of the rows that have a slot, and put what it returns in its place.

    A row without room keeps its state, and its output is NaN, where positions cannot be read at no cost.

    Args:
        x, slots, state: those of `run_`.
        levels: that the state has room for.
        take: tokens ``[N, E]`` and the state before them → outputs ``[N, E]``, or None for zeros, and the state after.

    Raises:
        RuntimeError: a row has no room for its tokens; nothing has changed.
    """
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    active = torch.arange(x.shape[0], device=x.device) if slots is None else (slots >= 0).nonzero().flatten()
    slot = active if slots is None else slots.index_select(0, active).long()
    known = concrete(state.position)
    if known:
        check_room(state.position.index_select(0, slot), x.shape[1], levels)
    for t in range(x.shape[1]):
        old = Slots(*(part.index_select(0, slot) for part in state))
        y_t, new = take(x[:, t].index_select(0, active), old)
        if not known:
            full = old.position >= (2 << levels) - 1
            pairs = zip(old, new, strict=True)
            new = Slots(*(torch.where(full.view(-1, *[1] * (a.dim() - 1)), a, b.to(a.dtype)) for a, b in pairs))
            y_t = None if y_t is None else y_t.masked_fill(full[:, None], math.nan)
        for part, value in zip(state, new, strict=True):
            part.index_copy_(0, slot, value)
        if y_t is not None:
            y[:, t].index_copy_(0, active, y_t.to(y.dtype))
    return y


def run_(x: Tensor, slots: Tensor | None, state: Slots, weights: StepWeights, attends: bool) -> Tensor:
    """T tokens of each row into a pool of states, in place; see ``lmn_kernels.decode_`` and ``update_``.

    Args:
        x: ``[B, T, E]``.
        slots: ``[B]`` the slot of each row, -1 for none; None for the row's own number.
        attends: whether the output is wanted; zeros where it is not.
    """
    named, expand = weights.named(), weights.expand
    around = Around.of_tensors(weights.block, weights.eps)
    bank, rows = state.nodes.shape[2], state.nodes.shape[1]
    levels = 0
    while state_rows(levels, expand) < rows:
        levels += 1
    merge = merge_of(named, weights.summarizer, bank)

    def project(nodes: Tensor) -> Tensor:
        return torch.cat([F.linear(nodes, *named.q), F.linear(nodes, *named.v)], -1)

    def take(given: Tensor, old: Slots) -> tuple[Tensor | None, Slots]:
        token = around.before(given)
        new = advance(token, old, merge, project, expand, chain_of(old.position + 1, levels))
        if not attends:
            return None, new
        qkv = torch.cat([F.linear(token, *pair) for pair in (named.q, named.k, named.v)], -1)
        mixed = attend_state(qkv, new, weights.heads, levels, expand)
        return around.after(given, F.linear(mixed, *named.out)), new

    return each_token_(x, slots, state, levels, take)
