"""Look-ahead attention: the reference and the operation against the definition, and as PyTorch sees them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from bench.measure.footprint import saved_bytes
from lmn_kernels import BackendError, look_ahead_attend
from python_ref import look_ahead as reference
from python_ref import look_ahead_definition as definition
from tests.layers.test_memory import Largest

OPS = torch.ops.lmn_kernels
OPERATIONS = ("look_ahead_attend", "look_ahead_attend_backward")
F64 = torch.float64
# Of values and of gradients, where both sides compute in float64.
BAR = 1e-11
LEAVES = ["q", "kv", "bias", "table"]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


class Shape(NamedTuple):
    name: str
    tokens: int
    memory: int
    window: int | None = None
    seeded: bool = True
    memory_asks: bool = True
    starts: bool = False
    # How far behind the first table the second begins; None where both are one.
    apart: int | None = None
    batch: int = 3
    heads: int = 2
    size: int = 3


SHAPES = [
    Shape("no memory", 5, 0),
    Shape("memory shorter than the segment", 5, 3),
    Shape("as long", 5, 5),
    Shape("three segments long", 4, 12),
    Shape("no multiple of the segment", 4, 7),
    Shape("nothing from before", 4, 7, seeded=False),
    Shape("one token", 1, 6),
    Shape("one token, no memory", 1, 0),
    Shape("no stream", 4, 7, batch=0),
    Shape("window of a longer segment before", 3, 9, window=5),
    Shape("window of a shorter segment before", 6, 9, window=2),
    Shape("window beyond the memory", 3, 5, window=40),
    Shape("the tokens alone ask", 4, 7, memory_asks=False),
    Shape("streams begin within the memory", 4, 7, starts=True),
    Shape("two tables", 4, 7, apart=0),
    Shape("two tables with rows between, one begins", 5, 9, window=3, starts=True, apart=3),
    Shape("more rows than a block", 130, 150, batch=1, heads=1, size=4),
    Shape("more rows than a block, a window within one", 130, 290, window=9, starts=True, apart=0, batch=1, heads=1),
]
FEW = [SHAPES[4], SHAPES[12], SHAPES[15]]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
few_shapes = pytest.mark.parametrize("shape", FEW, ids=lambda shape: shape.name)
low = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def operands(shape: Shape, dtype: torch.dtype = F64, scale: float = 1.0) -> dict[str, Any]:
    """What the arguments of the operations are called in their schemas, and a value for each."""
    batch, heads, size, keys = shape.batch, shape.heads, shape.size, shape.tokens + shape.memory

    def normal(*sizes: int) -> Tensor:
        return (scale * torch.randn(*sizes, dtype=F64)).to(dtype)

    rows = shape.memory if shape.memory_asks else 0
    future_row = 0 if shape.apart is None else keys + shape.apart
    given: dict[str, Any] = {
        "q": normal(batch, shape.tokens + rows, heads, size),
        "kv": normal(batch, keys, 2, heads, size),
        "bias": normal(4, heads, size),
        "table": normal(keys + 1 + (0 if shape.apart is None else shape.apart + shape.memory), heads, size),
        "output": None, "lse": None, "start": None,
        "tokens": shape.tokens, "window": shape.window or shape.tokens, "future_row": future_row,
    }  # fmt: skip
    if shape.starts:
        given["start"] = torch.randint(0, shape.memory + 1, (batch,), dtype=torch.int32 if shape.apart else torch.int64)
    if shape.seeded and rows:
        given["output"] = normal(batch, rows, heads, size)
        # As much as what is found now, more, and less.
        given["lse"] = (3 * torch.randn(batch, rows, heads) + 1).to(torch.promote_types(dtype, torch.float32))
    return given


def leaf(value: Tensor) -> Tensor:
    """A copy that requires grad and lies in memory as the original does."""
    return value.detach().clone().requires_grad_()


def with_leaves(given: dict[str, Any]) -> dict[str, Any]:
    return given | {name: leaf(given[name]) for name in LEAVES}


def cotangents(given: dict[str, Any]) -> list[Tensor]:
    return [torch.randn(given["q"].shape, dtype=F64), torch.randn(given["q"].shape[:3], dtype=F64)]


def run(function, given: dict[str, Any], grads: list) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients of the leaves through those results that have a cotangent."""
    given = with_leaves(given)
    results = function(**given)
    ys, used = zip(*((y, g.to(y.dtype)) for y, g in zip(results, grads, strict=True) if g is not None), strict=True)
    found = torch.autograd.grad(ys, [given[name] for name in LEAVES], used, materialize_grads=True)
    return [y.detach() for y in results], list(found)


