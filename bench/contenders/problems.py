"""What the contenders of a comparison are given: one operation at one shape, its inputs, and their float64 twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lmn_kernels import LogarithmicMixing, build_tree
from lmn_kernels.layers.summarizers import Summarizer
from python_ref.layout import Layout, make_layout
from python_ref.sequences import Sequences
from python_ref.tree import LinearMerge

from .shapes import Shape, Size

OPERATIONS = ("tree", "projections", "attention", "layer")

Outputs = Tensor | tuple[Tensor, ...]
Kind = TypeVar("Kind", bound="BaseProblem")


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

    def exact(self: Kind) -> Kind:
        """The same numbers in float64, served by the reference."""
        twin = copy.copy(self)
        twin.dtype, twin.backend = torch.float64, "reference"
        twin._modules = {name: copy.deepcopy(module).double() for name, module in self._modules.items()}
        return twin

    def shortened(self: Kind, length: int) -> Kind:
        """The same operation on rows of at most ``length`` tokens."""
        shape = replace(self.shape, length=min(length, self.shape.length))
        return type(self)(self.operation, shape, self.dtype, self.device, self.backend)


class Problem(BaseProblem):
    """An operation of a Logarithmic Memory Network, one of `OPERATIONS`.

    Attributes:
        layer: the mixing layer, whose weights every contender of our own network shares.
        x: ``[B, L, E]``.
        nodes: ``[m, rows, E]`` for ``"projections"``; token_qkv ``[B·L, 3E]`` and node_qv ``[m, rows, 2E]``
            for ``"attention"``; leaves like x.
    """

    example = Shape("", 1, 16, 128, 2, 1)
    shape: Shape

    def __init__(self, operation: str, shape: Shape, dtype: torch.dtype, device: torch.device, backend: str = "auto"):
        super().__init__(operation, shape, dtype, device, backend)
        self.layer = LogarithmicMixing(
            shape.embedding, shape.heads, shape.bank, init="variance_preserving", backend=backend,
            dtype=dtype, device=device,
        )  # fmt: skip
        self.x = self._leaf(torch.randn(shape.batch, shape.length, shape.embedding, dtype=dtype, device=device))
        self.nodes = self.token_qkv = self.node_qv = self.x
        if operation in ("projections", "attention"):
            with torch.no_grad():
                nodes = build_tree(self.x.flatten(0, 1), self.merge, self.sequences, backend=backend)
                qkv, qv = self.layer.sva.token_qkv(self.x.flatten(0, 1)), self.layer.sva.node_qv(nodes)
            self.nodes, self.token_qkv, self.node_qv = (self._leaf(tensor) for tensor in (nodes, qkv, qv))

    @property
    def sequences(self) -> Sequences:
        return Sequences.equal(self.shape.batch, self.shape.length)

    @property
    def layout(self) -> Layout:
        return make_layout(self.sequences, 0, self.device)

    @property
    def summarizer(self) -> Summarizer:
        assert isinstance(self.layer.summarizer, Summarizer)
        return self.layer.summarizer

    @property
    def merge(self) -> LinearMerge:
        return self.summarizer.merge()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The projections' weights and biases: ``q.weight``, …, ``out_proj.bias``."""
        return dict(self.layer.sva.named_parameters())

    def leaves(self) -> dict[str, Tensor]:
        """What the operation of our own network is differentiated with respect to."""
        tree = {"summarizer.weight": self.summarizer.weight, "summarizer.bias": self.summarizer.bias}
        projections = {name: weight for name, weight in self.weights.items() if not name.startswith("out_proj")}
        return {
            "tree": {"x": self.x, **tree},
            "projections": {"x": self.x, "nodes": self.nodes, **projections},
            "attention": {"token_qkv": self.token_qkv, "node_qv": self.node_qv},
            "layer": {"x": self.x, **tree, **self.weights},
        }[self.operation]

    def exact(self) -> Problem:
        """The same numbers in float64, served by the reference."""
        twin = super().exact()
        twin.layer = copy.deepcopy(self.layer).double()
        twin.layer.backend = "reference"
        twin.x, twin.nodes, twin.token_qkv, twin.node_qv = (
            self._leaf(tensor.double()) for tensor in (self.x, self.nodes, self.token_qkv, self.node_qv)
        )
        return twin
