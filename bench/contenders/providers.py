"""Who can do which operation: our path, other forms of our network, and other networks of the same size.

A provider is built from a `bench.contenders.problems.Problem` for time and for memory alike, and has an oracle, in
float64 and by another route, that its result must agree with before any figure of it counts. What cannot run here says
why. LaMemo's are in `bench.contenders.look_ahead`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from lmn_kernels import attend, build_tree

from . import attention as causal
from . import flex, linear_attention, materialized, node_level, recurrent
from .compiled import compile_whole
from .look_ahead import OPERATIONS as LOOK_AHEAD
from .look_ahead import LookAheadProblem
from .look_ahead import registry as look_ahead_registry
from .problems import OPERATIONS, BaseProblem, Form, Outputs, Problem
from .provider import OURS, Oracle, Provider, compile_mode, no_compiler, ours_missing, own
from .shapes import Shape, naive_peak_bytes

# Tokens of a sequence up to which an oracle may be of the materialising kind.
ANOTHER_ROUTE = 1 << 12


def _at(y: Tensor, positions: Tensor | None) -> Tensor:
    return y if positions is None else y[:, positions]


def _attention_rows(call: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
    return lambda problem: call(problem).view(problem.shape.batch, problem.shape.length, -1)


# Our network, by operation.


def our_tree(problem: Problem) -> Tensor:
    return build_tree(problem.x.flatten(0, 1), problem.merge, problem.sequences, backend=problem.backend)


def _nodes(problem: Problem) -> int:
    # The matrix has a bound of rows, not all of them nodes.
    return problem.layout.unused_base


def our_projections(problem: Problem) -> Outputs:
    sva = problem.layer.sva
    return sva.token_qkv(problem.x.flatten(0, 1)), sva.node_qv(problem.nodes)


def our_attention(problem: Problem) -> Tensor:
    heads, sequences = problem.shape.heads, problem.sequences
    return attend(problem.token_qkv, problem.node_qv, heads, sequences, backend=problem.backend)[0]


def our_layer(problem: Problem) -> Tensor:
    return problem.layer(problem.x)


def _lean_layer(problem: Problem) -> Tensor:
    problem.layer.lean = True
    try:
        return problem.layer(problem.x)
    finally:
        problem.layer.lean = False


def materialized_memory(problem: Problem) -> Tensor:
    return materialized.memory(problem.x, problem.summarizer.weight, problem.summarizer.bias)


def _expected_memory(problem: Problem, positions: Tensor | None) -> Tensor:
    """The memory tensor by its definition: our nodes, gathered."""
    shape, layout = problem.shape, problem.layout
    every = torch.arange(shape.length, device=problem.device)
    chosen = every if positions is None else positions
    sequence = torch.arange(shape.batch, device=problem.device)[:, None].expand(-1, len(chosen))
    row, exists = layout.slots(sequence, (chosen + 1).expand_as(sequence), layout.levels)
    upper = our_tree(problem)[:, row] * exists[..., None]
    return torch.cat([problem.x[:, chosen, None], upper.permute(1, 2, 3, 0, 4).flatten(2, 3)], 2)


def materialized_layer(problem: Problem, mix: Callable[..., Tensor] = materialized.mix) -> Tensor:
    summarizer = problem.summarizer
    return mix(problem.x, summarizer.weight, summarizer.bias, problem.weights, problem.shape.heads)


@functools.lru_cache(maxsize=2)
def _compiled_mix(mode: str | None) -> Callable[..., Tensor]:
    return compile_whole(materialized.mix, mode=mode)


def _compiled_layer(problem: Problem) -> Tensor:
    return materialized_layer(problem, _compiled_mix(compile_mode(problem)))


def _flex_attention(problem: Problem) -> Form:
    keys = flex.slots(problem)
    return Form(lambda: flex.attention(problem, keys, problem.token_qkv, problem.node_qv), problem.leaves())


def _flex_layer(problem: Problem) -> Form:
    keys, sva = flex.slots(problem), problem.layer.sva

    def call() -> Tensor:
        qkv, qv = sva.token_qkv(problem.x.flatten(0, 1)), sva.node_qv(our_tree(problem))
        return sva.out_proj(flex.attention(problem, keys, qkv, qv)).view_as(problem.x)

    return Form(call, problem.leaves())


def _no_flex_backward(problem: Problem) -> str | None:
    return "FlexAttention has no backward on a CPU" if problem.device.type == "cpu" else None


class _Factors(nn.Module):
    """Two matrices whose product takes as many FLOPs as a tree."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.left = nn.Parameter(torch.randn(shape.bank * shape.tokens, 2 * shape.embedding))
        self.right = nn.Parameter(torch.randn(2 * shape.embedding, shape.embedding))


def _factors(problem: Problem) -> _Factors:
    return cast(_Factors, problem.module("product", lambda: _Factors(problem.shape)))


def _product(problem: Problem) -> Form:
    factors = _factors(problem)
    return Form(lambda: factors.left @ factors.right, dict(factors.named_parameters()))


def _expected_product(problem: Problem, positions: Tensor | None) -> Tensor:
    factors = _factors(problem)
    return torch.einsum("ij,jk->ik", factors.left, factors.right)


