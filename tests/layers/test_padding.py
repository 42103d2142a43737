"""Rows of unequal length, packed documents, nothing at all, and what is refused (R7, R8, R10, R13)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import LogarithmicMixing, MemoryState
from lmn_kernels.layers.block import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory
from tests.support.variants import VARIANTS, defined

VALUE, GRADIENT = TOLERANCE[torch.float64]
BY_NAME = {variant.name: variant for variant in VARIANTS}
LINEAR, EXPANDER = BY_NAME["linear"], BY_NAME["expander_k1"]
STATE = ("position", "token", "nodes", "q", "v")
DOUBLE = {"dtype": torch.float64, "init": "variance_preserving"}
LAYERS = {
    "mixing": lambda: LogarithmicMixing(8, 2, 2, **DOUBLE),
    "mixing conv_mixed": lambda: LogarithmicMixing(8, 2, 2, summarizer="conv_mixed", **DOUBLE),
    "mixing module": lambda: BY_NAME["module"].layer(),
    "block": lambda: LogarithmicMemory(8, 2, 2, **DOUBLE),
    "expander block": lambda: ExpanderSummarizerLogarithmicMemory(8, 2, 2, 1, **DOUBLE),
    "block without feed-forward": lambda: LogarithmicMemory(8, 2, 2, feedforward_mult=0, **DOUBLE),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def random(*shape: int, **more) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, **more)


@dataclass(frozen=True)
class Ragged:
    """A way to say which tokens count: the arguments, and the runs ``(row, first, stop)`` that they mean."""

    name: str
    shape: tuple[int, int]
    runs: list[tuple[int, int, int]]
    arguments: dict

    def __str__(self) -> str:
        return self.name

    def is_token(self) -> Tensor:
        counts = torch.zeros(self.shape, dtype=torch.bool)
        for row, first, stop in self.runs:
            counts[row, first:stop] = True
        return counts


def rows(name: str, length: int, runs: list[tuple[int, int]], dtype: torch.dtype) -> Ragged:
    """Padded rows, by ``lengths`` where the name says so, else by a mask."""
    case = Ragged(name, (len(runs), length), [(row, *run) for row, run in enumerate(runs)], {})
    if "lengths" in name:
        return replace(case, arguments={"lengths": torch.tensor([stop for _, stop in runs], dtype=dtype)})
    return replace(case, arguments={"attention_mask": case.is_token().to(dtype)})


def packed(name: str, bounds: list[int], length: int, dtype: torch.dtype = torch.int64, **more) -> Ragged:
    runs = [(0, first, stop) for first, stop in zip(bounds, bounds[1:], strict=False)]
    return Ragged(name, (1, length), runs, {"cu_seqlens": torch.tensor(bounds, dtype=dtype), **more})


RAGGED = [
    rows("lengths int32", 19, [(0, 7), (0, 0), (0, 19), (0, 16), (0, 1)], torch.int32),
    rows("lengths int64, first and last empty", 18, [(0, 0), (0, 17), (0, 3), (0, 0)], torch.int64),
    rows("lengths, all empty", 9, [(0, 0)] * 3, torch.int64),
    rows("lengths, all full", 9, [(0, 9)] * 2, torch.int32),
    rows("right mask bool", 19, [(0, 7), (0, 19), (0, 0), (0, 8)], torch.bool),
    rows("left mask int64", 19, [(12, 19), (19, 19), (0, 19), (18, 19), (3, 19)], torch.int64),
    rows("left and right mask int32", 19, [(0, 0), (12, 19), (0, 9), (4, 13)], torch.int32),
    packed("documents int32", [0, 7, 8, 24, 41], 41, torch.int32),
    packed("documents, first, middle and last empty", [0, 0, 5, 5, 5, 21, 21], 21),
    packed("documents, padding behind", [0, 3, 12], 40),
    packed("documents, max_length", [0, 9, 16, 20], 24, torch.int32, max_length=9),
    packed("documents, loose max_length", [0, 9, 16, 20], 20, max_length=100),
    packed("documents, all empty", [0, 0, 0], 17),
    packed("documents, all empty, max_length 0", [0, 0, 0], 17, max_length=0),
    packed("one document", [0, 33], 33),
    packed("no document, only padding", [0], 40),
]
MIXTURE = [RAGGED[0], RAGGED[6], RAGGED[8]]


def cut(case: Ragged, x: Tensor) -> list[Tensor]:
    return [x[row : row + 1, first:stop] for row, first, stop in case.runs]


def weighted(y: Tensor, state: MemoryState | None, seed: int) -> Tensor:
    """A loss with a weight of its own for every entry of the outputs and of the state's nodes, q, v and token."""
    torch.manual_seed(seed)
    parts = [y] if state is None else [y, *(getattr(state, name) for name in STATE[1:])]
    return sum((part * random(*part.shape)).sum() for part in parts)


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
    return list(grad(loss, list(leaves.values()), materialize_grads=True, retain_graph=True))


