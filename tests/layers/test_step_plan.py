"""What a step must not overlook: a layer that is another one, tensors that are not plain, memory that is shared.

Found by a review that tried to get wrong numbers out of a layer's plan (`lmn_kernels.layers.step_plan`).
"""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bench.close import TOLERANCE, assert_close
from lmn_kernels import LogarithmicMemory, LogarithmicMixing, MemoryState, decode_
from lmn_kernels.backend import choice
from lmn_kernels.layers.summarizers import Summarizer

LIMIT = TOLERANCE[torch.float32][0]

pytestmark = [
    pytest.mark.ext,
    pytest.mark.skipif(
        choice.why_not("cpp", "step", torch.device("cpu"), torch.float32) is not None,
        reason=f"{choice.why_not('cpp', 'step', torch.device('cpu'), torch.float32)}",
    ),
]


def stepped(kind=LogarithmicMemory, **options) -> tuple[nn.Module, MemoryState]:
    """A layer that has a plan, and its state."""
    layer = kind(16, 2, 2, init="variance_preserving", **options).eval()
    state = layer.init_state(3)
    with torch.no_grad():
        for x in torch.randn(3, 3, 1, 16):
            _, state = layer.step(x, state)
    return layer, state


def reference(layer: nn.Module, x: Tensor, state: MemoryState) -> Tensor:
    layer.step_backend = "reference"
    try:
        return layer.step(x, state)[0]
    finally:
        layer.step_backend = "auto"


