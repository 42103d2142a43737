"""The sequential form: the same bits every way, slots, memory, gradients (R6, R7, R9, R10, R13)."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import decode_, update_
from tests.support.stepping import (
    BY_NAME,
    PARTS,
    Block,
    agree,
    agree_on_state,
    assert_same,
    assert_same_state,
    every_backend,
    every_layer,
    exact,
    extension,
    few,
    layers,
    one_by_one,
    parts,
    rows_of,
    started,
)
from tests.support.variants import Variant

F32, BF16 = torch.float32, torch.bfloat16
VALUE, GRADIENT = TOLERANCE[F32]

both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
in_place = pytest.mark.parametrize("run", [update_, decode_], ids=lambda run: run.__name__)


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids="state {}".format)
@both_dtypes
@every_layer
@extension
@torch.no_grad()
def test_every_way_through_the_tokens_gives_the_same_bits(variant, dtype, state_dtype, backend):
    layer = variant.layer(dtype, step_backend=backend)
    weights, start = layer.step_weights(), started(layer, [0, 5, 30], 19, state_dtype)
    x, whole = torch.randn(3, 19, variant.embedding).to(dtype), start.clone()
    y = decode_(x, whole, weights, backend=backend)
    for name, sizes in {"one by one": [1] * 19, "in threes": [3] * 6 + [1], "uneven": [8, 2, 9]}.items():
        state = start.clone()
        pieces = [decode_(part, state, weights, backend=backend) for part in x.split(sizes, 1)]
        assert_same(name, torch.cat(pieces, 1), y)
        assert_same_state(state, whole)
    stepped, state = one_by_one(layer, x, start)
    assert_same("layer.step", stepped, y)
    assert_same_state(state, whole)
    for row in range(3):
        state = rows_of(start, row)
        assert_same(f"row {row} alone", decode_(x[row : row + 1], state, weights, backend=backend), y[row : row + 1])
        assert_same_state(state, rows_of(whole, row))
    state = start.clone()
    assert update_(x, state, weights, backend=backend) is None
    assert_same_state(state, whole)


@pytest.mark.parametrize(
    ("variant", "rows", "tokens"),
    [
        (BY_NAME["linear"], 40, 1),  # blocks of rows, to whoever is free
        (BY_NAME["expander_k2"], 9, 5),
        (BY_NAME["wide_300"], 2, 11),  # one block, whose columns a team shares
        (BY_NAME["wide_300"], 50, 1),  # of both enough
        (BY_NAME["wide_299_expander_k2"], 1, 9),
        (BY_NAME["block_of_2112_features"], 2, 4),
        (Block("wide_block", 264, 3, 1), 3, 2),
        (Variant("wide_720_conv_mixed", 720, 3, 2, {"summarizer": "conv_mixed"}), 1, 9),
        (Variant("wide_715_separable_expander", 715, 5, 1, {"summarizer": "depthwise_separable", "expand": 1}), 2, 3),
    ],
    ids=str,
)
@both_dtypes
@extension
@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits(variant, rows, tokens, dtype, backend):
    layer = variant.layer(dtype, step_backend=backend)
    x, start = torch.randn(rows, tokens, variant.embedding).to(dtype), started(layer, [*range(rows)], tokens, dtype)
    expected = start.clone()
    y = decode_(x, expected, layer.step_weights(), backend=backend)
    for threads in (2, 2, 3):
        torch.set_num_threads(threads)
        # What is read too early is NaN then, and not what an earlier run has left there.
        decode_(torch.full_like(x, math.nan), start.clone(), layer.step_weights(), backend=backend)
        state = start.clone()
        assert_same(f"{threads} threads", decode_(x, state, layer.step_weights(), backend=backend), y)
        assert_same_state(state, expected)


@layers("expander_k1", "wide_300", "block_of_2112_features")
@extension
def test_callers_on_several_threads_do_not_meet(variant, backend):
    """Python's lock is given up for long calls; scratch memory belongs to a thread."""
    layer = variant.layer(F32, step_backend=backend).requires_grad_(False)
    runs = [(torch.randn(2, 9, variant.embedding), started(layer, [row, 7], 9)) for row in range(4)]
    alone = [(layer.step_(x, end), end) for x, end in [(x, start.clone()) for x, start in runs]]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            ends = [start.clone() for _, start in runs]
            ys = list(pool.map(layer.step_, [x for x, _ in runs], ends))
            for y, end, (expected, wanted) in zip(ys, ends, alone, strict=True):
                assert_same("y", y, expected)
                assert_same_state(end, wanted)


