"""The compiled step against a loop of ATen operations on the CPU, batch 1, far into a sequence.

    python -m bench.step_speed [--quick] [--out FILE]

All contenders run in one process on the same weights and the same state, in turns: an operation over a run of
512 tokens, then 64 tokens each with one token per call of the operation, with `layer.step` and its Python, and
with both loops of `bench.aten_step`.
Times are microseconds a token: mean (median over turns), median and 99th percentile over single calls (over
turns for the run). A ratio is the faster loop's median call over ours, over our mean token for the run: the loop's
mean would flatter us, since a stall of the scheduler costs its operations more. Results that disagree stop the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.aten_step import AtenStep
from bench.checkpoint import write_file
from bench.layer_speed import machine
from lmn_kernels import LogarithmicMixing, MemoryState, decode_
from lmn_kernels._backend import why_not

TURN, RUN = 64, 512
NEAR, HERE, FAR = 1_000, 65_000, 1_000_000
# embedding, heads, bank, dtype, ratios that issue and specification ask for (run of tokens, layer.step)
SHAPES: list[tuple[int, int, int, torch.dtype, tuple[float, float]]] = [
    (32, 4, 2, torch.float32, (40, 8)),
    (512, 8, 1, torch.bfloat16, (8, 6)),
    (1024, 16, 1, torch.bfloat16, (4.5, 4)),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def state_at(layer: LogarithmicMixing, position: int) -> MemoryState:
    """A state that stands at a position, its nodes made up, q and v as they follow from them."""
    state = layer.init_state(1, max_position=2 * FAR)
    torch.manual_seed(1)
    with torch.no_grad():
        nodes = torch.randn_like(state.nodes)
        q, v = layer.sva.node_qv(nodes.to(layer.sva.q.weight.dtype)).to(nodes.dtype).chunk(2, -1)
        made = MemoryState(
            torch.tensor([position]), torch.randn_like(state.token), nodes, q.contiguous(), v.contiguous(),
            state.expand, state.levels, position,
        )  # fmt: skip
    return made


def bytes_per_step(layer: LogarithmicMixing) -> float:
    """Matrix bytes that a step reads on average: q, k, v, out once, W_left at every other token, W_right at each."""
    size = layer.embedding
    return (4 + 1.5 * layer.bank) * size * size * layer.sva.q.weight.element_size()


def bandwidth(total: float) -> float:
    """Bytes a second at which torch multiplies a float32 matrix of ``total`` bytes with a vector."""
    side = max(16, int((total / 4) ** 0.5))
    matrix, vector, out = torch.randn(side, side), torch.randn(side), torch.empty(side)
    calls = max(1, int(2e7 / (side * side)))
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(calls):
            torch.mv(matrix, vector, out=out)
        best = max(best, 4 * side * side * calls / (time.perf_counter() - start))
    return best


def single(call: Callable[[Tensor], Any], x: Tensor) -> list[float]:
    """Seconds of each call for the tokens of ``x [1, T, E]``."""
    times = []
    for token in x.split(1, 1):
        start = time.perf_counter()
        call(token)
        times.append(time.perf_counter() - start)
    return times


def agree(layer: LogarithmicMixing, x: Tensor, tolerance: float) -> None:
    """Stop where the contenders do not give the same."""
    start = state_at(layer, HERE)
    loops, state, ys = [AtenStep(layer, start, fused) for fused in (False, True)], start, []
    for token in x.split(1, 1):
        y, state = layer.step(token, state)
        ys.append(y)
    expected, fused = (torch.cat([loop(token[0]) for token in x.split(1, 1)])[None].float() for loop in loops)
    run = decode_(x, state_at(layer, HERE), layer.step_weights())
    for name, got in (("the fused loop", fused), ("layer.step", torch.cat(ys, 1)), ("decode_", run)):
        difference = (got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        if not difference <= tolerance:
            sys.exit(f"{name} and the loop disagree: {difference:.3g} of 1, over {tolerance:g}; no time is reported")


def measure(shape: tuple[Any, ...], turns: int, bar: tqdm) -> dict[str, Any]:
    """All contenders at one shape."""
    embedding, heads, bank, dtype, goals = shape
    torch.manual_seed(0)
    layer = LogarithmicMixing(embedding, heads, bank, init="variance_preserving", dtype=dtype)
    weights, x = layer.step_weights(), torch.randn(1, TURN, embedding).to(dtype)
    prompt = torch.randn(1, RUN, embedding).to(dtype)
    agree(layer, x, TOLERANCE[dtype])
    pools = {name: state_at(layer, HERE) for name in ("run", "call")}
    kept = [state_at(layer, HERE)]
    loop, fused = (AtenStep(layer, state_at(layer, HERE), fused) for fused in (False, True))

    def step(token: Tensor) -> None:
        _, kept[0] = layer.step(token, kept[0])

    seconds: dict[str, list[list[float]]] = {name: [] for name in ("run", "call", "step", "aten", "fused")}
    for turn in range(turns + 2):
        start = time.perf_counter()
        decode_(prompt, pools["run"], weights)
        found = {"run": [(time.perf_counter() - start) / RUN]}
        found["call"] = single(lambda token: decode_(token, pools["call"], weights), x)
        found["step"] = single(step, x)
        found["aten"] = single(lambda token: loop(token[0]), x)
        found["fused"] = single(lambda token: fused(token[0]), x)
        if turn >= 2:  # the first ones warm up
            for name, times in found.items():
                seconds[name].append(times)
        bar.update()
    turn_mean = {name: [statistics.fmean(times) for times in lists] for name, lists in seconds.items()}
    row: dict[str, Any] = {"embedding": embedding, "heads": heads, "bank": bank, "dtype": str(dtype)[6:]}
    for name, lists in seconds.items():
        ordered = sorted(time for times in lists for time in times)
        row[name] = {
            "mean_us": 1e6 * statistics.median(turn_mean[name]),
            "median_us": 1e6 * statistics.median(ordered),
            "p99_us": 1e6 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        }
    for name, ours in (("run", "mean_us"), ("call", "median_us"), ("step", "median_us")):
        row[name]["ratio"] = min(row["aten"]["median_us"], row["fused"]["median_us"]) / row[name][ours]
    row["goals"] = {"run": goals[0], "step": goals[1]}
    # One token at a time: a run of tokens reads each matrix once for eight of them.
    reached = bytes_per_step(layer) / statistics.median(turn_mean["call"])
    row["bandwidth"] = {"reached": reached, "torch_mv": bandwidth(bytes_per_step(layer))}
    row["far_over_near"] = far_over_near(layer, x, turns)
    return row


def far_over_near(layer: LogarithmicMixing, x: Tensor, turns: int) -> float:
    """Time of a step at n = 1,000,000 over that at n = 1,000, one token a call."""
    weights, pools = layer.step_weights(), [state_at(layer, NEAR), state_at(layer, FAR)]
    ratios = []
    for _ in range(turns):
        near, far = (statistics.fmean(single(lambda token, p=p: decode_(token, p, weights), x)) for p in pools)  # type: ignore
        ratios.append(far / near)
    return statistics.median(ratios)


def show(row: dict[str, Any]) -> None:
    names = {"run": "run of 512 tokens", "call": "one token a call", "step": "layer.step"}
    names |= {"aten": "ATen loop", "fused": "the same, fused"}
    print(f"\nE={row['embedding']}, {row['heads']} heads, {row['bank']} banks, {row['dtype']}")
    for name, label in names.items():
        found = row[name]
        line = f"  {label:18} {found['mean_us']:9.2f} us a token, "
        line += f"median {found['median_us']:.2f}, p99 {found['p99_us']:.2f}"
        if "ratio" in found:
            line += f"; {found['ratio']:.1f} times the faster loop"
            if name in row["goals"]:
                line += f" (asked: {row['goals'][name]:g})"
        print(line)
    reached, there = row["bandwidth"]["reached"] / 1e9, row["bandwidth"]["torch_mv"] / 1e9
    print(f"  reads {reached:.1f} GB/s of matrices, {100 * reached / there:.0f} % of torch.mv's {there:.1f} GB/s")
    print(f"  a step at n = 1,000,000 takes {row['far_over_near']:.2f} times one at n = 1,000 (asked: at most 1.3)")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few turns")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    reason = why_not("cpp", "step", torch.device("cpu"), torch.float32)
    if reason is not None:
        sys.exit(f"there is nothing to measure: {reason}")
    turns, rows = 8 if options.quick else 40, []
    with torch.inference_mode(), tqdm(total=len(SHAPES) * (turns + 2), desc="step", disable=None) as bar:
        for shape in SHAPES:
            rows.append(measure(shape, turns, bar))
    for row in rows:
        show(row)
    if options.out:
        write_file(options.out, json.dumps({"machine": machine(), "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
