"""States taken apart and put together: trees, files and copies, rows and places, and what shares memory."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from bench.close import TOLERANCE, assert_close
from lmn_kernels import LookAheadState, MemoryState
from tests.support.states import both, ints, leaves, mixing, prefilled, stream
from tests.support.stepping import PARTS, assert_same_state, one_by_one

BF16, VALUE = torch.bfloat16, TOLERANCE[torch.float32][0]


# Trees


def test_a_state_is_a_tree_with_keys():
    memory, ahead = both()
    keys = [[_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(state)[0]] for state in (memory, ahead)]
    assert keys[0] == [f".{name}" for name in PARTS]
    assert keys[1] == [".inputs[0]", ".outputs[0]", ".outputs[1]", ".lse[0]", ".lse[1]", ".start"]
    for state in (memory, ahead):
        found, spec = _pytree.tree_flatten(state)
        again = _pytree.tree_unflatten(found, spec)
        assert type(again) is type(state) and repr(again) == repr(state)
        assert all(one is other for one, other in zip(leaves(again), leaves(state), strict=True))
        assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec


def test_trees_are_of_one_kind_at_any_position_and_of_another_with_other_room():
    layer = mixing()
    early, late = prefilled(layer, 9).with_room(100), prefilled(layer, 60).with_room(100)
    mean = _pytree.tree_map(lambda a, b: torch.maximum(a, b), early, late)
    assert mean.max_position == 60 and torch.equal(mean.nodes, torch.maximum(early.nodes, late.nodes))
    assert _pytree.tree_structure(early) == _pytree.tree_structure(late)
    assert _pytree.tree_structure(early) != _pytree.tree_structure(early.with_room(1000))
    assert _pytree.tree_structure(early) != _pytree.tree_structure(prefilled(mixing(expand=1), 9).with_room(100))


@pytest.mark.parametrize("how", ["chunk", "step", "step_", "reorder"])
def test_a_pool_knows_what_was_written_through_a_tree_of_its_tensors(how):
    """Also past what its own bound has room for: the pool was at 0 when it was taken apart."""
    layer, x = mixing(), torch.randn(2, 40, 16)
    with torch.no_grad():
        whole, pool = layer(x), layer.init_state(2, max_position=31)
        again = _pytree.tree_map(lambda tensor: tensor, pool)
        layer.step_(x[:, :30], again)
        assert pool.max_position == 30 and "max_position=30" in repr(pool)
        if how == "step_":
            assert_close("y", layer.step_(x[:, 30:31], pool), whole[:, 30:31], VALUE)
            with pytest.raises(RuntimeError, match="exhausted"):
                layer.step_(x[:, 31:32], pool)
            return
        if how == "step":
            y, state = one_by_one(layer, x[:, 30:], pool)
        else:
            state = pool if how == "chunk" else pool.reorder(ints(0, 1))
            y, state = layer(x[:, 30:], state=state, return_state=True)
        assert_close("y", y, whole[:, 30:], VALUE)
        assert state.max_position == 40 and state.levels == 5


# Files and copies


def stored(state, **options):
    file = io.BytesIO()
    torch.save([state], file)
    file.seek(0)
    return torch.load(file, **options)[0]


@pytest.mark.parametrize(
    "twin", [lambda s: stored(s, weights_only=True), lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy],
    ids=["weights_only", "pickle", "deepcopy", "copy"],
)  # fmt: skip
def test_a_copy_is_the_same_state(twin):
    for state in both():
        other = twin(state)
        assert type(other) is type(state) and repr(other) == repr(state)
        for one, own in zip(leaves(other), leaves(state), strict=True):
            assert one.dtype == own.dtype and torch.equal(one, own)
            assert (one.data_ptr() == own.data_ptr()) == (twin is copy.copy)


def test_what_was_pickled_when_states_were_dataclasses_is_read():
    for state in both():
        fields = dict(zip(state.FIELDS, (getattr(state, name) for name in state.FIELDS), strict=True))
        old = type(state).__new__(type(state))
        old.__setstate__(fields)  # which is what pickle calls with the fields of such a file
        assert repr(old) == repr(state) and all(map(torch.equal, leaves(old), leaves(state)))


def test_nobody_assigns_a_field():
    for state in both():
        for name in (*state.FIELDS, "another"):
            with pytest.raises(AttributeError, match=f"cannot assign to field '{name}' of a {type(state).__name__}"):
                setattr(state, name, 1)
        with pytest.raises(AttributeError, match="cannot delete"):
            delattr(state, state.FIELDS[0])
        with pytest.raises(TypeError, match="another"):
            state.replace(another=1)


# Rows and places


def test_rows_of_several_states_behind_each_other():
    layer, x = mixing(expand=1), torch.randn(4, 12, 16)
    with torch.no_grad():
        whole = layer(x)
        _, first = layer.prefill(x[:2], ints(9, 2))
        _, second = layer.prefill(x[2:3, :1])
        empty = layer.init_state(1, max_position=200)
        together = MemoryState.cat([first, second, empty])
        assert together.position.tolist() == [9, 2, 1, 0] and together.max_position == 9 and together.levels == 7
        for row, n in enumerate((9, 2, 1, 0)):
            alone = together.reorder(ints(row))
            y, _ = one_by_one(layer, x[row : row + 1, n:], alone)
            assert_close(f"row {row}", y, whole[row : row + 1, n:], VALUE)
        layer.step_(x[:, :1], together)
        assert first.position.tolist() == [9, 2], "the parts are written to"


def test_streams_of_several_states_behind_each_other():
    """Of different lengths of memory, uneven and empty ones among them."""
    model, x = stream()[0], torch.randn(5, 9, 16)
    with torch.no_grad():
        _, short = model(x[:2, :3])
        _, long = model(x[2:4, :3], model(torch.randn(2, 5, 16))[1])
        states = [short, long.reset(ints(1)), model.init_state(1)]
        together = LookAheadState.cat(states)
        assert together.length == 8 and together.start.tolist() == [5, 5, 0, 8, 8]
        assert (together.tokens, together.is_even) == (3, False)
        y, _ = model(x[:, 3:], together)
        rows = iter(range(5))
        for state in states:
            for own in range(state.batch_size):
                row = next(rows)
                expected, _ = model(x[row : row + 1, 3:], state.reorder(ints(own)))
                assert_close(f"stream {row}", y[row : row + 1], expected, VALUE)
        assert LookAheadState.cat([short, short]).is_even
        with pytest.raises(ValueError, match=r"states: expected newest segments of one length, got \[2, 3\]"):
            LookAheadState.cat([short, model(x[:1, :2])[1]])


def test_states_that_do_not_belong_together_are_not_put_together():
    own, ahead = prefilled(mixing()), stream()[1]
    for kind, others, error, said in (
        (MemoryState, [], ValueError, "states: expected at least one, got none"),
        (MemoryState, [own, ahead], TypeError, r"states\[1\]: expected a MemoryState, got LookAheadState"),
        (MemoryState, [own, prefilled(mixing(expand=1))], ValueError, r"states\[1\]: expected expand 0 .*, got 1"),
        (MemoryState, [own, MemoryState.empty(1, 16, 3)], ValueError, r"states\[1\]: expected bank 2 .*, got 3"),
        (MemoryState, [own, MemoryState.empty(1, 8, 2)], ValueError, r"states\[1\]: expected embedding 16 .*, got 8"),
        (MemoryState, [own, own.to(BF16)], ValueError, r"states\[1\]: expected dtype torch.float32 .*bfloat16"),
        (MemoryState, [own, own.to("meta")], ValueError, r"states\[1\]: expected device cpu .* got meta"),
        (LookAheadState, [ahead, own], TypeError, r"states\[1\]: expected a LookAheadState, got MemoryState"),
        (LookAheadState, [ahead, stream(keep_last=True)[1]], ValueError, r"states\[1\]: expected outputs \["),
    ):
        with pytest.raises(error, match=said):
            kind.cat(others)


def test_each_row_several_times():
    for state in both():
        twice = state.repeat_interleave(2)
        assert twice.batch_size == 4
        assert all(map(torch.equal, leaves(twice), leaves(state.reorder(ints(0, 0, 1, 1)))))
        assert state.repeat_interleave(0).batch_size == 0
        with pytest.raises(ValueError, match="repeats: expected an integer of at least 0, got -1"):
            state.repeat_interleave(-1)


def test_to_takes_what_a_tensors_to_takes():
    for state in both():
        like = torch.zeros(1, dtype=torch.float64, device="meta")
        for arguments, options, device, dtype in (
            ((BF16,), {}, "cpu", BF16),
            (("meta",), {}, "meta", torch.float32),
            ((torch.device("meta"), BF16), {}, "meta", BF16),
            ((like,), {}, "meta", torch.float64),
            ((), {"device": "meta", "dtype": torch.float64}, "meta", torch.float64),
            (("cpu",), {"dtype": BF16, "non_blocking": True}, "cpu", BF16),
            ((None, BF16), {}, "cpu", BF16),
        ):
            there = state.to(*arguments, **options)
            assert (there.device.type, leaves(there)[1].dtype) == (device, dtype)
            for one, own in zip(leaves(there), leaves(state), strict=True):
                assert one.is_floating_point() == own.is_floating_point() and one.device.type == device
                assert device == "meta" or torch.equal(one, own.to(one.dtype))
            if isinstance(state, LookAheadState):
                assert {part.dtype for part in there.lse} == {torch.promote_types(dtype, torch.float32)}
        for wrong, said in (
            (([1],), "to: expected a device, a dtype, both, or a tensor, got list"),
            ((torch.int64,), "dtype: expected a floating dtype, got torch.int64"),
            ((BF16, torch.float64), "dtype: expected one, got torch.bfloat16, torch.float64"),
            (("cpu", "meta"), "device: expected one, got cpu, meta"),
        ):
            with pytest.raises(TypeError, match=said):
                state.to(*wrong)


def test_pinned_memory_is_a_copy(monkeypatch):
    """Without a GPU there is none: what lies there is made up."""
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    monkeypatch.setattr(
        Tensor,
        "pin_memory",
        lambda t: t if t.is_pinned() else (lambda c: (pinned.append(c.data_ptr()), c)[1])(t.clone()),
    )
    for state in both():
        once = state.pin_memory()
        twice = once.pin_memory()
        for own, one, other in zip(*map(leaves, (state, once, twice)), strict=True):
            assert one.is_pinned() and other.is_pinned() and len({t.data_ptr() for t in (own, one, other)}) == 3
            assert torch.equal(own, one) and torch.equal(own, other)


GIVE = {
    "reorder": lambda s: s.reorder(ints(0, 1)), "repeat_interleave": lambda s: s.repeat_interleave(1),
    "cat": lambda s: MemoryState.cat([s]), "cat of two": lambda s: MemoryState.cat([s, s]),
    "with_room": lambda s: s.with_room(1000), "reset of none": lambda s: s.reset(ints()),
    "reset": lambda s: s.reset(), "clone": lambda s: s.clone(), "detach": lambda s: s.detach(),
    "snapshot": lambda s: s.snapshot(), "to nowhere": lambda s: s.to(), "to cpu": lambda s: s.to("cpu"),
    "to float32": lambda s: s.to(torch.float32), "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "deepcopy": copy.deepcopy,
}  # fmt: skip


@pytest.mark.parametrize("name", GIVE)
def test_no_method_gives_away_what_a_pool_writes_to(name):
    layer = mixing()
    pool = prefilled(layer, 9)
    given = GIVE[name](pool)
    own, theirs = ({part.untyped_storage().data_ptr() for part in leaves(state)} for state in (pool, given))
    assert given is not pool and not own & theirs
    kept = given.clone()
    for part in leaves(pool):
        part.fill_(7)
    assert_same_state(given, kept)


def test_no_call_gives_away_what_a_pool_writes_to():
    layer, pool = mixing(), prefilled(mixing(), 9)
    calls = [
        lambda: layer.step(torch.randn(2, 1, 16), pool)[1],
        lambda: layer(torch.randn(2, 1, 16), state=pool, return_state=True)[1],
        *(lambda T=T: layer(torch.randn(2, T, 16), state=pool, return_state=True)[1] for T in (0, 3)),
        lambda: layer(torch.randn(2, 3, 16), state=pool, lengths=ints(0, 2), return_state=True)[1],
    ]  # fmt: skip
    for grad in (False, True):
        for call in calls:
            with torch.set_grad_enabled(grad):
                after = call()
            own, theirs = ({part.untyped_storage().data_ptr() for part in leaves(state)} for state in (pool, after))
            assert not own & theirs


# What is known of a stream falls


def test_streams_that_are_all_reset_are_the_empty_state_again():
    model, state = stream()
    fresh = model.init_state(2)
    for empty in (
        state.reset(ints(0, 1)),
        state.reset(ints(0)).reset(ints(1)),
        state.reset(torch.tensor([True, True])),
    ):
        assert (empty.length, empty.tokens, empty.is_even) == (0, 0, True) and repr(empty) == repr(fresh)
    x = torch.randn(2, 4, 16)
    assert torch.equal(model(x, empty)[0], model(x)[0])


def test_rows_of_memory_that_no_stream_holds_are_dropped():
    model, state = stream((5,))
    with torch.no_grad():
        half = state.reset(ints(0))
        assert half.start.tolist() == [5, 0] and not half.is_even
        x = torch.randn(2, 3, 16)
        _, later = model(x, half)
        assert later.start.tolist() == [5, 0] and later.length == 8
        left = later.reset(ints(1))
        assert left.length == 3 and left.start.tolist() == [0, 3] and left.tokens == 3
        assert later.reorder(ints(0, 0)).is_even and later.reorder(ints(0, 0)).length == 3
        assert later.last(3).is_even
        segment = torch.randn(2, 4, 16)
        y, _ = model(segment, left)
        _, alone = model(x[:1])
        assert_close("kept", y[:1], model(segment[:1], alone)[0], VALUE)
        assert_close("fresh", y[1:], model(segment[1:])[0], VALUE)
