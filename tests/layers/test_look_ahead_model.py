"""LaMemo's modules and their state: whole streams against the definition, and what a `LookAheadState` offers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import (
    LogarithmicMixing,
    LookAheadLanguageModel,
    LookAheadMemory,
    LookAheadState,
    load_states,
    save_states,
)
from lmn_kernels.layers.look_ahead import LookAheadMemoryLayer, Reach
from python_ref import look_ahead_definition as definition
from tests.support.variants import enlarged

F64, BF16 = torch.float64, torch.bfloat16
VALUE, GRADIENT = TOLERANCE[F64]
both_kinds = pytest.mark.parametrize("attn_type", [3, 0])


def small(**options) -> LookAheadMemory:
    return enlarged(LookAheadMemory(8, 3, 2, 3, **{"feedforward": 12, "memory_length": 9, "dtype": F64} | options))


def merged(old: Tensor, old_lse: Tensor, new: Tensor, new_lse: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Section 3 as it is printed, but for a common factor of numerator and denominator."""
    total = torch.logaddexp(old_lse, new_lse)
    share = (old_lse - torch.maximum(old_lse, new_lse)).exp()
    share = (share / (share + (new_lse - torch.maximum(old_lse, new_lse)).exp() + eps))[..., None]
    return share * old + (1 - share) * new, total


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def proceed(model, lengths=(5, 5), batch=2) -> LookAheadState:
    state = None
    for length in lengths:
        _, state = model(random(batch, length, model.embedding).to(model.r_w_bias.dtype), state)
    return state


def gradients(y: Tensor, leaves, grad: Tensor, again: bool = True) -> list[Tensor]:
    return list(torch.autograd.grad(y, list(leaves), grad, retain_graph=again, materialize_grads=True))


