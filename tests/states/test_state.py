"""The memory between calls: prefill, steps, chunks, and what a `MemoryState` offers (R3, R9, R10, R13, R18)."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import LogarithmicMixing, MemoryState, load_states, save_states
from lmn_kernels.layers.block import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory
from python_ref.definition import BitmaskMemory, attention
from tests.support.variants import VARIANTS, defined, definition_of

VALUE, GRADIENT = TOLERANCE[torch.float64]
BY_NAME = {variant.name: variant for variant in VARIANTS}
FEW = [BY_NAME[name] for name in ("linear", "expander_k1", "conv_mixed", "depthwise_separable", "module")]
LINEAR, EXPANDER, MIXED = FEW[:3]
FLOATS = ("token", "nodes", "q", "v")
TENSORS = ("position", *FLOATS)

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
few_variants = pytest.mark.parametrize("variant", FEW, ids=str)
one_by_one_and_together = pytest.mark.parametrize("how", ["steps", "chunk"])


def random(*shape: int, **more) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, **more)


def proceed(layer: LogarithmicMixing, x: Tensor, state: MemoryState, how: str) -> tuple[Tensor, MemoryState]:
    """The tokens of ``x [B, T, E]`` behind a state, by single steps or as one chunk."""
    if how == "chunk":
        return layer(x, state=state, return_state=True)
    ys = [x[:, :0]]
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], state)
        ys.append(y)
    return torch.cat(ys, 1), state


def as_state(layer: LogarithmicMixing, memory: BitmaskMemory, token: Tensor) -> MemoryState:
    """What the definition's sequential form holds, as the layer should hold it."""
    projections = definition_of(layer)[1]
    nodes = torch.cat([token.new_zeros(token.shape[0], 0, layer.bank, token.shape[1]), *memory.newest[1:]], 1)
    q, v = (nodes @ projections[f"{name}.weight"].mT + projections[f"{name}.bias"] for name in "qv")
    n, levels = memory.position, max(memory.position, 1).bit_length() - 1
    return MemoryState(torch.full(token.shape[:1], n), token, nodes, q, v, layer.expand, levels, n)


def states_by_definition(layer: LogarithmicMixing, x: Tensor) -> list[MemoryState]:
    """The state after 0, 1, …, T tokens of ``x [B, T, E]``."""
    memory = BitmaskMemory(definition_of(layer)[0], layer.bank)
    states = [as_state(layer, memory, x.new_zeros(x.shape[0], x.shape[2]))]
    for token in x.unbind(1):
        memory.update(token)
        states.append(as_state(layer, memory, token))
    return states


def each(state: MemoryState) -> list[MemoryState]:
    """The rows, each as a state of its own."""
    parts = [getattr(state, name).split(1) for name in TENSORS]
    return [state.replace(**dict(zip(TENSORS, row, strict=True))) for row in zip(*parts, strict=True)]


def assert_state(got: MemoryState, expected: MemoryState, exactly: bool = False) -> None:
    """The same memory, however much room either has; what holds no node is exactly zero."""
    assert got.position.dtype == torch.int64 and torch.equal(got.position, expected.position)
    levels = [i for i in range(1, 64) for _ in range(1 + i * got.expand)]
    for name in FLOATS:
        pair = [getattr(state, name) for state in (got, expected)]
        if name != "token":
            rows = max(part.shape[1] for part in pair)
            pair = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, rows - part.shape[1])) for part in pair]
            absent = torch.tensor([[int(n) >> i == 0 for i in levels[:rows]] for n in got.position], dtype=torch.bool)
            assert not any(part[absent.view(part.shape[:2])].any() for part in pair), f"{name}: not zero without a node"
        if exactly:
            assert torch.equal(*pair), name
        else:
            assert_close(name, *pair, VALUE)
    assert all(int(n) <= got.max_position for n in got.position)