def assert_same_memory(got: MemoryState, row: int, alone: MemoryState) -> None:
    """Row of a state against a lone run, which may have room for fewer levels; further rows must be zero."""
    assert got.position[row] == alone.position[0]
    for name in STATE[1:]:
        mine, theirs = getattr(got, name)[row], getattr(alone, name)[0]
        if name != "token":
            assert not mine[len(theirs) :].any(), f"{name}: not zero without a node"
            mine = mine[: len(theirs)]
        assert_close(name, mine, theirs, VALUE)


# Every way to say which tokens count


@pytest.mark.parametrize(
    ("variant", "case"), [*((v, c) for v in (LINEAR, EXPANDER) for c in RAGGED),
                          *((v, c) for v in VARIANTS if v not in (LINEAR, EXPANDER) for c in MIXTURE)], ids=str
)  # fmt: skip
def test_every_run_of_tokens_equals_a_lone_one(variant, case):
    layer, x = variant.layer(), random(*case.shape, variant.embedding, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters())}
    y, state = layer(x, return_state=True, **case.arguments)
    assert state.batch_size == len(case.runs)
    together, apart = y.sum() * 0, y.sum() * 0
    for i, run in enumerate(cut(case, x)):
        expected, alone = layer.prefill(run)
        assert_close(f"run {i}", cut(case, y)[i], expected, VALUE)
        assert_close(f"run {i} by definition", expected, defined(layer, run), VALUE)
        assert_same_memory(state, i, alone)
        apart = apart + weighted(expected, alone, i)
        own = {name: getattr(state, name)[i : i + 1] for name in STATE}
        own.update({name: own[name][:, : alone.nodes.shape[1]] for name in STATE[2:]})
        together = together + weighted(cut(case, y)[i], state.replace(**own), i)
    assert_same_gradients(list(leaves), gradients(together, leaves), gradients(apart, leaves), GRADIENT)
    assert torch.equal(y, y.masked_fill(~case.is_token()[..., None], 0)), "padded outputs"
    assert not gradients(together, leaves)[0][~case.is_token()].any(), "padded gradients"
    assert torch.equal(layer(x, **case.arguments), y), "the outputs depend on return_state"