def same(got: LookAheadState, expected: LookAheadState) -> bool:
    assert (got.tokens, got.is_even) == (expected.tokens, expected.is_even)
    pairs = [(part, expected.tensors()[name]) for name, part in got.tensors().items()]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def sinusoids(distance: Tensor, size: int) -> Tensor:
    """With the frequencies of the original, which are of float32."""
    angle = distance[:, None] * (1 / 10000 ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    return torch.cat([angle.sin(), angle.cos()], 1)


def cut(model, part: Tensor) -> Tensor:
    return part[:, max(0, part.shape[1] - model.memory_length) :].detach()


def by_definition(model, x: Tensor, old, table: Tensor | None = None):
    """A segment of section 8, or of Transformer-XL; memories are inputs, outputs and lse of every layer, and T."""
    inputs, outputs, totals = ([cut(model, part) for part in parts] for parts in old[:3])
    tokens, memory, looks_ahead = x.shape[1], inputs[0].shape[1], model.attn_type != 0
    behind, ahead = torch.arange(tokens + memory, dtype=F64), torch.arange(memory + 1, dtype=F64)
    if table is None:
        distance = torch.cat([behind, -ahead if model.attn_type == 31 else ahead])
        table = sinusoids(distance.clamp(max=model.clamp_length or torch.inf), model.embedding)
    u, v = model.r_w_bias, model.r_r_bias
    u_ahead = model.r_w_bias_future if model.attn_type == 32 else u
    v_ahead = model.r_r_bias_future if model.attn_type in (3, 32) else v
    window = old[3] if model.window == "previous" and old[3] else tokens
    y, new = torch.cat([inputs[0], x], 1), ([], [], [])
    for n, layer in enumerate(model.layers):
        attention, feed = layer.dec_attn, layer.pos_ff
        before, after = (2, 0) if attention.pre_norm else (0, 2)
        norms = [torch.nn.Identity(), torch.nn.Identity(), attention.layer_norm, feed.layer_norm]
        rows = y if looks_ahead else torch.cat([inputs[n], y[:, -tokens:]], 1)
        asking = rows if looks_ahead else rows[:, -tokens:]
        q = linear(norms[before](asking), attention.q_net.weight).unflatten(2, u.shape)
        kv = linear(norms[before](rows), attention.kv_net.weight).unflatten(2, (2, *u.shape))
        r, bias = linear(table, attention.r_net.weight).unflatten(1, u.shape), torch.stack([u, v, u_ahead, v_ahead])
        out, lse = definition.attend(q, kv, bias, r, None, None, None, tokens, window, tokens + memory)
        if looks_ahead and memory:
            found = merged(outputs[n], totals[n], out[:, :memory], lse[:, :memory], attention.merge_eps)
            out, lse = (torch.cat([part, own[:, memory:]], 1) for part, own in zip(found, (out, lse), strict=True))
        y = norms[after](asking + linear(out.flatten(2), attention.o_net.weight))
        y = norms[after + 1](y + feed.CoreNet[3](feed.CoreNet[0](norms[before + 1](y)).relu()))
        for parts, part in zip(new, (rows, out, lse), strict=True):
            parts.append(cut(model, part))
    return y[:, -tokens:], (*new, tokens)


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_type": 32}, {"attn_type": 31}, {"attn_type": 0}, {"attn_type": 0, "pre_norm": True, "clamp_length": 3},
     {"clamp_length": 4}, {"attn_type": 31, "clamp_length": 4}, {"pre_norm": True}, {"window": "previous"},
     {"merge_eps": 1e-3, "keep_last": True}, {"keep_last": True}, {"memory_length": 0}, {"memory_length": 2},
     {"attn_type": 0, "memory_length": 0}, {"memory_length": 40}, {"changes": True}, {"changes": True, "attn_type": 0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("batch", [0, 2])
def test_a_stream_equals_the_definition(options, batch):
    """Outputs, gradients and every state, segment by segment; the memory's length may change between them."""
    model = small(**{name: value for name, value in options.items() if name != "changes"})
    state, old = None, (*([random(batch, 0, *size)] * 3 for size in ((8,), (2, 3), (2,))), 0)
    counts = (3, 0, 0) if model.attn_type == 0 else (1, *[2 + model.keep_last] * 2)
    for number, length in enumerate((5, 5, 3, 1, 7, 5)):
        if "changes" in options:
            model.memory_length = (9, 3, 12, 12, 0, 5)[number]
        x, grad = random(batch, length, 8).requires_grad_(), random(batch, length, 8)
        (y, state), (expected, old) = model(x, state), by_definition(model, x, old)
        assert_close("y", y.detach(), expected.detach(), VALUE)
        leaves = {"x": x, **dict(model.named_parameters())}
        found = [gradients(result, leaves.values(), grad) for result in (y, expected)]
        assert_same_gradients(list(leaves), *found, GRADIENT)
        parts = state.inputs, state.outputs, state.lse
        assert (state.batch_size, state.tokens, *map(len, parts)) == (batch, length, *counts)
        for kind, wanted in zip(parts, old[:3], strict=True):
            for n, part in enumerate(kind):
                assert_close(f"memory of layer {n}", part, wanted[n], VALUE)


@pytest.mark.parametrize("attn_type", [3, 31, 32, 0])
def test_no_token_sees_a_later_one_and_the_memory_sees_the_first(attn_type):
    model = small(attn_type=attn_type)
    state, x = proceed(model, (4, 4)), random(2, 4, 8).requires_grad_()
    y = model(x, state)[0]
    for t in range(4):
        (grad,) = gradients(y[:, t], [x], random(2, 8))
        assert not grad[:, t + 1 :].any() and grad[:, : t + 1].abs().amax(-1).min() > 0
        later = torch.cat([x[:, : t + 1], random(2, 3 - t, 8)], 1)
        assert torch.equal(model(later, state)[0][:, : t + 1], y[:, : t + 1])
        first = torch.cat([random(2, 1, 8), x[:, 1:]], 1)
        states = [model(given, state)[1] for given in (x, later, first)]  # five rows were there before
        for own, unmoved, moved in zip(*([p[:, :5] for p in (*s.outputs, *s.lse)] for s in states), strict=True):
            assert torch.equal(own, unmoved) and (own != moved).flatten(2).any(2).all()


@pytest.mark.parametrize(
    ("window", "lengths", "missed", "twice"),
    [("segment", (8, 8, 8), 0, 0), ("segment", (8, 8, 3), 55, 0), ("segment", (8, 3, 8), 6, 21),
     ("previous", (8, 8, 3), 0, 0), ("previous", (8, 3, 8), 0, 0), ("previous", (8, 8, 3, 8), 0, 0)],
)  # fmt: skip
def test_which_pairs_are_seen(window, lengths, missed, twice):
    """Without scores, and each token's value a unit vector, the output times the exponential of the lse counts."""
    model, total = LookAheadMemory(28, 2, 1, feedforward=2, memory_length=32, window=window, dtype=F64), sum(lengths)
    state, first = None, sum(lengths[:-1])
    for parameter in model.parameters():
        parameter.data.zero_()
    model.layers[0].dec_attn.kv_net.weight.data[28:] = torch.eye(28)
    for part in torch.eye(28, dtype=F64)[None, :total].split(lengths, 1):
        _, state = model(part, state)
    seen = (counted := (state.outputs[0] * state.lse[0].exp()[..., None])[0, :, 0, :total]).round()
    assert_close("counts", counted, seen, 1e-12)
    assert torch.equal(seen.tril(), torch.ones_like(seen).tril()) and not seen.triu(1)[:, first + 1 :].any()
    pairs = seen[:first, : first + 1][torch.ones(first, first + 1).triu(1).bool()]
    assert ((pairs == 0).sum(), (pairs == 2).sum(), pairs.max()) == (missed, twice, 1 + (twice > 0))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_log_sum_exp_stays_in_float32(autocast):
    """With a low-precision model, or under autocast, with which any state goes on and which any state leaves."""
    model = small(dtype=torch.float32 if autocast else BF16, keep_last=True)
    exact, state, expected = copy.deepcopy(model).double(), None, None
    for number, length in enumerate((5, 5, 3, 1, 7, 5)):
        x, cast = torch.randn(2, length, 8).to(model.r_w_bias.dtype), autocast and number != 3
        with torch.autocast("cpu", BF16, enabled=cast):
            y, state = model(x, state)
        wanted, expected = exact(x.double(), expected)
        assert_close("lse", state.lse[0], expected.lse[0], TOLERANCE[BF16][0])
        assert_close("y of three layers", y.detach(), wanted.detach(), 3 * TOLERANCE[BF16][0])
        assert {part.dtype for part in state.inputs} == {x.dtype}
        assert {part.dtype for part in state.outputs} == {BF16 if cast else x.dtype}
        for part in state.lse:
            assert part.dtype == torch.float32 and (part != part.to(BF16)).float().mean() > 0.9, "rounded on the way"
        y.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize(("attn_type", "window"), [(3, "segment"), (3, "previous"), (31, "segment"), (0, "segment")])
def test_a_reset_stream_is_as_a_fresh_one(attn_type, window):
    """Each stream of the batch against itself alone, in outputs, gradients and memory, whatever happens to others."""
    model = small(attn_type=attn_type, window=window)
    state, alone, leaves = None, [None] * 3, dict(model.named_parameters())
    resets = {3: torch.tensor([1]), 5: torch.tensor([True, False, False]), 6: torch.tensor([2, 0]).int()}
    for number, length in enumerate((5, 5, 3, 2, 4, 3, 8, 1, 5, 9, 4)):
        if gone := {3: [1], 5: [0], 6: [2, 0]}.get(number):
            state, alone = state.reset(resets[number]), [None if row in gone else s for row, s in enumerate(alone)]
            assert not any(part[gone].any() for part in (*state.inputs, *state.outputs, *state.lse))
        x, grad, wanted = random(3, length, 8), random(3, length, 8), []
        y, state = model(x, state)
        for row in range(3):
            expected, alone[row] = model(x[row : row + 1], alone[row])
            assert_close(f"row {row} of segment {number}", y[row : row + 1].detach(), expected.detach(), VALUE)
            wanted.append(gradients(expected, leaves.values(), grad[row : row + 1]))
            assert (start := int(state.start[row])) == state.length - alone[row].length
            for kind in ("inputs", "outputs", "lse"):
                for part, own in zip(getattr(state, kind), getattr(alone[row], kind), strict=True):
                    assert_close(kind, part[row : row + 1, start:], own, VALUE)
        wanted = [sum(parts) for parts in zip(*wanted, strict=True)]
        assert_same_gradients(list(leaves), gradients(y, leaves.values(), grad), wanted, GRADIENT)
        # Read on a CPU; without reading, known of the segment of nine, which leaves nothing of what was before it.
        assert state.is_even == (not state.start.any()) and (3 <= number < 7) == (not state.is_even)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@both_kinds
def test_reordered_streams_go_on_as_what_they_are(attn_type, dtype):
    model, index = small(attn_type=attn_type), torch.tensor([2, 2, 0, 1])
    first, second, third = (random(3, length, 8) for length in (5, 6, 4))
    state, expected = (model(x[1], model(x[0])[1])[1] for x in ((first, second), (first[index], second[index])))
    state = state.reset(torch.tensor([1])).reorder(index.to(dtype))
    (y, state), (wanted, expected) = (model(third[index], s) for s in (state, expected.reset(torch.tensor([3]))))
    assert_close("y", y, wanted, VALUE)
    assert torch.equal(state.start, expected.start) and (state.tokens, state.is_even) == (4, False)


@both_kinds
def test_nothing_flows_into_a_state_and_no_segment_changes_one(attn_type):
    model, x, buffer = small(attn_type=attn_type), random(2, 5, 8).requires_grad_(), random(2, 4, 8)
    state = model(x, proceed(model))[1].reset(torch.tensor([1]))
    before, (y, after) = state.clone(), model(buffer, state)
    assert not any(part.requires_grad for part in (*state.tensors().values(), *after.tensors().values()))
    assert not gradients(y, [x], torch.ones_like(y))[0].any()
    kept = after.clone()
    y.square().sum().backward()
    buffer.fill_(7)
    _ = state.reset(), state.reset(torch.tensor([0])), state.reorder(torch.tensor([0, 0])), state.last(2)
    assert same(state, before) and same(after, kept)


def test_reset_of_all_clone_detach_to_last_and_size():
    model, x = small(), random(2, 4, 8)
    for state in (proceed(model).reset(), proceed(model).reset(torch.tensor([0])).reset(), model.init_state(2)):
        assert torch.equal(model(x, state)[0], model(x)[0]) and same(state, model.init_state(2))
    state = proceed(model).reset(torch.tensor([1])).last(7)
    assert state.start.tolist() == [0, 7] and state.nbytes == 8 * 2 * (7 * (8 + 2 * (6 + 2)) + 1)
    storages = [{t.untyped_storage().data_ptr() for t in s.tensors().values()} for s in (state, state.clone())]
    assert not storages[0] & storages[1]
    for equal in (state.clone(), state.detach(), state.last(7), state.last(100), state.to("cpu")):
        assert same(equal, state)
    short, parts = state.last(3), state.tensors()
    assert short.start.tolist() == [0, 3] and (short.tokens, short.is_even) == (5, False)
    assert all(name == "start" or torch.equal(part, parts[name][:, 4:]) for name, part in short.tensors().items())
    assert state.last(0).start.tolist() == [0, 0] and model.init_state(2, BF16).lse[0].dtype == torch.float32
    for dtype, wide in ((BF16, torch.float32), (F64, F64)):
        for name, part in state.to(dtype=dtype).tensors().items():
            expected = torch.int64 if name == "start" else wide if name.startswith("lse") else dtype
            assert part.dtype == expected and torch.equal(part, parts[name].to(expected))
    assert {part.device.type for part in state.to("meta").tensors().values()} == {"meta"}
    for state in (proceed(model, (50,)), proceed(model).last(1), proceed(model).reset()):
        storages = [part.untyped_storage().nbytes() for part in state.tensors().values()]
        assert sum(storages) <= 2 * state.nbytes, "much more is kept than the state shows"


def test_save_and_load(tmp_path, monkeypatch):
    """Whole or not at all, and no other kind of file."""
    model, path, other = small(dtype=BF16), tmp_path / "state", tmp_path / "other"
    state = proceed(model).reset(torch.tensor([1]))
    for written in (model.init_state(0), small(attn_type=0).init_state(1), state):
        written.save(path)
        assert same(LookAheadState.load(path), written)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("os.replace", lambda *_: (tmp_path / "full").read_bytes())
        model.init_state(1).save(path)
    assert same(LookAheadState.load(path), state) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(
        ValueError,
        match="state: expected a file of the states of .*, got one of a LookAheadState",
    ):
        load_states(path)
    metadata = {"lmn_kernels.look_ahead_state": '{"tensors": ["lse.0"]}', "lmn_kernels.layout": "1"}
    versions = [save({"start": torch.zeros(1)}, metadata | {"lmn_kernels.layout": version}) for version in "12"]
    save_states(other, [LogarithmicMixing(8, 2).init_state(1)])
    kind = "expected a file of a LookAheadState, got one"
    for content, message in (
        (other.read_bytes(), f"{kind} of the states"), (path.read_bytes()[:-1], kind), (versions[0], f"{kind} .*lse.0"),
        (versions[1], "expected state layout 1, got 2"),
    ):  # fmt: skip
        other.write_bytes(content)
        with pytest.raises(ValueError, match=f"other: {message}"):
            LookAheadState.load(other)


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda m, s, x: m(x, "state"), "state: expected a LookAheadState, got str"),
     (lambda m, s, x: m(x, s.reorder(torch.tensor([0]))), r"state.start: expected shape .* = \[2\], got \[1\]"),
     (lambda m, s, x: m(x, s.to("meta")), "state: expected device cpu, got meta"),
     (lambda m, s, x: m(x, proceed(small(attn_type=0))), "state: .* of 1 and outputs of 2 layers, got .* 3 and 0"),
     (lambda m, s, x: m(x, proceed(small(keep_last=True))), "state: .* outputs of 2 layers, got those of 1 and 3"),
     (lambda m, s, x: m(x, s.replace(inputs=(s.inputs[0][..., :6],))), r"state.inputs\[0\]: .* got \[2, 9, 6\]"),
     (lambda m, s, x: m(x, s.replace(outputs=s.lse)), r"state.outputs\[0\]: expected shape .* got \[2, 9, 2\]"),
     (lambda m, s, x: m(x, s.replace(lse=(s.lse[0], s.lse[1][:, 1:]))), r"state.lse\[1\]: .* got \[2, 8, 2\]"),
     (lambda m, s, x: s.reorder(torch.tensor([0, 2])), "index: expected values in 0 … 1, got 0 … 2"),
     (lambda m, s, x: s.reset(torch.tensor([-1])), "rows: expected values in 0 … 1, got -1"),
     (lambda m, s, x: s.reset(torch.tensor([True])), r"rows: expected shape \[2\], got \[1\]"),
     (lambda m, s, x: s.last(-1), "length: expected an integer of at least 0, got -1"),
     (lambda m, s, x: s.to(dtype=torch.int64), "dtype: expected a floating dtype, got torch.int64"),
     (lambda m, s, x: m(x[..., :6], s), r"x: expected shape .* got \[2, 4, 6\]"),
     (lambda m, s, x: m(x[:, :0], s), "x: expected at least one token, got 0"),
     (lambda m, s, x: m(x.float(), s), "x: expected dtype torch.float64 .* got torch.float32"),
     (lambda m, s, x: LookAheadLanguageModel(9, 8, 1, 2, memory_length=4)([[1]]), "ids: expected a tensor, got list"),
     *((partial(lambda wrong, *_: small(**wrong), {name: value}), f"{name}: expected .* got {value!r}")
       for name, value in (("attn_type", 33), ("memory_length", -1), ("window", "next"), ("clamp_length", 0)))],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(call, message):
    model, x = small(), random(2, 4, 8)
    model(x, state := proceed(model))
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call(model, state, x)