@pytest.mark.parametrize(
    ("variant", "length"), [*((v, 19) for v in VARIANTS), *((v, 70) for v in (LINEAR, EXPANDER, MIXED))], ids=str
)
@torch.no_grad()
def test_every_split_into_prefill_and_steps(variant, length):
    layer, x = variant.layer(), random(2, length, variant.embedding)
    expected, states = defined(layer, x), states_by_definition(layer, x)
    for s in range(length + 1):
        y, state = layer.prefill(x[:, :s])
        assert_close("prefill", y, expected[:, :s], VALUE)
        assert_state(state, states[s])
        # All the rest behind some splits, none among them, and the next two behind every one.
        stop = length if s % 16 == 0 else min(s + 2, length)
        y, state = proceed(layer, x[:, s:stop], state, "steps")
        assert_close(f"steps behind {s}", y, expected[:, s:stop], VALUE)
        assert_state(state, states[stop])


@few_variants
@torch.no_grad()
def test_every_split_into_three_chunks(variant):
    """Across 8, where a chunk completes nodes of three levels; an empty chunk changes nothing."""
    layer, x = variant.layer(), random(2, 9, variant.embedding)
    expected, states = defined(layer, x), states_by_definition(layer, x)

    def chunk(state: MemoryState, first: int, stop: int) -> MemoryState:
        y, after = proceed(layer, x[:, first:stop], state, "chunk")
        assert_close(f"chunk {first}:{stop}", y, expected[:, first:stop], VALUE)
        assert_state(after, states[stop])
        if first == stop:
            assert_state(after, state, exactly=True)
        return after

    for i in range(10):
        first = chunk(layer.init_state(2), 0, i)
        for j in range(i, 10):
            chunk(chunk(first, i, j), j, 9)


@every_variant
@torch.no_grad()
def test_rows_at_different_positions(variant):
    """A row of a ragged batch equals its tokens run alone, wherever the others stand."""
    layer, x = variant.layer(), random(5, 64, variant.embedding)
    prompt = [0, 1, 7, 8, 13]
    _, state = layer.prefill(x[:, :13], lengths=torch.tensor(prompt))
    at, ys = prompt, [[] for _ in prompt]
    for count, how in [(3, "steps"), (6, "chunk"), (0, "chunk"), (1, "chunk"), (4, "steps"), (37, "chunk")]:
        part = torch.stack([x[row, n : n + count] for row, n in enumerate(at)])
        y, state = proceed(layer, part, state, how)
        at = [n + count for n in at]
        for row, piece in enumerate(y):
            ys[row].append(piece)
    for row, (n, end) in enumerate(zip(at, each(state), strict=True)):
        alone = x[row : row + 1, :n]
        assert_close(f"row {row}", torch.cat(ys[row])[None], defined(layer, alone)[:, prompt[row] :], VALUE)
        assert_state(end, states_by_definition(layer, alone)[n])