@few
@extension
@torch.no_grad()
def test_nothing_is_left_over_from_another_call(variant, backend):
    """Scratch memory outlives a call; what a larger one with NaN everywhere left there is read by nobody."""
    layer = variant.layer(F32, step_backend=backend)
    x, start = torch.randn(2, 9, variant.embedding), started(layer, [0, 7], 9)
    first, second = start.clone(), start.clone()
    y = decode_(x, first, layer.step_weights(), backend=backend)
    poison = torch.full((5, 64, variant.embedding), math.nan)
    assert decode_(poison, started(layer, [63] * 5, 64), layer.step_weights(), backend=backend).isnan().all()
    assert_same("y", decode_(x, second, layer.step_weights(), backend=backend), y)
    assert_same_state(second, first)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@few
@every_backend
@torch.no_grad()
def test_rows_go_to_their_slots(variant, ids, backend):
    """Each as if it ran alone; a row of slot -1 yields 0, NaN or not, and no other slot changes."""
    layer = variant.layer(F32, step_backend=backend)
    weights, pool = layer.step_weights(), started(layer, [0, 9, 6, 31, 3, 15, 1], 3)
    before, x = pool.clone(), torch.randn(5, 3, variant.embedding)
    x[1], x[4] = math.nan, math.inf
    slots = torch.tensor([5, -1, 0, 3, -1], dtype=ids)
    y = decode_(x, pool, weights, slots=slots, backend=backend)
    assert torch.equal(y[[1, 4]], torch.zeros(2, 3, variant.embedding))
    for row, slot in ((0, 5), (2, 0), (3, 3)):
        alone = rows_of(before, slot)
        agree(backend, f"row {row}", y[row : row + 1], decode_(x[row : row + 1], alone, weights, backend=backend))
        agree_on_state(backend, rows_of(pool, slot), alone)
    assert_same_state(rows_of(pool, 1, 2, 4, 6), rows_of(before, 1, 2, 4, 6))
    by_update, by_layer = before.clone(), before.clone()
    update_(x, by_update, weights, slots=slots, backend=backend)
    assert_same_state(by_update, pool)
    assert_same("step_", layer.step_(x, by_layer, slots), y)
    assert_same_state(by_layer, pool)


@both_dtypes
@pytest.mark.parametrize(
    ("rows", "tokens", "pool", "slots"),
    [(3, 0, 3, None), (2, 0, 3, [2, 0]), (0, 2, 3, []), (0, 0, 0, None), (0, 2, 0, None), (2, 2, 3, [-1, -1])],
    ids=str,
)
@few
@every_backend
@torch.no_grad()
def test_nothing_to_do_changes_nothing(variant, rows, tokens, pool, slots, dtype, backend):
    layer = variant.layer(dtype, step_backend=backend)
    state, x = started(layer, [7] * pool, 2), torch.full((rows, tokens, variant.embedding), math.nan).to(dtype)
    before, weights = state.clone(), layer.step_weights()
    slots = None if slots is None else torch.tensor(slots, dtype=torch.int64)
    for y in (decode_(x, state, weights, slots=slots, backend=backend), layer.step_(x, state, slots)):
        assert y.dtype == dtype and torch.equal(y, torch.zeros_like(x))
    update_(x, state, weights, slots=slots, backend=backend)
    assert_same_state(state, before)
    y, after = layer.step(x.new_zeros(0, 1, variant.embedding), rows_of(state))
    assert y.shape == (0, 1, variant.embedding) and after.batch_size == 0


def reversed_axes(tensor: Tensor) -> Tensor:
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def within_nan(tensor: Tensor) -> Tensor:
    """A view into a larger buffer, NaN around it along every axis (the lowest number for integers)."""
    buffer = torch.full([n + 3 for n in tensor.shape], math.nan).to(tensor.dtype)
    return buffer[tuple(slice(1, 1 + n) for n in tensor.shape)].copy_(tensor)


def between_nan(tensor: Tensor) -> Tensor:
    """Contiguous, at an odd address, NaN right before and right behind it."""
    buffer = torch.full((tensor.numel() + 34,), math.nan).to(tensor.dtype)
    return buffer[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)


def is_untouched_around(tensor: Tensor) -> bool:
    """Whether the NaN of `between_nan` are still there."""
    around = tensor.as_strided((tensor.numel() + 34,), (1,), 0)
    rim = torch.cat([around[:1], around[1 + tensor.numel() :]])
    return bool((rim.isnan() if tensor.is_floating_point() else rim == rim.min()).all()) and len(rim.unique()) > 0


