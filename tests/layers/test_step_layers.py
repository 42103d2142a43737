"""A step does what the layer does now, whoever changed, copied, traced or cast it (R12, R14, R16)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from bench.close import TOLERANCE, assert_close
from lmn_kernels import LogarithmicMemory, LogarithmicMixing
from tests.layers.test_step_plan import CHANGES as OTHERS
from tests.support.stepping import (
    BY_NAME,
    agree_on_state,
    assert_same,
    assert_state_close,
    every_backend,
    exact_steps,
    extension,
    layers,
    one_by_one,
    parts,
    started,
    tolerance,
)
from tests.support.variants import difference

F32, BF16 = torch.float32, torch.bfloat16
OPS = torch.ops.lmn_kernels


def replaced(path: str, module: Callable[[], nn.Module]) -> Callable[[LogarithmicMemory], None]:
    def change(layer: LogarithmicMemory) -> None:
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, module())

    return change


def hooked(path: str, before: bool = False) -> Callable[[LogarithmicMemory], None]:
    """Something of the user's around a module: an adapter, a probe."""

    def change(layer: LogarithmicMemory) -> None:
        module = layer.get_submodule(path)
        if before:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
        else:
            module.register_forward_hook(lambda _, inputs, output: 2 * output)

    return change


def patched(layer: LogarithmicMemory) -> None:
    """As libraries do that move weights about."""
    original = layer.sva.out_proj.forward
    layer.sva.out_proj.forward = lambda x: 2 * original(x)


def parameter(path: str, change: Callable[[nn.Module, str], None]) -> Callable[[LogarithmicMemory], None]:
    owner, _, name = path.rpartition(".")
    return lambda layer: change(layer.get_submodule(owner), name)


def assigned(owner: nn.Module, name: str) -> None:
    setattr(owner, name, nn.Parameter(torch.randn_like(getattr(owner, name))))


def other_data(owner: nn.Module, name: str) -> None:
    getattr(owner, name).data = torch.randn_like(getattr(owner, name))


def in_place(owner: nn.Module, name: str) -> None:
    getattr(owner, name).normal_()