@one_by_one_and_together
@few_variants
@torch.no_grad()
def test_positions_beyond_32_bits_carry(variant, how):
    """From random nodes at chosen positions on, against the bitmask with Python's unbounded integers."""
    layer = variant.layer()
    positions = [2**31 - 1, 2**32 - 1, 2**31 - 3, 2**32 - 2, 2**62 - 9, 6]
    x, memories, starts = random(len(positions), 5, variant.embedding), [], []
    for n in positions:
        memory, token = BitmaskMemory(definition_of(layer)[0], layer.bank), random(1, variant.embedding)
        memory.position, memory.newest = n, [token[:, None, None].expand(-1, 1, layer.bank, -1)]
        for i in range(1, n.bit_length()):
            memory.newest.append(random(1, 1 + i * layer.expand, layer.bank, variant.embedding))
        memories.append(memory)
        starts.append(as_state(layer, memory, token).with_room(2**62 - 1))
    together = {name: torch.cat([getattr(start, name) for start in starts]) for name in TENSORS}
    y, end = proceed(layer, x, starts[0].replace(**together, max_position=max(positions)), how)
    for row, (memory, state) in enumerate(zip(memories, each(end), strict=True)):
        slots = [memory.update(token[None]) for token in x[row]]
        expected = torch.cat([attention(part, definition_of(layer)[1], layer.heads) for part in slots])
        assert_close(f"from {positions[row]}", y[row], expected, VALUE)
        assert_state(state, as_state(layer, memory, x[row, -1:]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_variant
@torch.no_grad()
def test_low_precision(variant, dtype):
    """Every way through the tokens against float64 of the same rounded weights; the state is float32."""
    low, exact = variant.layer(dtype), variant.layer()
    exact.load_state_dict(low.state_dict())
    x = random(4, 21, variant.embedding).to(dtype)
    first, state = low.prefill(x[:, :5])
    second, state = proceed(low, x[:, 5:10], state, "chunk")
    third, state = proceed(low, x[:, 10:], state, "steps")
    assert {getattr(state, name).dtype for name in FLOATS} == {torch.float32}
    for name, got in (("parallel", low(x)), ("prefill, chunk and steps", torch.cat([first, second, third], 1))):
        assert got.dtype == dtype
        assert_close(name, got, defined(exact, x.double()), TOLERANCE[dtype][0])


@pytest.mark.parametrize("how", ["chunk", "steps", "state only"])
@every_variant
def test_backpropagation_through_states_equals_one_shot(variant, how):
    layer, x = variant.layer(), random(2, 11, variant.embedding, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters())}

    def gradients(y: Tensor, state: MemoryState) -> list[Tensor]:
        torch.manual_seed(1)  # every entry of the outputs and of the state has a weight of its own
        parts = [getattr(state, name) for name in FLOATS] + ([] if how == "state only" else [y])
        loss = sum((part * random(*part.shape)).sum() for part in parts)
        return list(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))

    ys, state = [], layer.init_state(2, max_position=11)
    for part in x.split([3, 4, 1, 3], 1):
        y, state = proceed(layer, part, state, "steps" if how == "steps" else "chunk")
        ys.append(y)
    got = gradients(torch.cat(ys, 1), state)
    assert_same_gradients(list(leaves), got, gradients(*layer.prefill(x)), GRADIENT)
    assert got[0].any(), "no gradient came through the state"


@one_by_one_and_together
@few_variants
def test_gradcheck_from_an_initial_state(variant, how):
    """With respect to x, the parameters and every tensor of the state; entry by entry for one variant."""
    layer = replace(variant, embedding=2, heads=1, bank=1 if variant == LINEAR else 2).layer()
    start = layer.prefill(random(2, 7, 2), lengths=torch.tensor([7, 2]))[1].detach()
    given = [getattr(start, name).requires_grad_() for name in FLOATS]

    def run(x, token, nodes, q, v, *parameters):
        y, end = proceed(layer, x, start.replace(token=token, nodes=nodes, q=q, v=v), how)
        return y, end.token, end.nodes, end.q, end.v

    inputs = (random(2, 2, 2, requires_grad=True), *given, *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=variant != LINEAR)


