"""What the kinds of state have in common: fields that are set once, and a tree of tensors that torch's tools walk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, KeyEntry, register_pytree_node

from python_ref.checks import check_float, check_ids, check_positive, check_tensor

Kind = TypeVar("Kind", bound="State")


class State:
    """Fields in the order of the constructor's arguments, of which nobody assigns another.

    No dataclass: FSDP's and others' casts rebuild every dataclass that they meet around cast copies of its tensors.
    What is written into those is lost, and what must stay float32 does not.
    """

    FIELDS: ClassVar[tuple[str, ...]]

    @property
    def batch_size(self) -> int:
        raise NotImplementedError

    def _map(self: Kind, function: Callable[[Tensor], Tensor]) -> Kind:
        """The state of what a function makes of each tensor."""
        raise NotImplementedError

    def reorder(self: Kind, index: Tensor) -> Kind:
        """Rows ``index [B']`` (int32 or int64, 0 … B-1) of the batch, in that order; for beams and slots."""
        check_tensor("index", index)
        check_ids("index", index, tuple(index.shape[:1]), 0, self.batch_size - 1)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def repeat_interleave(self: Kind, repeats: int) -> Kind:
        """Each row ``repeats`` ≥ 0 times, one behind the other: a prompt's beams."""
        repeats = check_positive("repeats", repeats, 0)
        return self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def clone(self: Kind) -> Kind:
        """A copy that shares no storage; gradients flow through."""
        return self._map(torch.clone)

    def pin_memory(self: Kind) -> Kind:
        """A copy in page-locked memory, from where ``to("cuda", non_blocking=True)`` does not wait."""
        # Of what lies there already, `Tensor.pin_memory` is no copy.
        return self._map(lambda tensor: (tensor.clone() if tensor.is_pinned() else tensor).pin_memory())

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot assign to field {name!r} of a {type(self).__name__}; replace({name}=…) copies it")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"cannot delete field {name!r} of a {type(self).__name__}")

    def __reduce__(self) -> tuple[Any, ...]:
        # By the constructor, which is what torch.load(weights_only=True) admits.
        return type(self), self._values()

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """Of a file that was written when states were dataclasses."""
        self.__init__(**fields)  # type: ignore[misc]

    def replace(self: Kind, **changes: Any) -> Kind:
        """The state with other values in some of its fields, which are not checked."""
        return type(self)(**(dict(zip(self.FIELDS, self._values(), strict=True)) | changes))

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.FIELDS)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)


class Place(NamedTuple):
    """Where `to` takes a state; None for where or what it is."""

    device: torch.device | str | int | None
    dtype: torch.dtype | None
    non_blocking: bool

    @classmethod
    def of(
        cls, given: tuple[Any, ...], device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Place:
        """That of the arguments of `torch.Tensor.to`: a device, a dtype, both, or a tensor that has both.

        Raises:
            TypeError: they are something else, or the dtype is not a floating one.
        """
        found: dict[str, list[Any]] = {"device": [device], "dtype": [dtype]}
        for value in given:
            if isinstance(value, torch.dtype):
                found["dtype"].append(value)
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                found["device"].append(value)
            elif isinstance(value, Tensor):
                found["device"].append(value.device)
                found["dtype"].append(value.dtype)
            elif value is not None:
                raise TypeError(f"to: expected a device, a dtype, both, or a tensor, got {type(value).__name__}")
        named = {name: [value for value in values if value is not None] for name, values in found.items()}
        for name, values in named.items():
            if len(values) > 1:
                raise TypeError(f"{name}: expected one, got {', '.join(map(str, values))}")
        kind = named["dtype"][0] if named["dtype"] else None
        if kind is not None and not kind.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {kind}")
        return cls(named["device"][0] if named["device"] else None, kind, non_blocking)

    def take(self, tensor: Tensor, least: torch.dtype | None = None, copy: bool = False) -> Tensor:
        """The tensor there, integers as they are; in ``least`` where the dtype holds less than that."""
        dtype = self.dtype if tensor.is_floating_point() else None
        if dtype is not None and least is not None:
            dtype = torch.promote_types(dtype, least)
        return tensor.to(device=self.device, dtype=dtype, non_blocking=self.non_blocking, copy=copy)


def check_states(states: Any, kind: type[Kind], same: Callable[[Kind], dict[str, Any]]) -> list[Kind]:
    """``states`` to `cat` as a list, where there are some and ``same`` of each is that of the first.

    Raises:
        TypeError: an element is no such state.
        ValueError: there is none, or one does not fit the first; the message names it.
    """
    found = list(states)
    if not found:
        raise ValueError("states: expected at least one, got none")
    for index, state in enumerate(found):
        if not isinstance(state, kind):
            raise TypeError(f"states[{index}]: expected a {kind.__name__}, got {type(state).__name__}")
        for name, value in same(state).items():
            if value != (expected := same(found[0])[name]):
                raise ValueError(f"states[{index}]: expected {name} {expected} of states[0], got {value}")
    return found


def check_wide(name: str, value: Tensor) -> None:
    """Whether a tensor is in float32 or float64.

    Raises:
        TypeError: it is of another dtype.
    """
    check_float(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, as the state's own to() keeps it, got {value.dtype}")


def register(
    kind: type[Kind],
    children: Iterable[str],
    context: Callable[[Kind], Any],
    build: Callable[[Iterable[Any], Any], Kind],
    load_context: Callable[[Any], Any],
) -> None:
    """Make a kind of state a pytree with keys, and one that ``torch.load(weights_only=True)`` loads.

    Args:
        children: the fields that hold tensors.
        context: what else a state consists of; comparing equal where a program traced with one takes the other.
        build: the state of children and a context; unchecked, as a tree's leaves may be anything.
        load_context: what JSON makes of a context, as one.
    """
    names = tuple(children)

    def flatten(state: Kind) -> tuple[list[Any], Any]:
        return [getattr(state, name) for name in names], context(state)

    def flatten_with_keys(state: Kind) -> tuple[list[tuple[KeyEntry, Any]], Any]:
        return [(GetAttrKey(name), getattr(state, name)) for name in names], context(state)

    register_pytree_node(
        kind,
        flatten,
        build,
        serialized_type_name=f"lmn_kernels.{kind.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=load_context,
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([kind])
