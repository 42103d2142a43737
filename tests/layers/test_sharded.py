"""FSDP2 of any part of a layer, by one process: weights are there only while the part itself is called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory, LookAheadLanguageModel

F64 = torch.float64
VALUE, GRADIENT = TOLERANCE[F64]
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def forms(layer: LogarithmicMemory, x: Tensor) -> Tensor:
    """Whole, and by prefill and steps; and without gradients into a pool."""
    y, state = layer.prefill(x[:, :5])
    found = [layer(x), y]
    for t in range(5, x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], state)
        found.append(y)
    with torch.no_grad():
        found.append(layer.step_(x, layer.init_state(2, max_position=x.shape[1])))
        found.append(layer.step(x[:, :1], layer.init_state(2))[0])
    return torch.cat(found, 1)


def segments(model: nn.Module, ids: Tensor) -> Tensor:
    state, found = None, []
    for segment in ids.split(4, 1):
        y, state = model(segment, state)
        found.append(y)
    return torch.cat(found, 1)


def sharded(plain: nn.Module, parts: tuple[str, ...], run: Callable[[Any], Tensor]) -> None:
    """Values and gradients are those without."""
    model = copy.deepcopy(plain)
    for part in parts:
        fully_shard(model.get_submodule(part))
    assert any(isinstance(p, DTensor) for p in model.parameters())
    ys = [run(module) for module in (model, plain)]
    assert_close("y", *ys, VALUE)
    for y in ys:
        y.square().sum().backward()
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    names, expected = zip(*((name, p.grad) for name, p in plain.named_parameters()), strict=True)
    assert_same_gradients(list(names), grads, list(expected), GRADIENT)


BLOCK = [
    ("sva",), ("summarizer",), ("feedforward",), ("sva.q",), ("sva.k", "sva.v"), ("sva.out_proj",), ("norm1",),
    ("norm2", "feedforward.fc1"), ("expander",), ("expander.conv_transpose",), ("summarizer.conv",),
    ("sva.q", "sva", "summarizer.conv", "summarizer", "expander", "feedforward"),
]  # fmt: skip


@pytest.mark.parametrize("parts", BLOCK, ids=" ".join)
def test_parts_of_a_block(parts):
    layer, x = ExpanderSummarizerLogarithmicMemory(16, 4, 2, summarizer="conv", dtype=F64), torch.randn(2, 11, 16)
    sharded(layer, parts, lambda layer: forms(layer, x.double()))


@pytest.mark.parametrize("parts", [("sva",), ("summarizer",), ("feedforward",)], ids=" ".join)
def test_parts_of_the_originals_block(parts):
    layer, x = LogarithmicMemory(16, 4, 2, dtype=F64), torch.randn(2, 11, 16, dtype=F64)
    sharded(layer, parts, lambda layer: forms(layer, x))


LOOKING = [
    ("layers.0.dec_attn",), ("layers.1.dec_attn.q_net", "layers.1.dec_attn.kv_net"), ("layers.0.pos_ff",),
    ("layers.0.dec_attn.layer_norm", "layers.0.dec_attn.r_net"), ("layers.1.pos_ff.CoreNet",),
    ("word_emb.emb_layers.0",), ("crit.out_layers.0",),
    ("layers.0.dec_attn.q_net", "layers.0.dec_attn", "layers.0", "layers.1", "word_emb.emb_layers.0", ""),
]  # fmt: skip


@pytest.mark.parametrize("parts", LOOKING, ids=" ".join)
def test_parts_of_a_look_ahead_model(parts):
    model = LookAheadLanguageModel(12, 16, 2, 4, memory_length=7, feedforward=16, dtype=F64)
    ids = torch.randint(12, (2, 11))
    sharded(model, parts, lambda model: segments(model, ids))


def test_a_method_that_a_sharded_block_does_not_know_is_named_and_forward_serves():
    layer, x = LogarithmicMemory(16, 4, 2, dtype=F64), torch.randn(2, 11, 16, dtype=F64)
    expected = layer(x)
    fully_shard(layer)
    message = r"^norm1.weight: expected a weight at hand, got a sharded one.*register_fsdp_forward_method"
    for call in (
        lambda: layer.prefill(x),
        lambda: layer.step(x[:, :1], layer.init_state(2)),
        lambda: layer.step_(x, layer.init_state(2, max_position=11)),
        lambda: layer.sequential(x[:, :1]),
        lambda: layer.parallel(x),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    y, state = layer(x[:, :10], return_state=True)
    assert_close("forward", y, expected[:, :10], VALUE)
    assert_close("one token", layer(x[:, 10:], state=state, return_state=True)[0], expected[:, 10:], VALUE)
    register_fsdp_forward_method(layer, "step")
    assert_close("step", layer.step(x[:, 10:], state)[0], expected[:, 10:], VALUE)
