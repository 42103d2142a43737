"""A layer with its own memory, called as the original is: one token at a time is a step, and copies keep numbers."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import BackendError, LogarithmicMemory, LogarithmicMixing

F64 = torch.float64
VALUE, GRADIENT = TOLERANCE[F64]
streaming = partial(LogarithmicMemory, 12, 3, 2, False, init="variance_preserving")


def gradients(layer: torch.nn.Module, y: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(layer.parameters())))


@pytest.mark.parametrize("kind", [LogarithmicMixing, LogarithmicMemory])
@pytest.mark.parametrize("cuts", [(1,) * 9, (3, 1, 1, 4), (1, 5, 1, 2)], ids=str)
def test_tokens_and_chunks_of_a_stream_equal_the_whole(kind, cuts):
    layer = kind(12, 3, 2, False, init="variance_preserving", dtype=F64)
    x = torch.randn(2, 9, 12, dtype=F64)
    y = torch.cat([layer(part) for part in x.split(cuts, 1)], 1)
    assert layer.ptr == 9
    layer.parallelize = True
    whole = layer(x)
    assert_close("y", y, whole, VALUE)
    names = [name for name, _ in layer.named_parameters()]
    assert_same_gradients(names, gradients(layer, y), gradients(layer, whole), GRADIENT)


def test_a_token_without_gradients_is_the_step_to_the_bit():
    layer, other = streaming(), streaming()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 12)
    with torch.no_grad():
        state = other.init_state(2)
        for t in range(7):
            y, state = other.step(x[:, t : t + 1], state)
            assert torch.equal(layer(x[:, t : t + 1]), y)
    served = "_plan" in other.__dict__
    assert ("_plan" in layer.__dict__) == served and layer._stream.capacity == state.capacity


def test_a_token_with_a_state_is_the_step_and_leaves_the_own_memory_alone():
    layer = LogarithmicMemory(12, 3, 2)
    x = torch.randn(2, 6, 12)
    with torch.no_grad():
        _, state = layer.prefill(x[:, :5])
        expected, after = layer.step(x[:, 5:], state)
        y, new = layer(x[:, 5:], state=state, return_state=True)
        assert torch.equal(y, expected) and torch.equal(new.nodes, after.nodes)
        assert torch.equal(layer(x[:, 5:], state=state), expected) and layer.ptr == 0
    y = layer(x[:, 5:], state=state)
    assert y.requires_grad and torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("name, value", [("lengths", [1, 0]), ("attention_mask", [[1], [0]])])
def test_a_token_that_is_padding_leaves_its_row_of_the_stream_alone(name, value):
    layer, x = streaming(dtype=F64), torch.randn(2, 5, 12, dtype=F64)
    layer(x[:, :3])
    y = layer(x[:, 3:4], **{name: torch.tensor(value)})
    assert layer._stream.position.tolist() == [4, 3] and y[1].eq(0).all()
    after = layer(x[:, 4:])
    layer.parallelize = True
    assert_close("full row", after[:1], layer(x[:1])[:, 4:], VALUE)
    assert_close("padded row", after[1:], layer(x[1:, [0, 1, 2, 4]])[:, 3:], VALUE)


def test_what_does_not_fit_is_refused_by_name():
    layer = streaming()
    layer(torch.randn(2, 1, 12))
    for x, kind, said in (
        (torch.randn(3, 1, 12), ValueError, "state.position: expected shape"),
        (torch.randn(2, 1, 11), ValueError, "x.*: expected shape"),
        (torch.randn(2, 1, 12).double(), TypeError, "x.*: expected dtype"),
        ([[0.0]], TypeError, "x: expected a tensor"),
    ):
        with pytest.raises(kind, match=said):
            layer(x)
    assert layer.ptr == 1


def test_ptr_and_memory_are_set_as_the_originals_reset_does():
    layer = streaming()
    layer(torch.randn(2, 3, 12))
    layer.memory = None
    layer.ptr = 0
    assert layer.ptr == 0 and layer.memory is None
    with pytest.raises(ValueError, match="ptr: expected 0"):
        layer.ptr = 3
    with pytest.raises(ValueError, match="memory: expected None"):
        layer.memory = [torch.zeros(2, 2, 1, 12)]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_where_the_stream_stands_without_its_graph(twin):
    layer, x = streaming(), torch.randn(2, 6, 12)
    layer(x[:, :3]).sum().backward()
    other = twin(layer)
    assert other.ptr == 3 and not other._stream.nodes.requires_grad and layer._stream.nodes.requires_grad
    with torch.no_grad():
        assert torch.equal(other(x[:, 3:4]), layer(x[:, 3:4]))
    torch.optim.swa_utils.AveragedModel(layer)


@pytest.mark.parametrize("how", ["gradients", "float64", "function", "environment"])
def test_a_token_that_the_named_step_does_not_serve_is_taken_all_the_same(how, monkeypatch):
    """The name is obeyed by `step`; a chunk runs whatever its length."""
    named = {"step_backend": "cpp"}
    if how == "environment":
        named = {}
        monkeypatch.setenv("LMN_KERNELS_BACKEND", "cpp")
    dtype = F64 if how == "float64" else torch.float32
    summarizer = (lambda left, right: 0.5 * left + 0.75 * right) if how == "function" else "linear"
    layer = LogarithmicMixing(12, 3, 2, False, summarizer=summarizer, dtype=dtype, **named)
    x = torch.randn(2, 5, 12, dtype=dtype)
    with torch.set_grad_enabled(how not in ("float64", "function")):
        y = torch.cat([layer(x[:, :3]), layer(x[:, 3:4]), layer(x[:, 4:])], 1)
        _, state = layer.prefill(x[:, :4])
        continued = layer(x[:, 4:], state=state)
        with pytest.raises(BackendError, match="backend='cpp' cannot serve step on cpu"):
            layer.step(x[:, 4:], state)
    layer.parallelize = True
    whole = layer(x)
    assert_close("y", y, whole, TOLERANCE[dtype][0])
    assert_close("continued", continued, whole[:, 4:], TOLERANCE[dtype][0])


def test_a_call_that_returns_a_state_begins_anew_and_leaves_the_own_memory_alone():
    layer, x = streaming(), torch.randn(2, 7, 12)
    layer(x[:, :4])
    y, state = layer(x[:, 4:], return_state=True)
    assert layer.ptr == 4 and state.max_position == 3
    layer.reset()
    assert torch.equal(layer(x[:, 4:]), y)


def test_one_token_of_a_stream_takes_no_bound_for_documents():
    with pytest.raises(ValueError, match="max_length: expected None without cu_seqlens, got 1"):
        streaming()(torch.randn(2, 1, 12), max_length=1)


def test_under_autocast_a_chunk_builds_its_tree_in_the_dtype_of_the_region():
    layer, seen = LogarithmicMixing(12, 3, 2), []

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "lmn_kernels":
                seen.append((func._schema.name, {a.dtype for a in args if torch.is_tensor(a)}))
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Dtypes():
        y = layer(torch.randn(2, 7, 12))
    kinds = {torch.bfloat16}
    assert seen == [("lmn_kernels::build_tree", kinds), ("lmn_kernels::attend", kinds)] and y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [LogarithmicMixing, LogarithmicMemory])
def test_autocast_leaves_float64_alone(kind):
    layer, x = kind(12, 3, 2, dtype=F64), torch.randn(2, 7, 12, dtype=F64)
    y, state = layer(x, return_state=True)
    after, _ = layer.step(x[:, :1], state)
    with torch.autocast("cpu", torch.bfloat16):
        again, state = layer(x, return_state=True)
        assert torch.equal(again, y) and torch.equal(layer.step(x[:, :1], state)[0], after)


class Forms:
    """The ways of a token or a chunk into the layer's own memory, ``[B, T, E]`` → a tensor to differentiate."""

    @staticmethod
    def chunk(layer, x):
        return layer(x)

    @staticmethod
    def token(layer, x):
        return torch.cat([layer(x_t) for x_t in x.split(1, 1)], 1)

    @staticmethod
    def memory(layer, x):
        return torch.cat([layer.attention(layer.sequential(x_t)) for x_t in x.split(1, 1)], 1)