def doubled(forward):
    return lambda *given: 2 * forward(*given)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES = {
    "eps": lambda layer: setattr(layer.norm1, "eps", 1.0),
    "heads": lambda layer: setattr(layer, "heads", 4),
    "a forward of its own": lambda layer: setattr(
        layer.feedforward.fc1, "forward", doubled(layer.feedforward.fc1.forward)
    ),
    "another class": lambda layer: setattr(layer.feedforward.fc1, "__class__", Doubled),
    "no feed-forward": lambda layer: (setattr(layer, "feedforward", None), setattr(layer, "norm2", None)),
    "a parameter": lambda layer: setattr(layer.sva.q, "weight", nn.Parameter(torch.randn(16, 16))),
    "its data": lambda layer: setattr(layer.sva.q.weight, "data", torch.randn(16, 16)),
    "a module": lambda layer: setattr(layer.feedforward, "activation", nn.GELU()),
    "a hook": lambda layer: layer.norm1.register_forward_hook(lambda module, given, y: 2 * y),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_steps_as_it_is_now(change):
    layer, state = stepped()
    assert "_plan" in layer.__dict__
    CHANGES[change](layer)
    x = torch.randn(3, 1, 16)
    with torch.no_grad():
        assert_close(change, layer.step(x, state)[0], reference(layer, x, state), LIMIT)


def test_a_summarizer_that_knows_better():
    class Halved(Summarizer):
        def merge(self):
            weight, bias, scale = super().merge()
            return type(super().merge())(weight / 2, bias, scale)

    layer = LogarithmicMixing(16, 2, 2, init="variance_preserving")
    layer.summarizer = Halved(16, 2, "variance_preserving")
    x, state = torch.randn(1, 9, 16), layer.init_state(1, max_position=9)
    with torch.no_grad():
        assert_close("y", layer.step_(x, state), layer(x), LIMIT)


class Wrapped(Tensor):
    """A tensor without memory of its own, as quantised weights are."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, given=(), options=None):
        plain = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (given, options or {}))
        found = function(*plain[0], **plain[1])
        return Wrapped(found) if function is torch.ops.aten.detach.default else found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tensors_without_memory_of_their_own():
    layer, state = stepped(LogarithmicMixing)
    x = torch.randn(3, 1, 16)
    with torch.no_grad():
        for given in (torch._neg_view(x), torch._efficientzerotensor((3, 1, 16))):
            assert_close("y", layer.step(given, state)[0], reference(layer, given.clone(), state), LIMIT)
        expected = layer.step(x, state)[0]
        layer.sva.q.weight = nn.Parameter(Wrapped(layer.sva.q.weight.detach()), requires_grad=False)
        assert_close("y", layer.step(x, state)[0], expected, LIMIT)
        # The dispatcher asks the subclass, which hands on what it holds.
        y = decode_(x, state.with_room(9), layer.step_weights(), backend="cpp")
        assert_close("y", y, expected, LIMIT)


def test_transforms_of_torch_func():
    layer, state = stepped(LogarithmicMixing)
    layer.requires_grad_(False)
    x, tangent = torch.randn(3, 1, 16), torch.randn(3, 1, 16)
    with torch.no_grad():
        layer.step(x, state)
    _, got = torch.func.jvp(lambda t: layer.step(t, state)[0], (x,), (tangent,))
    assert got.any(), "a tangent was dropped without a word"
    many = torch.randn(4, 3, 1, 16)
    with torch.no_grad():
        got = torch.func.vmap(lambda t: layer.step(t, state)[0])(many)
        expected = torch.stack([layer.step(part, state)[0] for part in many])
    assert_close("vmap", got, expected, LIMIT)


def test_copies_and_pickles_have_plans_of_their_own():
    layer, state = stepped()
    x = torch.randn(3, 1, 16)
    with torch.no_grad():
        expected = layer.step(x, state)[0]
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert "_plan" not in twin.__dict__
            assert torch.equal(twin.step(x, state)[0], expected)
            twin.sva.v.weight.zero_()
        assert torch.equal(layer.step(x, state)[0], expected)


def test_a_plan_does_not_keep_a_layer():
    layer, _ = stepped()
    layer.summarizer.note = [layer]
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("rows", [3, 33])  # 33: long enough to run without Python's lock
def test_a_plan_takes_and_leaves_references(rows):
    layer, _ = stepped()
    counts = [(sys.getrefcount(p), p._use_count()) for p in layer.parameters()]
    x, state, pool = torch.randn(rows, 1, 16), layer.init_state(rows), layer.init_state(rows, max_position=3)
    with torch.no_grad():
        for _ in range(3):
            layer.step(x, state)
            layer.step_(x, pool)
            with pytest.raises(ValueError, match="x_t: expected shape"):
                layer.step(x.expand(-1, 2, -1), state)
    assert "_plan" in layer.__dict__
    assert [(sys.getrefcount(p), p._use_count()) for p in layer.parameters()] == counts
    assert {use for _, use in counts} == {1}


@pytest.fixture
def swaps():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def check_step(layer: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Against the definition's parallel form, which no plan serves."""
    x, state = torch.randn(3, 5, 16, dtype=dtype), layer.init_state(3)
    with torch.no_grad():
        steps = []
        for x_t in x.split(1, 1):
            y, state = layer.step(x_t, state)
            steps.append(y)
        pooled = layer.step_(x, layer.init_state(3, max_position=5))
        for y in (torch.cat(steps, 1), pooled):
            assert y.dtype == dtype
            assert_close("y", y.double(), layer(x).double(), 4 * TOLERANCE[dtype][0])


BOTH = pytest.mark.parametrize("step_backend", ["auto", "reference"])


@BOTH
@pytest.mark.parametrize("kind", [LogarithmicMixing, LogarithmicMemory])
def test_a_swapped_weight_is_what_steps_take(kind, step_backend):
    """`torch.utils.swap_tensors` refuses a tensor that anything but its Python object refers to, weakly or not."""
    layer, _ = stepped(kind, step_backend=step_backend)
    for name, parameter in list(layer.named_parameters()):
        before = parameter.detach().clone()
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.randn_like(before)))
        assert layer.get_parameter(name) is parameter and not torch.equal(parameter, before)
        check_step(layer)


def test_a_weight_swapped_for_one_of_another_kind():
    layer, state = stepped(LogarithmicMixing)
    x = torch.randn(3, 1, 16)
    with torch.no_grad():
        expected = layer.step(x, state)[0]
        weight = layer.sva.q.weight
        wrapped = nn.Parameter(Wrapped(weight.detach().clone()), requires_grad=False)
        torch.utils.swap_tensors(weight, wrapped)
        assert type(layer.sva.q.weight.data) is Wrapped
        assert_close("y", layer.step(x, state)[0], expected, LIMIT)
        torch.utils.swap_tensors(weight, nn.Parameter(torch.randn(16, 12)))
        with pytest.raises(ValueError, match=r"^q.weight: expected shape \[16, 16\], got \[16, 12\]$"):
            layer.step(x, state)


