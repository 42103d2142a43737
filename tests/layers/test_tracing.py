"""A layer whose parameters a trace has replaced by tensors without values takes the same road as one with its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from lmn_kernels import LogarithmicMixing
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
    with FakeTensorMode(), Served() as served:
        layer, x = variant.layer(torch.float32), torch.randn(2, 9, variant.embedding)
        layer(x).sum().backward()
    served.check("reference", "attend", "attend_backward", "build_tree", "build_tree_backward")
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
