"""What stands in the place of a part is obeyed: adapters, hooks, wrappers, weights of another kind, in every form."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from bench.close import TOLERANCE, assert_close
from lmn_kernels import BackendError, LogarithmicMemory, LogarithmicMixing

F64 = torch.float64
VALUE, GRADIENT = TOLERANCE[F64]
KINDS = {
    "linear": {},
    "conv": {"summarizer": "conv"},
    "conv_mixed": {"summarizer": "conv_mixed"},
    "separable": {"summarizer": "depthwise_separable"},
    "expander": {"expand": 1},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Adapter(nn.Module):
    """A low-rank adapter around a projection, as libraries of adapters put it there."""

    def __init__(self, inner: nn.Module, size: int = 12):
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(size, 2, bias=False), nn.Linear(2, size, bias=False)
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))

    def merged(self) -> nn.Module:
        plain = copy.deepcopy(self.inner)
        plain.weight.data += self.up.weight @ self.down.weight
        return plain


def mixing(**options) -> LogarithmicMixing:
    return LogarithmicMixing(12, 3, 2, init="variance_preserving", dtype=F64, **options)


def every_form(layer: LogarithmicMixing, x: Tensor) -> dict[str, Tensor]:
    """The layer over ``x [2, L, E]`` by each way that it has."""
    found = {"forward": layer(x)}
    (head, state), length = layer.prefill(x[:, :5]), x.shape[1]
    tail = []
    for t in range(5, length):
        y, state = layer.step(x[:, t : t + 1], state)
        tail.append(y)
    found["prefill and step"] = torch.cat([head, *tail], 1)
    first, state = layer(x[:, :3], return_state=True)
    found["chunks"] = torch.cat([first, layer(x[:, 3:], state=state, return_state=True)[0]], 1)
    with torch.no_grad():
        pool = layer.init_state(4, max_position=length)
        found["step_"] = layer.step_(x, pool, torch.tensor([2, 0]))
        outputs = [layer.attention(layer.sequential(x[:, t : t + 1])) for t in range(length)]
        found["sequential"], layer._stream = torch.cat(outputs, 1), None
        found["memory tensor"] = layer.attention(layer.parallel(x))
    return found


def agree(layer: LogarithmicMixing, expected: LogarithmicMixing, x: Tensor) -> None:
    for name, y in every_form(layer, x).items():
        assert_close(name, y, expected(x), VALUE)


@pytest.mark.parametrize("names", [("q",), ("k",), ("v",), ("out_proj",), ("q", "k", "v", "out_proj")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_serves_every_form_learns_and_can_be_merged(kind, names):
    torch.manual_seed(1)
    layer, x = mixing(**KINDS[kind]), torch.randn(2, 11, 12, dtype=F64)
    before = layer(x)
    for name in names:
        setattr(layer.sva, name, Adapter(getattr(layer.sva, name)))
    merged = copy.deepcopy(layer)
    for name in names:
        setattr(merged.sva, name, getattr(merged.sva, name).merged())
    assert (layer(x) - before).abs().max() > 1e-3, "the adapter has no effect"
    agree(layer, merged, x)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n in names for p in getattr(layer.sva, n).parameters())


@pytest.mark.parametrize("part", ["sva.q", "sva.k", "sva.v", "sva.out_proj", "summarizer", "expander", "sva"])
def test_a_hook_fires_and_its_result_counts_in_every_form(part):
    layer, x = mixing(expand=1), torch.randn(2, 11, 12, dtype=F64)
    before, calls = layer(x), []
    layer.get_submodule(part).register_forward_hook(lambda _, inputs, output: (calls.append(part), 1.5 * output)[1])
    y = layer(x)
    assert calls and (y - before).abs().max() > 1e-3
    agree(layer, copy.deepcopy(layer), x)
    for name, z in every_form(layer, x).items():
        assert_close(name, z, y, VALUE)


@pytest.mark.parametrize(
    "register", [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook]
)
@pytest.mark.parametrize("form", ["step", "step_"])
def test_a_hook_of_all_modules_fires_also_after_a_plan_was_made(form, register):
    layer, x = LogarithmicMemory(12, 3, 2), torch.randn(2, 1, 12)
    with torch.no_grad():
        _, state = layer.step(x, layer.init_state(2))
        layer.step(x, state)
        pool = layer.init_state(2, max_position=3)
        seen: set[str] = set()
        handle = register(lambda module, *_: seen.add(type(module).__name__))
        try:
            layer.step(x, state) if form == "step" else layer.step_(x.expand(-1, 2, -1), pool)
        finally:
            handle.remove()
    assert {"Linear", "Summarizer", "RMSNorm", "FeedForward"} <= seen


@pytest.mark.parametrize(
    "part", ["sva", "sva.q", "summarizer", "summarizer.conv", "expander", "expander.conv_transpose"]
)
def test_a_backward_hook_fires(part):
    layer, calls = mixing(summarizer="conv", expand=1), []
    layer.get_submodule(part).register_full_backward_hook(lambda *_: calls.append(part))
    layer(torch.randn(2, 11, 12, dtype=F64)).sum().backward()
    assert calls


def test_a_backward_hook_of_all_modules_fires():
    layer, seen = mixing(expand=1), set()
    handle = nn.modules.module.register_module_full_backward_hook(lambda module, *_: seen.add(type(module).__name__))
    try:
        layer(torch.randn(2, 11, 12, dtype=F64)).sum().backward()
    finally:
        handle.remove()
    assert {"SingleVectorAttention", "Linear", "Summarizer", "Expander"} <= seen


@pytest.mark.parametrize("part", ["sva", "sva.q", "sva.v", "summarizer", "expander"])
def test_a_forward_of_an_instance_is_called_in_every_form(part):
    layer, x = mixing(expand=1), torch.randn(2, 11, 12, dtype=F64)
    before, module = layer(x), layer.get_submodule(part)
    own = module.forward
    module.forward = lambda *given: 1.5 * own(*given)
    y = layer(x)
    assert (y - before).abs().max() > 1e-3
    for name, z in every_form(layer, x).items():
        assert_close(name, z, y, VALUE)


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_stream_goes_on_after_hooks_are_removed(everywhere, tokens):
    """A hook that watches a prompt, of one module or of all of them, is no reason for a state without q and v."""
    layer, x = mixing(expand=1), torch.randn(2, 9, 12, dtype=F64)
    register = nn.modules.module.register_module_forward_hook if everywhere else layer.sva.register_forward_hook
    handle = register(lambda *_: None)
    try:
        _, state = layer.prefill(x[:, :tokens])
        stepped = layer.init_state(2)
        for t in range(tokens):
            _, stepped = layer.step(x[:, t : t + 1], stepped)
    finally:
        handle.remove()
    for before in (state, stepped):
        y, _ = layer.step(x[:, tokens : tokens + 1], before)
        assert_close("y", y, layer(x)[:, tokens : tokens + 1], VALUE)


def test_a_state_has_no_q_and_v_of_an_attention_that_is_none_of_the_layers():
    """NaN, which nobody takes for a result, and not numbers that belong to other projections."""
    layer = mixing()
    layer.sva = OwnAttention()
    _, state = layer.prefill(torch.randn(2, 11, 12, dtype=F64))
    valid = state.valid()
    assert state.q[valid].isnan().all() and state.v[valid].isnan().all()
    _, state = layer.step(torch.randn(2, 1, 12, dtype=F64), state)
    assert state.q[valid].isnan().all() and state.nodes.isfinite().all()


class OwnAttention(nn.Module):
    def forward(self, memory: Tensor, valid: Tensor) -> Tensor:
        return memory.mean(2)


class Dropping(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(nn.functional.dropout(x, 0.5))


class DroppedWeight(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.dropout(weight, 0.5)


@pytest.mark.parametrize("how", ["called", "parametrized"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_lean_layer_draws_in_backward_what_it_drew_in_forward(name, how):
    gradients, x, layer = [], torch.randn(2, 11, 12, dtype=F64), mixing()
    if how == "called":
        layer.sva.add_module(name, Dropping(layer.sva.get_submodule(name)))
    else:
        nn.utils.parametrize.register_parametrization(layer.sva.get_submodule(name), "weight", DroppedWeight())
    for lean in (False, True):
        layer.lean = lean
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())))
    for (name, _), plain, again in zip(layer.named_parameters(), *gradients, strict=True):
        assert_close(name, again, plain, GRADIENT)


def test_an_expander_of_another_kind_is_called():
    """Of one that keeps a stack's height, as k = 0 says."""
    layer, x = mixing(expand=0), torch.randn(2, 11, 12, dtype=F64)
    layer.expander = nn.Linear(12, 12, dtype=F64)
    other = copy.deepcopy(layer)
    other.expander = nn.Sequential(other.expander)
    agree(layer, other, x)