@one_by_one_and_together
@few_variants
@torch.no_grad()
def test_a_state_shares_nothing_with_its_input_and_is_never_changed(variant, how):
    """A decode loop writes each token into one buffer; and any strides will do."""
    layer, x = variant.layer(), random(3, 3, variant.embedding)
    _, plain = layer.prefill(random(3, 7, variant.embedding), lengths=torch.tensor([7, 4, 0]))
    expected, expected_end = proceed(layer, x, plain, how)
    wide = {name: torch.stack([getattr(plain, name), torch.full_like(getattr(plain, name), 7)], -1) for name in TENSORS}
    copies = {name: tensor.clone() for name, tensor in wide.items()}
    buffer = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    y, end = proceed(layer, buffer, plain.replace(**{name: tensor[..., 0] for name, tensor in wide.items()}), how)
    buffer.fill_(7)
    assert_close("y", y, expected, VALUE)
    assert_state(end, expected_end)
    assert all(torch.equal(wide[name], copies[name]) for name in TENSORS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@few_variants
@torch.no_grad()
def test_beams_equal_recomputation(variant, dtype):
    layer, beams = variant.layer(), random(3, 3, variant.embedding)
    _, state = layer.prefill(beams)
    for _ in range(10):
        parent = torch.randint(0, 3, (3,), dtype=dtype)
        beams = torch.cat([beams[parent.long()], random(3, 1, variant.embedding)], 1)
        y, state = layer.step(beams[:, -1:], state.reorder(parent))
        assert_close("beam", y, layer(beams)[:, -1:], VALUE)
    for row, source in zip(each(state.reorder(torch.tensor([2, 2, 0, 1]))), (2, 2, 0, 1), strict=True):
        assert_state(row, each(state)[source], exactly=True)


@pytest.mark.parametrize("rows", [[2, 0], [], [False, True, True], None], ids=str)
@torch.no_grad()
def test_reset_rows(rows):
    layer, x, mask = EXPANDER.layer(), random(3, 30, 6), rows == [False, True, True]
    gone = [1, 2] if mask else [0, 1, 2] if rows is None else rows
    _, old = layer.prefill(x[:, :11])
    state = old.reset(None if rows is None else torch.tensor(rows, dtype=torch.bool if mask else torch.int32))
    y, _ = proceed(layer, x[:, 11:], state, "steps")
    for row in range(3):
        assert_state(each(state)[row], layer.init_state(1) if row in gone else each(old)[row], exactly=True)
        first = 11 if row in gone else 0
        assert_close(f"row {row}", y[row : row + 1], layer(x[row : row + 1, first:])[:, 11 - first :], VALUE)


def test_clone_detach_to_and_size():
    layer = EXPANDER.layer(torch.float32)
    _, state = layer.prefill(torch.randn(2, 9, 6))
    copy = state.clone()
    assert_state(copy.detach(), state.detach(), exactly=True)
    own, copied = ({getattr(s, name).untyped_storage().data_ptr() for name in TENSORS} for s in (state, copy))
    assert not own & copied
    assert copy.nodes.requires_grad and copy.q.requires_grad
    assert not any(getattr(cut, name).requires_grad for cut in (state.detach(), state.snapshot()) for name in FLOATS)
    other = state.to("cpu", torch.bfloat16)
    assert other.position.dtype == torch.int64
    assert all(torch.equal(getattr(other, name), getattr(state, name).bfloat16()) for name in FLOATS)
    for n in (1, 2, 3, 4, 9, 64, 1 << 40):
        rows = sum(1 + i for i in range(1, n.bit_length()))
        sized = layer.init_state(2, max_position=n) if n != 9 else state
        assert sized.nbytes == 2 * (8 + 4 * 6 + 3 * 4 * rows * 2 * 6)


@pytest.mark.parametrize("taken", [0, 1, 3, 8], ids="after {}".format)
@few_variants
@torch.no_grad()
def test_rollback(variant, taken):
    """In place, also to a snapshot of fewer levels; no other state and no input is written to."""
    layer, x = variant.layer(), random(2, 24, variant.embedding)
    states, start = states_by_definition(layer, x), layer.prefill(x[:, :taken])[1]
    snapshot, wrong = start.snapshot(), random(2, 12, variant.embedding)
    draft = proceed(layer, wrong[:, :11], start, "steps")[1]
    kept, wrong_kept, rejected = draft.clone(), wrong.clone(), layer.step(wrong[:, 11:], draft)[1]
    addresses = [getattr(rejected, name).data_ptr() for name in TENSORS]
    back = rejected.restore(snapshot)
    assert [getattr(back, name).data_ptr() for name in TENSORS] == addresses and back.max_position == taken
    again = back.snapshot()
    assert_state(back.restore(kept), kept)
    assert_state(back.restore(again), states[taken])
    y, end = proceed(layer, x[:, taken:], back, "steps")
    assert_close("after rollback", y, defined(layer, x)[:, taken:], VALUE)
    assert_state(end, states[24])
    assert torch.equal(wrong, wrong_kept), "restore wrote into an input"
    assert_state(draft, kept, exactly=True)
    assert_state(start, states[taken])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_save_and_load(tmp_path, dtype):
    """Several layers, ragged, stepped side by side on one input, empty, with room, of other dtypes."""
    layers = [BY_NAME[name].layer(dtype) for name in ("expander_k1", "module", "conv")]
    x, token = torch.randn(3, 9, 6, dtype=dtype), torch.randn(3, 1, 6, dtype=dtype)
    states = [layer.prefill(x, lengths=torch.tensor([9, 2, 0]))[1] for layer in layers]
    states += [layer.step(token, layer.init_state(3))[1] for layer in layers]
    states += [layers[0].init_state(0), layers[0].init_state(2, max_position=40, dtype=torch.float16)]
    path = tmp_path / "states.safetensors"
    save_states(path, states)
    for got, expected in zip(load_states(path), states, strict=True):
        assert (got.expand, got.levels, got.max_position) == (expected.expand, expected.levels, expected.max_position)
        for name in TENSORS:  # the dtypes, too
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)
    assert torch.equal(layers[0].step(token, load_states(path)[0])[0], layers[0].step(token, states[0])[0])
    assert os.listdir(tmp_path) == ["states.safetensors"]


