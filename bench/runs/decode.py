"""A token of a stream, batch 1: our step against ATen loops, a KV cache, GRU and LSTM, far into a sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import InputError
from bench.journal import Row
from bench.peers import recurrent
from bench.peers.aten_step import AtenStep
from bench.peers.streams import CachedAttention, Recurrent
from bench.runner import Case, Context
from bench.shapes import Shape
from bench.terminal import table
from lmn_kernels import LogarithmicMixing, MemoryState, decode_
from lmn_kernels._backend import why_not
from tests.close import error

POSITIONS = (1 << 10, 1 << 15, 1 << 20)
LAYERS = (
    (Shape("E32", 1, 1, 32, 4, 2), torch.float32),
    (Shape("E512", 1, 1, 512, 8, 1), torch.bfloat16),
    (Shape("E1024", 1, 1, 1024, 16, 1), torch.bfloat16),
)
# Tokens of a turn, and of one call over many.
TURN, RUN = 64, 512
# Root mean square of the difference over that of what is expected.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Beside ``layer.step``, which is "ours": the operation under it, with a token and with many tokens a call.
OPERATION, MANY = "ours, decode_", f"ours, decode_ of {RUN} tokens"
# Slower contenders get fewer tokens a turn, to bring a turn to this.
TURN_SECONDS = 0.15
CHECKED = 16

Token = Callable[[Tensor], Tensor]


@dataclass
class Stream:
    """A contender.

    Attributes:
        token: ``x [1, E]`` → ``y [1, E]``, and on to the next position.
        start: puts it at a position.
        expected: ``x [T, E]`` → ``[T, E]`` from that position, in float64 and by another route; or why there is none.
    """

    token: Token
    start: Callable[[int], None]
    expected: Callable[[Tensor], Tensor]


def add_arguments(add: Callable[..., Any]) -> None:
    """None of its own."""


def made_up(layer: LogarithmicMixing, position: int) -> MemoryState:
    """A state that stands at a position, its nodes drawn, q and v as they follow from them."""
    state = layer.init_state(1, max_position=4 * POSITIONS[-1])
    torch.manual_seed(1)
    with torch.no_grad():
        nodes = torch.randn_like(state.nodes)
        q, v = layer.sva.node_qv(nodes.to(layer.sva.q.weight.dtype)).to(nodes.dtype).chunk(2, -1)
        return MemoryState(
            torch.tensor([position]), torch.randn_like(state.token), nodes, q.contiguous(), v.contiguous(),
            state.expand, state.levels, position,
        )  # fmt: skip


def _layer(shape: Shape, dtype: torch.dtype, step_backend: str) -> LogarithmicMixing:
    torch.manual_seed(0)
    return LogarithmicMixing(
        shape.embedding, shape.heads, shape.bank, init="variance_preserving", dtype=dtype, step_backend=step_backend
    )


def _expected_step(layer: LogarithmicMixing, x: Tensor, n: int) -> Tensor:
    """Our step in float64 by the reference, on the same rounded weights and the same state."""
    exact = LogarithmicMixing(layer.embedding, layer.heads, layer.bank, backend="reference", dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    state, ys = made_up(layer, n).to(dtype=torch.float64), []
    for token in x.double().split(1):
        y, state = exact.step(token[None], state)
        ys.append(y[0])
    return torch.cat(ys)


class Ours:
    """Our step in one of its faces."""

    def __init__(self, layer: LogarithmicMixing, face: str):
        self.layer, self.face = layer, face
        self.state = made_up(layer, 1)
        self.weights = layer.step_weights()

    def start(self, n: int) -> None:
        self.state = made_up(self.layer, n)

    def __call__(self, x: Tensor) -> Tensor:
        if self.face == "operation":
            return decode_(x[None], self.state, self.weights)[0]
        y, self.state = self.layer.step(x[None], self.state)
        return y[0]


def streams(shape: Shape, dtype: torch.dtype, n: int) -> dict[str, Stream | str]:
    """Every contender, or why it cannot run."""
    layer = _layer(shape, dtype, "auto")

    def expected(x: Tensor) -> Tensor:
        return _expected_step(layer, x, n)

    found: dict[str, Stream | str] = {}
    reason = why_not("cpp", "step", torch.device("cpu"), dtype)
    if reason:
        found["ours"] = found[OPERATION] = reason
    else:
        for name, face in (("ours", "layer"), (OPERATION, "operation")):
            ours = Ours(_layer(shape, dtype, "cpp"), face)
            found[name] = Stream(ours, ours.start, expected)
    reference = Ours(_layer(shape, dtype, "reference"), "layer")
    found["reference"] = Stream(reference, reference.start, expected)
    for name, fused in (("ATen loop", False), ("ATen loop, fused", True)):
        found[name] = _aten(layer, fused, expected)
    cache = 2 * 2 * n * shape.embedding * dtype.itemsize
    if cache > 4e9:
        found["KV cache"] = f"a cache of {cache / 2e9:.2g} GB"
    else:
        for name, fused in (("KV cache", False), ("KV cache, fused", True)):
            cached = CachedAttention(layer, n + RUN, fused)
            found[name] = Stream(cached, cached.start, partial(_expected_cached, cached, n))
    for name, kind in (("GRU", nn.GRU), ("LSTM", nn.LSTM)):
        found[name] = _recurrent(kind, shape.embedding, dtype)
    return found


def _aten(layer: LogarithmicMixing, fused: bool, expected: Callable[[Tensor], Tensor]) -> Stream:
    kept: list[AtenStep] = []

    def start(n: int) -> None:
        kept[:] = [AtenStep(layer, made_up(layer, n), fused)]

    return Stream(lambda x: kept[0](x), start, expected)


def _expected_cached(cached: CachedAttention, n: int, x: Tensor) -> Tensor:
    cached.start(n)
    ys = []
    for token in x.split(1):
        ys.append(cached.definition(token))
        cached(token)
    return torch.cat(ys)


def _recurrent(kind: type[nn.GRU] | type[nn.LSTM], embedding: int, dtype: torch.dtype) -> Stream:
    made = Recurrent(kind, embedding, dtype)

    def start(n: int) -> None:
        made.state = None

    def expected(x: Tensor) -> Tensor:
        twin = kind(embedding, embedding, batch_first=True).double()
        twin.load_state_dict(made.module.state_dict())
        return recurrent.definition(twin, x.double()[None])[0]

    return Stream(made, start, expected)


def single(call: Token, x: Tensor) -> list[float]:
    """Seconds of each call for the tokens of ``x [T, E]``."""
    times = []
    for token in x.split(1):
        start = time.perf_counter()
        call(token)
        times.append(time.perf_counter() - start)
    return times


def check(stream: Stream, x: Tensor, n: int) -> float:
    """The error over a few tokens.

    Raises:
        AssertionError: it is wrong.
    """
    stream.start(n)
    got = torch.cat([stream.token(token) for token in x.split(1)])
    found = error(got, stream.expected(x))
    limit = TOLERANCE[x.dtype]
    assert found <= limit, f"error {found:.3g} is over {limit:.3g}"
    return found


@torch.inference_mode()
def at_position(shape: Shape, dtype: torch.dtype, n: int, turns: int) -> list[Row]:
    """All contenders in turns at one position."""
    able: dict[str, Stream] = {}
    head: Row = {
        "operation": "step", "position": n, "dtype": str(dtype).removeprefix("torch."),
        "shape": {"batch": 1, "embedding": shape.embedding, "heads": shape.heads, "bank": shape.bank},
    }  # fmt: skip
    rows: dict[str, Row] = {}
    torch.manual_seed(4)
    x = torch.randn(TURN, shape.embedding).to(dtype)
    for name, stream in streams(shape, dtype, n).items():
        rows[name] = {"provider": name, **head}
        if isinstance(stream, str):
            rows[name]["gap"] = stream
            continue
        try:
            rows[name] |= {"error": float(f"{check(stream, x[:CHECKED], n):.3g}"), "tolerance": TOLERANCE[dtype]}
            able[name] = stream
        except AssertionError as wrong:
            rows[name]["gap"] = f"gate: {wrong}"
    prompt = torch.randn(1, RUN, shape.embedding).to(dtype)
    seconds = _turns(able, x, prompt, n, turns)
    for name, times in seconds.items():
        row = rows.setdefault(name, {**rows["ours"], "provider": name})
        row |= _spread(times) | {"unit": "us", "repeats": len(times)}
        if name != "ours" and "ours" in seconds:
            row["ratio"] = float(f"{statistics.median(times) / statistics.median(seconds['ours']):.4g}")
    return list(rows.values())


def _turns(able: dict[str, Stream], x: Tensor, prompt: Tensor, n: int, turns: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in able}
    if OPERATION in able:
        seconds[MANY] = []
    tokens = dict.fromkeys(able, TURN)
    for turn in range(turns + 2):
        for name, stream in able.items():
            stream.start(n)
            times = single(stream.token, x[: tokens[name]])
            if turn < 2:  # the first ones warm up, and tell how many tokens fit
                tokens[name] = max(4, min(TURN, int(TURN_SECONDS / statistics.median(times))))
            else:
                seconds[name] += times
        if OPERATION in able:
            run = able[OPERATION]
            run.start(n)
            begin = time.perf_counter()
            ours = run.token
            assert isinstance(ours, Ours)
            decode_(prompt, ours.state, ours.weights)
            if turn >= 2:
                seconds[MANY].append((time.perf_counter() - begin) / RUN)
    return seconds


def _spread(seconds: list[float]) -> Row:
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return float(f"{1e6 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.4g}")

    return {"median": float(f"{1e6 * statistics.median(ordered):.4g}"), "p20": at(0.2), "p80": at(0.8), "p99": at(0.99)}


@torch.inference_mode()
def facts(shape: Shape, dtype: torch.dtype, turns: int) -> list[Row]:
    """How much longer a far token takes than a near one, and the share of a matrix-vector product's bandwidth."""
    reason = why_not("cpp", "step", torch.device("cpu"), dtype)
    head: Row = {
        "provider": "ours", "operation": "step", "dtype": str(dtype).removeprefix("torch."),
        "shape": {"batch": 1, "embedding": shape.embedding, "heads": shape.heads, "bank": shape.bank},
    }  # fmt: skip
    if reason:
        return [{**head, "gap": reason}]
    layer = _layer(shape, dtype, "cpp")
    near, far = Ours(layer, "operation"), Ours(layer, "operation")
    torch.manual_seed(4)
    x = torch.randn(TURN, shape.embedding).to(dtype)
    ratios, singles = [], []
    for _ in range(turns):
        near.start(POSITIONS[0])
        far.start(POSITIONS[-1])
        times = single(near, x)
        singles.append(statistics.fmean(times))
        ratios.append(statistics.fmean(single(far, x)) / singles[-1])
    needed = (4 + 1.5 * shape.bank) * shape.embedding**2 * dtype.itemsize
    reached, there = needed / statistics.median(singles), _bandwidth(needed)
    return [
        {**head, "fact": "far_over_near", "value": round(statistics.median(ratios), 3), "positions": POSITIONS[::2]},
        {
            **head, "fact": "bandwidth", "value": round(reached / there, 3),
            "reached_gbs": round(reached / 1e9, 2), "torch_mv_gbs": round(there / 1e9, 2),
        },
    ]  # fmt: skip