@layers
@pytest.mark.parametrize("case", [c for c in RAGGED if not c.is_token().all()], ids=str)
def test_whatever_padding_holds_changes_nothing(make, case):
    """NaN and infinity in padded inputs and in the upstream gradient: bit-equal outputs, states and gradients."""
    layer = make()
    x, upstream = (random(*case.shape, layer.embedding) for _ in range(2))
    padding = ~case.is_token()[..., None]

    def run(filler: float) -> list[Tensor]:
        given = x.masked_fill(padding, filler).requires_grad_()
        y, state = layer(given, return_state=True, **case.arguments)
        weights = {name: getattr(state, name) for name in STATE[1:]}
        loss = (y * upstream.masked_fill(padding, 0)).sum() + sum(part.sum() for part in weights.values())
        leaves = [given, *layer.parameters()]
        found = grad(loss, leaves, materialize_grads=True, retain_graph=True)
        poisoned = grad(y, leaves, upstream.masked_fill(padding, filler), materialize_grads=True)
        return [y, *weights.values(), *found, *poisoned]

    expected = run(0.0)
    assert not expected[0].masked_select(padding).any() and not expected[5].masked_select(padding).any()
    for filler in (math.nan, -math.inf, 1e300):
        for got, want in zip(run(filler), expected, strict=True):
            assert torch.isfinite(got).all()
            assert torch.equal(got, want)


@pytest.mark.parametrize("how", ["documents", "lengths", "left mask", "full rows", "behind a state"])
@pytest.mark.parametrize("kind", ["mixing", "mixing module", "expander block"])
def test_no_document_sees_another(kind, how):
    """Bit-equal outputs and gradients of the others, whatever one of them holds."""
    layer, more = LAYERS[kind](), {}
    if how == "documents":
        case = packed(how, [0, 7, 24, 35], 37)
    else:
        runs = {"lengths": [(0, 5), (0, 18), (0, 9)], "left mask": [(13, 18), (0, 18), (9, 18)]}
        case = rows(how, 18, runs.get(how, [(0, 18)] * 3), torch.int64)
    if how in ("lengths", "left mask", "documents"):
        more = case.arguments
    if how == "behind a state":
        with torch.no_grad():
            more = {"state": layer.prefill(random(3, 9, layer.embedding), lengths=torch.tensor([9, 0, 6]))[1]}
    x, upstream = (random(*case.shape, layer.embedding) for _ in range(2))

    for row, first, stop in case.runs:
        rest = case.is_token()
        rest[row, first:stop] = False
        found = []
        for value in (None, 7.5, 1e300, math.inf, math.nan):
            given = x.clone()
            if value is not None:
                given[row, first:stop] = value
            y = layer(given.requires_grad_(), **more)
            # No upstream gradient for the changed one, as from a loss on the others.
            found.append((y[rest], grad(y, given, upstream * rest[..., None])[0][rest]))
        for others in found[1:]:
            for name, got, expected in zip(("outputs", "gradients"), others, found[0], strict=True):
                assert torch.isfinite(got).all() and torch.equal(got, expected), f"{name}, run from {row, first}"


@layers
@pytest.mark.parametrize("lengths", [[5, 0, 9, 1], [0, 0, 0, 0], [16, 3, 0, 16]], ids=str)
def test_ragged_rows_go_on_from_ragged_states(make, lengths):
    layer = make()
    before, x = [6, 4, 0, 15], random(4, 16, layer.embedding, requires_grad=True)
    prompt = random(4, 15, layer.embedding, requires_grad=True)
    _, start = layer.prefill(prompt, lengths=torch.tensor(before))
    y, state = layer(x, state=start, return_state=True, lengths=torch.tensor(lengths, dtype=torch.int32))
    leaves = {"prompt": prompt, "x": x, **dict(layer.named_parameters())}
    together, apart = y.sum() * 0, y.sum() * 0
    for row, (n, more) in enumerate(zip(before, lengths, strict=True)):
        whole, alone = layer.prefill(torch.cat([prompt[row : row + 1, :n], x[row : row + 1, :more]], 1))
        assert_close(f"row {row}", y[row : row + 1, :more], whole[:, n:], VALUE)
        assert not y[row, more:].any()
        assert_same_memory(state, row, alone)
        together = together + weighted(y[row : row + 1, :more], None, row)
        apart = apart + weighted(whole[:, n:], None, row)
        if more == 0:
            for name in STATE:
                old, new = getattr(start, name)[row], getattr(state, name)[row]
                same = torch.equal(new[: len(old)], old) and not new[len(old) :].any() if old.dim() else new == old
                assert same, f"{name} of a row without a token"
    assert_same_gradients(list(leaves), gradients(together, leaves), gradients(apart, leaves), GRADIENT)


