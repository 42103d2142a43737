"""torch's own plans of tensor parallelism on 2 and 4 processes: each rank attends with its own heads."""

from __future__ import annotations

import copy
import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import LogarithmicMemory, LogarithmicMixing, LookAheadMemory

F64 = torch.float64
VALUE, GRADIENT = TOLERANCE[F64]
HEADS = ("sva.q", "sva.k", "sva.v")


def block_plan() -> dict[str, object]:
    inward = {name: ColwiseParallel() for name in (*HEADS, "feedforward.fc1")}
    return inward | {name: RowwiseParallel() for name in ("sva.out_proj", "feedforward.fc2")}


def look_ahead_plan(*left_out: str) -> dict[str, object]:
    inward = [f"dec_attn.{name}" for name in ("q_net", "kv_net", "r_net") if name not in left_out]
    plan: dict[str, object] = {name: ColwiseParallel() for name in (*inward, "pos_ff.CoreNet.0")}
    return plan | {name: RowwiseParallel() for name in ("dec_attn.o_net", "pos_ff.CoreNet.3")}


def on_ranks(world: int, check: Callable[[DeviceMesh], None], meeting: Path) -> None:
    # A server that has imported torch, so that not every process has to.
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor.parallel", "torch._dynamo"])
    given = world, check, meeting.as_uri()
    torch.multiprocessing.start_processes(_run, given, nprocs=world, start_method="forkserver")


def _run(rank: int, world: int, check: Callable[[DeviceMesh], None], meeting: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout)
    try:
        check(init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))
    finally:
        dist.destroy_process_group()


def gradients(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Of every parameter, whole."""
    found = {name: p.grad for name, p in model.named_parameters()}
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found.values()]
    return list(found), whole


def own(state_part: Tensor, mesh: DeviceMesh, dim: int = -1) -> Tensor:
    return state_part.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def same_gradients(name: str, got: nn.Module, expected: nn.Module) -> None:
    names, grads = gradients(expected)
    assert_same_gradients([f"{name}: {n}" for n in names], gradients(got)[1], grads, GRADIENT)


def check_block(name: str, plain: LogarithmicMixing, layer: LogarithmicMixing, mesh: DeviceMesh) -> None:
    """Whole sequences, unequal ones, chunks, steps, pools and states, with gradients through all but the pool."""
    size, count = plain.embedding, 11
    x = torch.randn(2, count, size, dtype=F64)
    x_own, x_plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    lengths, results = torch.tensor([count, 6]), []
    for module, given in ((layer, x_own), (plain, x_plain)):
        whole = module(given)
        padded = module(given, lengths=lengths)
        head, state = module.prefill(given[:, :5])
        chunk, state = module(given[:, 5:8], state=state, return_state=True)
        steps = [head, chunk]
        for t in range(8, count):
            y, state = module.step(given[:, t : t + 1], state)
            steps.append(y)
        (whole.square().sum() + padded.sum() + torch.cat(steps, 1).pow(3).sum() + state.nodes.sum()).backward()
        results.append((whole, padded, torch.cat(steps, 1), state))
    for part, got, want in zip(("forward", "lengths", "steps"), *(r[:3] for r in results), strict=True):
        assert_close(f"{name}: {part}", got, want, VALUE)
    assert_close(f"{name}: x", x_own.grad, x_plain.grad, GRADIENT)
    same_gradients(name, layer, plain)
    mine, theirs = results[0][3], results[1][3]
    assert_close(f"{name}: nodes", mine.nodes, theirs.nodes, VALUE)
    for part in ("q", "v"):
        assert_close(f"{name}: state.{part}", getattr(mine, part), own(getattr(theirs, part), mesh), VALUE)
    with torch.no_grad():
        pool, slots = layer.init_state(3, max_position=count), torch.tensor([2, 0])
        assert_close(f"{name}: step_", layer.step_(x, pool, slots), plain(x), VALUE)
        y, _ = layer.step(x[:, :1], layer.init_state(2))
        assert_close(f"{name}: first step", y, plain(x[:, :1]), VALUE)
        assert_close(f"{name}: attention", layer.attention(layer.parallel(x)), plain.attention(plain.parallel(x)), VALUE)
        handle = layer.sva.register_forward_hook(lambda *_: None)  # so that the attention is called as a whole
        y, state = layer.prefill(x[:, :7])
        handle.remove()
        assert_close(f"{name}: called", y, plain(x)[:, :7], VALUE)
        assert_close(f"{name}: after it", layer.step(x[:, 7:8], state)[0], plain(x)[:, 7:8], VALUE)


def check_blocks(mesh: DeviceMesh) -> None:
    for options in ({}, {"lean": True, "summarizer": "conv"}, {"_expand": 1, "init": "variance_preserving"}):
        plain = LogarithmicMemory(16, 4, 2, dtype=F64, **options)
        layer = parallelize_module(copy.deepcopy(plain), mesh, block_plan())
        assert layer.sva.q.weight.to_local().shape[0] == 16 // mesh.size()
        check_block(str(options), plain, layer, mesh)


def check_look_ahead(mesh: DeviceMesh) -> None:
    for options, left_out in (({}, ()), ({"attn_type": 32, "pre_norm": True, "merge_eps": 1e-6}, ("r_net", "kv_net"))):
        options = {"memory_length": 7, "feedforward": 16, "dtype": F64, **options}
        plain = LookAheadMemory(16, 2, 4, 6, **options)
        model = copy.deepcopy(plain)
        for layer in model.layers:
            parallelize_module(layer, mesh, look_ahead_plan(*left_out))
        assert [part.shape[2] for part in model.init_state(2).outputs] == [4 // mesh.size()]
        states, start = [model.init_state(2), plain.init_state(2)], torch.randn(2, 15, 16, dtype=F64)
        for number, segment in enumerate(start.split(5, 1)):
            given = [segment.clone().requires_grad_() for _ in range(2)]
            ys = []
            for place, module in enumerate((model, plain)):
                y, states[place] = module(given[place], states[place])
                y.square().sum().backward()
                ys.append(y)
            assert_close(f"{options}: y {number}", *ys, VALUE)
            assert_close(f"{options}: x {number}", given[0].grad, given[1].grad, GRADIENT)
            for part in ("outputs", "lse"):
                mine, theirs = (getattr(state, part)[0] for state in states)
                assert_close(f"{options}: {part} {number}", mine, own(theirs, mesh, 2), VALUE)
        same_gradients(str(options), model, plain)


def check_all(mesh: DeviceMesh) -> None:
    check_blocks(mesh)
    check_look_ahead(mesh)


@pytest.mark.parametrize("world", [2, 4])
def test_outputs_gradients_and_states_are_those_of_one_process(world, tmp_path):
    on_ranks(world, check_all, tmp_path / "meeting")
