"""torch.func: gradients of samples, ensembles, rows of states, on the reference alone (R3)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import (
    BackendError,
    ExpanderSummarizerLogarithmicMemory,
    LogarithmicMemory,
    LogarithmicMixing,
    LookAheadMemory,
    LookAheadState,
    MemoryState,
    decode_,
)
from tests.support.variants import VARIANTS, enlarged

VALUE, GRADIENT = TOLERANCE[torch.float64]


def random(*shape: int, **more) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, **more)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_close_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and any(part.any() for part in expected.values())
    assert_same_gradients(list(got), list(got.values()), list(expected.values()), GRADIENT)


def by_autograd(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, leaves = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def stacked(every: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in every]) for name in every[0]}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_of_every_sample(variant):
    layer, x = variant.layer(), random(3, 11, variant.embedding)
    weight = random(11, variant.embedding)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x[None],))[0] * weight).pow(2).sum()

    expected = stacked([by_autograd(layer, (layer(one[None])[0] * weight).pow(2).sum()) for one in x])
    assert_close_gradients(vmap(grad(loss), (None, 0))(parameters_of(layer), x), expected)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_sequences_without_a_tree(length):
    layer, x = LogarithmicMemory(8, 2, 2, dtype=torch.float64), random(3, length, 8)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x[None],)).pow(2).sum()

    got = vmap(grad(loss), (None, 0))(parameters_of(layer), x)
    expected = stacked([by_autograd(layer, layer(one[None]).pow(2).sum()) for one in x])
    if length:
        assert_close_gradients(got, expected)
    else:
        assert not any(part.any() for part in got.values()) and got.keys() == expected.keys()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("given_as", ["lengths", "attention_mask"])
def test_padding_and_a_state(lean, given_as):
    """Each sample has a length, or a mask with gaps, and a state of its own."""
    layer = enlarged(ExpanderSummarizerLogarithmicMemory(8, 2, 2, 1, dtype=torch.float64, lean=lean))
    x, before = random(3, 9, 8), random(3, 6, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 1], [1] * 4 + [0] * 5, [0] * 3 + [1] * 6])
    given = torch.tensor([9, 4, 0]) if given_as == "lengths" else mask
    with torch.no_grad():
        _, state = layer.prefill(before, torch.tensor([6, 3, 5]))

    def run(x: Tensor, given: Tensor, slots: tuple[Tensor, ...], call) -> Tensor:
        one = MemoryState(*(part[None] for part in slots), state.expand, state.levels, state.max_position)
        y, after = call(x[None], state=one, return_state=True, **{given_as: given[None]})
        return y.pow(2).sum() + after.nodes.sin().sum() + after.q.pow(2).sum() + after.token.pow(3).sum()

    def loss(parameters: dict[str, Tensor], *sample) -> Tensor:
        return run(*sample, lambda *a, **k: functional_call(layer, parameters, a, k))

    got = vmap(grad(loss), (None, 0, 0, 0))(parameters_of(layer), x, given, tuple(state.slots()))
    samples = ((x[i], given[i], [part[i] for part in state.slots()]) for i in range(3))
    assert_close_gradients(got, stacked([by_autograd(layer, run(*sample, layer)) for sample in samples]))


def test_gradients_of_gradients():
    layer, x, v = enlarged(LogarithmicMixing(6, 2, 2, dtype=torch.float64)), random(1, 7, 6), random(1, 7, 6)

    def slope(x: Tensor) -> Tensor:
        return (grad(lambda x: layer(x).pow(3).sum())(x) * v).sum()

    leaf = x.clone().requires_grad_()
    [first] = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
    [expected] = torch.autograd.grad((first * v).sum(), leaf)
    assert_close("grad(grad)", grad(slope)(x), expected, GRADIENT)
    # Rows of vmap inside of grad, and forward over reverse.
    for twice in (jacrev(grad(lambda x: layer(x).pow(3).sum())), hessian(lambda x: layer(x).pow(3).sum())):
        assert_close("second derivative", twice(x).flatten(3) @ v.flatten(), expected, GRADIENT)


def test_an_ensemble():
    layers = [LogarithmicMemory(8, 2, 2, dtype=torch.float64) for _ in range(3)]
    x, [base, *_] = random(2, 9, 8), layers
    parameters, buffers = stack_module_state(layers)
    got = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    assert_close("outputs", got, torch.stack([layer(x) for layer in layers]), VALUE)
    got = vmap(grad(lambda p: functional_call(base, p, (x,)).pow(2).sum()))(parameters)
    assert_close_gradients(got, stacked([by_autograd(layer, layer(x).pow(2).sum()) for layer in layers]))


@pytest.mark.parametrize("step_backend", ["auto", "reference"])
def test_steps_over_rows_of_a_state(step_backend):
    layer = LogarithmicMemory(8, 2, 2, step_backend=step_backend)
    x = torch.randn(3, 12, 8)
    with torch.no_grad():
        _, state = layer.prefill(x[:, :11], torch.tensor([11, 3, 6]))
        layer.step(x[:, :1], state)  # a plan must not take what follows
        y, after = layer.step(x[:, 11:], state)

        def one(x: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
            row = MemoryState(*(part[None] for part in slots), state.expand, state.levels, state.max_position)
            y, new = layer.step(x[None], row)
            return y[0], *(part[0] for part in new.slots())

        got = vmap(one)(x[:, 11:], *state.slots())
    for name, part, expected in zip(
        ("y", "position", "token", "nodes", "q", "v"), got, (y, *after.slots()), strict=True
    ):
        assert_close(name, part, expected, TOLERANCE[torch.float32][0])


def test_steps_into_a_pool_over_its_rows():
    layer = LogarithmicMemory(8, 2, 2).requires_grad_(False)
    x, weights = torch.randn(3, 1, 5, 8), layer.step_weights()
    _, pool = layer.prefill(torch.randn(3, 9, 8), torch.tensor([9, 4, 0]))
    pool = pool.with_room(20)
    for take in (layer.step_, lambda x, row: decode_(x, row, weights)):
        rows, expected = pool.clone(), pool.clone()

        def one(x: Tensor, slots: tuple[Tensor, ...], take=take) -> Tensor:
            row = MemoryState(*(part[None] for part in slots), pool.expand, pool.levels, pool.max_position)
            return take(x, row)

        y = vmap(one)(x, tuple(rows.slots()))
        assert_close("y", y[:, 0], layer.step_(x[:, 0], expected), TOLERANCE[torch.float32][0])
        for name in ("position", "nodes", "v"):
            assert_close(name, getattr(rows, name), getattr(expected, name), TOLERANCE[torch.float32][0])


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("options", [{"attn_type": 3}, {"attn_type": 0}, {"attn_type": 31, "keep_last": True}], ids=str)
def test_look_ahead_memory(options, uneven):
    model = LookAheadMemory(8, 2, 2, memory_length=6, dtype=torch.float64, **options)
    enlarged(model)
    x = random(3, 9, 8)
    with torch.no_grad():
        _, state = model(x[:, :5])
        state = state.reset(torch.tensor([1])) if uneven else state
    named = state.tensors()

    def run(x: Tensor, tensors: dict[str, Tensor], call) -> Tensor:
        one = LookAheadState.from_tensors({n: t[None] for n, t in tensors.items()}, state.tokens, state.is_even)
        y, after = call(x[None], one)
        return y.pow(2).sum()

    def loss(parameters: dict[str, Tensor], x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return run(x, tensors, lambda *given: functional_call(model, parameters, given))

    got = vmap(grad(loss), (None, 0, 0))(parameters_of(model), x[:, 5:], named)
    rows = ({name: part[i] for name, part in named.items()} for i in range(3))
    expected = [by_autograd(model, run(x[i, 5:], row, model)) for i, row in enumerate(rows)]
    assert_close_gradients(got, stacked(expected))


def test_compiled():
    layer, x = LogarithmicMemory(8, 2, 2, dtype=torch.float64), random(3, 9, 8)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x[None],)).pow(2).sum()

    every = vmap(grad(loss), (None, 0))
    expected = every(parameters_of(layer), x)
    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        assert_close_gradients(torch.compile(every, backend=backend)(parameters_of(layer), x), expected)


def test_named_kernels_refuse_by_name():
    x = torch.randn(1, 5, 8)
    layer = LogarithmicMemory(8, 2, backend="triton")
    with pytest.raises(BackendError, match=r"backend='triton'.*build_tree.*torch\.func.*backend='reference'"):
        grad(lambda x: layer(x).sum())(x)
    model = LookAheadMemory(8, 1, 2, memory_length=4, backend="triton")
    with pytest.raises(BackendError, match=r"look_ahead_attend.*torch\.func.*backend='reference'"):
        vmap(lambda x: model(x[None])[0])(x)


def test_a_named_extension_refuses_by_name():
    x = torch.randn(3, 1, 1, 8)
    layer = LogarithmicMemory(8, 2, step_backend="cpp").requires_grad_(False)
    state, pool = layer.init_state(1), layer.init_state(1, max_position=8)
    with pytest.raises(BackendError, match=r"step.*torch\.func.*step_backend='reference'"):
        vmap(lambda x: layer.step(x, state)[0])(x)
    with pytest.raises(BackendError, match=r"step.*torch\.func.*step_backend='reference'"):
        vmap(lambda x: layer.step_(x, pool))(x)
    with pytest.raises(BackendError, match=r"step.*torch\.func.*backend='reference'"):
        vmap(lambda x: decode_(x, pool, layer.step_weights(), backend="cpp"))(x)


def test_forward_mode_is_refused():
    layer, x = LogarithmicMixing(6, 2), torch.randn(1, 5, 6)
    with pytest.raises(NotImplementedError, match="forward-mode tangent"):
        jvp(lambda x: layer(x).sum(), (x,), (x,))
