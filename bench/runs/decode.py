"""A token of a stream: ours against ATen loops, a KV cache, GRU and LSTM, far into a sequence; on a GPU, of many.

And a whole stream as the original is called, against its own algorithm.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.close import error
from bench.contenders import recurrent
from bench.contenders.aten_step import AtenStep
from bench.contenders.shapes import Shape
from bench.contenders.streams import CachedAttention, Recurrent, made_up
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.measure.timing import pair_ratio
from bench.report import chapters
from lmn_kernels import LogarithmicMixing, MemoryState, decode_
from lmn_kernels.backend.choice import why_not

from . import decode_gpu, decode_original

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
# Slower contenders whose tokens all cost alike get fewer of them a turn, to bring a turn to this.
TURN_SECONDS = 0.15
# Tokens that are checked where all are alike: the definition of a cache's attention reads it in float64.
FEW = 8
# Bytes of a cache that is read for every token.
LARGEST_CACHE = 1 << 30

Token = Callable[[Tensor], Tensor]


@dataclass
class Stream:
    """A contender.

    Attributes:
        token: ``x [T, E]`` → ``y [T, E]``, and on by as many positions.
        start: puts it at a position.
        expected: ``x [T, E]`` → ``[T, E]`` from that position, in float64 and by another route.
        uneven: whether one token costs more than another, as merging does.
        call: T, tokens of a call.
    """

    token: Token
    start: Callable[[int], None]
    expected: Callable[[Tensor], Tensor]
    uneven: bool = False
    call: int = 1


def add_arguments(add: Callable[..., Any]) -> None:
    """None of its own."""


def _state(layer: LogarithmicMixing, n: int) -> MemoryState:
    """The same for equal layers and positions, whoever asks."""
    torch.manual_seed(1)
    return made_up(layer, torch.tensor([n]), 4 * POSITIONS[-1])


def _layer(shape: Shape, dtype: torch.dtype, step_backend: str) -> LogarithmicMixing:
    torch.manual_seed(0)
    return LogarithmicMixing(
        shape.embedding, shape.heads, shape.bank, init="variance_preserving", dtype=dtype, step_backend=step_backend
    )


def _expected_step(layer: LogarithmicMixing, x: Tensor, n: int) -> Tensor:
    """Our step in float64 by the reference, on the same rounded weights and the same state."""
    exact = LogarithmicMixing(layer.embedding, layer.heads, layer.bank, backend="reference", dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    state, ys = _state(layer, n).to(dtype=torch.float64), []
    for token in x.double().split(1):
        y, state = exact.step(token[None], state)
        ys.append(y[0])
    return torch.cat(ys)


class Ours:
    """Our step in one of its faces."""

    def __init__(self, layer: LogarithmicMixing, face: str):
        self.layer, self.face = layer, face
        self.state = _state(layer, 1)
        self.weights = layer.step_weights()

    def start(self, n: int) -> None:
        self.state = _state(self.layer, n)

    def __call__(self, x: Tensor) -> Tensor:
        if self.face == "operation":
            return decode_(x[None], self.state, self.weights)[0]
        y, self.state = self.layer.step(x[None], self.state)
        return y[0]


def streams(shape: Shape, dtype: torch.dtype, n: int) -> dict[str, Stream | str]:
    """Every contender, or why it cannot run."""
    layer = _layer(shape, dtype, "auto")

    known: list[Tensor] = []

    def expected(x: Tensor) -> Tensor:
        if not known:
            known.append(_expected_step(layer, x, n))
        return known[0]

    found: dict[str, Stream | str] = {}
    reason = why_not("cpp", "step", torch.device("cpu"), dtype)
    if reason:
        found["ours"] = found[OPERATION] = found[MANY] = reason
    else:
        for name, face, call in (("ours", "layer", 1), (OPERATION, "operation", 1), (MANY, "operation", RUN)):
            ours = Ours(_layer(shape, dtype, "cpp"), face)
            found[name] = Stream(ours, ours.start, expected, True, call)
    reference = Ours(_layer(shape, dtype, "reference"), "layer")
    found["reference"] = Stream(reference, reference.start, expected, True)
    for name, fused in (("ATen loop", False), ("ATen loop, fused", True)):
        found[name] = _aten(layer, fused, expected)
    for kept in (dtype,) if dtype == torch.float32 else (dtype, torch.float32):
        # Elsewhere than in our step, PyTorch's bfloat16 is slow on many CPUs: its float32 is the stronger contender.
        tag = "" if kept == dtype else ", float32"
        cache = 2 * n * shape.embedding * kept.itemsize
        for name, fused in ((f"KV cache{tag}", False), (f"KV cache, fused{tag}", True)):
            if cache > LARGEST_CACHE:
                found[name] = f"not tried: a cache of {cache / 1e9:.2g} GB is read for every token"
                continue
            cached = CachedAttention(layer, n + RUN, fused, kept)
            found[name] = Stream(cached, cached.start, partial(_expected_cached, cached, n))
        for name, kind in ((f"GRU{tag}", nn.GRU), (f"LSTM{tag}", nn.LSTM)):
            found[name] = _recurrent(kind, shape.embedding, kept)
    return found


def _aten(layer: LogarithmicMixing, fused: bool, expected: Callable[[Tensor], Tensor]) -> Stream:
    kept: list[AtenStep] = []

    def start(n: int) -> None:
        kept[:] = [AtenStep(layer, _state(layer, n), fused)]

    return Stream(lambda x: kept[0](x), start, expected, True)


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


def calls(token: Token, x: Tensor, call: int = 1) -> list[float]:
    """Seconds a token of each call, over so many tokens of ``x [T, E]`` each."""
    times = []
    for tokens in x.split(call):
        start = time.perf_counter()
        token(tokens)
        times.append((time.perf_counter() - start) / len(tokens))
    return times


def check(stream: Stream, x: Tensor, n: int) -> float:
    """The error over a few tokens.

    Raises:
        AssertionError: it is wrong.
    """
    stream.start(n)
    got = torch.cat([stream.token(tokens) for tokens in x.split(stream.call)])
    found = error(got, stream.expected(x))
    limit = TOLERANCE[x.dtype]
    assert found <= limit, f"error {found:.3g} is over {limit:.3g}"
    return found


def _head(provider: str, shape: Shape, dtype: torch.dtype) -> Row:
    sizes = {"batch": 1, "embedding": shape.embedding, "heads": shape.heads, "bank": shape.bank}
    return {"provider": provider, "operation": "step", "dtype": str(dtype).removeprefix("torch."), "shape": sizes}


@torch.inference_mode()
def at_position(shape: Shape, dtype: torch.dtype, n: int, turns: int) -> list[Row]:
    """All contenders in turns at one position."""
    able: dict[str, Stream] = {}
    rows: dict[str, Row] = {}
    torch.manual_seed(4)
    x = torch.randn(RUN, shape.embedding).to(dtype)
    for name, stream in streams(shape, dtype, n).items():
        rows[name] = {**_head(name, shape, dtype), "position": n}
        if isinstance(stream, str):
            rows[name]["gap"] = stream
            continue
        try:
            wrong_by = check(stream, x[: TURN if stream.uneven else FEW], n)
            rows[name] |= {"error": float(f"{wrong_by:.3g}"), "tolerance": TOLERANCE[dtype]}
            able[name] = stream
        except AssertionError as wrong:
            rows[name]["gap"] = f"gate: {wrong}"
    taken = _turns(able, x, n, turns)
    for name, found in taken.items():
        rows[name] |= _spread(found)
        if name != "ours" and "ours" in taken:
            rows[name]["ratio"] = float(f"{pair_ratio(_means(found), _means(taken['ours'])):.4g}")
    return list(rows.values())


def _turns(able: dict[str, Stream], x: Tensor, n: int, turns: int) -> dict[str, list[list[float]]]:
    """Seconds a token of every call of every turn."""
    taken: dict[str, list[list[float]]] = {name: [] for name in able}
    tokens = {name: max(TURN, stream.call) for name, stream in able.items()}
    for turn in range(turns + 2):
        for name, stream in able.items():
            stream.start(n)
            found = calls(stream.token, x[: tokens[name]], stream.call)
            if turn >= 2:
                taken[name].append(found)
            elif not stream.uneven:  # the first ones warm up, and tell how many tokens fit
                tokens[name] = max(4, min(TURN, int(TURN_SECONDS / statistics.median(found))))
    return taken


def _means(turns: list[list[float]]) -> list[float]:
    return [statistics.fmean(found) for found in turns]


def _spread(turns: list[list[float]]) -> Row:
    """Microseconds a token: median and percentiles over the means of turns; typical and 99th over single calls.

    Every second token merges nothing, so a median over tokens stands between two kinds of them.
    """
    low, *_, high = statistics.quantiles(_means(turns), n=5, method="inclusive")
    single = sorted(second for found in turns for second in found)
    found = {"median": statistics.median(_means(turns)), "p20": low, "p80": high}
    found |= {"typical": statistics.median(single), "p99": single[math.ceil(0.99 * len(single)) - 1]}
    rounded = {name: float(f"{1e6 * second:.4g}") for name, second in found.items()}
    return {**rounded, "unit": "us", "repeats": len(turns)}


@torch.inference_mode()
def facts(shape: Shape, dtype: torch.dtype, turns: int) -> list[Row]:
    """How much longer a far token takes than a near one, and the share of a matrix-vector product's bandwidth."""
    reason = why_not("cpp", "step", torch.device("cpu"), dtype)
    head = _head("ours", shape, dtype)
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
        singles.append(statistics.fmean(calls(near, x)))
        ratios.append(statistics.fmean(calls(far, x)) / singles[-1])
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
    if context.on_gpu:
        return decode_gpu.cases(context)
    turns = 3 if context.quick else 12
    positions = POSITIONS[:2] if context.quick else POSITIONS
    found = []
    # The widest takes longer than all others.
    for shape, dtype in LAYERS[:-1] if context.quick else LAYERS:
        for n in positions:
            found.append(Case(f"{shape.name}/{n}", partial(at_position, shape, dtype, n, turns)))
        found.append(Case(f"{shape.name}/facts", partial(facts, shape, dtype, turns)))
    length = 256 if context.quick else 2048
    for bank in decode_original.BANKS:
        found.append(Case(f"original/{bank}", partial(decode_original.stream, bank, length, turns)))
    return found


show = chapters.decode