class Wrapped(nn.Module):
    """A summarizer around another, as adapters are."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.inner(left, right) + right


class Triple(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 3 * weight


def parametrized(path: str) -> Callable[[LogarithmicMemory], None]:
    return lambda layer: nn.utils.parametrize.register_parametrization(layer.get_submodule(path), "weight", Triple())


CHANGES = {
    "other weights loaded": lambda layer: layer.load_state_dict(BY_NAME["block"].layer(F32).state_dict()),
    "a parameter assigned": parameter("sva.v.weight", assigned),
    "a bias assigned": parameter("summarizer.bias", assigned),
    "a norm assigned": parameter("norm2.weight", assigned),
    "a parameter with other data": parameter("feedforward.fc2.weight", other_data),
    "a parameter written to": parameter("sva.k.weight", in_place),
    "a parametrization": parametrized("sva.k"),
    "a parametrized end": parametrized("sva.out_proj"),
    "a parametrized norm": parametrized("norm1"),
    "another eps": lambda layer: setattr(layer.norm1, "eps", 1.0),
    "another eps of the second norm": lambda layer: setattr(layer.norm2, "eps", 1.0),
    "a norm without weight": replaced("norm1", lambda: nn.RMSNorm(12, elementwise_affine=False)),
    "another norm": replaced("norm2", lambda: nn.LayerNorm(12)),
    "another activation": replaced("feedforward.activation", nn.ReLU),
    "another feed-forward": replaced("feedforward", lambda: nn.Linear(12, 12)),
    "no feed-forward": lambda layer: (setattr(layer, "feedforward", None), setattr(layer, "norm2", None)),
    "no bias": replaced("feedforward.fc1", lambda: nn.Linear(12, 48, bias=False)),
    "a wider layer": lambda layer: (
        setattr(layer.feedforward, "fc1", nn.Linear(12, 20)),
        setattr(layer.feedforward, "fc2", nn.Linear(20, 12)),
    ),
    "a hook on a norm": hooked("norm1"),
    "a hook on the output projection": hooked("sva.out_proj"),
    "a hook before the output projection": hooked("sva.out_proj", before=True),
    "a hook on the projection of q": hooked("sva.q"),
    "a hook before the projection of v": hooked("sva.v", before=True),
    "another projection of q": replaced("sva.q", lambda: nn.Sequential(nn.Linear(12, 12), nn.Tanh())),
    "a hook on the summarizer": hooked("summarizer"),
    "a hook on the attention": hooked("sva"),
    "a wrapped summarizer": lambda layer: setattr(layer, "summarizer", Wrapped(layer.summarizer)),
    "a hook on the feed-forward": hooked("feedforward"),
    "a hook before a layer": hooked("feedforward.fc2", before=True),
    "a hook before the activation": hooked("feedforward.activation", before=True),
    "a patched output projection": patched,
    "another output projection": replaced("sva.out_proj", lambda: nn.Sequential(nn.Linear(12, 12), nn.Tanh())),
    "bfloat16": lambda layer: layer.to(BF16),
    "the reference": lambda layer: setattr(layer, "step_backend", "reference"),
}


@pytest.mark.parametrize("when", ["before the first step", "after it"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@torch.no_grad()
def test_a_step_follows_every_change_of_the_layer(change, when, backend):
    """Whatever a layer may remember of itself: steps equal the parallel form, which asks modules and parameters."""
    layer = BY_NAME["block"].layer(F32, step_backend=backend)
    x = torch.randn(2, 7, 12)
    if when == "after it":
        one_by_one(layer, x, layer.init_state(2))
        layer.step_(x, layer.init_state(2, max_position=7))
    old = layer(x)
    CHANGES[change](layer)
    x = x.to(layer.sva.v.weight.dtype)
    expected = layer(x)
    assert change == "the reference" or (expected - old).abs().max() > 1e-3, "nothing has changed"
    assert_close("step", one_by_one(layer, x, layer.init_state(2))[0], expected, tolerance(x.dtype))
    pool = layer.init_state(2, max_position=7)
    assert_close("step_", layer.step_(x, pool), expected, tolerance(x.dtype))
    if "projection" in change:  # no part of `StepWeights` can stand for it
        with pytest.raises(TypeError, match=r"sva\.(q|v|out_proj): expected"):
            layer.step_weights()


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "with a hook"])
@torch.no_grad()
def test_a_layer_that_stepped_can_be_freed(hooked):
    """What it remembers of itself ties it to nothing, not even to a hook that refers to the layer."""
    layer = BY_NAME["block"].layer(F32)
    _, state = layer.step(torch.randn(1, 1, 12), layer.init_state(1))
    if hooked:
        layer.sva.q.register_forward_hook(lambda *_, layer=layer: None)
    layer.step(torch.randn(1, 1, 12), state)
    left = weakref.ref(layer)
    del layer
    gc.collect()
    assert left() is None


def saved_and_loaded(layer: LogarithmicMemory) -> LogarithmicMemory:
    return pickle.loads(pickle.dumps(layer))


@torch.no_grad()
def test_states_of_any_dtype():
    """Those that the extension does not know are the reference's, one after the other with one layer."""
    layer, x = BY_NAME["block"].layer(F32), torch.randn(2, 1, 12)
    for dtype in (F32, torch.float16, F32, torch.float64, BF16, F32):
        state = started(layer, [3, 7], 1, dtype)
        expected, end = exact_steps(BY_NAME["block"], layer, x, state)
        y, new = layer.step(x, state)
        assert_close("step", y, expected, tolerance(dtype, F32))
        assert_close("step_", layer.step_(x, state), expected, tolerance(dtype, F32))
        for kept in (new, state):
            assert kept.nodes.dtype == kept.token.dtype == dtype
            assert_state_close(kept, end, tolerance(dtype, F32))
    layer.step_backend = "cpp"
    for run in (layer.step, layer.step_):
        with pytest.raises(RuntimeError, match="cannot serve step.*the state is kept in torch.float16"):
            run(x, started(layer, [3, 7], 1, torch.float16))


@torch.no_grad()
def test_a_layer_gets_another_summarizer():
    layer, x = BY_NAME["block"].layer(F32), torch.randn(2, 7, 12)
    one_by_one(layer, x, layer.init_state(2))
    del layer.summarizer
    layer.summarizer = difference
    assert_close("step", one_by_one(layer, x, layer.init_state(2))[0], layer(x), tolerance(F32))
    assert_close("step_", layer.step_(x, layer.init_state(2, max_position=7)), layer(x), tolerance(F32))
    with pytest.raises(TypeError, match="summarizer: expected a linear one"):
        layer.step_weights()