def check(function, given: dict[str, Any], grads: list) -> tuple[list[Tensor], list[Tensor]]:
    """`run` against the definition in float64 on the same values; returns what the definition says."""
    (out, lse), found = run(function, given, grads)
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}
    (expected, total), wanted = run(definition.attend, exact, grads)
    dtype = given["q"].dtype
    values, gradients = (BAR, BAR) if dtype == F64 else TOLERANCE[dtype]
    assert out.dtype == dtype and all(g.dtype == dtype for g in found)
    assert_close("out", out, expected, values)
    assert lse.dtype == torch.promote_types(dtype, torch.float32), "rounded to the dtype of the inputs"
    assert_close("lse", lse, total, BAR if dtype == F64 else TOLERANCE[torch.float32][0])
    assert_same_gradients(LEAVES, found, wanted, gradients)
    return [expected, total], wanted


@pytest.mark.parametrize(("streams", "rows"), [(3, None), (1, 1), (2, 3)])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.batch], ids=lambda shape: shape.name)
def test_the_reference_equals_the_definition(shape, streams, rows, monkeypatch):
    """Its forward, plain autograd through it, and its formulas for backward; for blocks of any size."""
    given = operands(shape)
    if rows is not None:
        rows *= 1 + shape.tokens // 20
        elements = streams * rows * shape.heads * (shape.tokens + shape.memory)
        sizes = {"LEAST_ROWS": rows, "MOST_ROWS": rows, "BLOCK_ELEMENTS": elements}
        for name, size in sizes.items():
            monkeypatch.setattr(reference, name, size)
    results, wanted = check(reference.attend, given, grads := cotangents(given))
    reach = [given[name] for name in ("start", "tokens", "window", "future_row")]
    formula = reference.attend_backward(*grads, *(given[name] for name in LEAVES), *results, *reach)
    assert_same_gradients(LEAVES, list(formula), wanted, BAR)


@pytest.mark.parametrize("through", ["out", "lse", "both"])
@every_shape
def test_the_operation_equals_the_definition(shape, through):
    """Also where one of the results has no gradient."""
    given = operands(shape)
    to_out, to_lse = cotangents(given)
    check(look_ahead_attend, given, [None if through == "lse" else to_out, None if through == "out" else to_lse])