@both_dtypes
@pytest.mark.parametrize("lay", [reversed_axes, within_nan, between_nan], ids=lambda lay: lay.__name__)
@layers("linear", "conv", "wide_72_conv_mixed", "wide_102", "wide_136_separable_expander", "block")
@every_backend
@torch.no_grad()
def test_any_layout_in_memory_gives_the_contiguous_result(variant, lay, dtype, backend):
    """Of tokens, slots and weights; and nothing is read or written beside them, or beside the state."""
    layer = variant.layer(dtype, step_backend=backend)
    weights, start = layer.step_weights(), started(layer, [0, 6, 3], 9, dtype)
    x, slots, expected = torch.randn(3, 9, variant.embedding).to(dtype), torch.tensor([2, 0, 1]), start.clone()
    y = decode_(x, expected, weights, slots=slots, backend=backend)
    laid = weights._replace(tensors=tuple(map(lay, weights.tensors)), block=tuple(map(lay, weights.block)))
    state = start.replace(**{name: between_nan(tensor) for name, tensor in parts(start)})
    got = decode_(lay(x), state, laid, slots=torch.stack([slots, slots + 9], 1)[:, 0], backend=backend)
    if backend == "cpp":
        assert_same("y", got, y)
        assert_same_state(state, expected)
    else:  # torch sums in an order of its own for every layout
        assert_close("y", got, y, TOLERANCE[dtype][0])
        agree_on_state(backend, state, expected)
    for name, tensor in parts(state):
        assert is_untouched_around(tensor), f"{name}: written past its ends"


@pytest.mark.parametrize("axis", [0, 1, 2])
@every_backend
@torch.no_grad()
def test_expanded_tokens_and_states(axis, backend):
    """One token for all rows, one for all times, one number for all features; one prompt's memory for every row."""
    layer, shape = BY_NAME["expander_k1"].layer(F32, step_backend=backend), [3, 5, 6]
    x = torch.randn([1 if i == axis else n for i, n in enumerate(shape)]).expand(shape)
    states = [started(layer, [6, 0, 3], 5)]
    states.append(states[0].clone())
    agree(backend, "y", layer.step_(x, states[0]), layer.step_(x.contiguous(), states[1]))
    agree_on_state(backend, *states)
    prompt = rows_of(states[0], 0)
    shared = prompt.replace(**{name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in parts(prompt)})
    (got, end), (y, expected) = layer.step(x[:, :1], shared), layer.step(x[:, :1], rows_of(prompt, 0, 0, 0))
    agree(backend, "y", got, y)
    agree_on_state(backend, end, expected)


@few
@every_backend
@torch.no_grad()
def test_nan_where_there_is_no_node_reaches_nothing(variant, backend):
    """Rows of levels to come, and slots of others; a level's first node then takes its place."""
    layer = variant.layer(F32, step_backend=backend)
    x, clean, slots = torch.randn(3, 9, variant.embedding), started(layer, [0, 6, 3, 9], 9), torch.tensor([2, 0, 1])
    dirty = clean.clone()
    for name in ("nodes", "q", "v"):
        getattr(dirty, name).masked_fill_(~clean.valid()[..., None, None], math.nan)[3] = math.nan
    dirty.token[[0, 3]] = math.nan
    y = decode_(x, clean, layer.step_weights(), slots=slots, backend=backend)
    assert_same("y", decode_(x, dirty, layer.step_weights(), slots=slots, backend=backend), y)
    for name, tensor in parts(dirty):
        exists = clean.valid()[:3] if name in ("nodes", "q", "v") else slice(None)
        assert_same(name, tensor[:3][exists], getattr(clean, name)[:3][exists])


@layers("linear", "expander_k1", "wide_72_conv_mixed", "block")
@every_backend
@torch.no_grad()
def test_a_nan_is_not_hidden_and_stays_in_its_row(variant, backend):
    layer = variant.layer(F32, step_backend=backend)
    x, start = torch.randn(4, 7, variant.embedding), started(layer, [3, 0, 5, 2], 7)
    expected, state = start.clone(), start.clone()
    y = layer.step_(x, expected)
    x[1, 2, -1] = math.nan
    got = layer.step_(x, state)
    assert got[1, 2:].isnan().all(), "a NaN that came in did not come out"
    assert_same("y of other rows", got[[0, 2, 3]], y[[0, 2, 3]])
    assert_same("y before the NaN", got[1, :2], y[1, :2])
    assert_same_state(rows_of(state, 0, 2, 3), rows_of(expected, 0, 2, 3))