@pytest.mark.parametrize("part", ["expander.conv_transpose", "expander", "summarizer.conv", "summarizer"])
@pytest.mark.parametrize("length", [0, 1])
def test_a_called_part_takes_a_sequence_without_a_node(part, length):
    layer, x = mixing(summarizer="conv", expand=1), torch.randn(2, length, 12, dtype=F64)
    expected = layer(x)
    layer.get_submodule(part).register_forward_hook(lambda *_: None)
    assert_close("y", layer(x), expected, VALUE)


NORMS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm of hooks": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm of hooks": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.parametrize("part", ["sva.q", "sva.k", "sva.out_proj", "summarizer"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_and_pruning_train_and_serve_every_form(norm, part):
    layer, x = mixing(), torch.randn(2, 11, 12, dtype=F64)
    module = layer.get_submodule(part)
    NORMS[norm](module)
    for _ in range(2):  # a second step of training finds a graph of its own
        layer.zero_grad()
        layer(x).square().sum().backward()
    own = [p for p in module.parameters(recurse=True) if p.grad is not None]
    assert own and all(p.grad.abs().max() > 0 for p in own)
    layer.eval()
    agree(layer, layer, x)
    if "weight_norm" in norm:
        y = layer(x)
        scale = module.weight_g if "hooks" in norm else module.parametrizations.weight.original0
        with torch.no_grad():
            scale.mul_(3)
        assert (layer(x) - y).abs().max() > 1e-3


def test_a_part_that_must_be_called_is_said_where_a_kernel_was_asked_for_by_name():
    layer = mixing(backend="triton")
    layer.summarizer.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendError, match="callable summarizer"):
        layer(torch.randn(1, 9, 12, dtype=F64))
    layer = mixing(backend="triton")
    layer.summarizer.weight = nn.Parameter(layer.summarizer.weight.detach().as_subclass(Kind))
    with pytest.raises(BackendError, match="weights of its own kind"):
        layer(torch.randn(1, 9, 12, dtype=F64))
    layer = LogarithmicMixing(12, 3, 2, step_backend="cpp")
    layer.sva.q.register_forward_hook(lambda *_: None)
    with torch.no_grad(), pytest.raises(BackendError, match="sva.q must be called"):
        layer.step(torch.randn(1, 1, 12), layer.init_state(1))


class Kind(Tensor):
    """A tensor of another kind."""


def test_a_sequence_of_padded_rows_through_an_attention_that_is_called():
    """Of unequal rows and documents as well: what the memory tensor holds is what each position may see."""
    layer, x = mixing(), torch.randn(2, 11, 12, dtype=F64)
    lengths, bounds = torch.tensor([11, 4]), torch.tensor([0, 3, 3, 9, 20])
    packed = torch.randn(1, 22, 12, dtype=F64)
    plain = layer(x, lengths=lengths), layer(packed, cu_seqlens=bounds)
    layer.sva.register_forward_hook(lambda *_: None)
    assert_close("padded", layer(x, lengths=lengths), plain[0], VALUE)
    assert_close("packed", layer(packed, cu_seqlens=bounds), plain[1], VALUE)


def test_weights_of_a_tensor_subclass_are_not_joined():
    """As int8 weights of quantisers are: the module is called, in float32 what it says."""

    class Held(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.cat:
                raise NotImplementedError("weights of this kind cannot be joined")
            found = super().__torch_function__(func, types, args, kwargs or {})
            return found.as_subclass(Tensor) if func is torch.nn.functional.linear else found

    layer, x = mixing(), torch.randn(2, 11, 12, dtype=F64)
    expected = layer(x).detach()
    for name in ("q", "k", "v"):
        module = getattr(layer.sva, name)
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Held), requires_grad=False)
    with pytest.raises(NotImplementedError):
        torch.cat([layer.sva.q.weight])
    with torch.no_grad():
        assert_close("y", layer(x), expected, VALUE)
        assert_close("step", layer.step(x[:, :1], layer.init_state(2))[0], expected[:, :1], VALUE)


