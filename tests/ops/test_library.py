"""The operations as PyTorch sees them: registration, compilation, autograd (R9, R15, R16, R22)."""

from __future__ import annotations

import copy
import shutil
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import LogarithmicMemory, LogarithmicMixing
from tests.support.variants import VARIANTS, defined

OPS = torch.ops.lmn_kernels
NAMES = ("build_tree", "build_tree_backward", "attend", "attend_backward")
CASES = ("equal", "spans", "carried", "expander", "grouped", "scale")
F64 = torch.float64


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def variant(name: str):
    return next(v for v in VARIANTS if v.name == name)


# Registration


def operands(case: str, dtype: torch.dtype, size: int = 6, length: int = 7) -> dict:
    """What every argument of the four operations is called in the schemas, and a value for it."""
    bank, sequences = 2, 2
    groups = 1 if case == "grouped" else bank
    width = bank * size // groups

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    given = {
        "x": normal(sequences * length, size),
        "weight": normal(groups, 2 if case == "expander" else 1, width if case == "scale" else 2 * width, width) * 0.3,
        "bias": normal(groups, width),
        "scale": normal(2, groups, width) if case == "scale" else None,
        "token": None,
        "carried": None,
        "token_qkv": normal(sequences * length, 3 * size),
        "heads": 2 if size % 2 == 0 else 1,
        "spans": None,
        "tokens": sequences * length,
        "sequences": sequences,
        "max_position": length,
        "carried_levels": None,
        "expand": 1 if case == "expander" else 0,
        "backend": "reference",
    }
    if case == "spans":
        given["spans"] = torch.tensor([[0, length // 2 + 1, 0], [length, length - 1, 0]])
    if case == "carried":
        spans = torch.tensor([[0, length // 2 + 1, 6], [length, length, 3]])
        given |= {"spans": spans, "carried_levels": 2, "max_position": length + 7}
        given |= {"token": normal(sequences, size), "carried": normal(sequences, 2, bank, size)}
    given["nodes"] = call("build_tree", given)
    given["node_qv"] = normal(*given["nodes"].shape[:2], 2 * size)
    given["out"], given["lse"] = call("attend", given)
    return given


def arguments(name: str, given: dict) -> list:
    """In the order of the operation's own schema; ``grad`` is shaped like what the operation differentiates."""
    wanted = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    values = given
    if "grad" in wanted:
        values = given | {"grad": torch.randn_like(given["nodes" if "tree" in name else "out"])}
    return [values[argument] for argument in wanted]


def call(name: str, given: dict):
    return getattr(OPS, name)(*arguments(name, given))


def leaf(value):
    """A copy that requires grad and lies in memory as the original does; what is no float as it is."""
    return value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, dtype, grad):
    for name in NAMES:
        given = operands(case, dtype)
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if dtype == torch.float32 and not (grad and name.endswith("backward")):  # every dtype is traced alike
            checks.append("test_aot_dispatch_dynamic")
        elif dtype == torch.float32 and case == "equal":
            # Second derivatives with symbolic sizes trace slowly: one kind, few levels, and the tree alone.
            given = operands(case, dtype, length=3)
            checks.append("test_aot_dispatch_dynamic" if "tree" in name else "test_aot_dispatch_static")
        args = [leaf(value) if grad else value for value in arguments(name, given)]
        opcheck(getattr(OPS, name).default, args, test_utils=checks)


def transposed(value):
    """The same values, the axes reversed in memory."""
    if not isinstance(value, Tensor):
        return value
    order = tuple(reversed(range(value.dim())))
    return value.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("size", [1, 6], ids=lambda size: f"E={size}")
@pytest.mark.parametrize("length", [1, 7], ids=lambda length: f"L={length}")
@pytest.mark.parametrize("case", CASES)
def test_fakes_are_laid_out_as_what_is_real(case, length, size):
    """Shape, dtype *and strides*, whatever those of the inputs: compiled code asserts what the fake promised."""
    given = operands(case, torch.float32, size, length)
    for name in NAMES:
        for change in (lambda value: value, transposed):
            args = [change(value) for value in arguments(name, given)]
            real = getattr(OPS, name)(*args)
            with FakeTensorMode() as mode:
                fake = getattr(OPS, name)(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
            pairs = zip(*([o] if isinstance(o, Tensor) else o for o in (real, fake)), strict=True)
            for index, (r, f) in enumerate(pairs):
                assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device), (name, index)
                for axis in range(r.dim()):
                    same = r.shape[axis] <= 1 or r.stride(axis) == f.stride(axis)
                    assert same, f"{name}, output {index}: fake {f.stride()}, real {r.stride()}"


def test_tracing_leaves_nothing_behind():
    """Tables that a trace made are fake: an eager call of the same sizes must not find them."""
    layer, x = variant("linear").layer(), torch.randn(3, 11, 12, dtype=F64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty_like(x).requires_grad_()
        first = torch.autograd.grad(layer(fake).sum(), fake, create_graph=True)[0]
        torch.autograd.grad(first.sum(), fake)
    x.requires_grad_()
    first = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.sum(), x)
    assert type(second) is Tensor and torch.isfinite(second).all()


# Compilation

COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
BEST = pytest.param("inductor") if COMPILER else pytest.param("aot_eager", id="aot_eager: no C++ compiler is here")


def check_against_float64(run, layer, x: Tensor, dynamic: bool = False, **options) -> list[Tensor]:
    """Values and gradients of ``run`` against eager float64; returns the gradients of the parameters of ``layer``."""
    exact = copy.deepcopy(layer).double()
    x64 = x.double().requires_grad_()
    x = x.clone().requires_grad_()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    y, expected = run(x, **options), exact(x64, **options)
    cotangent = torch.randn(y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, [x, *layer.parameters()], cotangent)
    want = torch.autograd.grad(expected, [x64, *exact.parameters()], cotangent.double())
    values, grads = TOLERANCE[x.dtype]
    assert_close(f"y of {tuple(x.shape)}", y.detach(), expected.detach(), values)
    assert_same_gradients(["x", *(name for name, _ in layer.named_parameters())], list(got), list(want), grads)
    return list(got[1:])


@pytest.mark.parametrize("backend", [BEST])
def test_a_compiled_step_of_training_equals_eager_at_any_length(backend):
    """Twenty lengths, few graphs, no break; an optimizer moves the weights under the graph."""
    layers = torch.nn.Sequential(*(LogarithmicMemory(8, 2, 2, init="variance_preserving") for _ in range(2)))
    counter = CompileCounterWithBackend(backend)
    graph = torch.compile(layers, fullgraph=True, backend=counter)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    for length in (37, 2, 3, 5, 8, 9, 16, 17, 31, 33, 40, 63, 64, 65, 70, 100, 127, 128, 129, 200):
        grads = check_against_float64(graph, layers, torch.randn(2, length, 8), dynamic=True)
        for parameter, grad in zip(layers.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    assert counter.frame_count <= 3, f"{counter.frame_count} graphs for 20 lengths"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_compiles(variant):
    layer = variant.layer()
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check_against_float64(graph, layer, torch.randn(2, 21, variant.embedding, dtype=F64))


def test_ragged_batches_and_lean_layers_compile():
    mask = torch.ones(3, 20).index_fill(1, torch.arange(5), 0).bool()
    for batch, options, lean in (
        (3, {"lengths": torch.tensor([20, 0, 7])}, False),
        (1, {"cu_seqlens": torch.tensor([0, 5, 5, 18])}, False),
        (3, {"attention_mask": mask}, True),
    ):
        layer = LogarithmicMixing(8, 2, 2, init="variance_preserving", lean=lean)
        graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
        check_against_float64(graph, layer, torch.randn(batch, 20, 8), **options)


def same_state(got, expected) -> None:
    for part in ("position", "token", "nodes", "q", "v"):
        assert_close(part, getattr(got, part), getattr(expected, part), TOLERANCE[torch.float32][0])
    assert (got.levels, got.max_position) == (expected.levels, expected.max_position)


def test_prefill_compiles_for_any_length():
    """A new graph where a level is added, as the state then has another shape, and for no other length."""
    layer, counter = LogarithmicMixing(8, 2, 2), CompileCounterWithBackend("aot_eager")
    graph = torch.compile(layer.prefill, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):
        for length in (*range(22, 32), *range(32, 42)):
            x = torch.randn(2, length, 8)
            (y, state), (expected, want) = graph(x), layer.prefill(x)
            assert_close(f"y at L={length}", y, expected, TOLERANCE[torch.float32][0])
            same_state(state, want)
    assert counter.frame_count <= 3


def test_prefill_of_a_ragged_batch_compiles():
    layer, x, lengths = LogarithmicMixing(8, 2, 2), torch.randn(2, 20, 8), torch.tensor([20, 7])
    graph = torch.compile(layer.prefill, fullgraph=True, backend="aot_eager")
    (y, state), (expected, want) = graph(x, lengths), layer.prefill(x, lengths)
    assert_close("y", y, expected, TOLERANCE[torch.float32][0])
    same_state(state, want)


def test_step_compiles_once_for_a_state_with_room():
    """The state grows at powers of two, and each growth is another graph: make room once, at the start."""
    layer, counter = LogarithmicMixing(8, 2, 2), CompileCounterWithBackend("aot_eager")
    graph = torch.compile(layer.step, fullgraph=True, backend=counter)
    with torch.no_grad():
        state = want = layer.init_state(2, max_position=200)
        for _ in range(40):
            x = torch.randn(2, 1, 8)
            (y, state), (expected, want) = graph(x, state), layer.step(x, want)
            assert_close("y", y, expected, TOLERANCE[torch.float32][0])
            same_state(state, want)
    assert counter.frame_count <= 2


# Autograd


def names_and_leaves(layer, x: Tensor) -> tuple[list[str], list[Tensor]]:
    return ["x", *(name for name, _ in layer.named_parameters())], [x, *layer.parameters()]


def penalty(y: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Gradients of a loss that holds first gradients with respect to x and every parameter."""
    first = torch.autograd.grad(y, leaves, cotangent, create_graph=True, allow_unused=True)
    loss = sum(g.square().sum() for g in first if g is not None) + y.square().sum()
    found = torch.autograd.grad(loss, [*leaves, cotangent], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, [*leaves, cotangent], strict=True)]


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_gradient_penalty_equals_that_of_the_definition(variant, length):
    layer = variant.layer()
    x = torch.randn(2, length, variant.embedding, dtype=F64, requires_grad=True)
    names, leaves = names_and_leaves(layer, x)
    cotangent = torch.randn_like(x).requires_grad_()
    got, expected = (penalty(form, leaves, cotangent) for form in (layer(x), defined(layer, x)))
    assert_same_gradients([*names, "cotangent"], got, expected, TOLERANCE[F64][1])


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_and_gradgradcheck_of_the_operations(case):
    given = operands(case, F64, size=2, length=5)
    for name in ("build_tree", "attend"):
        args = arguments(name, given)
        floats = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]

        def operation(*inputs, name=name, args=args, floats=floats):
            filled = list(args)
            for index, value in zip(floats, inputs, strict=True):
                filled[index] = value
            result = getattr(OPS, name)(*filled)
            return result if isinstance(result, Tensor) else result[0]

        inputs = [leaf(args[index]) for index in floats]
        assert gradcheck(operation, inputs)
        assert gradgradcheck(operation, inputs, fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradcheck_of_the_layer(variant):
    layer = variant.layer()
    x = torch.randn(1, 6, variant.embedding, dtype=F64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert gradcheck(run, [x, *layer.parameters()], fast_mode=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_forward_mode_is_right_or_refused(frozen, compiled):
    """A tangent that is dropped on the way would be a derivative of zero, without a word."""
    layer = variant("linear").layer().requires_grad_(not frozen)
    derivative = torch.compile(partial(jvp, layer), backend="eager") if compiled else partial(jvp, layer)
    x, tangent = torch.randn(2, 1, 9, 12, dtype=F64)
    with torch.no_grad():
        expected = (layer(x + 1e-6 * tangent) - layer(x - 1e-6 * tangent)) / 2e-6
    try:
        got = derivative((x,), (tangent,))[1]
    except RuntimeError:
        return
    assert_close("tangent", got.detach(), expected, 1e-6)


@pytest.mark.parametrize("name", ["linear", "expander_k1"])
def test_a_third_derivative_is_right_or_refused(name):
    """Through a residual, as in a block: terms that are dropped leave a number that looks like any other."""
    layer = variant(name).layer()
    x = torch.randn(1, 6, layer.embedding, dtype=F64, requires_grad=True)
    results = []
    for form in (layer(x), defined(layer, x)):
        value = (form + x).pow(3).sum()
        for _ in range(2):
            value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        try:
            results += torch.autograd.grad(value, x)
        except RuntimeError:
            assert not results, "the definition has a third derivative"
            return
    assert_close("third derivative", *results, TOLERANCE[F64][1])


@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
@pytest.mark.parametrize("name", ["linear", "module", "expander_k1"])
def test_checkpointing_changes_nothing(name, lean):
    layer = variant(name).layer(lean=lean)
    x = torch.randn(2, 37, layer.embedding, dtype=F64, requires_grad=True)
    _, leaves = names_and_leaves(layer, x)
    plain = torch.autograd.grad(layer(x).square().sum(), leaves)
    for reentrant in (False, True):
        for parameter in leaves:
            parameter.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(leaves, plain, strict=True)), reentrant


def test_a_kept_graph_gives_the_same_again_and_unpacks_each_saved_tensor_once():
    layer = LogarithmicMemory(8, 2, 2)
    x = torch.randn(2, 37, 8, requires_grad=True)
    unpacked: list[int] = []
    handles = iter(range(10**6))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (next(handles), tensor), lambda pair: (unpacked.append(pair[0]), pair[1])[1]
    ):
        y = layer(x)
    grads = [torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y), retain_graph=True) for _ in range(3)]
    for again in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], again, strict=True))
    assert len(unpacked) == 3 * len(set(unpacked)), "a saved tensor was unpacked twice in one backward pass"


@pytest.mark.parametrize("case", CASES)
def test_no_operation_writes_to_its_inputs(case):
    given = operands(case, torch.float32)
    for name in NAMES:
        for change in (lambda value: value, transposed):
            args = [change(value) for value in arguments(name, given)]
            tensors = [value for value in args if isinstance(value, Tensor)]
            before = [(tensor._version, tensor.clone()) for tensor in tensors]
            getattr(OPS, name)(*args)
            for tensor, (version, content) in zip(tensors, before, strict=True):
                assert tensor._version == version and torch.equal(tensor, content), name


def test_twenty_runs_are_the_same_to_the_bit():
    """With default settings and two threads; large enough for both to have work."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_num_threads(2)
    layer = LogarithmicMixing(32, 4)
    x = torch.randn(2, 300, 32, requires_grad=True)
    first = None
    for _ in range(20):
        y = layer(x)
        run = [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))