every_form = pytest.mark.parametrize("form", [Forms.chunk, Forms.token, Forms.memory], ids=lambda f: f.__name__)
both_kinds = pytest.mark.parametrize("kind", [LogarithmicMixing, LogarithmicMemory])


@every_form
@both_kinds
def test_a_second_backward_says_what_to_do_and_then_runs(kind, form):
    layer, x = kind(12, 3, 2, False, dtype=F64), torch.randn(2, 8, 12, dtype=F64)
    form(layer, x[:, :3]).sum().backward()
    with pytest.raises(RuntimeError, match=r"parallelize=False: reset\(\) or detach\(\) the layer between"):
        form(layer, x[:, 3:]).sum().backward()
    layer.reset()
    form(layer, x[:, :3]).sum().backward()
    before, numbers = layer._stream, [level.clone() for level in layer.memory]
    layer.detach()
    assert layer.ptr == 3 and layer._stream is not before and not layer._stream.nodes.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(layer.memory, numbers, strict=True))
    form(layer, x[:, 3:]).sum().backward()
    layer.reset()
    layer.detach()
    assert layer.memory is None


@pytest.mark.parametrize("form", [Forms.chunk, Forms.token], ids=lambda f: f.__name__)
@both_kinds
def test_after_detach_the_gradient_is_that_of_a_state_cut_off(kind, form):
    layer, x = kind(12, 3, 2, False, dtype=F64, init="variance_preserving"), torch.randn(2, 8, 12, dtype=F64)
    form(layer, x[:, :3])
    layer.detach()
    got = gradients(layer, form(layer, x[:, 3:]))
    layer.parallelize = True
    _, state = layer.prefill(x[:, :3])
    want = gradients(layer, layer(x[:, 3:], state=state.detach()))
    assert_same_gradients([name for name, _ in layer.named_parameters()], got, want, GRADIENT)


