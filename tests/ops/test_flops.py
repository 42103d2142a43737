"""What `torch.utils.flop_counter` counts, against a walk over positions by the definition."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lmn_kernels import LogarithmicMemory, LogarithmicMixing, decode_, look_ahead_attend, update_
from lmn_kernels.ops.library import OPS
from tests.support.served import Served
from tests.support.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
LINEAR = [v for v in VARIANTS if v.options.get("summarizer") in (None, "conv", "conv_mixed", "depthwise_separable")]


def counted(call) -> dict[str, int]:
    """FLOPs by operation of this package."""
    with FlopCounterMode(display=False) as counter:
        call()
    found = counter.get_flop_counts().get("Global", {})
    return {str(packet).partition(".")[2]: n for packet, n in found.items() if "lmn_kernels" in str(packet)}


def merge_flops(layer: LogarithmicMixing, level: int, folded: bool) -> int:
    """Of one node of every bank: the rows of both children times matrices, an expander before them or folded in."""
    features, bank, below = layer.embedding, layer.bank, 1 + (level - 1) * layer.expand
    mixed = layer.summarizer.conv.groups == 1 < bank if hasattr(layer.summarizer, "conv") else False
    inputs = bank * features if mixed else features
    sides = 1 if hasattr(layer.summarizer, "scale") and not (folded and layer.expander) else 2
    if folded:
        return 2 * below * (1 + layer.expand) * sides * inputs * bank * features
    widened = 0 if layer.expander is None else 2 * (2 * below * bank) * (1 + layer.expand) * features**2
    return widened + 2 * (below + layer.expand) * sides * inputs * bank * features


def walk(layer: LogarithmicMixing, runs: list[tuple[int, int]]) -> tuple[int, int]:
    """Merges, and scores and mixes, of positions ``first + 1 … last`` of every run ``(first, last)``."""
    tree = slots = 0
    for first, last in runs:
        for n in range(first + 1, last + 1):
            level, seen = 1, 1
            while 2**level <= n:
                tree += merge_flops(layer, level, True) * (n % 2**level == 0)
                seen += layer.bank * (1 + level * layer.expand)
                level += 1
            slots += seen
    return tree, 4 * layer.embedding * slots


@pytest.mark.parametrize("length", [0, 1, 2, 37, 64])
@pytest.mark.parametrize("variant", LINEAR, ids=str)
def test_equal_lengths_exactly(variant, length):
    layer = variant.layer(torch.float32)
    x = torch.randn(3, length, variant.embedding)
    tree, attention = walk(layer, [(0, length)] * 3)
    folds = layer.expander is None or 3 * length > layer.embedding
    expected = {"attend": attention} | ({"build_tree": tree} if folds else {})
    with torch.no_grad():
        assert counted(lambda: layer(x)) == expected
    expected |= {"attend_backward": attention * 5 // 2} | ({"build_tree_backward": 2 * tree} if folds else {})
    assert counted(lambda: layer(x).sum().backward()) == expected


def test_spans_are_bounded():
    """By the most that there could be in such shapes: full rows, or few long documents."""
    layer, x = LogarithmicMixing(8, 2, 2), torch.randn(3, 21, 8)
    lengths, bounds = torch.tensor([21, 4, 0]), torch.tensor([0, 20, 24, 63])
    rows, gaps = [(0, 21)] * 3, torch.arange(21) % 3 > lengths[:, None] % 3
    ragged = {
        "lengths": (x, {"lengths": lengths}, [(0, 21), (0, 4)], rows),
        "full rows": (x, {"lengths": torch.full((3,), 21)}, rows, rows),
        "mask": (x, {"attention_mask": gaps}, [(0, 14), (0, 7), (0, 14)], rows),
        "documents": (x.view(1, 63, 8), {"cu_seqlens": bounds, "max_length": 39}, [(0, 20), (0, 4), (0, 39)],
                      [(0, 39), (0, 24)]),
    }  # fmt: skip
    assert gaps.sum(1).tolist() == [14, 7, 14]
    for name, (given, arguments, runs, most) in ragged.items():
        got, expected = counted(lambda g=given, a=arguments: layer(g, **a)), walk(layer, most)
        assert (got["build_tree"], got["attend"]) == expected, name
        assert all(low <= high for low, high in zip(walk(layer, runs), expected, strict=True)), name


def test_chunks_behind_states_are_bounded():
    layer, x = LogarithmicMixing(8, 2, 2), torch.randn(3, 16, 8)
    with torch.no_grad():
        for lengths in ([16, 16, 16], [16, 3, 7]):
            _, state = layer.prefill(x, torch.tensor(lengths))
            tree, attention = walk(layer, [(before, before + 16) for before in lengths])
            got = counted(lambda s=state: layer(x, state=s))
            assert tree <= got["build_tree"] <= 1.25 * tree and attention <= got["attend"] <= 1.25 * attention
            if len(set(lengths)) == 1:
                assert got["attend"] == attention


@pytest.mark.parametrize(("keys", "tokens", "window"), [(5, 5, 5), (9, 4, 4), (12, 3, 7), (12, 3, 100)])
def test_look_ahead_exactly(keys, tokens, window):
    q, kv = torch.randn(2, keys, 3, 4, requires_grad=True), torch.randn(2, keys, 2, 3, 4)
    bias, table, memory = torch.randn(4, 3, 4), torch.randn(keys + 1, 3, 4), keys - tokens
    pairs = sum(
        (j <= i) if i >= memory else (max(i + 1, memory - window + 1) <= j <= memory)
        for i in range(keys)
        for j in range(keys)
    )
    for rows, seen in ((keys, pairs), (tokens, sum(range(memory + 1, keys + 1)))):
        given = q[:, -rows:], kv, bias, table
        got = counted(lambda g=given: look_ahead_attend(*g, tokens=tokens, window=window)[0].sum().backward())
        forward, backward = 6 * 4 * 3 * 2 * seen, 16 * 4 * 3 * 2 * seen
        assert got == {"look_ahead_attend": forward, "look_ahead_attend_backward": backward}


def step_flops(layer: LogarithmicMixing, levels: int) -> tuple[int, int]:
    """Of a token that completes every level: into the memory, and out of it."""
    size, bank = layer.embedding, layer.bank
    rows = sum(1 + level * layer.expand for level in range(1, levels + 1)) * bank
    into = sum(merge_flops(layer, level, False) for level in range(1, levels + 1)) + 2 * rows * 2 * size**2
    return into, 2 * 4 * size**2 + 4 * size * (1 + rows)


@pytest.mark.parametrize("variant", LINEAR, ids=str)
def test_steps_are_bounded_by_those_that_complete_every_level(variant):
    """Exactly; whatever serves, and also where a plan was made before."""
    layer = variant.layer(torch.float32).requires_grad_(False)
    x, pool, weights = torch.randn(2, 3, variant.embedding), layer.init_state(2, max_position=15), layer.step_weights()
    into, out = step_flops(layer, 3)
    slots: tuple[Tensor, ...] = tuple(pool.slots())
    assert counted(lambda: OPS.decode_(x, None, *slots, *weights)) == {"decode_": 6 * (into + out)}
    assert counted(lambda: OPS.update_(x, None, *slots, *weights)) == {"update_": 6 * into}
    assert counted(lambda: OPS.step(x[:, :1], *slots, *weights)) == {"step": 2 * (into + out)}


def test_a_layers_steps_are_counted_behind_a_plan():
    layer = LogarithmicMemory(16, 2, 2, feedforward_mult=3).requires_grad_(False)
    x, state = torch.randn(2, 1, 16), layer.init_state(2, max_position=15)
    with torch.no_grad():
        layer.step(x, state)
    if "_plan" not in layer.__dict__:
        pytest.skip("the extension is not built: a step of the reference is torch's own operations, which torch counts")
    into, out = step_flops(layer, 3)
    whole = {"step": 2 * (into + out + 2 * 2 * 16 * 48)}
    with torch.no_grad():
        assert counted(lambda: layer.step(x, state)) == whole
        assert counted(lambda: layer(x, state=state)) == whole
        layer.step(x, state)
        assert "_plan" in layer.__dict__
        with Served() as watcher:  # a mode without the counter's global hooks
            layer.step(x, state)
        watcher.check("cpp", "step")
    pool, weights = layer.init_state(2, max_position=15), layer.step_weights()
    assert counted(lambda: layer.step_(x, pool)) == {"decode_": whole["step"]}
    assert counted(lambda: decode_(x, pool, weights)) == {"decode_": whole["step"]}
    assert counted(lambda: update_(x, pool, weights)) == {"update_": 2 * into}


def test_counting_changes_nothing_of_what_is_counted():
    """Torch's counter hooks every module; those hooks are none for which a layer leaves its fused road."""
    layer, x = LogarithmicMixing(16, 2, 2), torch.randn(2, 33, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    nodes = 2 * (2 * 33 + 1)  # and a null row
    projections = 2 * 16**2 * (2 * nodes + 3 * 66 + 66)
    assert sum(counter.get_flop_counts()["LogarithmicMixing"].values()) == counter.get_total_flops()
    assert counter.get_total_flops() == projections + sum(walk(layer, [(0, 33)] * 2))
    calls = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.sva.q in calls, "another global hook sees every part"


@pytest.mark.parametrize("first", ["lmn_kernels", "torch.utils.flop_counter"])
def test_importing_in_any_order(first):
    """The counter imports Triton, so the package leaves it alone until somebody else wants it."""
    second = {"lmn_kernels": "torch.utils.flop_counter", "torch.utils.flop_counter": "lmn_kernels"}[first]
    code = f"""
import importlib, importlib.util, sys
importlib.import_module("{first}")
assert ("torch.utils.flop_counter" in sys.modules) == ("{first}" != "lmn_kernels")
importlib.util.find_spec("torch.utils.flop_counter")
importlib.import_module("{second}")
import lmn_kernels.ops.library as library, torch.utils.flop_counter as counter
every = [name + end for name in ("build_tree", "attend", "look_ahead_attend") for end in ("", "_backward")]
assert {{getattr(library.OPS, name) for name in [*every, "step", "decode_", "update_"]}} <= set(counter.flop_registry)
assert not any(type(finder).__module__.startswith("lmn_kernels") for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lightnings_count():
    throughput = pytest.importorskip(
        "lightning.fabric.utilities.throughput", reason="lightning is an extra of the tests"
    )
    with torch.device("meta"):
        layer, x = LogarithmicMixing(16, 2, 2), torch.randn(2, 33, 16)
    got = throughput.measure_flops(layer, lambda: layer(x))
    nodes = 2 * (2 * 33 + 1)
    assert got == 2 * 16**2 * (2 * nodes + 4 * 66) + sum(walk(layer, [(0, 33)] * 2))
