"""Conformance of LaMemo: numbers that the original code produced in float64, relative error ≤ 1e-9."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.close import assert_close
from lmn_kernels import LookAheadLanguageModel
from python_ref import look_ahead_definition as definition

FOLDER = Path(__file__).parents[1] / "golden_lamemo"
CASES = json.loads((FOLDER / "index.json").read_text())
BAR = 1e-9
# The original's merge has 1e-6 in its denominator.
EPS = 1e-6


class Golden:
    def __init__(self, case: dict):
        with np.load(FOLDER / case["file"]) as stored:
            self.tensors = {name: torch.from_numpy(stored[name]) for name in stored.files}
        self.case = case

    def model(self, merge_eps: float, keep_last: bool = True) -> LookAheadLanguageModel:
        case = self.case
        model = LookAheadLanguageModel(
            case["vocab"], case["model_dim"], case["layers"], case["heads"], case["head_dim"],
            feedforward=case["ff_dim"], memory_length=case["mem_len"], attn_type=case["variant"],
            clamp_length=case["clamp_len"] if case["clamp_len"] > 0 else None, pre_norm=case["pre_norm"],
            merge_eps=merge_eps, keep_last=keep_last, backend="reference", dtype=torch.float64,
        )  # fmt: skip
        weights = {name[6:]: value for name, value in self.tensors.items() if name.startswith("param.")}
        model.load_state_dict(weights, strict=True)
        return model

    def segment(self, number: int) -> dict[str, torch.Tensor]:
        """Its tensors by name, batch first."""
        prefix = f"seg{number}."
        found = {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}
        return {n: v if n.startswith("grad.") else v.transpose(0, 1).contiguous() for n, v in found.items()}


@pytest.fixture(params=CASES, ids=[case["file"].removesuffix(".npz") for case in CASES])
def golden(request) -> Golden:
    return Golden(request.param)


def losses(model, segment, state):
    logits, state = model(segment["input"], state)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), segment["target"].flatten(), reduction="none")
    return loss.view(segment["target"].shape), state


def check_segments(golden: Golden, model: LookAheadLanguageModel) -> None:
    state = None
    for number, length in enumerate(golden.case["segments"]):
        segment = golden.segment(number)
        model.zero_grad()
        loss, state = losses(model, segment, state)
        loss.mean().backward()
        assert loss.shape[1] == length
        assert_close(f"loss {number}", loss.detach(), segment["loss"], BAR)
        assert_close("embedding", state.inputs[0], segment["cache.embedding"], BAR)
        for layer in range(golden.case["layers"]):
            assert_close(f"output {layer}", state.outputs[layer], segment[f"cache.output{layer}"], BAR)
            assert_close(f"lse {layer}", state.lse[layer], segment[f"cache.lse{layer}"], BAR)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, gradient in gradients.items():
            expected = segment.get(f"grad.{name}", torch.zeros_like(gradient))
            assert_close(f"gradient of {name} in segment {number}", gradient, expected, BAR)
        # Nothing is left over: the original leaves out what got no gradient.
        assert {f"grad.{name}" for name in gradients} >= {name for name in segment if name.startswith("grad.")}


def test_loss_cache_and_every_gradient_with_the_literal_merge(golden):
    check_segments(golden, golden.model(EPS))


def test_the_definition_itself(golden, monkeypatch):
    monkeypatch.setattr("lmn_kernels.layers.look_ahead.look_ahead_attend", by_definition)
    check_segments(golden, golden.model(EPS))


def by_definition(q, kv, bias, table, *, tokens, output, lse, start, window, future_row, backend):
    return definition.attend(q, kv, bias, table, output, lse, start, tokens, window, future_row)


def test_the_merge_within_the_softmax_is_off_by_the_eps_alone(golden):
    """Section 3: 1e-6 a merge, and the loss of the model without it is another by no more than that."""
    model, state = golden.model(0.0), None
    with torch.no_grad():
        for number in range(len(golden.case["segments"])):
            segment = golden.segment(number)
            loss, state = losses(model, segment, state)
            assert_close(f"loss {number}", loss, segment["loss"], 1e-5)
            for layer in range(golden.case["layers"]):
                assert_close(f"lse {layer}", state.lse[layer], segment[f"cache.lse{layer}"], 1e-5)


def test_the_last_layer_s_memory_changes_no_result(golden):
    whole, short, states = golden.model(0.0), golden.model(0.0, keep_last=False), [None, None]
    for number in range(len(golden.case["segments"])):
        segment, found = golden.segment(number), []
        for index, model in enumerate((whole, short)):
            model.zero_grad()
            loss, states[index] = losses(model, segment, states[index])
            loss.mean().backward()
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for got, expected in zip(found[1], found[0], strict=True):
            assert_close("result", got, expected, 1e-12)