def whole(layer: nn.Module) -> nn.Module:
    return layer


def part(layer: nn.Module) -> nn.Module:
    return layer.sva


def parent(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"inner": nn.Sequential(layer)})


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("of", [whole, part, parent])
@BOTH
def test_a_load_after_a_step(of, assign, step_backend):
    layer, _ = stepped(step_backend=step_backend)
    other = LogarithmicMemory(16, 2, 2, init="variance_preserving")
    of(layer).load_state_dict(of(other).state_dict(), assign=assign)
    for loaded, given in zip(of(layer).parameters(), of(other).parameters(), strict=True):
        assert torch.equal(loaded, given)
    check_step(layer)


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("of", [whole, parent])
@BOTH
def test_a_conversion_after_a_step(of, step_backend):
    layer, _ = stepped(step_backend=step_backend)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        of(layer).to(dtype)
        check_step(layer, dtype)
    of(layer).double()
    check_step(layer, torch.float64)


@pytest.mark.usefixtures("swaps")
def test_a_conversion_of_a_part_after_a_step():
    layer, state = stepped(LogarithmicMixing)
    layer.sva.double()
    x = torch.randn(3, 1, 16)
    with torch.no_grad(), pytest.raises(TypeError, match="x: expected dtype torch.float64 of the layer"):
        layer.step(x, state)
    layer.sva.float()
    check_step(layer)


def test_what_was_restored_knows_how_far_it_is():
    layer, _ = stepped(LogarithmicMixing)
    x = torch.randn(2, 60, 16)
    with torch.no_grad():
        expected, snapshot = layer.prefill(x[:, :50])
        pool = layer.init_state(2, max_position=60)
        pool.restore(snapshot)
        assert pool.max_position == 50
        assert_close("y", layer(x[:, 50:], state=pool), layer(x)[:, 50:], 4 * LIMIT)
    with pytest.raises(ValueError, match="rows: expected shape"):
        pool.restore(snapshot, torch.tensor(0))


def test_tokens_that_lie_in_the_state():
    layer, _ = stepped(LogarithmicMixing)
    pool = layer.init_state(24, max_position=9)
    with torch.no_grad():
        layer.step_(torch.randn(24, 3, 16), pool)
        twin, slots = pool.clone(), torch.arange(24).flip(0)
        expected = layer.step_(twin.token.clone()[:, None], twin, slots)
        assert torch.equal(layer.step_(pool.token[:, None], pool, slots), expected)


def test_a_state_of_another_dtype_goes_to_the_reference():
    layer, _ = stepped(LogarithmicMixing)
    x, state = torch.randn(2, 4, 16), layer.init_state(2, max_position=4, dtype=torch.float64)
    with torch.no_grad():
        assert_close("y", decode_(x, state, layer.step_weights()), layer(x), LIMIT)
        with pytest.raises(TypeError, match="state.token"):
            decode_(x, state, layer.step_weights(), backend="cpp")


def test_no_bank_and_no_features():
    layer, _ = stepped(LogarithmicMixing)
    weights = layer.step_weights()
    for shape in ((1, 0, 16), (1, 2, 0)):
        state = MemoryState.empty(1, shape[2], shape[1], levels=2)
        with torch.no_grad(), pytest.raises(ValueError, match="at least 1"):
            decode_(torch.randn(1, 1, shape[2]), state, weights._replace(summarizer="pair"), backend="cpp")


def test_the_feed_forward_far_below_zero():
    layer, state = stepped()
    with torch.no_grad():
        layer.feedforward.fc1.bias.fill_(-1e38)
        x = torch.randn(3, 1, 16)
        assert_close("y", layer.step(x, state)[0], reference(layer, x, state), LIMIT)


def test_a_plan_does_not_drop_a_tangent():
    layer, state = stepped(LogarithmicMixing)
    x = torch.randn(state.batch_size, 1, 16)
    with torch.no_grad(), forward_ad.dual_level():
        y, _ = layer.step(forward_ad.make_dual(x, torch.ones_like(x)), state)
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    epsilon = 1e-2
    with torch.no_grad():
        ahead, behind = (layer.step(x + sign * epsilon, state)[0] for sign in (1, -1))
    assert torch.allclose(tangent, (ahead - behind) / (2 * epsilon), atol=1e-3)