def _bandwidth(total: float) -> float:
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


def cases(context: Context) -> list[Case]:
    if context.device.type != "cpu":
        raise InputError(f"device: expected cpu, got {context.device}: bench.gpu_check times decoding on a GPU")
    turns = 3 if context.quick else 12
    positions = POSITIONS[:2] if context.quick else POSITIONS
    found = []
    for shape, dtype in LAYERS:
        for n in positions:
            found.append(Case(f"{shape.name}/{n}", partial(at_position, shape, dtype, n, turns)))
        found.append(Case(f"{shape.name}/facts", partial(facts, shape, dtype, turns)))
    return found


def show(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        shape = row["shape"]
        what = f"E={shape['embedding']} H={shape['heads']} m={shape['bank']} {row['dtype']}"
        place = f"{row['position']:,}" if "position" in row else ""
        if "gap" in row:
            cells = [row["gap"], "", ""]
        elif "fact" in row:
            cells = [f"{row['fact'].replace('_', ' ')}: {row['value']:.2f}", "", ""]
        else:
            ratio = f"{row['ratio']:.3g}x" if "ratio" in row else ""
            cells = [f"{row['median']:.4g} ({row['p20']:.4g} to {row['p80']:.4g})", f"{row['p99']:.4g}", ratio]
        lines.append([what, place, row["provider"], *cells])
    return table(["", "n", "", "us a token", "p99", "of ours"], lines)