@low
@every_shape
def test_low_precision_against_float64(shape, dtype):
    """Under autocast, too, which has nothing to cast in it."""
    given = operands(shape, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        check(look_ahead_attend, given, [cotangents(given)[0].to(dtype), None])


@low
def test_large_scores_and_large_seeds_stay_finite(dtype):
    given = operands(SHAPES[4], dtype, scale=60.0)
    given["lse"] *= 1e4
    (out, lse), found = run(look_ahead_attend, given, cotangents(given))
    assert lse.abs().max() > 1e4
    for value in (out, lse, *found):
        assert torch.isfinite(value).all()


def test_a_seed_that_weighs_nothing_is_no_seed_and_one_that_weighs_all_stays():
    given = operands(SHAPES[3])
    seed, lse, memory = given["output"], given["lse"], SHAPES[3].memory
    changes = {"lse": lse - 1e4}, {"output": None, "lse": None}, {"lse": lse + 1e4}
    light, without, heavy = (look_ahead_attend(**given | change) for change in changes)
    assert torch.equal(light[0], without[0]) and torch.equal(light[1], without[1])
    assert torch.equal(heavy[0][:, :memory], seed) and torch.equal(heavy[1][:, :memory], lse + 1e4)


def test_what_lies_before_a_start_may_be_of_any_value():
    given = operands(SHAPES[12]) | {"start": torch.tensor([7, 3, 0])}
    gone, grads = (torch.arange(11) < given["start"][:, None])[..., None, None, None], cotangents(given)
    broken = given | {"kv": given["kv"].masked_fill(gone, torch.nan)}
    (expected, wanted), (got, found) = (run(look_ahead_attend, each, grads) for each in (given, broken))
    assert all(torch.equal(a, b) for a, b in zip([*got, *found], [*expected, *wanted], strict=True))


def transposed(value: Any) -> Any:
    """The same values, the axes reversed in memory."""
    if not isinstance(value, Tensor):
        return value
    order = tuple(reversed(range(value.dim())))
    return value.permute(order).contiguous().permute(order)


@few_shapes
def test_any_strides_give_the_same(shape):
    given = operands(shape)
    other, grads = {name: transposed(value) for name, value in given.items()}, cotangents(given)
    assert not any(leaf(other[name]).is_contiguous() for name in LEAVES)
    expected, wanted = run(look_ahead_attend, given, grads)
    got, found = run(look_ahead_attend, other, [transposed(grad) for grad in grads])
    assert got[0].is_contiguous()
    for a, b in zip([*got, *found], [*expected, *wanted], strict=True):
        assert_close("result", a, b, 1e-13)


def test_one_softmax_over_a_life():
    """Section 2: in a first layer, with segments of one length, over the window at birth and all that came since."""
    tokens, segments, size = 4, 8, 3
    memory, length = 3 * tokens, tokens * segments
    q, k, v = (torch.randn(length, 2, size, dtype=F64) for _ in range(3))
    bias, table = torch.randn(4, 2, size, dtype=F64), torch.randn(memory + tokens, 2, size, dtype=F64)
    kv, seed = torch.stack([k, v], 1)[None], {}
    for stop in range(tokens, length + 1, tokens):
        first = max(0, stop - tokens - memory)
        out, lse = look_ahead_attend(q[None, first:stop], kv[:, first:stop], bias, table, tokens=tokens, **seed)
        seed = {"output": out[:, -memory:], "lse": lse[:, -memory:]}
    newest = length - tokens
    for i in range(newest - memory, length):
        past, later = torch.arange(max(0, i - i % tokens - memory), i + 1), torch.arange(i + 1, max(i, newest) + 1)
        by_content, by_distance = (
            torch.cat([(q[i] + bias[n]).expand(len(past), -1, -1), (q[i] + bias[2 + n]).expand(len(later), -1, -1)])
            for n in range(2)
        )
        seen, row = torch.cat([past, later]), i - (newest - memory)
        score = (by_content * k[seen] + by_distance * table[(seen - i).abs()]).sum(-1) / size**0.5
        assert_close(f"lse of {i}", lse[0, row], score.logsumexp(0), BAR)
        assert_close(f"out of {i}", out[0, row], (score.softmax(0)[..., None] * v[seen]).sum(0), BAR)


def arguments(name: str, given: dict[str, Any]) -> list:
    """In the order of the operation's own schema."""
    given = given | {"backend": "reference"}
    if name.endswith("backward"):
        given["out"], given["total"] = OPS.look_ahead_attend(*arguments("look_ahead_attend", given))
        given["grad"], given["grad_lse"] = torch.randn_like(given["out"]), torch.randn_like(given["total"])
    return [given[argument.name] for argument in getattr(OPS, name).default._schema.arguments]


@pytest.mark.parametrize("name", OPERATIONS)
@few_shapes
def test_opcheck(shape, name):
    args, operation = arguments(name, operands(shape, torch.float32)), getattr(OPS, name).default
    differentiable = [argument.name in (*LEAVES, "grad", "grad_lse") for argument in operation._schema.arguments]
    tracked = [leaf(value) if wanted else value for value, wanted in zip(args, differentiable, strict=True)]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    opcheck(operation, args, test_utils=checks)
    if shape is FEW[0] and name == OPERATIONS[0]:  # tracing is slow
        checks.append("test_aot_dispatch_dynamic")
    opcheck(operation, tracked, test_utils=checks)


@pytest.mark.parametrize("name", OPERATIONS)
@every_shape
def test_fakes_are_laid_out_as_what_is_real_and_no_input_is_written_to(shape, name):
    for change in (lambda value: value, transposed):
        args = [change(value) for value in arguments(name, operands(shape, torch.bfloat16))]
        tensors = [value for value in args if isinstance(value, Tensor)]
        before = [(tensor._version, tensor.clone()) for tensor in tensors]
        real = getattr(OPS, name)(*args)
        for tensor, (version, content) in zip(tensors, before, strict=True):
            assert tensor._version == version and torch.equal(tensor, content)
        with FakeTensorMode() as mode:
            fake = getattr(OPS, name)(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
        for r, f in zip(real, fake, strict=True):
            assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device)
            same = [r.shape[axis] <= 1 or r.stride(axis) == f.stride(axis) for axis in range(r.dim())]
            assert all(same) or not r.numel(), f"{list(r.shape)}: fake {f.stride()}, real {r.stride()}"


def test_steps_of_training_compile_to_few_graphs_for_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(look_ahead_attend, fullgraph=True, backend=counter)
    for shape in (FEW[2], *(Shape("", *sizes) for sizes in ((4, 6), (5, 6), (3, 9), (8, 7), (9, 11)))):
        given = operands(shape)
        check(graph, given, cotangents(given))
    assert counter.frame_count <= 4


@pytest.mark.parametrize(
    "shape",
    [Shape("begun and merged", 2, 3, batch=1, heads=1, size=2),
     Shape("all else", 2, 4, window=1, seeded=False, starts=True, apart=1, batch=1, heads=1, size=2)],
    ids=lambda shape: shape.name,
)  # fmt: skip
def test_gradcheck_and_gradgradcheck(shape):
    given = operands(shape)
    inputs = [leaf(given.pop(name)) for name in LEAVES]
    assert gradcheck(partial(look_ahead_attend, **given), inputs)
    assert gradgradcheck(partial(look_ahead_attend, **given), inputs, fast_mode=True)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["out", "lse", "both"])
