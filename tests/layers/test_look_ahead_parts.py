"""What stands in the place of a part of LaMemo's layers is obeyed: hooks, norms, wrappers, other modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import LookAheadLanguageModel, LookAheadMemory
from tests.layers.test_parts import NORMS

F64 = torch.float64
VALUE, GRADIENT = TOLERANCE[F64]
PROJECTIONS = [f"layers.0.dec_attn.{name}" for name in ("q_net", "kv_net", "r_net", "o_net")]
PARTS = [*PROJECTIONS, "layers.1.pos_ff.CoreNet.0", "layers.0.pos_ff.CoreNet.3"]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def speaking(**options: Any) -> LookAheadLanguageModel:
    model = LookAheadLanguageModel(12, 16, 2, 4, memory_length=7, feedforward=16, dtype=F64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def words() -> Tensor:
    return torch.randint(12, (2, 11), generator=torch.Generator().manual_seed(3))


def segments(model: nn.Module, ids: Tensor) -> Tensor:
    state, found = None, []
    for segment in ids.split(4, 1):
        y, state = model(segment, state)
        found.append(y)
    return torch.cat(found, 1)


def scaled(result: Any) -> Any:
    """The first of several tensors, or the one, each feature times its own factor, which no norm takes back."""
    first = result[0] if isinstance(result, tuple) else result
    first = first * torch.linspace(0.5, 1.5, first.shape[-1], dtype=F64)
    return (first, *result[1:]) if isinstance(result, tuple) else first


class Scaling(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **named: Any) -> Any:
        return scaled(self.inner(*given, **named))


EVERYWHERE = [
    *PARTS, "layers.0.dec_attn", "layers.1.dec_attn.layer_norm", "layers.0.pos_ff", "layers.0.pos_ff.layer_norm",
    "layers.1.pos_ff.CoreNet", "layers.0", "layers.1", "drop", "crit.out_layers.0",
]  # fmt: skip


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("part", EVERYWHERE)
def test_hooks_wrappers_and_forwards_of_an_instance_are_obeyed_alike(part, train):
    model, ids = speaking().train(train), words()
    before, hooked, wrapped, own = segments(model, ids), *(copy.deepcopy(model) for _ in range(3))
    hooked.get_submodule(part).register_forward_hook(lambda _, given, result: scaled(result))
    wrapped.set_submodule(part, Scaling(wrapped.get_submodule(part)))
    module = own.get_submodule(part)
    forward = module.forward
    module.forward = lambda *given, **named: scaled(forward(*given, **named))
    y = segments(hooked, ids)
    assert (y - before).abs().max() > 1e-3
    assert_close("wrapper", segments(wrapped, ids), y, VALUE)
    assert_close("own forward", segments(own, ids), y, VALUE)


def test_what_replaces_the_words_is_the_output_layer_too():
    """A wrapper, a forward of an instance. A hook sees the words that are read, and the weight stays tied."""
    model, ids = speaking(), words()
    expected, wrapped, own, hooked = (copy.deepcopy(model) for _ in range(4))
    with torch.no_grad():
        expected._table().weight.copy_(scaled(model._table().weight))
    wrapped.set_submodule("word_emb.emb_layers.0", Scaling(wrapped._table()))
    forward = own._table().forward
    own._table().forward = lambda given: scaled(forward(given))
    assert_close("wrapper", segments(wrapped, ids), segments(expected, ids), VALUE)
    assert_close("own forward", segments(own, ids), segments(expected, ids), VALUE)
    hooked._table().register_forward_hook(lambda _, given, result: scaled(result))
    table = model._table()
    y, _ = LookAheadMemory.forward(model, scaled(table(ids)) * 4)
    assert_close("hook", hooked(ids)[0], y @ table.weight.T, VALUE)


@pytest.mark.parametrize(
    "part", ["layers.0", "layers.1.dec_attn", "layers.0.dec_attn.q_net", "layers.0.dec_attn.kv_net"]
)
def test_a_backward_hook_fires(part):
    model, calls = speaking(), []
    model.get_submodule(part).register_full_backward_hook(lambda *_: calls.append(part))
    segments(model, words()).sum().backward()
    assert calls


@pytest.mark.parametrize("part", [*PARTS, "word_emb.emb_layers.0"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_and_pruning_train_and_are_obeyed(norm, part):
    model, ids = speaking(), words()
    module = model.get_submodule(part)
    NORMS[norm](module)
    for _ in range(2):  # a second step of training finds a graph of its own
        model.zero_grad()
        segments(model, ids).square().sum().backward()
    own = [p for p in module.parameters() if p.requires_grad]
    assert own and all(p.grad is not None and p.grad.any() for p in own)
    model.eval()
    y, plain = segments(model, ids), speaking()
    with torch.no_grad():
        source = {n: p for n, p in model.state_dict().items() if n in plain.state_dict()}
        plain.load_state_dict({**plain.state_dict(), **source})
        plain.get_submodule(part).weight.copy_(module.weight)
    assert_close("y", y, segments(plain, ids), VALUE)
    if "weight_norm" in norm:
        with torch.no_grad():
            (module.weight_g if "hooks" in norm else module.parametrizations.weight.original0).mul_(3)
        assert (segments(model, ids) - y).abs().max() > 1e-3


def test_a_pruned_bias_of_the_stack():
    model, ids = speaking(), words()
    prune.l1_unstructured(model, "r_w_bias", 0.5)
    for _ in range(2):
        model.zero_grad()
        segments(model, ids).square().sum().backward()
    assert model.r_w_bias_orig.grad.count_nonzero() == 8


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda layer: torch.compile(layer, backend="eager")])
def test_layers_inside_wrappers(wrap):
    torch._dynamo.reset()
    plain, x = LookAheadMemory(16, 2, 4, memory_length=7, feedforward=16, dtype=F64), torch.randn(2, 8, 16, dtype=F64)
    model = copy.deepcopy(plain)
    for number in range(2):
        model.layers[number] = wrap(model.layers[number])
    ys = [segments(module, x) for module in (model, plain)]
    assert_close("y", *ys, VALUE)
    for y in ys:
        y.square().sum().backward()
    names, grads = zip(*((name, p.grad) for name, p in plain.named_parameters()), strict=True)
    assert_same_gradients(list(names), [p.grad for p in model.parameters()], list(grads), GRADIENT)