@every_form
def test_one_backward_over_chunks_and_kept_graphs_go_on(form):
    layer, x = streaming(dtype=F64), torch.randn(2, 8, 12, dtype=F64)
    parameters = list(layer.parameters())

    def losses():
        layer.reset()
        return [form(layer, part).square().sum() for part in x.split((3, 4, 1), 1)]

    def grads(loss, **options):
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, **options)
        return torch.cat([g.flatten() for g in found])

    want = grads(sum(losses()))
    one, two, three = losses()
    got = grads(one, retain_graph=True) + grads(two, retain_graph=True) + grads(three)
    assert_close("kept graphs", got, want, GRADIENT)
    _, two, three = losses()
    assert grads(two, create_graph=True).requires_grad
    assert grads(grads(three, create_graph=True).square().sum()).abs().sum() > 0


def test_what_a_stream_returns_may_be_written_to():
    for layer in (streaming(), LogarithmicMixing(12, 3, 2, False)):
        y = layer(torch.randn(2, 3, 12))
        y += 1
        y.mul_(2).sum().backward()


def test_a_frozen_layer_streams_for_gradients_of_its_input_alone():
    layer, x = streaming(dtype=F64).requires_grad_(False), torch.randn(2, 6, 12, dtype=F64, requires_grad=True)
    got = torch.autograd.grad(sum(layer(part).square().sum() for part in x.split(2, 1)), x)[0]
    layer.parallelize = True
    assert_close("x", got, torch.autograd.grad(layer(x).square().sum(), x)[0], GRADIENT)


def test_no_node_is_added_where_no_gradient_is_recorded():
    layer = streaming()
    with torch.no_grad():
        assert layer(torch.randn(2, 3, 12)).grad_fn is None
    layer.parallelize = True
    assert "Link" not in type(layer(torch.randn(2, 3, 12)).grad_fn).__name__


def test_the_table_of_what_is_summarised_is_the_originals():
    layer = streaming()
    tables = [layer.summarize_table() for _ in range(8)]
    assert tables == [
        [], [True], [False], [True, True], [False, False], [True, False], [False, False], [True, True, True]
    ]  # fmt: skip
    assert layer.ptr == 8
    x = torch.randn(2, 2, 12)
    for call in (lambda: layer(x), lambda: layer(x[:, :1]), lambda: layer.sequential(x[:, :1])):
        with pytest.raises(
            RuntimeError, match=r"ptr: expected 0, the tokens that the memory has seen, got 8: .*reset\(\)"
        ):
            call()
    layer.ptr = 0
    layer(x)
    assert layer.ptr == 2 and layer.summarize_table() == [False] and layer.ptr == 3
    layer.memory = None
    assert layer.ptr == 0


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("expand", [None, 1])
def test_memory_tensors_tokens_and_chunks_may_alternate(expand, grad):
    layer = LogarithmicMixing(12, 3, 2, False, expand=expand, init="variance_preserving", dtype=F64)
    x = torch.randn(2, 19, 12, dtype=F64)
    with torch.set_grad_enabled(grad):
        ways = [Forms.memory, Forms.token, Forms.memory, Forms.chunk, Forms.token, Forms.memory]
        y = torch.cat([way(layer, part) for way, part in zip(ways, x.split((5, 1, 6, 3, 2, 2), 1), strict=True)], 1)
        layer.parallelize = True
        assert_close("y", y, layer(x), VALUE)
    if grad:
        names = [name for name, _ in layer.named_parameters()]
        assert_same_gradients(names, gradients(layer, y), gradients(layer, layer(x)), GRADIENT)


class Sum(torch.nn.Module):
    def forward(self, left, right):
        return left + right


@pytest.mark.parametrize("change", ["weight", "data", "hook", "summarizer"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_memory_tensors_hear_of_a_change_to_the_summarizer(change, backend):
    layer = LogarithmicMixing(12, 3, 2, False, init="variance_preserving", step_backend=backend)
    x = torch.randn(2, 8, 12)
    with torch.no_grad():
        for x_t in x[:, :7].split(1, 1):
            layer.sequential(x_t)
        assert "_plan" in layer.__dict__
        if change == "weight":
            layer.summarizer.weight = torch.nn.Parameter(layer.summarizer.weight * 2)
        elif change == "data":
            layer.summarizer.weight.data = layer.summarizer.weight.data * 2
        elif change == "hook":
            layer.summarizer.register_forward_hook(lambda module, inputs, node: node * 2)
        else:
            layer.summarizer = Sum()
        merge, before = layer.summarizer, [level[:, :, 0] for level in layer.memory]
        slots = layer.sequential(x[:, 7:])
        expected = [merge(*(x[:, t, None].expand(-1, 2, -1) for t in (6, 7)))]
        for left in before[1:]:
            expected.append(merge(left, expected[-1]))
    assert_close("slots", slots[:, 0], torch.cat([x[:, 7:], *expected], 1), 1e-6)