@pytest.mark.parametrize("shape", [*FEW, SHAPES[7]], ids=lambda shape: shape.name)
def test_a_gradient_penalty_equals_that_of_the_definition(shape, used):
    """Second derivatives with respect to the leaves and the cotangents, and third ones."""
    given = operands(shape)
    grads = [grad.requires_grad_() for grad in cotangents(given)]
    found = []
    for function in (look_ahead_attend, definition.attend):
        tracked = with_leaves(given)
        leaves, results = [tracked[name] for name in LEAVES], function(**tracked)
        chosen = [results[n] for n in used], leaves, [grads[n] for n in used]
        first = torch.autograd.grad(*chosen, create_graph=True, materialize_grads=True)
        loss = sum(g.square().sum() for g in first) + sum(results[n].square().sum() for n in used)
        second = torch.autograd.grad(loss, [*leaves, *grads], create_graph=True, materialize_grads=True)
        third = torch.autograd.grad(sum(g.sin().sum() for g in second), [*leaves, *grads], materialize_grads=True)
        found.append([*second, *third])
    names = [f"{order} {name}" for order in ("second", "third") for name in (*LEAVES, "grad", "grad_lse")]
    assert_same_gradients(names, [g.detach() for g in found[0]], [g.detach() for g in found[1]], 1e-10)


def test_what_is_saved_is_linear_in_the_memory():
    per_row = {}
    for memory in (1000, 8000):
        shape = Shape("", 16, memory, apart=0)
        given = with_leaves(operands(shape, torch.float32))
        rows, row = memory + shape.tokens, shape.heads * shape.size
        saved = saved_bytes(partial(look_ahead_attend, **given))
        # q, k and v, out and its log-sum-exp of all rows, the seed of the memory's; two tables and the biases.
        of_stream = rows * (4 * row + shape.heads) + memory * (row + shape.heads)
        assert saved <= 4 * (shape.batch * of_stream + (2 * rows + 5) * row)
        per_row[memory] = saved / rows
    assert per_row[8000] == pytest.approx(per_row[1000], rel=0.02)


