"""Other networks of the same size: attention by its implementation's name, linear attention, GRU and LSTM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from bench.measure.contender import Form, Provider

from . import attention as causal
from . import linear_attention, recurrent
from .problems import Problem
from .shapes import Shape


def at(y: Tensor, positions: Tensor | None) -> Tensor:
    return y if positions is None else y[:, positions]


def rows_of(build: Callable[[Problem], Form]) -> Callable[[Problem], Form]:
    """A form whose ``[B·L, E]`` result is seen as ``[B, L, E]``."""

    def rows(problem: Problem) -> Form:
        form = build(problem)
        shape = problem.shape
        return Form(lambda: cast(Tensor, form.call()).view(shape.batch, shape.length, -1), form.leaves)

    return rows


_SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


def _causal_attention(backend: SDPBackend) -> Callable[[Problem], Form]:
    def build(problem: Problem) -> Form:
        leaves = {"token_qkv": problem.token_qkv}
        return Form(lambda: causal.attention(problem, problem.token_qkv, backend), leaves)

    return build


def _causal_layer(backend: SDPBackend) -> Callable[[Problem], Form]:
    def build(problem: Problem) -> Form:
        sva = problem.layer.sva

        def call() -> Tensor:
            return sva.out_proj(causal.attention(problem, causal.project(problem), backend)).view_as(problem.x)

        return Form(call, {"x": problem.x, **problem.weights})

    return build


def _expected_causal_attention(problem: Problem, positions: Tensor | None) -> Tensor:
    every = torch.arange(problem.shape.length, device=problem.device)
    return causal.definition(problem, problem.token_qkv, every if positions is None else positions)


def _expected_causal_layer(problem: Problem, positions: Tensor | None) -> Tensor:
    every = torch.arange(problem.shape.length, device=problem.device)
    mixed = causal.definition(problem, causal.project(problem), every if positions is None else positions)
    return problem.layer.sva.out_proj(mixed)


def _sdpa_missing(backend: SDPBackend) -> Callable[[Problem], str | None]:
    def missing(problem: Problem) -> str | None:
        if backend == SDPBackend.CUDNN_ATTENTION and problem.device.type != "cuda":
            return "cuDNN serves NVIDIA GPUs alone"
        if backend == SDPBackend.CUDNN_ATTENTION and problem.dtype == torch.float32:
            return "cuDNN's attention takes 16-bit dtypes alone"
        return None

    return missing


def _math_bytes(shape: Shape) -> float:
    """Scores, weights and a gradient."""
    return 2 * 3 * shape.batch * shape.heads * shape.length**2


def _recurrent_module(problem: Problem, kind: type[nn.GRU] | type[nn.LSTM]) -> nn.GRU | nn.LSTM:
    size = problem.shape.embedding
    made = problem.module(kind.__name__, lambda: kind(size, size, batch_first=True))
    return cast("nn.GRU | nn.LSTM", made)


def _recurrent(kind: type[nn.GRU] | type[nn.LSTM]) -> Callable[[Problem], Form]:
    def build(problem: Problem) -> Form:
        module = _recurrent_module(problem, kind)
        return Form(lambda: module(problem.x)[0], {"x": problem.x, **dict(module.named_parameters())})

    return build


def _until(problem: Problem, positions: Tensor | None) -> Tensor:
    """The tokens that the results at ``positions`` depend on."""
    return problem.x if positions is None else problem.x[:, : int(positions.max()) + 1]


def _expected_recurrent(kind: type[nn.GRU] | type[nn.LSTM]) -> Callable[[Problem, Tensor | None], Tensor]:
    return lambda problem, positions: at(
        recurrent.definition(_recurrent_module(problem, kind), _until(problem, positions)), positions
    )


def _fla_module(problem: Problem, name: str) -> linear_attention.Layer:
    kind = linear_attention.KINDS[name]
    made = problem.module(name, lambda: linear_attention.Layer(kind, problem.shape.embedding))
    return cast(linear_attention.Layer, made)


def _fla(name: str) -> Callable[[Problem], Form]:
    def build(problem: Problem) -> Form:
        module = _fla_module(problem, name)
        return Form(lambda: module(problem.x), {"x": problem.x, **dict(module.named_parameters())})

    return build


def _expected_fla(name: str) -> Callable[[Problem, Tensor | None], Tensor]:
    return lambda problem, positions: at(
        _fla_module(problem, name)(_until(problem, positions), literally=True), positions
    )


def _fla_missing(problem: Problem) -> str | None:
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    if problem.device.type != "cuda":
        return "flash-linear-attention's kernels need a GPU"
    return None


def attention_peers() -> list[Provider]:
    """Of the operation ``"attention"``."""
    return [
        Provider(
            name, rows_of(_causal_attention(backend)), _expected_causal_attention, _sdpa_missing(backend),
            ours=False, growth=2, peak_bytes=_math_bytes if backend == SDPBackend.MATH else None,
        )
        for name, backend in _SDPA.items()
    ]  # fmt: skip


def layer_peers() -> list[Provider]:
    """Of the operation ``"layer"``."""
    found = [
        Provider(
            name, _causal_layer(backend), _expected_causal_layer, _sdpa_missing(backend),
            ours=False, growth=2, peak_bytes=_math_bytes if backend == SDPBackend.MATH else None,
        )
        for name, backend in _SDPA.items()
    ]  # fmt: skip
    for name in linear_attention.KINDS:
        found.append(Provider(name, _fla(name), _expected_fla(name), _fla_missing, ours=False, token_by_token=True))
    for name, kind in (("GRU", nn.GRU), ("LSTM", nn.LSTM)):
        found.append(Provider(name, _recurrent(kind), _expected_recurrent(kind), ours=False, token_by_token=True))
    return found
