"""One token per row (section 3): the bitmask rule, and attention over the cached slots.

A state holds, per row, the position n, the newest token, and the newest node of levels 1 … D with its
q and v. The invariant: the rows of level i hold ``node(i, (n >> i) - 1)`` and count once 2^i ≤ n. On a
new token, level i is summarised again iff bit i of ``(n-1) XOR n`` is set, that is iff 2^i divides n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .around import Around
from .checks import concrete
from .layout import constant, last_position, level_count, levels_in, stack_height, state_rows
from .tree import LinearMerge, expand_stack, merge_stacks

Merge = Callable[[Tensor, Tensor], Tensor]
Project = Callable[[Tensor], Sequence[Tensor]]


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


def check_room(position: Tensor, tokens: int, levels: int) -> None:
    """Whether so many levels have room for ``tokens`` more behind ``position [N]``.

    Raises:
        RuntimeError: they have not.
    """
    _check_last(int(position.max()) + tokens if position.numel() else 0, levels)


def _check_last(last: int, levels: int) -> None:
    if last > (capacity := last_position(levels)):
        raise RuntimeError(
            f"state: exhausted: expected positions of at most {capacity}, got {last}; state.with_room(n) makes more"
        )


class Turn(NamedTuple):
    """Where the rows of a batch stand, a new token counted.

    Attributes:
        position: ``[B]`` int64.
        chain: the highest level that any row may complete; what is above stays.
        shared: the position of every row, where they stand at the same one and reading it costs nothing: then each
            completes the levels up to ``chain``, and reads the same slots. Else 0.
    """

    position: Tensor
    chain: int
    shared: int

    @classmethod
    def of(cls, position: Tensor, levels: int) -> Turn:
        """At ``position [B]``; without reading it, rows may complete any level that there is room for.

        Raises:
            RuntimeError: there is no room for them, where they can be read.
        """
        if not concrete(position):
            return cls(position, levels, 0)
        rows = position.tolist()
        _check_last(max(rows, default=0), levels)
        if rows and rows.count(rows[0]) == len(rows):
            return cls(position, (rows[0] & -rows[0]).bit_length() - 1, rows[0])
        return cls(position, int((position & -position).max()).bit_length() - 1 if rows else 0, 0)

    def completes(self, level: int) -> Tensor:
        """``[B]``: whether a row completes a level."""
        return ((self.position - 1) ^ self.position) >> level & 1 > 0


def update(
    x: Tensor,
    token: Tensor,
    nodes: Tensor,
    merge: Merge,
    expand: int,
    turn: Turn,
) -> list[Tensor]:
    """Summarise again what the new tokens complete.

    Args:
        x: ``[B, E]`` the new tokens.
        token: ``[B, E]`` the tokens before them.
        nodes: ``[B, R, m, E]`` the newest nodes before them, level after level.
        merge: two stacks ``[B, h, m, E]`` → ``[B, h+k, m, E]``.
        expand: k.
        turn: where the rows stand.

    Returns:
        For levels 1 … chain the level's stack ``[B, 1+i·k, m, E]``.
    """
    bank, base, levels = nodes.shape[2], 0, []
    left = token[:, None, None, :].expand(-1, 1, bank, -1)
    new = x[:, None, None, :].expand(-1, 1, bank, -1)
    for level in range(1, turn.chain + 1):
        height = stack_height(level, expand)
        old, merged = nodes[:, base : base + height], merge(left, new)
        new = merged if turn.shared else torch.where(turn.completes(level)[:, None, None, None], merged, old)
        levels.append(new)
        left, base = old, base + height
    return levels


def advance(x: Tensor, old: Slots, merge: Merge, project: Project | None, expand: int, turn: Turn) -> Slots:
    """The state after the tokens ``x [B, E]``; it shares no storage with the old one.

    Args:
        merge, expand, turn: those of `update`.
        project: nodes ``[…, E]`` → their q and v, each ``[…, E]``; None for a state in which these are nobody's yet,
            and are the old one's.
    """
    token = x.to(old.token.dtype, copy=True)
    if not turn.chain:
        qv = (old.q, old.v) if project is None else (old.q.clone(), old.v.clone())
        return Slots(turn.position, token, old.nodes.clone(), *qv)
    levels = update(x, old.token.to(x.dtype), old.nodes.to(x.dtype), merge, expand, turn)
    fresh = levels[0] if len(levels) == 1 else torch.cat(levels, 1)
    count, changed = fresh.shape[1], None
    if not turn.shared:
        flags = (turn.completes(i)[:, None].expand(-1, stack.shape[1]) for i, stack in enumerate(levels, 1))
        changed = torch.cat(list(flags), 1)[..., None, None]

    def over(new: Tensor, kept: Tensor) -> Tensor:
        new = new.to(kept.dtype)
        if changed is not None:
            new = torch.where(changed, new, kept[:, :count])
        return torch.cat([new, kept[:, count:]], 1)

    nodes = over(fresh, old.nodes)
    if project is None:
        return Slots(turn.position, token, nodes, old.q, old.v)
    q, v = project(fresh)
    return Slots(turn.position, token, nodes, over(q, old.q), over(v, old.v))


def attend_slots(k: Tensor, q: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """Section 4 for one position per row.

    Args:
        k: ``[B, E]`` of the current token.
        q, v: ``[B, S, E]`` of the slots.
        valid: ``[B, S]``, at least one True in each row; all where None.
        heads: H.

    Returns:
        ``[B, E]`` in the dtype of ``k``; computed in float32 at least.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    size = k.shape[-1] // heads
    q, v = (part.to(wide).unflatten(-1, (heads, size)) for part in (q, v))
    # Sums of products: for vectors cheaper than a product of matrices, and no region of autocast narrows them.
    score = (q * k.to(wide).view(-1, 1, heads, size)).sum(-1) * size**-0.5
    if valid is not None:
        score = score.masked_fill(~valid[..., None], -math.inf)
        v = v.masked_fill(~valid[:, :, None, None], 0)  # which may be NaN, and 0 · NaN is NaN
    weight = torch.softmax(score, 1)
    return (weight[..., None] * v).sum(1).flatten(1).to(k.dtype)