@few
@every_backend
@torch.no_grad()
def test_a_step_shares_no_storage_and_changes_nothing(variant, backend):
    """A decode loop writes each token into one buffer."""
    layer = variant.layer(F32, step_backend=backend)
    x, state = torch.randn(2, 1, variant.embedding), started(layer, [3, 4], 9)
    before, versions = state.clone(), [tensor._version for _, tensor in parts(state)]
    y, new = layer.step(x, state)
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, y, *dict(parts(state)).values())}
    made = {tensor.untyped_storage().data_ptr() for _, tensor in parts(new)}
    assert not given & made and len(made) == len(PARTS)
    kept = new.clone()
    x.fill_(math.nan)
    assert_same_state(new, kept)
    assert_same_state(state, before)
    assert [tensor._version for _, tensor in parts(state)] == versions and state.max_position == 4


@in_place
@every_backend
@torch.no_grad()
def test_what_is_written_in_place_says_so(run, backend):
    """Version counters tell autograd what was overwritten; addresses stay."""
    layer = BY_NAME["linear"].layer(F32, step_backend=backend)
    state, x = started(layer, [3, 4], 9), torch.randn(2, 9, 12)
    versions, places = ([look(t) for _, t in parts(state)] for look in (lambda t: t._version, Tensor.data_ptr))
    given, version = x.clone(), x._version
    run(x, state, layer.step_weights(), backend=backend)
    assert all(tensor._version > old for (_, tensor), old in zip(parts(state), versions, strict=True))
    assert [tensor.data_ptr() for _, tensor in parts(state)] == places
    assert torch.equal(x, given) and x._version == version and state.max_position == 13


@few
def test_a_step_under_grad_records_the_gradients_of_the_parallel_form(variant):
    """Also behind steps that the extension served, under no_grad, to the same values."""
    layer = variant.layer(F32)
    twin, x, weight = exact(variant, layer), *(torch.randn(2, 11, variant.embedding) for _ in range(2))

    def gradients(y: Tensor, leaf: Tensor, owner: torch.nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad((y * weight).sum(), [leaf, *owner.parameters()]))

    with torch.no_grad():
        served, _ = one_by_one(layer, x, layer.init_state(2))
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = one_by_one(layer, leaf, layer.init_state(2))[0], twin(wide)
    assert_close("under no_grad", served, expected.detach(), VALUE)
    assert_close("y", y, expected, VALUE)
    names = ["x", *dict(layer.named_parameters())]
    assert_same_gradients(names, gradients(y, leaf, layer), gradients(expected, wide, twin), GRADIENT)


@layers("linear", "expander_k1", "block")
def test_a_frozen_layer_passes_gradients_on_to_its_state(variant):
    """Where nothing but the state asks for a gradient, it is not lost in the extension."""
    layer = variant.layer(F32).requires_grad_(False)
    twin = exact(variant, layer).requires_grad_(False)
    x, start, found = torch.randn(2, 3, variant.embedding), started(layer, [6, 3], 3), []
    for one, tokens, state in ((layer, x, start), (twin, x.double(), start.to(dtype=torch.float64))):
        leaves = [getattr(state, name).clone().requires_grad_() for name in PARTS[1:]]
        y, end = one_by_one(one, tokens, state.replace(**dict(zip(PARTS[1:], leaves, strict=True))))
        loss = y.square().sum() + sum(getattr(end, name).square().sum() for name in PARTS[1:])
        found.append(list(torch.autograd.grad(loss, leaves)))
    assert_same_gradients(list(PARTS[1:]), *found, GRADIENT)


@few
@every_backend
def test_inference_mode(variant, backend):
    layer = variant.layer(F32, step_backend=backend)
    x, state = torch.randn(2, 5, variant.embedding), layer.init_state(2, max_position=9)
    end = state.clone()
    with torch.no_grad():
        expected = layer.step_(x, end)
    with torch.inference_mode():
        for memory in (state, layer.init_state(2, max_position=9)):
            assert_same("step_", layer.step_(x, memory), expected)
            assert_same_state(memory, end)
        y, stepped = one_by_one(layer, x, layer.init_state(2, max_position=9))
    agree(backend, "step", y, expected)
    agree_on_state(backend, stepped, end)
