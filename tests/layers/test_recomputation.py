"""What a backward pass computes again must be what the forward pass computed, or an error says that it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory, LogarithmicMixing, LookAheadMemory

GRADIENT = TOLERANCE[torch.float64][1]
DOUBLE = {"dtype": torch.float64}
REFUSED = r"use_reentrant=False.*use_reentrant=True.*states"


def random(*shape: int, **more) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, **more)


# Reentrant checkpoints differentiate tensors among arguments and results, and cut off states.


def chunk(layer, x, state):
    return layer(x, state=state, return_state=True)


def one_step(layer, x, state):
    return layer.step(x[:, :1], state or layer.init_state(2))


def prefill(layer, x, state):
    return layer.prefill(x)


def two_layers(layer, x, state):
    x, first = layer(x, state=state and state[0], return_state=True)
    x, second = layer(x, state=state and state[1], return_state=True)
    return x, (first, second)


def in_no_reentrant_one(layer, x, state):
    return checkpoint(lambda x, state: chunk(layer, x, state), x, state, use_reentrant=False)


def as_a_tensor_alone(layer, x, state):
    y, state = chunk(layer, x, state)
    return y + state.nodes.sum(), state


WAYS = [chunk, one_step, prefill, two_layers, in_no_reentrant_one, as_a_tensor_alone]


def gradient(layer, take, reentrant: bool | None) -> Tensor:
    """Of chunks that hand on a state, from a loss on the last alone."""
    torch.manual_seed(1)
    x, state = random(2, 40, 8, requires_grad=True), None
    for part in x.split(10, 1):
        if reentrant is None:
            y, state = take(layer, part, state)
        else:
            y, state = checkpoint(lambda x, s: take(layer, x, s), part, state, use_reentrant=reentrant)
    y.pow(2).sum().backward()
    return x.grad


@pytest.mark.parametrize("take", WAYS)
@pytest.mark.parametrize("make", [LogarithmicMemory, LogarithmicMixing, ExpanderSummarizerLogarithmicMemory])
def test_a_state_out_of_a_reentrant_checkpoint_is_refused(make, take):
    layer = make(8, 2, 2, **DOUBLE)
    expected = gradient(layer, take, None)
    assert_close("x", gradient(layer, take, False), expected, GRADIENT)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient(layer, take, True)


def test_a_state_into_a_reentrant_checkpoint_is_refused():
    """One that requires a gradient; another is a constant."""
    layer, x = LogarithmicMemory(8, 2, 2, **DOUBLE), random(2, 10, 8, requires_grad=True)
    _, state = layer.prefill(x)
    y = checkpoint(lambda x: layer(x, state=state), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        y.sum().backward()
    found = []
    for reentrant in (True, False):
        y = checkpoint(lambda x: layer(x, state=state.detach()), x, use_reentrant=reentrant)
        x.grad = None
        y.pow(2).sum().backward()
        found.append(x.grad)
    assert_close("x", *found, GRADIENT)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_layers_own_stream_in_a_checkpoint_is_refused(tokens, reentrant):
    """Its recomputation would go on behind the tokens that it is of, and leave the memory with them twice."""
    layer = LogarithmicMemory(8, 2, 2, parallelize=False, **DOUBLE)
    layer(random(2, 8, 8))  # room for seven more
    takes = [layer, *([lambda x: layer.attention(layer.sequential(x))] if tokens == 1 else [])]
    for take in takes:
        y = checkpoint(take, random(2, tokens, 8, requires_grad=True), use_reentrant=reentrant)
        before = layer.ptr
        with pytest.raises(RuntimeError, match="checkpoint.*given its state.*own memory"):
            y.sum().backward()
        assert layer.ptr == before


def test_layers_without_states_take_reentrant_checkpoints():
    layers, x = nn.Sequential(*(LogarithmicMemory(8, 2, 2, **DOUBLE) for _ in range(2))), random(2, 10, 8)
    found = []
    for reentrant in (True, False):
        given = x.clone().requires_grad_()
        checkpoint(layers, given, use_reentrant=reentrant).pow(2).sum().backward()
        found.append([given.grad, *(p.grad.clone() for p in layers.parameters())])
        layers.zero_grad()
    names = ["x", *(name for name, _ in layers.named_parameters())]
    assert_same_gradients(names, *found, GRADIENT)


def test_look_ahead_memory_takes_both_kinds():
    """No gradient flows between its segments, so that none can be lost."""
    model, x = LookAheadMemory(8, 2, 2, memory_length=8, **DOUBLE), random(2, 12, 8)
    found = []
    for reentrant in (None, False, True):
        given, state, loss = x.clone().requires_grad_(), None, 0
        for part in given.split(4, 1):
            if reentrant is None:
                y, state = model(part, state)
            else:
                y, state = checkpoint(model, part, state, use_reentrant=reentrant)
            loss = loss + y.pow(3).sum()
        loss.backward()
        found.append([given.grad, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    names = ["x", *(name for name, _ in model.named_parameters())]
    assert found[0][0].any()
    for other in found[1:]:
        assert_same_gradients(names, other, found[0], GRADIENT)


# lean=True reads weights, tokens and nodes again.


class Adapted(nn.Module):
    """A low-rank adapter as others write it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(random(2, base.in_features))
        self.up = nn.Parameter(random(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def plain(layer):
    pass


def adapted(layer):
    layer.sva.q = Adapted(layer.sva.q)


def weight_norm(layer):
    parametrizations.weight_norm(layer.sva.v)


def spectral_norm(layer):
    for name in ("k", "out_proj"):
        parametrizations.spectral_norm(getattr(layer.sva, name))


def hooked(layer):
    layer.sva.q.register_forward_hook(lambda module, given, result: 2 * result)


KINDS = [plain, adapted, weight_norm, spectral_norm, hooked]


def made(kind, lean: bool = True) -> LogarithmicMixing:
    torch.manual_seed(0)
    layer = LogarithmicMixing(8, 2, 2, lean=lean, **DOUBLE)
    kind(layer)
    return layer


READ = [(kind, name) for kind in KINDS for name, _ in made(kind).sva.named_parameters() if "out_proj" not in name]


@pytest.mark.parametrize(("kind", "name"), READ, ids=lambda value: getattr(value, "__name__", value))
def test_a_weight_that_has_changed_is_named(kind, name):
    layer, x = made(kind), random(2, 9, 8)
    loss = layer(x).sum()
    with torch.no_grad():
        layer.sva.get_parameter(name).mul_(2)
    said = rf"has been modified by an inplace operation: sva\.{name}.*version.*expected version.*lean=True"
    with pytest.raises(RuntimeError, match=said):
        loss.backward()


def test_an_input_that_has_changed_is_named():
    layer, leaf = made(plain), random(2, 9, 8, requires_grad=True)
    x = leaf + 0
    loss = layer(x, lengths=None).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ["functional_call", "assign", "module"])
def test_another_weight_in_its_place_is_named(how):
    """Which would be read in backward, in the place of that of the forward pass."""
    layer, x = made(plain), random(2, 9, 8)
    other = {name: parameter.detach() * 2 for name, parameter in layer.named_parameters()}
    if how == "functional_call":
        loss = functional_call(layer, {n: p.requires_grad_() for n, p in other.items()}, (x,)).sum()
    else:
        loss = layer(x).sum()
    if how == "assign":
        layer.load_state_dict(other, assign=True)
    if how == "module":
        layer.sva.q = nn.Linear(8, 8, **DOUBLE)
    with pytest.raises(RuntimeError, match=r"lean=True: expected sva\.q\.weight of the forward pass.*lean=False"):
        loss.backward()


def test_a_step_of_an_optimizer_between_the_passes_is_refused():
    layer = LogarithmicMemory(8, 2, 2, lean=True, **DOUBLE)
    losses = [layer(random(2, 9, 8)).sum() for _ in range(2)]
    losses[0].backward()
    torch.optim.AdamW(layer.sva.q.parameters()).step()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: sva\.q\.weight"):
        losses[1].backward()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changed_is_no_error(kind):
    """Two forward passes, then both backward ones; modules whose forward updates a buffer included."""
    found = []
    for lean in (False, True):
        layer = made(kind, lean)
        layer.requires_grad_(True).sva.v.requires_grad_(False)
        losses = []
        for seed in range(2):
            torch.manual_seed(seed)
            losses.append(layer(random(2, 9, 8)).pow(2).sum())
        for loss in losses:
            loss.backward()
        found.append({n: p.grad for n, p in layer.named_parameters() if p.grad is not None})
    assert_same_gradients(list(found[0]), list(found[1].values()), list(found[0].values()), GRADIENT)


def test_inference_mode_keeps_no_versions():
    with torch.inference_mode():
        layer, x = made(plain), random(2, 9, 8)
        y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    layer = made(plain)
    with torch.inference_mode():
        x = random(2, 9, 8)
    assert layer.requires_grad_(False)(x).shape == x.shape