# Nothing, or nearly


@pytest.mark.parametrize(
    ("batch", "length", "arguments"),
    [
        *((0, 9, how) for how in ("", "state", "lengths", "mask")),
        *((2, 0, how) for how in ("", "state", "lengths", "mask", "state and lengths")),
        *((2, 1, how) for how in ("", "state", "lengths", "state and lengths")),
        *((1, length, "documents") for length in (0, 1)),
        (0, 0, "state and lengths"),
    ],
    ids=str,
)
@layers
def test_no_rows_no_tokens_one_token(make, batch, length, arguments):
    """Shapes, finite values, and gradients that are zeros, neither None nor NaN."""
    layer, more = make(), {}
    x = random(batch, length, layer.embedding, requires_grad=True)
    if "lengths" in arguments:
        more["lengths"] = torch.full((batch,), length)
    if arguments == "mask":
        more["attention_mask"] = torch.ones(batch, length, dtype=torch.bool)
    if arguments == "documents":
        more["cu_seqlens"] = torch.tensor([0, length])
    if "state" in arguments:
        more["state"] = layer.prefill(random(batch, 5, layer.embedding))[1].detach()
        more["state"].nodes.requires_grad_()
    y, state = layer(x, return_state=True, **more)
    assert y.shape == x.shape and torch.isfinite(y).all() and torch.isfinite(state.nodes).all()
    if length == 0 and "state" in arguments:
        assert all(torch.equal(getattr(state, name), getattr(more["state"], name)) for name in STATE)
    (y.sum() + state.token.sum()).backward()
    for name, leaf in (("x", x), *layer.named_parameters()):
        assert leaf.grad is not None, name
        assert torch.isfinite(leaf.grad).all(), name
        assert batch * length or not leaf.grad.any(), f"{name}: a gradient without a token"
    if length == 1:
        z, stepped = layer.step(x, more.get("state", layer.init_state(batch)))
        assert_close("step", z, y, VALUE)
        assert torch.equal(stepped.position, state.position)


# What is refused


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


