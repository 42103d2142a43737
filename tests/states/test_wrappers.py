"""States within what wraps a layer: FSDP's policies, autocast, and others that cast what they are given."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree

from bench.close import TOLERANCE, assert_close
from lmn_kernels import LogarithmicMemory, LookAheadMemory, LookAheadState
from tests.support.states import both, leaves, stream
from tests.support.stepping import parts

BF16 = torch.bfloat16


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [None, BF16], ids=str)
def test_a_pool_is_written_by_step_under_a_policy_of_fsdp(dtype):
    plain = LogarithmicMemory(16, 2, 2)
    sharded = copy.deepcopy(plain)
    if dtype is not None:
        plain = plain.to(dtype)
    fully_shard(sharded, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    register_fsdp_forward_method(sharded, "step_")
    x, pool, expected = (
        torch.randn(2, 6, 16).to(dtype),
        plain.init_state(2, max_position=8),
        plain.init_state(2).with_room(8),
    )
    y = sharded.step_(x, pool)
    assert_close("y", y, plain.step_(x, expected), TOLERANCE[dtype or torch.float32][0])
    assert pool.max_position == 6 and pool.position.tolist() == [6, 6] and pool.nodes.dtype == torch.float32
    for name, part in parts(pool):
        assert_close(name, part, getattr(expected, name), TOLERANCE[dtype or torch.float32][0])


@pytest.mark.usefixtures("alone")
def test_log_normalisers_stay_wide_under_a_policy_of_fsdp(monkeypatch):
    model, seen, check = LookAheadMemory(16, 3, 2, memory_length=9), [], LookAheadState.check_for
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    monkeypatch.setattr(LookAheadState, "check_for", lambda s, *a: (seen.extend(t.dtype for t in s.lse), check(s, *a)))
    state = None
    for segment in torch.randn(2, 16, 16).split(4, 1):
        _, state = model(segment, state)
    assert seen == [torch.float32] * 6 and state is not None


def test_log_normalisers_stay_wide_under_autocast():
    for merge_eps in (0.0, 1e-6):
        model, state = LookAheadMemory(16, 3, 2, memory_length=9, merge_eps=merge_eps), None
        with torch.no_grad(), torch.autocast("cpu", BF16):
            for segment in torch.randn(2, 15, 16).split(5, 1):
                _, state = model(segment, state)
                assert {part.dtype for part in state.lse} == {torch.float32}


def test_rounded_log_normalisers_are_refused_by_name():
    model, state = stream()
    rounded = _pytree.tree_map(lambda t: t.bfloat16() if t.is_floating_point() else t, state)
    with pytest.raises(TypeError, match=r"state\.lse\[0\]: expected float32 or float64, .* got torch.bfloat16"):
        model(torch.randn(2, 3, 16), rounded)


def test_casts_of_what_looks_like_a_container_leave_states_alone():
    for state in both():
        assert _apply_to_tensors(lambda tensor: tensor.to(BF16), {"state": [state]})["state"][0] is state


def test_accelerate_and_lightning_hand_states_on():
    operations = pytest.importorskip("accelerate.utils.operations", reason="accelerate is an extra of the tests")
    fabric = pytest.importorskip("lightning.fabric.utilities.apply_func", reason="lightning is an extra of the tests")
    for state in both():
        low = state.to(BF16)
        y, same = operations.convert_to_fp32((torch.ones(2, dtype=BF16), low))
        assert y.dtype == torch.float32 and same is low
        [moved] = fabric.move_data_to_device([state], torch.device("cpu"))
        assert type(moved) is type(state) and all(map(torch.equal, leaves(moved), leaves(state)))