def test_dynamic_quantisation_runs_in_every_form():
    layer, x = LogarithmicMemory(32, 4, 2).eval(), torch.randn(2, 11, 32)
    with torch.no_grad():
        expected = layer(x)
        small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
        for name, y in every_form(small, x).items():
            if name in ("sequential", "memory tensor"):
                continue  # attention alone, without the norms of the block
            assert (y - expected).abs().max() < 0.1 * expected.abs().max(), name


@pytest.mark.parametrize("part", [None, "q", "summarizer"])
def test_a_called_part_compiles_whole(part):
    layer, x = mixing(), torch.randn(2, 11, 12, dtype=F64)
    if part == "q":
        layer.sva.q = Adapter(layer.sva.q)
    elif part == "summarizer":
        layer.summarizer = Around(layer.summarizer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close("y", compiled(x), layer(x), VALUE)


class Around(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.inner(left, right)


def test_a_pool_of_a_called_part_checks_and_counts():
    layer, x = mixing(), torch.randn(2, 2, 12, dtype=F64)
    layer.sva.register_forward_hook(lambda *_: None)
    pool = layer.init_state(3, max_position=3)
    y = layer.step_(x, pool, torch.tensor([2, -1]))
    assert y[1].eq(0).all() and pool.max_position == 2 and pool.position.tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="^slots: expected each slot at most once"):
        layer.step_(x, pool, torch.tensor([1, 1]))
    with pytest.raises(RuntimeError, match="^state: exhausted"):
        layer.step_(x, pool, torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="^state: expected one with expand=0"):
        layer.step_(x, mixing(expand=1).init_state(2, max_position=3))
    assert pool.position.tolist() == [0, 0, 2]