def attend_state(own: tuple[Tensor, ...], state: Slots, heads: int, levels: int, expand: int, turn: Turn) -> Tensor:
    """`attend_slots` of the newest tokens, of which q, k and v are ``own``, each ``[B, E]``, over a state."""
    (q, k, v), bank = own, state.nodes.shape[2]
    rows, valid = state.q.shape[1], None
    if turn.shared:
        rows = state_rows(level_count(turn.shared), expand)
    else:
        valid = valid_rows(state.position, levels, expand).repeat_interleave(bank, 1)
        valid = F.pad(valid, (1, 0), value=True)

    def slots(newest: Tensor, kept: Tensor) -> Tensor:
        kept = kept if rows == kept.shape[1] else kept[:, :rows]
        newest = newest if newest.dtype == kept.dtype else newest.to(kept.dtype)
        return torch.cat([newest.unsqueeze(1), kept.flatten(1, 2)], 1)

    return attend_slots(k, slots(q, state.q), slots(v, state.v), valid, heads)


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

    def merge(left: Tensor, right: Tensor) -> Tensor:
        weight, bias = weights.summarizer
        if summarizer == "pair":
            groups = bank * left.shape[3] // weight.shape[1]
            weight = weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2)
        groups, features = weight.shape[0], weight.shape[2]
        scale = None if weights.scale is None else weights.scale.reshape(2, groups, features)
        if weights.expander is not None:
            left, right = expand_stack(left, *weights.expander), expand_stack(right, *weights.expander)
        return merge_stacks(LinearMerge(weight.unsqueeze(1), bias.reshape(groups, features), scale), left, right)

    return merge


class TokenStep:
    """A layer's weights made ready to take tokens: nothing here is a copy or a view of one."""

    def __init__(self, weights: StepWeights, bank: int):
        self.heads, self.expand = weights.heads, weights.expand
        self.around, self.named = Around.of_tensors(weights.block, weights.eps), weights.named()
        self.merge = merge_of(self.named, weights.summarizer, bank)

    def project(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(nodes, *self.named.q), F.linear(nodes, *self.named.v)

    def take(self, x: Tensor, old: Slots, levels: int) -> Slots:
        """`advance` by tokens ``x [B, E]`` as the mixing sees them, without q and v."""
        return advance(x, old, self.merge, None, self.expand, Turn.of(old.position + 1, levels))

    def __call__(self, x: Tensor, old: Slots, levels: int, attends: bool = True) -> tuple[Tensor, Slots]:
        """One token a row, ``x [B, E]``, and the state before it → ``y [B, E]``, zeros unless it ``attends``, and the
        state after it."""
        turn, token, named = Turn.of(old.position + 1, levels), self.around.before(x), self.named
        new = advance(token, old, self.merge, self.project, self.expand, turn)
        if not attends:
            return torch.zeros_like(x), new
        own = F.linear(token, *named.q), F.linear(token, *named.k), F.linear(token, *named.v)
        mixed = attend_state(own, new, self.heads, levels, self.expand, turn)
        return self.around.after(x, F.linear(mixed, *named.out)), new


def each_token_(
    x: Tensor, slots: Tensor | None, state: Slots, levels: int, take: Callable[[Tensor, Slots], tuple[Tensor, Slots]]
) -> Tensor:
    """``take`` one token after the other of the rows that have a slot, and put what it returns in its place.

    A row without room keeps its state, and its output is NaN, where positions cannot be read at no cost.

    Args:
        x, slots, state: those of `run_`.
        levels: that the state has room for.
        take: tokens ``[N, E]`` and the state before them → outputs ``[N, E]`` and the state after.

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
            full = old.position >= last_position(levels)
            pairs = zip(old, new, strict=True)
            new = Slots(*(torch.where(full.view(-1, *[1] * (a.dim() - 1)), a, b.to(a.dtype)) for a, b in pairs))
            y_t = y_t.masked_fill(full[:, None], math.nan)
        for part, value in zip(state, new, strict=True):
            part.index_copy_(0, slot, value)
        y[:, t].index_copy_(0, active, y_t.to(y.dtype))
    return y


def run_(x: Tensor, slots: Tensor | None, state: Slots, weights: StepWeights, attends: bool) -> Tensor:
    """T tokens of each row into a pool of states, in place; see ``lmn_kernels.decode_`` and ``update_``.

    Args:
        x: ``[B, T, E]``.
        slots: ``[B]`` the slot of each row, -1 for none; None for the row's own number.
        attends: whether the output is wanted; zeros where it is not.
    """
    levels = levels_in(state.nodes.shape[1], weights.expand)
    step = TokenStep(weights, state.nodes.shape[2])
    return each_token_(x, slots, state, levels, lambda given, old: step(given, old, levels, attends))
