"""Single-vector attention in C++ (csrc/cpu/attention.cpp)."""

from __future__ import annotations

from torch import Tensor

from python_ref.layout import Layout

from .rows import EXTENSION, rows_of


def attend(token_qkv: Tensor, node_qv: Tensor, heads: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """`python_ref.attention.attend`; float32 and bfloat16, any strides."""
    out, lse = EXTENSION.attend(token_qkv, node_qv, heads, rows_of(layout))
    return out, lse


def attend_backward(
    grad_out: Tensor, token_qkv: Tensor, node_qv: Tensor, out: Tensor, lse: Tensor, heads: int, layout: Layout
) -> tuple[Tensor, Tensor]:
    """`python_ref.attention.attend_backward`, which needs no ``out`` here: the weights are made again."""
    grad_tokens, grad_nodes = EXTENSION.attend_backward(grad_out, token_qkv, node_qv, lse, heads, rows_of(layout))
    return grad_tokens, grad_nodes