@pytest.mark.parametrize("twin", [copy.deepcopy, saved_and_loaded], ids=lambda twin: twin.__name__)
@torch.no_grad()
def test_a_copy_of_a_layer_steps_with_its_own_weights(twin):
    layer, x = BY_NAME["block"].layer(F32), torch.randn(2, 5, 12)
    y, _ = one_by_one(layer, x, layer.init_state(2))
    other = twin(layer)
    assert_same("copy", one_by_one(other, x, other.init_state(2))[0], y)
    for weight in other.parameters():
        weight.mul_(0.5)
    assert_close("changed copy", one_by_one(other, x, other.init_state(2))[0], other(x), tolerance(F32))
    assert_same("original", one_by_one(layer, x, layer.init_state(2))[0], y)


@pytest.mark.parametrize("name", ["update_", "decode_", "step"])
@layers("linear", "conv_mixed", "expander_depthwise", "block")
@extension
def test_opcheck(variant, name, backend):
    layer = variant.layer(F32).requires_grad_(False)
    tensors, *rest = layer.step_weights()
    state = [tensor for _, tensor in parts(started(layer, [6, 0, 3], 2))]
    tokens, rest = torch.randn(3, 2, variant.embedding), [list(r) if isinstance(r, tuple) else r for r in rest]
    if name == "step":
        opcheck(OPS.step.default, (tokens[:, :1], *state, list(tensors), *rest))
        return
    for x, slots in ((tokens, None), (tokens[:2], torch.tensor([2, 0]))):
        opcheck(getattr(OPS, name).default, (x, slots, *state, list(tensors), *rest))


@pytest.mark.parametrize(
    ("variant", "backend"),
    [(BY_NAME["linear"], "reference"), *((BY_NAME[v], "auto") for v in ("linear", "expander_conv_mixed", "block"))],
    ids=str,
)
@torch.no_grad()
def test_a_compiled_step_equals_eager(variant, backend):
    """Without a graph break; positions, also those where a level begins, are no reason to compile again."""
    torch._dynamo.reset()
    layer, counter = variant.layer(F32, step_backend=backend), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer.step, fullgraph=True, backend=counter)
    x, state = torch.randn(2, 20, variant.embedding), layer.init_state(2, max_position=40)
    other = state
    for token in x.split(1, 1):
        y, state = layer.step(token, state)
        got, other = compiled(token, other)
        assert_close("y", got, y, tolerance(F32))
        agree_on_state("reference", other, state)
    assert state.max_position == other.max_position == 20 and counter.frame_count <= 3


@pytest.mark.parametrize("asked", ["auto", "cpp"])
@extension
@torch.no_grad()
def test_autocast_steps_on_the_reference(asked, backend):
    variant = BY_NAME["expander_k1"]
    layer = variant.layer(F32, step_backend=asked)
    x, state = torch.randn(2, 1, 6), started(layer, [3, 7], 1)
    expected, end = exact_steps(variant, layer, x, state)
    before = state.clone()
    layer.step(x, state)  # and it may remember who served
    with torch.autocast("cpu", BF16):
        with pytest.raises(RuntimeError, match="step_: expected no torch.autocast region"):
            layer.step_(x, state)
        if asked == backend:
            with pytest.raises(RuntimeError, match="cannot serve step.*torch.autocast is active"):
                layer.step(x, state)
            return
        y, new = layer.step(x, state)
    assert y.dtype == BF16
    assert_close("y", y, expected, tolerance(BF16))
    assert_state_close(new, end, tolerance(BF16))
    assert_state_close(state, before, 0.0)


