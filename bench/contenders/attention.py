"""Causal attention by ``scaled_dot_product_attention``, its implementation forced by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .problems import Problem


def _heads(problem: Problem, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = problem.shape
    qkv = qkv.view(shape.batch, shape.length, 3, shape.heads, -1)
    q, k, v = (qkv[:, :, part].transpose(1, 2) for part in range(3))
    return q, k, v


def attention(problem: Problem, qkv: Tensor, backend: SDPBackend) -> Tensor:
    """``[B·L, 3E]`` → ``[B·L, E]``."""
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*_heads(problem, qkv), is_causal=True)
    return out.transpose(1, 2).reshape(problem.shape.tokens, -1)


def definition(problem: Problem, qkv: Tensor, positions: Tensor) -> Tensor:
    """The rows of `attention` at ``positions [P]`` (from 0) of every sequence, ``[B, P, E]``, literally."""
    q, k, v = _heads(problem, qkv)
    score = q[:, :, positions] @ k.mT / math.sqrt(q.shape[-1])
    later = torch.arange(problem.shape.length, device=qkv.device) > positions[:, None]
    mixed = torch.softmax(score.masked_fill(later, -math.inf), -1) @ v
    return mixed.transpose(1, 2).flatten(2)


def project(problem: Problem) -> Tensor:
    """q, k and v of every token by one product, ``[B·L, 3E]``; the weights are those of our own layer."""
    return problem.layer.sva.token_qkv(problem.x.flatten(0, 1))