REFUSED = {
    "lengths too long": ({"lengths": ints(10, 3)}, ValueError, r"lengths.*0 … 9.*10"),
    "lengths negative": ({"lengths": ints(-1, 3)}, ValueError, r"lengths.*0 … 9.*-1"),
    "lengths float": ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, r"lengths.*int32 or int64.*float32"),
    "lengths bool": ({"lengths": torch.tensor([True, True])}, TypeError, r"lengths.*int32 or int64.*bool"),
    "lengths of three rows": ({"lengths": ints(1, 2, 3)}, ValueError, r"lengths.*\[2\].*\[3\]"),
    "lengths a list": ({"lengths": [1, 2]}, TypeError, r"lengths.*tensor.*list"),
    "mask too short": (
        {"attention_mask": ints(1, 1)[:, None].repeat(1, 8)}, ValueError, r"attention_mask.*\[2, 9\].*\[2, 8\]"),
    "mask of one dimension": ({"attention_mask": ints(*[1] * 9)}, ValueError, r"attention_mask.*\[2, 9\].*\[9\]"),
    "mask a list": ({"attention_mask": [[1] * 9] * 2}, TypeError, r"attention_mask.*tensor.*list"),
    "lengths and mask": (
        {"lengths": ints(1, 2), "attention_mask": ints(1, 2)}, ValueError, "lengths.*attention_mask.*most one"),
    "documents in two rows": ({"cu_seqlens": ints(0, 9)}, ValueError, r"x.*\[1, .*cu_seqlens.*\[2, 9, 8\]"),
    "state of three rows": ({"state": (8, 2, 2, 3)}, ValueError, r"state.*\[2\].*\[3\]"),
    "state of another width": ({"state": (6, 2, 2, 2)}, ValueError, r"state.*8\].*6\]"),
    "state of other banks": ({"state": (8, 2, 3, 2)}, ValueError, r"state.*2, 8\].*3, 8\]"),
    "state of an expander": ({"state": "expander"}, ValueError, "state.*expand=0.*1"),
    "state a tensor": ({"state": ints(0, 0)}, TypeError, "state.*MemoryState.*Tensor"),
    "state with float positions": (
        {"state": {"position": torch.zeros(2)}}, TypeError, r"state\.position.*int64.*float32"),
    "state with short positions": (
        {"state": {"position": ints(0, 0, dtype=torch.int32)}}, TypeError, r"state\.position.*int64.*int32"),
    "state of integers": (
        {"state": {"token": torch.zeros(2, 8, dtype=torch.int64)}}, TypeError, r"state\.token.*float.*int64"),
    "x a list": ({"x": [1.0]}, TypeError, "x.*tensor.*list"),
    "x of two dimensions": ({"x": torch.zeros(9, 8)}, ValueError, r"x: .*batch, length, embedding.*\[9, 8\]"),
    "x of another width": ({"x": torch.zeros(2, 9, 7)}, ValueError, r"x: .*8\].*\[2, 9, 7\]"),
    "x of integers": ({"x": torch.zeros(2, 9, 8, dtype=torch.int64)}, TypeError, "x: .*float.*int64"),
    "x of another dtype": ({"x": torch.zeros(2, 9, 8).double()}, TypeError, "x: .*float32.*float64"),
    "x on another device": ({"x": torch.zeros(2, 9, 8, device="meta")}, ValueError, "x: .*cpu.*meta"),
}  # fmt: skip
REFUSED_PACKED = {
    "descending": ({"cu_seqlens": ints(0, 5, 3)}, ValueError, "cu_seqlens.*ascending"),
    "not from 0": ({"cu_seqlens": ints(1, 5)}, ValueError, "cu_seqlens.*0.*1"),
    "beyond x": ({"cu_seqlens": ints(0, 10)}, ValueError, r"cu_seqlens.*0 … 9.*10"),
    "of two dimensions": ({"cu_seqlens": ints(0, 5)[None]}, ValueError, r"cu_seqlens.*\[1, 2\]"),
    "empty": ({"cu_seqlens": ints()}, ValueError, r"cu_seqlens.*documents \+ 1.*\[0\]"),
    "float": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens.*int32 or int64.*float32"),
    "a list": ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens.*tensor.*list"),
    "max_length too small": ({"cu_seqlens": ints(0, 5), "max_length": 4}, ValueError, "max_length.*5.*4"),
    "max_length a float": ({"cu_seqlens": ints(0, 5), "max_length": 5.5}, (TypeError, ValueError), r"max_length.*5\.5"),
    "max_length without documents": ({"max_length": 4}, ValueError, "max_length.*cu_seqlens"),
    "a state of one row": ({"cu_seqlens": ints(0, 5, 9), "state": (8, 2, 2, 1)}, ValueError, r"state.*\[2\].*\[1\]"),
    "and lengths": ({"cu_seqlens": ints(0, 5), "lengths": ints(1)}, ValueError, "lengths.*cu_seqlens.*at most one"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*REFUSED, *(f"cu_seqlens {name}" for name in REFUSED_PACKED)])
def test_a_wrong_argument_is_named(name):
    """With what was expected and what came; and before anything ran."""
    layer = LogarithmicMixing(8, 2, 2)
    given, error, said = {**REFUSED, **{f"cu_seqlens {k}": v for k, v in REFUSED_PACKED.items()}}[name]
    given = {"x": torch.zeros(1 if "cu_seqlens " in name else 2, 9, 8), **given}
    state = given.get("state")
    if isinstance(state, tuple):
        given["state"] = LogarithmicMixing(*state[:3]).init_state(state[3], max_position=4)
    elif state == "expander":
        given["state"] = ExpanderSummarizerLogarithmicMemory(8, 2, 2, 1).init_state(2)
    elif isinstance(state, dict):
        given["state"] = layer.init_state(2).replace(**state)
    with pytest.raises(error, match=said):
        layer(given.pop("x"), **given)