@pytest.mark.parametrize("attn_type", [3, 31, 0])
def test_dropout_draws_for_each_table_anew_and_a_layer_reads_both(attn_type):
    model, tables, calls = small(attn_type=attn_type, dropout=0.5, memory_length=30).eval(), [], []
    for module in filter(lambda module: isinstance(module, torch.nn.Dropout), model.modules()):
        module.register_forward_hook(lambda *_: calls.append(0))
    for layer in model.layers:
        layer.dec_attn.r_net.register_forward_pre_hook(lambda _, args: tables.append(args[0]))
    state, x = proceed(model), random(2, 6, 8)
    assert torch.equal(model(x, state)[0], model(x, state)[0]) and len(tables[-1]) == 16 + 11 * (attn_type == 31)
    (y, after), distance = model.train()(x, state), torch.arange(16, dtype=F64)
    exact = sinusoids(torch.cat([distance, distance[:11] * (-1 if attn_type == 31 else 1)][: 1 + (attn_type != 0)]), 8)
    table, kept = tables[-1], after.inputs[0][:, 10:]
    assert all(other is table for other in tables[-3:]) and tables[-4] is not table and table.shape == exact.shape
    assert ((table == 0) | torch.isclose(table, 2 * exact)).all() and ((kept == 0) | torch.isclose(kept, 2 * x)).all()
    assert all(0.2 < gone.double().mean() < 0.8 for gone in ((table == 0) & (exact != 0), kept == 0, y == 0))
    assert len(calls) == 5 * (3 + 3 * 3), "of each segment its input, table and output, and three of each layer"
    if attn_type:
        assert not torch.equal(table[1:11] == 0, table[17:] == 0)
        old = state.inputs, [*state.outputs, state.outputs[0]], [*state.lse, state.lse[0]], 5
        _, found = by_definition(model.eval(), kept, old, table)
        assert_close("output", after.outputs[0], found[1][0], VALUE)


