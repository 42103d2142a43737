"""Conformance: numbers that the original code produced in float64 (tests/golden), relative error ≤ 1e-9."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory, why_not
from python_ref import definition
from tests.support.served import Served
from tests.support.variants import definition_of

FOLDER = Path(__file__).parents[1] / "golden"
CASES = json.loads((FOLDER / "index.json").read_text())
BAR = 1e-9


class Golden:
    def __init__(self, case: dict):
        with np.load(FOLDER / case["file"]) as stored:
            tensors = {name: torch.from_numpy(stored[name]) for name in stored.files}
        options = dict(case["kwargs"])
        if case["kind"] == "expander":
            kind = ExpanderSummarizerLogarithmicMemory
        else:
            kind = LogarithmicMemory
            if case["kind"] == "conv":
                options["summarizer"] = "conv" if options.pop("depth_wise") else "conv_mixed"
        self.layer = kind(case["embedding"], dtype=torch.float64, **options)
        weights = {name[6:]: value for name, value in tensors.items() if name.startswith("param.")}
        self.layer.load_state_dict(weights, strict=True)
        self.gradients = {name[5:]: value for name, value in tensors.items() if name.startswith("grad.")}
        self.x, self.cotangent, self.grad_x = tensors["x"], tensors["cotangent"], tensors["grad_x"]
        self.y, self.y_sequential, self.memory = tensors["y"], tensors["y_sequential"], tensors["memory"]


@pytest.fixture(params=CASES, ids=[case["file"].removesuffix(".npz") for case in CASES])
def golden(request) -> Golden:
    return Golden(request.param)


def test_parallel_and_every_gradient(golden):
    x = golden.x.requires_grad_()
    y = golden.layer(x)
    (y * golden.cotangent).sum().backward()
    assert_close("y", y.detach(), golden.y, BAR)
    assert_close("grad_x", x.grad, golden.grad_x, BAR)
    # The original leaves the summarizer's gradient out where L = 1 never uses it; ours is zero there.
    names = [name for name, _ in golden.layer.named_parameters()]
    got = [parameter.grad for parameter in golden.layer.parameters()]
    expected = [golden.gradients.get(name, torch.zeros_like(g)) for name, g in zip(names, got, strict=True)]
    assert set(golden.gradients) <= set(names)
    assert_same_gradients(names, got, expected, BAR)


@pytest.mark.ext
def test_parallel_and_every_gradient_in_float32_by_the_extension(golden):
    if (reason := why_not("cpp", "attend", "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    layer, x = golden.layer.float(), golden.x.float().requires_grad_()
    layer.backend = "cpp"
    with Served() as served:
        y = layer(x)
        (y * golden.cotangent.float()).sum().backward()
    served.check("cpp", "build_tree", "attend", "build_tree_backward", "attend_backward")
    values, gradients = TOLERANCE[torch.float32]
    assert_close("y", y.detach(), golden.y, values)
    got = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    known = golden.gradients | {"x": golden.grad_x}
    expected = [known.get(name, torch.zeros_like(g)) for name, g in got.items()]
    assert_same_gradients(list(got), list(got.values()), expected, gradients)


def test_memory_tensor(golden):
    slots = golden.layer.parallel(golden.layer.norm1(golden.x))
    assert_close("memory", slots.detach(), golden.memory, BAR)


def test_attention_over_the_memory_tensor(golden):
    x = golden.x
    h = x + golden.layer.attention(golden.layer.parallel(golden.layer.norm1(x)))
    y = h + golden.layer.feedforward(golden.layer.norm2(h))
    assert_close("y", y.detach(), golden.y, BAR)


def test_step_by_step(golden):
    state, rows = golden.layer.init_state(golden.x.shape[0]), []
    with torch.no_grad():
        for x_t in golden.x.split(1, 1):
            y_t, state = golden.layer.step(x_t, state)
            rows.append(y_t)
    assert_close("y_sequential", torch.cat(rows, 1), golden.y_sequential, BAR)


def test_the_original_sequential_face(golden):
    layer = golden.layer
    layer.parallelize = False
    with torch.no_grad():
        y = torch.cat([layer(x_t) for x_t in golden.x.split(1, 1)], 1)
        assert layer.ptr == golden.x.shape[1]
        assert_close("y_sequential", y, golden.y_sequential, BAR)
        layer.reset()
        assert layer.ptr == 0 and layer.memory is None
        for t, x_t in enumerate(golden.x.split(1, 1)):
            slots = layer.sequential(layer.norm1(x_t))
            assert_close("memory", slots[:, 0], golden.memory[:, t, : slots.shape[2]], BAR)
            assert not golden.memory[:, t, slots.shape[2] :].any()


def test_the_definition_itself(golden):
    layer, x = golden.layer, golden.layer.norm1(golden.x)
    merge, projections = definition_of(layer)
    assert_close("memory", definition.memory(x, merge, layer.bank).detach(), golden.memory, BAR)
    mixed = definition.mix(x, merge, layer.bank, projections, layer.heads)
    h = golden.x + mixed
    assert_close("y", (h + layer.feedforward(layer.norm2(h))).detach(), golden.y, BAR)


def test_the_definition_of_the_bitmask_rule(golden):
    layer, x = golden.layer, golden.layer.norm1(golden.x)
    merge, _ = definition_of(layer)
    stream = definition.BitmaskMemory(merge, layer.bank)
    for t in range(x.shape[1]):
        slots = stream.update(x[:, t])
        assert_close("memory", slots.detach(), golden.memory[:, t, : slots.shape[1]], BAR)
