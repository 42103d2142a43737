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
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from bench.close import TOLERANCE, assert_close, assert_same_gradients
from lmn_kernels import LogarithmicMemory, LogarithmicMixing, LookAheadMemory, MemoryState

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
        assert_close(
            f"{name}: attention", layer.attention(layer.parallel(x)), plain.attention(plain.parallel(x)), VALUE
        )
        handle = layer.sva.register_forward_hook(lambda *_: None)  # so that the attention is called as a whole
        y, state = layer.prefill(x[:, :6])
        handle.remove()
        assert_close(f"{name}: called", y, plain(x)[:, :6], VALUE)
        assert_close(f"{name}: after it", layer.step(x[:, 6:7], state)[0], plain(x)[:, 6:7], VALUE)


def check_blocks(mesh: DeviceMesh) -> None:
    for options in ({"lean": True, "summarizer": "conv"}, {"_expand": 1, "init": "variance_preserving"}):
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


def check_values(mesh: DeviceMesh) -> None:
    check_blocks(mesh)
    check_look_ahead(mesh)


@pytest.mark.parametrize("world", [2, 4])
def test_outputs_gradients_and_states_are_those_of_one_process(world, tmp_path):
    on_ranks(world, check_values, tmp_path / "meeting")


def check_sharded_too(tp: DeviceMesh) -> None:
    """FSDP2 of parts and layers over pairs of ranks that share heads."""
    mesh, x = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), torch.randn(2, 11, 16, dtype=F64)
    plain = LogarithmicMemory(16, 4, 2, dtype=F64)
    layer = parallelize_module(copy.deepcopy(plain), mesh["tp"], block_plan())
    for part in (layer.sva.q, layer.sva.k, layer.sva.v, layer.sva.out_proj, layer.summarizer, layer):
        fully_shard(part, mesh=mesh["dp"])
    for method in ("prefill", "step"):
        register_fsdp_forward_method(layer, method)
    ys = [module(x) for module in (layer, plain)]
    assert_close("y", *ys, VALUE)
    for y in ys:
        y.square().sum().backward()
    same_gradients("block", layer, plain)
    assert layer.init_state(2, max_position=3).q.shape == (2, 1, 2, 8)
    with torch.no_grad():
        y, state = layer.prefill(x[:, :10])
        assert_close("step", layer.step(x[:, 10:], state)[0], plain(x)[:, 10:], VALUE)

    plain = LookAheadMemory(16, 2, 4, memory_length=7, feedforward=16, dtype=F64)
    model = copy.deepcopy(plain)
    for number in range(2):
        parallelize_module(model.layers[number], mesh["tp"], look_ahead_plan())
        for part in ("dec_attn.q_net", "dec_attn.kv_net", ""):
            fully_shard(model.layers[number].get_submodule(part), mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    ys = [module(x, module(x)[1])[0] for module in (model, plain)]
    assert_close("y", *ys, VALUE)
    for y in ys:
        y.square().sum().backward()
    same_gradients("model", model, plain)


def test_tensor_parallel_and_sharded_on_a_mesh_of_two_dimensions(tmp_path):
    on_ranks(4, check_sharded_too, tmp_path / "meeting")


class Traffic(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = func.__name__.partition(".")[0]
        if "c10d" in func.namespace and name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            self.found[name] = self.found.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def check_traffic_and_refusals(mesh: DeviceMesh) -> None:
    """What docs/parallel.md says of the price, and that what does not fit is said on every rank."""
    x = torch.randn(2, 11, 16, dtype=F64, requires_grad=True)
    layer = parallelize_module(LogarithmicMemory(16, 4, 2, dtype=F64), mesh, block_plan())
    model = LookAheadMemory(16, 1, 4, memory_length=7, feedforward=16, dtype=F64)
    parallelize_module(model.layers[0], mesh, look_ahead_plan())
    for call, forward, backward in (
        (layer, {"all_reduce": 2}, {"all_reduce": 6}),
        (
            lambda x: model(x)[0],
            {"all_gather_into_tensor": 1, "all_reduce": 2},
            {"all_gather_into_tensor": 2, "all_reduce": 3},
        ),
    ):
        with Traffic() as there:
            y = call(x).sum()
        with Traffic() as back:
            y.backward()
        assert (there.found, back.found) == (forward, backward)

    def block(embedding: int = 16, heads: int = 4, without: str = "", **plan: object) -> LogarithmicMemory:
        named = {name.replace("__", "."): style for name, style in plan.items()}
        whole = {name: style for name, style in (block_plan() | named).items() if name != without}
        return parallelize_module(LogarithmicMemory(embedding, heads, 2, dtype=F64), mesh, whole)

    def memory(without: str = "", **plan: object) -> LookAheadMemory:
        model = LookAheadMemory(16, 1, 4, memory_length=7, feedforward=16, dtype=F64)
        named = {name.replace("__", "."): style for name, style in plan.items()}
        whole = {name: style for name, style in (look_ahead_plan() | named).items() if name != without}
        parallelize_module(model.layers[0], mesh, whole)
        return model

    plain, column, row = LogarithmicMemory(16, 4, 2, dtype=F64), ColwiseParallel, RowwiseParallel
    state, own_state = plain.prefill(x)[1], layer.prefill(x)[1]

    def replicated(state: MemoryState) -> MemoryState:
        return state._map(lambda tensor: DTensor.from_local(tensor, mesh, [Replicate()]))

    everywhere = DTensor.from_local(x.detach(), mesh, [Replicate()])
    for error, message, call in (
        (TypeError, "^x: expected a plain tensor, got a DTensor; give the layer", lambda: layer(everywhere)),
        (TypeError, "^x: .* a DTensor", lambda: layer.step(everywhere[:, :1], layer.init_state(2))),
        (TypeError, "^x: .* a DTensor", lambda: memory()(everywhere)),
        (TypeError, "^x: .* a DTensor", lambda: plain.step_(everywhere, plain.init_state(2, max_position=11))),
        (TypeError, "^memory: .* a DTensor", lambda: plain.attention(everywhere[:, :1, None])),
        (TypeError, "^state: .* a DTensor", lambda: plain.step(x[:, :1], replicated(state))),
        (TypeError, "^sva.v: .*use_local_output=True", lambda: block(sva__v=column(use_local_output=False))(x)),
        (TypeError, "^sva.out_proj: .*use_local", lambda: block(sva__out_proj=row(use_local_output=False))(x)),
        (TypeError, "^feedforward.fc2: .*use", lambda: block(feedforward__fc2=row(use_local_output=False))(x)),
        (TypeError, "^kv_net: .*use_local", lambda: memory(dec_attn__kv_net=column(use_local_output=False))(x)),
        (TypeError, "^o_net: .*use_local", lambda: memory(dec_attn__o_net=row(use_local_output=False))(x)),
        (TypeError, "^CoreNet: .*use_local", lambda: memory(pos_ff__CoreNet__3=row(use_local_output=False))(x)),
        (TypeError, "^norm1: expected a plain tensor", lambda: block(norm1=SequenceParallel())(x)),
        (ValueError, "^sva.q: expected ranks that divide the 3 heads, got 2", lambda: block(12, 3)(x[..., :12])),
        (ValueError, "^sva.q: expected ranks that divide the 3 heads, got 2", lambda: block(12, 3).init_state(2)),
        (ValueError, "^sva.k: expected 8 features, as many as of sva.q, got 16", lambda: block(without="sva.k")(x)),
        (ValueError, "^sva.out_proj: .* of 8 features in.*got 16", lambda: block(without="sva.out_proj")(x)),
        (ValueError, "^o_net: .* of 8 features in.*got 16", lambda: memory(without="dec_attn.o_net")(x)),
        (ValueError, "^kv_net: expected 32 features for 4 heads", lambda: memory(without="dec_attn.q_net")(x)),
        (ValueError, "^state.q: expected 8 features, .*got 16", lambda: layer.step(x[:, :1], state)),
        (ValueError, "^state.q: expected 8 features", lambda: layer(x, state=state, return_state=True)),
        (ValueError, "^state.q: expected 8 features", lambda: layer.step_(x, plain.init_state(2, max_position=11))),
        (ValueError, "^state.q: expected shape", lambda: plain.step(x[:, :1], own_state)),
    ):
        with pytest.raises(error, match=message):
            call()


def test_collectives_are_as_few_as_said_and_what_does_not_fit_is_named(tmp_path):
    on_ranks(2, check_traffic_and_refusals, tmp_path / "meeting")


def test_narrower_projections_hold_fewer_heads_of_the_same_size():
    """As a rank's own are, cut by hand: 2 heads of 4 features where the layer has 4."""
    layer = LogarithmicMixing(16, 4, 2, dtype=F64)
    for name in ("q", "k", "v"):
        layer.sva.add_module(name, nn.Linear(16, 8, dtype=F64))
    layer.sva.out_proj = nn.Linear(8, 16, dtype=F64)
    # The same heads beside two that the output projection does not read.
    wide = LogarithmicMixing(16, 4, 2, dtype=F64)
    wide.load_state_dict(layer.state_dict() | {n: p for n, p in wide.state_dict().items() if n.startswith("sva.")})
    with torch.no_grad():
        for name in ("q", "k", "v"):
            wide.sva.get_submodule(name).weight[:8] = layer.sva.get_submodule(name).weight
            wide.sva.get_submodule(name).bias[:8] = layer.sva.get_submodule(name).bias
        wide.sva.out_proj.weight[:, :8], wide.sva.out_proj.weight[:, 8:] = layer.sva.out_proj.weight, 0
        wide.sva.out_proj.bias.copy_(layer.sva.out_proj.bias)
        x = torch.randn(2, 9, 16, dtype=F64)
        y, state = layer.prefill(x[:, :5])
        assert_close("prefill", y, wide(x)[:, :5], VALUE)
        for t in range(5, 9):
            y, state = layer.step(x[:, t : t + 1], state)
            assert_close("step", y, wide(x)[:, t : t + 1], VALUE)
        assert_close("step_", layer.step_(x, layer.init_state(2, max_position=9)), wide(x), VALUE)
        layer.sva.q = nn.Linear(16, 6, dtype=F64)
        with pytest.raises(ValueError, match="^sva.v: expected 6 features, as many as of sva.q, got 8"):
            layer(x)
        layer.sva.k, layer.sva.v = nn.Linear(16, 6, dtype=F64), nn.Linear(16, 6, dtype=F64)
        with pytest.raises(ValueError, match="^sva.q: expected whole heads, a multiple of 4 features, got 6"):
            layer(x)
