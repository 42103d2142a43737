"""The public operations of the sequential form: tokens into a pool of states, in place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from python_ref import step as reference
from python_ref.checks import check_device, check_float, check_ids, check_shape, check_tensor, concrete
from python_ref.layout import stack_height
from python_ref.step import StepWeights, Weights

from ..backend import env
from ..backend.choice import declare, functional, resolve, wanted
from ..states.memory import MemoryState
from .library import OPS, register


def keeps(device_type: str, dtype: torch.dtype, state_dtype: torch.dtype) -> bool:
    """Whether the extension takes tokens of a dtype into a state of another."""
    return state_dtype in (torch.float32, dtype) or (device_type == "cpu" and state_dtype == torch.bfloat16)


def update_(
    x: Tensor, state: MemoryState, weights: StepWeights, *, slots: Tensor | None = None, backend: str = "auto"
) -> None:
    """Take tokens into a pool of states, in place (docs/definition.md, section 3).

    Level i of a row is summarised again iff bit i of ``(n-1) XOR n`` is set; everything else stays as it is,
    to the bit. What is new is projected to its q and v.

    Args:
        x: ``[B, T, E]``, T tokens a row.
        state: a pool of P slots with room for the new positions (``with_room``), outside of any graph.
        weights: of the layer.
        slots: ``[B]`` int32 or int64, the slot of each row, or -1 for a row that takes no part; distinct. None
            for row b in slot b.
        backend: ``"auto"``, ``"reference"`` or ``"cpp"``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a slot or the name of the backend is wrong.
        RuntimeError: a row has no room for its tokens (on the CPU: nothing has changed then; on CUDA, where
            positions are not read back, the row's slot stays as it is and its output is NaN); or gradients
            would be lost.
        BackendError: the named backend cannot serve the call.
    """
    _run("update_", x, state, weights, slots, backend)


def decode_(
    x: Tensor, state: MemoryState, weights: StepWeights, *, slots: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Take tokens into a pool of states, in place, and attend at each of them (docs/definition.md, sections 3 and 4).

    Arguments and errors are those of `update_`.

    Returns:
        ``[B, T, E]`` in the dtype of x: the mixing layer's output, or the block's; 0 for rows whose slot is -1.
    """
    y: Tensor = _run("decode_", x, state, weights, slots, backend)
    return y


def _run(name: str, x: Tensor, state: MemoryState, weights: StepWeights, slots: Tensor | None, backend: str) -> Any:
    check_tensor("x", x)
    if not isinstance(state, MemoryState):
        raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
    if state.expand != weights.expand:
        raise ValueError(f"state: expected one with expand={weights.expand}, got {state.expand}")
    if slots is not None:
        # Before the dispatcher: of a device without values (meta) it would run nothing, and say nothing.
        check_tensor("slots", slots)
        check_device("slots", slots, x.device)
    asked = wanted(backend, "step")
    unfit = asked == "auto" and not keeps(x.device.type, x.dtype, state.token.dtype)
    if unfit or functional(backend, "step") or resolve(backend, "step", x.device, x.dtype) == "reference":
        _check(x, state, weights, slots)
        run = _REFERENCE[name]
    else:
        if x.is_cuda and env.debug():
            check_rows(x, state, slots)
        run = getattr(OPS, name).default  # checks for itself, as nothing here would be cheap beside it
    y = run(x, slots, *state.slots(), *weights)
    state.note_tokens(x.shape[1])
    return y


def _check(x: Tensor, state: MemoryState, weights: StepWeights, slots: Tensor | None) -> None:
    """What csrc/register.cpp checks, for the reference."""
    check_float("x", x)
    check_shape("x", x, (None, None, None), "[batch, tokens, embedding]")
    size, bank = x.shape[2], state.nodes.shape[2]
    state.check_for(state.batch_size, size, bank, weights.expand, x.device)
    named = weights.named()
    for name, tensor in (*_mixing(named), *_block(weights)):
        check_float(name, tensor, x.dtype)
        check_device(name, tensor, x.device)
    if weights.heads < 1 or size % weights.heads:
        raise ValueError(f"heads: expected a divisor of embedding={size}, got {weights.heads}")
    _check_mixing(named, weights, size, bank)
    _check_block(weights, size)
    check_rows(x, state, slots)


def check_rows(x: Tensor, state: MemoryState, slots: Tensor | None) -> None:
    """Distinct slots, read where they lie on a CPU; for `env.debug` off any device, and whether they have room."""
    rows, pool = x.shape[0], state.batch_size
    position = state.position
    if slots is None:
        if rows != pool:
            raise ValueError(f"x: expected a row for each of {pool} slots, got {rows}")
    else:
        check_tensor("slots", slots)
        check_device("slots", slots, x.device)
        slots = slots.cpu() if env.debug() else slots
        check_ids("slots", slots, (rows,), -1, pool - 1)
        if not concrete(slots):
            return
        taken = slots[slots >= 0]
        if len(taken.unique()) != len(taken):
            raise ValueError(f"slots: expected each slot at most once, got {slots.tolist()}")
        position = position[taken.to(position.device).long()]
    if env.debug():
        reference.check_room(position.cpu(), x.shape[1], state.levels)


def _mixing(named: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a mixing layer and what it is called in a message."""
    projections = {"q": named.q, "k": named.k, "v": named.v, "out_proj": named.out, "summarizer": named.summarizer}
    for name, pair in (projections | ({} if named.expander is None else {"expander": named.expander})).items():
        yield f"{name}.weight", pair.weight
        yield f"{name}.bias", pair.bias
    if named.scale is not None:
        yield "summarizer.scale", named.scale


def _check_mixing(named: Weights, weights: StepWeights, size: int, bank: int) -> None:
    features, (weight, _) = bank * size, named.summarizer
    check_shape("summarizer.weight", weight, (None, None, None))
    pair = weights.summarizer == "pair"
    groups = features // max(weight.shape[1], 1) if pair else weight.shape[0]
    if groups < 1 or bank % groups:
        raise ValueError(f"summarizer.weight: expected a divisor of bank={bank} groups, got {list(weight.shape)}")
    c = features // groups
    shapes: dict[str, tuple[int, ...]] = {
        "summarizer.weight": (features, c, 2) if pair else (groups, c if named.scale is not None else 2 * c, c),
        "expander.weight": (size, size, 1 + weights.expand),
        "expander.bias": (size,),
    }
    for name in ("q", "k", "v", "out_proj"):
        shapes |= {f"{name}.weight": (size, size), f"{name}.bias": (size,)}
    counts = {"summarizer.bias": features, "summarizer.scale": 2 * features}  # of any shape
    for name, tensor in _mixing(named):
        if name in shapes:
            check_shape(name, tensor, shapes[name])
        elif tensor.numel() != counts[name]:
            raise ValueError(f"{name}: expected {counts[name]} elements, got shape {list(tensor.shape)}")
    if named.expander is None and weights.expand:
        raise ValueError(f"expand: expected 0 without an expander, got {weights.expand}")


def _block(weights: StepWeights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of what stands around the mixing and what it is called in a message."""
    names = ("norm1.weight", "norm2.weight", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return zip(names, weights.block, strict=False)


def _check_block(weights: StepWeights, size: int) -> None:
    block, eps = weights.block, weights.eps
    if len(block) not in (0, 1, 6):
        raise ValueError(f"block: expected 0, 1 or 6 tensors, got {len(block)}")
    if len(eps) != min(len(block), 2):
        raise ValueError(f"eps: expected {min(len(block), 2)} numbers, got {len(eps)}")
    width = block[2].shape[0] if len(block) == 6 and block[2].dim() else 0
    shapes = ((size,), (size,), (width, size), (width,), (size, width), (size,))
    for (name, tensor), shape in zip(_block(weights), shapes, strict=False):
        check_shape(name, tensor, shape)


# One token or several of each row into a pool of states (python_ref.step). No gradients.
_WEIGHTS = "Tensor[] weights, str summarizer, int heads, int expand, Tensor[] block, float[] eps"
_SLOTS = ", ".join(f"Tensor({mark}!) {name}" for mark, name in zip("abcde", reference.Slots._fields, strict=True))
_STATE = ", ".join(f"Tensor {name}" for name in reference.Slots._fields)
_PARTS = len(reference.Slots._fields)


def _take(attends: bool, x: Tensor, slots: Tensor | None, given: tuple[Any, ...]) -> Tensor:
    state, weights = reference.Slots(*given[:_PARTS]), StepWeights(*given[_PARTS:])
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, *state[1:], *weights.tensors, *weights.block)
    ):
        raise RuntimeError("the step's operations record no gradients: call them under torch.no_grad()")
    return reference.run_(x, slots, state, weights, attends)


def _update(x: Tensor, slots: Tensor | None, *given: Any) -> None:
    _take(False, x, slots, given)


def _decode(x: Tensor, slots: Tensor | None, *given: Any) -> Tensor:
    return _take(True, x, slots, given)


def _step(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    state = [part.clone(memory_format=torch.contiguous_format) for part in given[:_PARTS]]
    return (_decode(x, None, *state, *given[_PARTS:]), *state)


def _update_flops(x: Any, slots: Any, *given: Any, **_: Any) -> int:
    """Of tokens that complete a node of every level: each merged, and projected to q and v."""
    (batch, tokens, size), state, weights = x, reference.Slots(*given[:_PARTS]), StepWeights(*given[_PARTS:])
    named, (_, rows, bank, _), expand = weights.named(), state.nodes, weights.expand
    flops, base, level = 0, 0, 1
    while base < rows:
        below, height = (stack_height(i, expand) for i in (level - 1, level))
        taps = 0 if named.expander is None else math.prod(named.expander.weight)
        flops += 2 * height * math.prod(named.summarizer.weight) + 2 * 2 * below * bank * taps
        base, level = base + height, level + 1
    count: int = batch * tokens * (flops + 2 * 2 * rows * bank * size**2)
    return count


def _decode_flops(x: Any, slots: Any, *given: Any, **_: Any) -> int:
    """`_update_flops`, the token's projections, attention over all slots, and a block's feed-forward."""
    (batch, tokens, size), (_, rows, bank, _), block = x, given[2], given[_PARTS + 4]
    token = 2 * 4 * size**2 + 4 * size * (1 + rows * bank) + 2 * sum(map(math.prod, block[2::2]))
    count: int = batch * tokens * token + _update_flops(x, slots, *given)
    return count


def _step_flops(x: Any, *given: Any, **_: Any) -> int:
    return _decode_flops(x, None, *given)


declare("step", cpp=("cpu", "cuda"))
# By name, also where the extension has taken the reference's place.
_REFERENCE = {
    "update_": register(
        f"update_(Tensor x, Tensor? slots, {_SLOTS}, {_WEIGHTS}) -> ()",
        _update,
        lambda x, *_: None,
        flops=_update_flops,
    ),
    "decode_": register(
        f"decode_(Tensor x, Tensor? slots, {_SLOTS}, {_WEIGHTS}) -> Tensor",
        _decode,
        lambda x, *_: x.new_empty(x.shape),
        flops=_decode_flops,
    ),
}
register(
    f"step(Tensor x, {_STATE}, {_WEIGHTS}) -> ({', '.join(['Tensor'] * (1 + _PARTS))})",
    _step,
    lambda *given: tuple(part.new_empty(part.shape) for part in given[: 1 + _PARTS]),
    flops=_step_flops,
)
