"""A layer whose parameters a trace has replaced by tensors without values takes the same road as one with its own."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from bench.close import TOLERANCE, assert_close
from lmn_kernels import LogarithmicMemory, LogarithmicMixing, LookAheadMemory
from lmn_kernels.backend import choice
from tests.support.served import Served
from tests.support.variants import VARIANTS

LINEAR = [variant for variant in VARIANTS if variant.name in ("linear", "conv_mixed", "depthwise_separable")]
BOTH = {"lmn_kernels.attend.default", "lmn_kernels.build_tree.default"}
kinds = pytest.mark.parametrize("variant", LINEAR, ids=str)


def operations(graph: torch.fx.GraphModule) -> set[str]:
    """The operations of the package in a graph, those of graphs within it included."""

    def nodes() -> Iterator[torch.fx.Node]:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                yield from module.graph.nodes

    return {str(node.target) for node in nodes() if str(node.target).startswith("lmn_kernels.")}


@pytest.mark.parametrize("strict", [False, True])
@kinds
def test_an_exported_layer_keeps_the_operations_and_takes_any_length_of_its_levels(variant, strict):
    layer = variant.layer(torch.float32)
    x = torch.randn(2, 9, variant.embedding)
    length = torch.export.Dim("length", min=8, max=15)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: length}}, strict=strict)
    assert operations(program.graph_module) == BOTH
    for given in (x, torch.randn(2, 14, variant.embedding)):
        assert torch.equal(program.module()(given), layer(given))


@kinds
def test_a_layer_of_fake_tensors_runs_the_operations_forward_and_backward(variant):
    served_by = choice.resolve("auto", "attend", torch.device("cpu"))
    with FakeTensorMode(), Served() as served:
        layer, x = variant.layer(torch.float32), torch.randn(2, 9, variant.embedding)
        layer(x).sum().backward()
    served.check(served_by, "attend", "attend_backward", "build_tree", "build_tree_backward")
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_function_of_the_parameters_keeps_the_operations(mode):
    layer = LogarithmicMixing(12, 3, 2, expand=1)
    x = torch.randn(2, 9, 12)

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))

    parameters: dict[str, nn.Parameter] = dict(layer.named_parameters())
    graph = make_fx(run, tracing_mode=mode)(parameters, x)
    assert operations(graph) == BOTH
    assert torch.equal(graph(parameters, x), layer(x))


class Stream(nn.Module):
    """A model as one exports it: tokens and a state to outputs and a state."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.call(self.layer, x, state)


STREAMS = {
    "step": (1, lambda layer, x, state: layer.step(x, state)),
    "chunk": (4, lambda layer, x, state: layer(x, state=state, return_state=True)),
}


def saved_and_loaded(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_an_exported_stream_goes_on_from_any_position_that_there_is_room_for(name, strict):
    tokens, call = STREAMS[name]
    layer = LogarithmicMemory(12, 3, 2, init="variance_preserving")
    state, x = layer.prefill(torch.randn(2, 5, 12))[1].with_room(60), torch.randn(2, 40, 12)
    model = saved_and_loaded(torch.export.export(Stream(layer, call), (x[:, :tokens], state), strict=strict))
    expected = state
    for piece in x.split(tokens, 1):
        y, state = model(piece, state)
        other, expected = call(layer, piece, expected)
        assert_close("y", y, other, TOLERANCE[torch.float32][0])
        assert state.max_position == expected.max_position and state.levels == expected.levels == 5


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_an_exported_look_ahead_memory_goes_on(strict):
    model, state = LookAheadMemory(12, 2, 3, memory_length=8), None
    for _ in range(3):
        _, state = model(torch.randn(2, 4, 12), state)
    program = torch.export.export(Stream(model, lambda m, x, s: m(x, s)), (torch.randn(2, 4, 12), state), strict=strict)
    run, expected = saved_and_loaded(program), state
    for _ in range(3):
        x = torch.randn(2, 4, 12)
        y, state = run(x, state)
        other, expected = model(x, expected)
        assert_close("y", y, other, TOLERANCE[torch.float32][0])
