"""What a contender is to those who measure: a way of doing an operation, its problem, and the oracle of its result.

The contenders themselves are in `bench.contenders`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

OURS = "ours"

Outputs = Tensor | tuple[Tensor, ...]
Kind = TypeVar("Kind", bound="BaseProblem")


@dataclass(frozen=True)
class Size:
    """A batch of rows of so many tokens; kinds of layers add sizes of their own."""

    name: str
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def elements(self) -> int:
        """Of the rows' activations."""
        raise NotImplementedError(f"{type(self).__name__} must define elements")

    def row(self) -> dict[str, Any]:
        """As rows of results have it."""
        return asdict(self)

    def least_ms(self, operation: str, ways: Sequence[str], rate: float, bandwidth: float, itemsize: int) -> float:
        """Roofline of an operation in the directions ``ways``, every stage at its own."""
        raise NotImplementedError(f"{type(self).__name__} must define least_ms()")


@dataclass
class Form:
    """One way of doing an operation.

    Attributes:
        call: does it; what of its result requires a gradient is differentiated.
        leaves: what the result is differentiated with respect to, by name.
    """

    call: Callable[[], Outputs]
    leaves: dict[str, Tensor]


class BaseProblem:
    """An operation at a shape, its inputs and weights; kinds of networks are subclasses.

    Args:
        operation: its name.
        shape: batch and layer.
        dtype, device: of inputs and weights.
        backend: of our own path, ``"auto"`` or a name.

    Attributes:
        example: a small shape, to ask contenders about.
    """

    example: ClassVar[Size]

    def __init__(self, operation: str, shape: Size, dtype: torch.dtype, device: torch.device, backend: str = "auto"):
        torch.manual_seed(0)
        self.operation, self.shape, self.dtype, self.device, self.backend = operation, shape, dtype, device, backend
        self._modules: dict[str, nn.Module] = {}

    @staticmethod
    def _leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()

    def leaves(self) -> dict[str, Tensor]:
        """What the operation of our own network is differentiated with respect to."""
        raise NotImplementedError(f"{type(self).__name__} must define leaves()")

    def result_dtype(self, index: int) -> torch.dtype:
        """What the ``index``-th result must be typed as."""
        return self.dtype

    def module(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A contender's own module, made once, and copied by `exact`."""
        if name not in self._modules:
            torch.manual_seed(0)
            self._modules[name] = make().to(self.device, self.dtype)
        return self._modules[name]

    def exact(self: Kind, dtype: torch.dtype = torch.float64) -> Kind:
        """The same numbers in a wider dtype, served by the reference."""
        twin = copy.copy(self)
        twin.dtype, twin.backend = dtype, "reference"
        twin._modules = {name: copy.deepcopy(module).to(dtype) for name, module in self._modules.items()}
        return twin

    def shortened(self: Kind, length: int) -> Kind:
        """The same operation on rows of at most ``length`` tokens."""
        shape = replace(self.shape, length=min(length, self.shape.length))
        return type(self)(self.operation, shape, self.dtype, self.device, self.backend)


Oracle = Callable[[Any, Tensor | None], Outputs]


@dataclass(frozen=True)
class Provider:
    """A contender for one operation. Its functions take the kind of problem that the operation has.

    Attributes:
        name: as in tables.
        build: its way of doing the operation.
        oracle: ``(problem in float64, positions [P] or None for all) → what is expected there``.
        missing: why it cannot run here, or None.
        no_training: why it has no backward here, or None.
        ours: whether it computes what our path does, so that our floor is its floor.
        by_position: whether its result is ``[B, L, …]``, so that the oracle may be asked for some positions.
        nodes: where its result is the matrix of a tree's nodes, how many of the rows are nodes.
        token_by_token: whether its oracle is a loop over tokens, and asked for the first of long sequences only.
        growth: power of L with which its time grows.
        peak_bytes: a prediction for bfloat16, from the shape, where it is known to be large.
    """

    name: str
    build: Callable[[Any], Form]
    oracle: Oracle
    missing: Callable[[Any], str | None] = lambda problem: None
    no_training: Callable[[Any], str | None] = lambda problem: None
    ours: bool = True
    by_position: bool = True
    nodes: Callable[[Any], int] | None = None
    token_by_token: bool = False
    growth: float = 1.0
    peak_bytes: Callable[[Any], float] | None = None