def test_steps_of_training_compile_to_few_graphs_for_all_lengths():
    torch._dynamo.reset()
    model, counter = LookAheadMemory(8, 2, 2, memory_length=9, dtype=F64), CompileCounterWithBackend("aot_eager")
    graph, state = torch.compile(enlarged(model), fullgraph=True, backend=counter), proceed(model)
    for length in (5, 4, 6, 3):
        x, grad, results = random(2, length, 8), random(2, length, 8), []
        for run in (graph, model):
            y, after = run(x, state)
            results.append([y, *after.tensors().values(), *gradients(y, model.parameters(), grad, False)])
            assert (after.tokens, after.is_even, after.length) == (length, True, 9)
        for got, expected in zip(*results, strict=True):
            assert_close("result", got.detach(), expected.detach(), GRADIENT)
    assert counter.frame_count == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_layer_changes_nothing(reentrant):
    layer, x = enlarged(LookAheadMemoryLayer(8, 2, 3, feedforward=12, dtype=F64)), random(2, 11, 8).requires_grad_()
    run = partial(layer, looks_ahead=True, output=random(2, 7, 2, 3), lse=random(2, 7, 2))
    found, reach = [], Reach(4, random(11, 8), 0, random(4, 2, 3), None, 4)
    for call in (run, partial(checkpoint, run, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad, (y, out, lse) = None, call(x, reach)
        (y.square().sum() + out.sin().sum() + lse.sum()).backward()
        found.append([x.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_state_is_printed_by_its_sizes():
    said = repr(proceed(small()))
    assert said.startswith("LookAheadState(batch_size=") and "length=" in said and "tensor(" not in said
