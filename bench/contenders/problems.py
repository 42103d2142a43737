"""What contenders of our network are given: one operation at one shape, its inputs, and their float64 twins."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from bench.measure.contender import BaseProblem
from lmn_kernels import LogarithmicMixing, build_tree
from lmn_kernels.layers.summarizers import Summarizer
from python_ref.layout import Layout, make_layout
from python_ref.sequences import Sequences
from python_ref.tree import LinearMerge

from .shapes import Shape

OPERATIONS = ("tree", "projections", "attention", "output", "layer")


class Problem(BaseProblem):
    """An operation of a Logarithmic Memory Network, one of `OPERATIONS`.

    Attributes:
        layer: the mixing layer, whose weights every contender of our own network shares.
        x: ``[B, L, E]``.
        nodes: ``[m, rows, E]`` for ``"projections"``; token_qkv ``[B·L, 3E]`` and node_qv ``[m, rows, 2E]``
            for ``"attention"``; mixed ``[B·L, E]`` for ``"output"``; leaves like x.
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
        self.mixed = self._leaf(torch.randn_like(self.x.flatten(0, 1))) if operation == "output" else self.x
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
        out = self.layer.sva.out_proj
        projections = {name: weight for name, weight in self.weights.items() if not name.startswith("out_proj")}
        return {
            "tree": {"x": self.x, **tree},
            "projections": {"x": self.x, "nodes": self.nodes, **projections},
            "attention": {"token_qkv": self.token_qkv, "node_qv": self.node_qv},
            "output": {"mixed": self.mixed, "out_proj.weight": out.weight, "out_proj.bias": out.bias},
            "layer": {"x": self.x, **tree, **self.weights},
        }[self.operation]

    def exact(self, dtype: torch.dtype = torch.float64) -> Problem:
        twin = super().exact(dtype)
        twin.layer = copy.deepcopy(self.layer).to(dtype)
        twin.layer.backend = "reference"
        for name in ("x", "nodes", "token_qkv", "node_qv", "mixed"):
            setattr(twin, name, self._leaf(getattr(self, name).to(dtype)))
        return twin