# Attention, and what is recurrent.

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
    return lambda problem, positions: _at(
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
    return lambda problem, positions: _at(
        _fla_module(problem, name)(_until(problem, positions), literally=True), positions
    )


def _fla_missing(problem: Problem) -> str | None:
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    if problem.device.type != "cuda":
        return "flash-linear-attention's kernels need a GPU"
    return None


def _gathered(problem: Problem) -> Tensor:
    return node_level.attention(problem, problem.token_qkv, problem.node_qv)


def _expected_projections(problem: Problem) -> tuple[Tensor, ...]:
    """Each projection by its own product."""
    sva, x = problem.layer.sva, problem.x.flatten(0, 1)
    nodes = problem.nodes
    return torch.cat([sva.q(x), sva.k(x), sva.v(x)], -1), torch.cat([sva.q(nodes), sva.v(nodes)], -1)


def _by_another_route(
    other: Callable[[Problem], Tensor], reference: Callable[[Problem, Tensor | None], Tensor]
) -> Callable[[Problem, Tensor | None], Tensor]:
    """Another form as the oracle of ours; where that is too large, our reference in float64."""

    def expected(problem: Problem, positions: Tensor | None) -> Tensor:
        if problem.shape.length > ANOTHER_ROUTE:
            return reference(problem, positions)
        return _at(other(problem), positions)

    return expected


def _registry() -> dict[str, dict[str, Provider]]:
    def attention_at(problem: Problem, positions: Tensor | None) -> Tensor:
        return _at(_attention_rows(our_attention)(problem), positions)

    def layer_at(problem: Problem, positions: Tensor | None) -> Tensor:
        return _at(our_layer(problem), positions)

    def tree_of(problem: Problem, positions: Tensor | None) -> Tensor:
        return our_tree(problem)

    ours: dict[str, Oracle] = {"tree": tree_of, "attention": attention_at, "layer": layer_at}
    expected: dict[str, Oracle] = {
        "tree": lambda problem, positions: node_level.tree(problem),
        "projections": lambda problem, positions: _expected_projections(problem),
        "attention": _by_another_route(_attention_rows(_gathered), attention_at),
        "layer": _by_another_route(materialized_layer, layer_at),
    }
    tree = [
        Provider(OURS, own(our_tree), expected["tree"], ours_missing("build_tree"), by_position=False, nodes=_nodes),
        Provider(
            "node-level", own(node_level.tree), lambda problem, _: our_tree(problem), by_position=False, nodes=_nodes
        ),
        Provider(
            "materialised memory",
            own(materialized_memory),
            _expected_memory,
            ours=False,
            growth=1.1,
            peak_bytes=naive_peak_bytes,
        ),
        Provider("one product", _product, _expected_product, ours=False, by_position=False),
    ]
    projections = [Provider(OURS, own(our_projections), expected["projections"], by_position=False)]

    attention = [
        Provider(OURS, own(_attention_rows(our_attention)), expected["attention"], ours_missing("attend")),
        Provider(
            "node-level", own(_attention_rows(_gathered)), ours["attention"],
            growth=1.1, peak_bytes=naive_peak_bytes,
        ),
        Provider("FlexAttention", _rows_of(_flex_attention), expected["attention"], no_compiler, _no_flex_backward),
    ]  # fmt: skip
    layer = [
        Provider(OURS, own(our_layer), expected["layer"], ours_missing("attend")),
        Provider("ours, lean", own(_lean_layer), expected["layer"], ours_missing("attend")),
        Provider(
            "materialised", own(materialized_layer), ours["layer"], growth=1.1, peak_bytes=naive_peak_bytes
        ),
        Provider(
            "materialised, compiled", own(_compiled_layer), ours["layer"], no_compiler,
            growth=1.1, peak_bytes=naive_peak_bytes,
        ),
        Provider("node-level", own(node_level.layer), ours["layer"], growth=1.1, peak_bytes=naive_peak_bytes),
        Provider("FlexAttention", _flex_layer, expected["layer"], no_compiler, _no_flex_backward),
    ]  # fmt: skip
    for name, backend in _SDPA.items():
        peak = _math_bytes if backend == SDPBackend.MATH else None
        missing = _sdpa_missing(backend)
        attention.append(
            Provider(
                name, _rows_of(_causal_attention(backend)), _expected_causal_attention, missing,
                ours=False, growth=2, peak_bytes=peak,
            )
        )  # fmt: skip
        layer.append(
            Provider(
                name, _causal_layer(backend), _expected_causal_layer, missing, ours=False, growth=2, peak_bytes=peak
            )
        )
    for name in linear_attention.KINDS:
        layer.append(Provider(name, _fla(name), _expected_fla(name), _fla_missing, ours=False, token_by_token=True))
    for name, kind in (("GRU", nn.GRU), ("LSTM", nn.LSTM)):
        layer.append(Provider(name, _recurrent(kind), _expected_recurrent(kind), ours=False, token_by_token=True))
    every = {"tree": tree, "projections": projections, "attention": attention, "layer": layer}
    return {operation: {p.name: p for p in providers} for operation, providers in every.items()}


def _rows_of(build: Callable[[Problem], Form]) -> Callable[[Problem], Form]:
    """A form whose ``[B·L, E]`` result is seen as ``[B, L, E]``."""

    def rows(problem: Problem) -> Form:
        form = build(problem)
        shape = problem.shape
        return Form(lambda: cast(Tensor, form.call()).view(shape.batch, shape.length, -1), form.leaves)

    return rows


REGISTRY = {**_registry(), **look_ahead_registry()}
# The kind of problem that an operation is.
PROBLEMS: dict[str, type[BaseProblem]] = {
    **dict.fromkeys(OPERATIONS, Problem), **dict.fromkeys(LOOK_AHEAD, LookAheadProblem)
}  # fmt: skip