def test_time_and_the_largest_tensor_are_linear_in_the_memory():
    """For a window and a segment of one length: what is looked at grows with the rows, not with their square."""
    flops, elements = {}, {}
    for memory in (512, 2048):
        given = operands(Shape("", 16, memory, apart=0, batch=1, heads=1, size=4), torch.float32)
        reach = [given[name] for name in ("start", "tokens", "window", "future_row")]
        with FlopCounterMode(display=False) as counter, Largest() as mode:
            out, lse = reference.attend(**given)
            reference.attend_backward(out, lse, *(given[name] for name in LEAVES), out, lse, *reach)
        flops[memory], elements[memory] = counter.get_total_flops() / memory, mode.elements / memory
    assert flops[2048] == pytest.approx(flops[512], rel=0.05) and elements[2048] <= 1.05 * elements[512]


OTHERS = ("kv", "bias", "table", "output", "lse")
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
    ({"q": "long"}, TypeError, "q: expected a floating dtype .* got torch.int64"),
    *(({n: "half"}, TypeError, f"{n}: expected dtype torch.float32, got torch.float16") for n in OTHERS),
    ({"start": torch.zeros(2)}, TypeError, "start: expected dtype int32 or int64, got torch.float32"),
    *(({n: "meta"}, ValueError, f"{n}: expected device cpu, got meta") for n in (*OTHERS, "start")),
    *(({n: torch.zeros(2, 7, 5)}, ValueError, rf"{n}: expected shape .* got \[2, 7, 5\]") for n in ("q", *OTHERS)),
    ({"q": torch.zeros(2, 5, 2, 3)}, ValueError, "q: expected 4 rows of the tokens or all 11 of the keys, got 5"),
    ({"kv": torch.zeros(2, 3, 2, 2, 3)}, ValueError, "tokens: expected at most the 3 keys of kv, got 4"),
    ({"table": torch.zeros(10, 2, 3)}, ValueError, "table: expected at least 11 rows, got 10"),
    ({"table": torch.zeros(18, 2, 3), "future_row": 11}, ValueError, "table: expected at least 19 rows, got 18"),
    ({"start": torch.zeros(3).long()}, ValueError, r"start: expected shape \[2\], got \[3\]"),
    ({"start": torch.tensor([-1, 8])}, ValueError, "start: expected values in 0 … 7, got -1 … 8"),
    *(({n: value}, ValueError, f"{n}: expected an integer of at least {least}, got {value}")
      for n, value, least in (("tokens", 0, 1), ("tokens", 4.0, 1), ("window", 0, 1), ("future_row", -1, 0))),
    ({"future_row": 10}, ValueError, "future_row: expected 0, or 11 or more .* got 10"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of .* got 'cuda'"),
    *((change, ValueError, "output, lse: expected both with memory rows in q, or neither")
      for change in ({"output": None}, {"lse": None}, {"q": torch.zeros(2, 4, 2, 3)})),
    *(({n: "requires_grad_"}, ValueError, "output, lse: expected constants .* that require grad") for n in OTHERS[3:]),
    *(({"backend": n}, BackendError, f"backend='{n}' cannot serve look_ahead_attend") for n in ("triton", "cpp")),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_a_wrong_argument_is_refused_by_name(changes, error, message):
    given = operands(SHAPES[4]._replace(batch=2), torch.float32) | {"start": torch.tensor([0, 7])}
    look_ahead_attend(**given)
    methods = {name: value for name, value in changes.items() if isinstance(value, str) and name != "backend"}
    changed = {n: given[n].to("meta") if how == "meta" else getattr(given[n], how)() for n, how in methods.items()}
    with pytest.raises(error, match=f"^{message}"):
        look_ahead_attend(**given | changes | changed)


@pytest.mark.parametrize("name", ["q", *OTHERS])
def test_a_forward_mode_tangent_is_refused(name):
    given = operands(SHAPES[4])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(NotImplementedError, match=f"^{name}: expected a tensor without a forward-mode tangent"):
            look_ahead_attend(**given | {name: dual})
