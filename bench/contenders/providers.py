"""Who can do which operation: our path, other forms of our network, and other networks of the same size.

A provider is built from a `bench.contenders.problems.Problem` for time and for memory alike, and has an oracle, in
float64 and by another route, that its result must agree with before any figure of it counts. What cannot run here says
why. LaMemo's are in `bench.contenders.look_ahead`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bench.measure.comparison import Comparison, Limits
from bench.measure.contender import OURS, BaseProblem, Form, Oracle, Outputs, Provider, Size
from bench.measure.runner import Context
from lmn_kernels import attend, build_tree

from . import flex, materialized, node_level
from .compiled import compile_whole
from .peers import at, attention_peers, layer_peers, rows_of
from .problems import OPERATIONS, Problem
from .provider import compile_mode, no_compiler, ours_missing, own
from .shapes import Shape, naive_peak_bytes

# Tokens of a sequence up to which an oracle may be of the materialising kind.
ANOTHER_ROUTE = 1 << 12


def _attention_rows(call: Callable[[Problem], Tensor]) -> Callable[[Problem], Tensor]:
    return lambda problem: call(problem).view(problem.shape.batch, problem.shape.length, -1)


# Our network, by operation.


def our_tree(problem: Problem, backend: str | None = None) -> Tensor:
    served = problem.backend if backend is None else backend
    return build_tree(problem.x.flatten(0, 1), problem.merge, problem.sequences, backend=served)


def _nodes(problem: Problem) -> int:
    # The matrix has a bound of rows, not all of them nodes.
    return problem.layout.unused_base


def our_projections(problem: Problem) -> Outputs:
    sva = problem.layer.sva
    return sva.token_qkv(problem.x.flatten(0, 1)), sva.node_qv(problem.nodes)


def our_attention(problem: Problem, backend: str | None = None) -> Tensor:
    heads, sequences, served = problem.shape.heads, problem.sequences, problem.backend if backend is None else backend
    return attend(problem.token_qkv, problem.node_qv, heads, sequences, backend=served)[0]


def our_layer(problem: Problem) -> Tensor:
    return problem.layer(problem.x)


def _lean_layer(problem: Problem) -> Tensor:
    problem.layer.lean = True
    try:
        return problem.layer(problem.x)
    finally:
        problem.layer.lean = False


def _reference_layer(problem: Problem) -> Tensor:
    problem.layer.backend = "reference"
    try:
        return problem.layer(problem.x)
    finally:
        problem.layer.backend = problem.backend


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
    return materialized_layer(problem, _compiled_mix(None))


def _autotuned_layer(problem: Problem) -> Tensor:
    return materialized_layer(problem, _compiled_mix(compile_mode(problem)))


def _no_tuning(problem: Problem) -> str | None:
    return no_compiler(problem) or (None if problem.device.type == "cuda" else "torch.compile tunes for GPUs alone")


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


def _gathered(problem: Problem) -> Tensor:
    return node_level.attention(problem, problem.token_qkv, problem.node_qv)


def our_output(problem: Problem) -> Tensor:
    return problem.layer.sva.out_proj(problem.mixed)


def _expected_output(problem: Problem) -> Tensor:
    out = problem.layer.sva.out_proj
    return torch.einsum("tj,ij->ti", problem.mixed, out.weight) + out.bias


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
        return at(other(problem), positions)

    return expected


def _registry() -> dict[str, dict[str, Provider]]:
    def attention_at(problem: Problem, positions: Tensor | None) -> Tensor:
        return at(_attention_rows(our_attention)(problem), positions)

    def layer_at(problem: Problem, positions: Tensor | None) -> Tensor:
        return at(our_layer(problem), positions)

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
            "ours, reference",
            own(lambda problem: our_tree(problem, "reference")),
            expected["tree"],
            by_position=False,
            nodes=_nodes,
        ),
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
    output = [Provider(OURS, own(our_output), lambda problem, _: _expected_output(problem), by_position=False)]

    attention = [
        Provider(OURS, own(_attention_rows(our_attention)), expected["attention"], ours_missing("attend")),
        Provider(
            "ours, reference", own(_attention_rows(lambda problem: our_attention(problem, "reference"))),
            expected["attention"],
        ),
        Provider(
            "node-level", own(_attention_rows(_gathered)), ours["attention"],
            growth=1.1, peak_bytes=naive_peak_bytes,
        ),
        Provider("FlexAttention", rows_of(_flex_attention), expected["attention"], no_compiler, _no_flex_backward),
    ]  # fmt: skip
    layer = [
        Provider(OURS, own(our_layer), expected["layer"], ours_missing("attend")),
        Provider("ours, reference", own(_reference_layer), expected["layer"]),
        Provider("ours, lean", own(_lean_layer), expected["layer"], ours_missing("attend")),
        Provider(
            "materialised", own(materialized_layer), ours["layer"], growth=1.1, peak_bytes=naive_peak_bytes
        ),
        Provider(
            "materialised, compiled", own(_compiled_layer), ours["layer"], no_compiler,
            growth=1.1, peak_bytes=naive_peak_bytes,
        ),
        Provider(
            "materialised, autotuned", own(_autotuned_layer), ours["layer"], _no_tuning,
            growth=1.1, peak_bytes=naive_peak_bytes,
        ),
        Provider("node-level", own(node_level.layer), ours["layer"], growth=1.1, peak_bytes=naive_peak_bytes),
        Provider("FlexAttention", _flex_layer, expected["layer"], no_compiler, _no_flex_backward),
    ]  # fmt: skip
    attention += attention_peers()
    layer += layer_peers()
    every = {"tree": tree, "projections": projections, "attention": attention, "output": output, "layer": layer}
    return {operation: {p.name: p for p in providers} for operation, providers in every.items()}


# Who can do an operation, by its name, and the kind of problem that it is.
REGISTRY, PROBLEMS = _registry(), dict[str, type[BaseProblem]](dict.fromkeys(OPERATIONS, Problem))


def _add_others() -> None:
    """Of every module beside this one that knows operations of its own: `registry`, and ``PROBLEM``, their kind."""
    for one in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"bench.contenders.{one.name}")
        if hasattr(module, "registry"):
            found = module.registry()
            REGISTRY.update(found)
            PROBLEMS.update(dict.fromkeys(found, module.PROBLEM))


_add_others()


def compare(
    context: Context,
    operation: str,
    shape: Size,
    names: Iterable[str],
    directions: Sequence[str],
    limits: Limits,
    mode: str | None = None,
) -> Comparison:
    """Providers of an operation, by name, at a shape; ours comes first."""
    providers = [REGISTRY[operation][name] for name in names]
    return Comparison(context, operation, shape, PROBLEMS[operation], providers, directions, limits, mode)
