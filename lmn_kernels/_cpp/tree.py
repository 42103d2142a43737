"""All nodes of all sequences in C++ (csrc/cpu/tree.cpp)."""

from __future__ import annotations

from torch import Tensor

from python_ref.layout import Layout
from python_ref.tree import LinearMerge

from .rows import EXTENSION, rows_of


def build_tree(
    x: Tensor, summarizer: LinearMerge, bank: int, token: Tensor | None, carried: Tensor | None, layout: Layout
) -> Tensor:
    """`python_ref.tree.build_tree`; float32 and bfloat16, any strides. Rows that hold no node are zero."""
    nodes: Tensor = EXTENSION.build_tree(x, *summarizer, token, carried, rows_of(layout))
    return nodes


def build_tree_backward(
    grad_nodes: Tensor,
    x: Tensor,
    nodes: Tensor,
    summarizer: LinearMerge,
    token: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`python_ref.tree.build_tree_backward`; what the rows that hold no node are given counts for nothing."""
    found = EXTENSION.build_tree_backward(grad_nodes, x, nodes, *summarizer, token, rows_of(layout))
    return (*found,)