def test_wrong_arguments_of_step_and_of_states_are_named():
    layer, x = LogarithmicMixing(8, 2, 2), torch.zeros(2, 1, 8)
    own, grown = layer.init_state(2), layer.prefill(torch.randn(2, 9, 8))[1]
    far = layer.init_state(2, max_position=2**62 - 1).replace(position=ints(0, 2**62 - 1))
    other = ExpanderSummarizerLogarithmicMemory(8, 2, 2, 1).init_state(2)

    def roomy() -> MemoryState:
        return layer.init_state(2, max_position=2**62).replace(position=ints(0, 2**62 - 1), max_position=2**62 - 1)

    for call, error, said in (
        (lambda: layer.step(x.repeat(1, 2, 1), own), ValueError, r"x_t.*1, 8\].*\[2, 2, 8\]"),
        (lambda: layer.step(x[:, 0], own), ValueError, "x.*embedding"),
        (lambda: layer.step(x, None), TypeError, "state.*MemoryState.*None"),
        (lambda: layer.step(x[:1], own), ValueError, r"state.*\[1\].*\[2\]"),
        (lambda: layer.step(x, far), RuntimeError, "exhausted"),
        (lambda: layer(x, state=far), RuntimeError, "exhausted"),
        (lambda: layer.step(x, roomy()), (RuntimeError, ValueError), "exhausted|max_position"),
        (lambda: layer.init_state(-1), ValueError, "batch_size.*-1"),
        (lambda: layer.init_state(2, max_position=-1), ValueError, "max_position.*-1"),
        (lambda: layer.init_state(2, dtype=torch.int32), TypeError, "dtype.*int32"),
        (lambda: own.to(dtype=torch.int32), TypeError, "dtype.*int32"),
        (lambda: own.reorder(ints(2)), ValueError, "index.*0 … 1.*2"),
        (lambda: own.reorder([0]), TypeError, "index.*tensor.*list"),
        (lambda: own.reset(ints(-1)), ValueError, "rows.*0 … 1.*-1"),
        (lambda: own.reset(torch.tensor([True])), ValueError, r"rows.*\[2\].*\[1\]"),
        (lambda: own.reset([0]), TypeError, "rows.*tensor.*list"),
        (lambda: grown.restore(grown.snapshot()), RuntimeError, "grad"),
        (lambda: own.restore(grown.snapshot()), ValueError, r"snapshot\.position: .* at most 1, .* up to 9"),
        (lambda: own.restore(layer.init_state(3)), ValueError, r"snapshot\.position.*\[2\].*\[3\]"),
        (lambda: own.restore(other), ValueError, "snapshot.*expand=0.*1"),
        (lambda: own.restore(own.nodes), TypeError, "snapshot.*MemoryState.*Tensor"),
    ):
        with pytest.raises(error, match=said):
            call()


def test_an_additive_mask_is_refused():
    """Its zeros stand where tokens are: taken for a mask of tokens it would keep exactly what it hides."""
    mask = torch.zeros(2, 9)
    mask[:, 7:] = -math.inf
    with pytest.raises(TypeError, match="attention_mask: expected bool or integers.*float32"):
        LogarithmicMixing(8)(torch.zeros(2, 9, 8), attention_mask=mask)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_packed_batch_of_no_documents_is_padding_alone(hooked):
    layer = LAYERS["mixing"]()
    if hooked:
        layer.sva.register_forward_hook(lambda *_: None)
    y, state = layer(torch.full((1, 5, 8), math.nan).double(), cu_seqlens=ints(0), return_state=True)
    assert torch.equal(y, torch.zeros(1, 5, 8).double()) and state.batch_size == 0