def test_load_refuses_other_files(tmp_path):
    path, ours = tmp_path / "its_name", {"lmn_kernels.layout": "1"}
    save_states(path, [LINEAR.layer().init_state(2, max_position=9)])
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="missing"):
        load_states(tmp_path / "missing")
    for content, said in (
        (b"no safetensors", "its_name"),
        (whole[:-8], "its_name"),
        ({"lmn_kernels.layout": "999", "lmn_kernels.states": "[]"}, "expected state layout 1, got 999"),
        (ours, "its_name"),
        ({**ours, "lmn_kernels.states": "{"}, "its_name"),
        ({**ours, "lmn_kernels.states": '[{"expand": 0, "levels": 0, "max_position": 0}]'}, "its_name"),
    ):
        raw = isinstance(content, bytes)
        path.write_bytes(content if raw else save({"0.position": torch.zeros(2, dtype=torch.int64)}, content))
        with pytest.raises(ValueError, match=said):
            load_states(path)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    layer, path = LINEAR.layer(), tmp_path / "states"
    save_states(path, [layer.init_state(2)])
    old = path.read_bytes()
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(os, broken, fail)
            save_states(path, [layer.init_state(5)])
        assert path.read_bytes() == old and os.listdir(tmp_path) == ["states"]


@pytest.mark.parametrize("kind", [LogarithmicMixing, LogarithmicMemory, ExpanderSummarizerLogarithmicMemory])
@torch.no_grad()
def test_the_stateful_face_of_the_original(kind):
    layer = kind(8, 2, 3, dtype=torch.float64, init="variance_preserving")
    x = random(2, 19, 8)
    expected = layer(x)
    layer.parallelize = False
    for first, stop in ((0, 1), (1, 2), (2, 9), (9, 16), (16, 19)):
        assert_close(f"forward {first}:{stop}", layer(x[:, first:stop]), expected[:, first:stop], VALUE)
        assert layer.ptr == stop
    layer.reset()
    assert layer.ptr == 0 and layer.memory is None
    assert_close("after reset", layer(x[:, :3]), expected[:, :3], VALUE)
    layer.reset()
    merge, projections = definition_of(layer)
    definition = BitmaskMemory(merge, 3)
    for t in range(19):
        slots, got = definition.update(x[:, t]), layer.sequential(x[:, t : t + 1])
        assert_close("sequential", got, slots[:, None], VALUE)
        assert_close("attention", layer.attention(got)[:, 0], attention(slots, projections, 2), VALUE)
        assert layer.ptr == t + 1
        for stack, node in zip(layer.memory, definition.newest, strict=True):
            assert_close("memory", stack, node[:, :, :, None] if layer.expand else node[:, 0, :, None], VALUE)
    for refused in (layer, layer.sequential):
        with pytest.raises(ValueError, match="state"):
            refused(x[:1, :1])
    assert layer.ptr == 19, "a refused call took a token in"