@pytest.mark.parametrize("eps", [None, 0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_backend
@torch.no_grad()
def test_the_eps_of_a_norm_counts_where_tokens_are_small(backend, dtype, eps):
    """`torch.nn.RMSNorm` without one takes the resolution of the dtype."""
    if backend == "cpp" and dtype == torch.float64:
        backend = "reference"  # which is all that float64 has
    layer = LogarithmicMemory(12, 3, 2, step_backend=backend, dtype=dtype)
    layer.norm1.eps = layer.norm2.eps = eps
    x = 1e-6 * torch.randn(2, 5, 12, dtype=dtype)
    y = layer.step_(x, layer.init_state(2, max_position=5, dtype=dtype))
    assert_close("y", y, layer(x), TOLERANCE[dtype][0])


@every_backend
@torch.no_grad()
def test_a_row_without_a_slot_is_zero_behind_a_block_of_other_parts(backend):
    layer = LogarithmicMemory(12, 3, 2, step_backend=backend)
    layer.norm2 = torch.nn.LayerNorm(12)
    x, pool = torch.randn(2, 3, 12), layer.init_state(2, max_position=3)
    y = layer.step_(x, pool, torch.tensor([-1, 0]))
    assert torch.equal(y[0], torch.zeros(3, 12))
    assert_close("y", y[1:], layer(x[1:]), TOLERANCE[torch.float32][0])


@pytest.mark.parametrize("change", OTHERS)
def test_a_plan_of_the_reference_steps_as_the_layer_is_now(change):
    layer = LogarithmicMemory(16, 2, 2, init="variance_preserving", step_backend="reference").eval()
    state = layer.init_state(3)
    with torch.no_grad():
        for x in torch.randn(3, 3, 1, 16):
            _, state = layer.step(x, state)
        kept = layer.__dict__["_plan"]
        assert kept.serves(layer, x, state)
        OTHERS[change](layer)
        y = layer.step(x, state)[0]
    expected, _ = layer.step(x, state)
    assert expected.requires_grad, "a step with gradients has no plan"
    assert_close(change, y, expected.detach(), TOLERANCE[torch.float32][0])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_plan_makes_room_where_others_have_advanced_the_tensors(backend):
    layer, x = LogarithmicMixing(16, 2, 2, init="variance_preserving", step_backend=backend), torch.randn(2, 4, 16)
    with torch.no_grad():
        layer.step(x[:, :1], layer.init_state(2))
        state = layer.init_state(2, max_position=3)
        twin = torch.utils._pytree.tree_map(lambda tensor: tensor, state)
        layer.step_(x[:, :3], twin)
        assert layer.__dict__["_plan"].serves(layer, x[:, 3:], state), "which stands at 3 of 3"
        y, after = layer.step(x[:, 3:], state)
    assert_close("y", y, layer(x)[:, 3:].detach(), TOLERANCE[torch.float32][0])
    assert after.position.tolist() == [4, 4] and after.levels == 2


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_state_of_another_expander_with_as_many_rows_is_refused_behind_a_plan(backend):
    layer, x = LogarithmicMixing(16, 2, 2, step_backend=backend), torch.randn(2, 1, 16)
    other = LogarithmicMixing(16, 2, 2, expand=1).init_state(2, max_position=7)
    with torch.no_grad():
        _, state = layer.step(x, layer.init_state(2, max_position=63))
        assert other.nodes.shape == state.nodes.shape and layer.__dict__["_plan"].serves(layer, x, state)
        with pytest.raises(ValueError, match="^state: expected one with expand=0, got 1"):
            layer.step(x, other)


@pytest.mark.parametrize("name", ["token", "nodes", "q", "v"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_state_of_integers_is_refused_behind_a_plan_as_before_one(backend, name):
    layer, x = LogarithmicMemory(16, 2, 2, step_backend=backend), torch.randn(2, 1, 16)
    with torch.no_grad():
        _, state = layer.prefill(torch.randn(2, 5, 16))
        rounded = state.replace(**{name: getattr(state, name).long()})
        for _ in range(2):
            with pytest.raises(TypeError, match=f"^state.{name}: expected a floating dtype"):
                layer.step(x, rounded)
            _, state = layer.step(x, state)
        assert layer.__dict__["_plan"].serves(layer, x, state)


def test_rows_that_stand_together_step_as_rows_that_do_not():
    """The same rows among others that stand elsewhere, for which levels and slots are told apart by masks."""
    layer = LogarithmicMixing(12, 3, 2, expand=1, init="variance_preserving", dtype=torch.float64)
    x = torch.randn(3, 20, 12, dtype=torch.float64)
    together, apart = layer.init_state(3), layer.init_state(4)
    with torch.no_grad():
        _, shifted = layer.prefill(x[:1, :5])
        apart = apart._map(torch.clone).with_room(40)
        apart.restore(shifted, torch.tensor([3]))
        for t in range(20):
            y, together = layer.step(x[:, t : t + 1], together)
            both, apart = layer.step(torch.cat([x, x[:1]])[:, t : t + 1], apart)
            assert_close("y", both[:3], y, 1e-12)
            for name in ("nodes", "q", "v"):
                mine, theirs = getattr(together, name), getattr(apart, name)[:3]
                assert_close(name, theirs[:, : mine.shape[1]], mine, 1e-12)
