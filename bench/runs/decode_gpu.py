"""What `decode` measures on a GPU: a token of layers in a row, as a CUDA graph, beside attention over a KV cache.

A graph is one token of several layers, as in a model, so that the weights of none are in the L2 cache when its turn
comes. A measurement of ours is a run of tokens from n on: on average one merge a token. Microseconds are those of one
layer and token.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.close import TOLERANCE, error
from bench.contenders.shapes import cache_bytes, decode_bytes
from bench.contenders.streams import made_up
from bench.errors import first_line
from bench.measure.contender import OURS
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.measure.timing import LEAST, Clock, Work, free_bytes, graphed, pair_ratio, spread, take_turns
from lmn_kernels import LogarithmicMixing, decode_
from lmn_kernels.backend.choice import why_not

# Embedding and batch, by importance: the goals are of the first two.
ORDER = [(1024, 1), (1024, 32), (512, 1), (512, 32), (4096, 1), (1024, 256), (512, 256), (4096, 32), (4096, 256)]
LENGTHS = (1 << 10, 1 << 15, 1 << 17, 1 << 20)
NEAR, MIDDLE, FAR = 1 << 10, 1 << 17, 1 << 20
CACHE, APART = "KV cache", "ours, rows apart"
# Layers that take turns at least, and the multiple of the L2 cache that they read before the first comes again.
LAYERS, CACHES = 8, 4
TURN, SECONDS = 64, 3.0
# Bytes that no KV cache takes: weights, states and workspaces are there.
RESERVE = 10e9


@dataclass(frozen=True)
class Sizes:
    """A layer and a batch; in a rehearsal tiny ones in their place."""

    embedding: int
    batch: int
    quick: bool

    @property
    def width(self) -> int:
        return max(16, self.embedding // 64) if self.quick else self.embedding

    @property
    def heads(self) -> int:
        return 2 if self.quick else self.embedding // (128 if self.embedding > 1024 else 64)

    @property
    def rows(self) -> int:
        return (1 + self.batch.bit_length()) // 2 if self.quick else self.batch

    def length(self, n: int) -> int:
        return 8 * n.bit_length() if self.quick else n

    def cache(self, n: int, itemsize: int = 2) -> int:
        """Bytes of a KV cache."""
        return cache_bytes(self.rows, self.width, self.length(n)) * itemsize // 2


def layers_for(each: int, l2: int) -> int:
    """How many layers that read ``each`` bytes a token take turns."""
    return max(LAYERS, math.ceil(CACHES * l2 / each))


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def turn_tokens(once: float) -> int:
    """Tokens of a measurement, a power of two: 64 where that takes at most a quarter of a second, else fewer, to 4."""
    tokens = TURN
    while tokens > 4 and tokens * once > 0.25:
        tokens //= 2
    return tokens


def allowed(dtype: torch.dtype) -> float:
    """Error of a layer, whose stages' roundings add up."""
    return 3 * TOLERANCE[dtype][0]


class Ours:
    """Layers, each with a state that ends where told."""

    def __init__(self, sizes: Sizes, context: Context):
        torch.manual_seed(0)
        self.sizes, self.dtype = sizes, context.dtype
        self.count = layers_for(decode_bytes(0, sizes.width, 1), l2_bytes(context.device))
        self.layers = [
            LogarithmicMixing(
                sizes.width, sizes.heads, init="variance_preserving", backend="reference", step_backend="cpp",
                dtype=self.dtype, device=context.device,
            )
            for _ in range(self.count)
        ]  # fmt: skip
        self.weights = [layer.step_weights() for layer in self.layers]
        self.position = torch.zeros(self.count, sizes.rows, dtype=torch.int64, device=context.device)
        last = 2 * sizes.length(FAR)
        pairs = zip(self.layers, self.position, strict=True)
        self.states = [made_up(layer, position, last, self.dtype) for layer, position in pairs]
        self.x = torch.randn(sizes.rows, 1, sizes.width, dtype=self.dtype, device=context.device)

    def token(self) -> list[Tensor]:
        """One token of every row in every layer."""
        pairs = zip(self.states, self.weights, strict=True)
        return [decode_(self.x, state, weights, backend="cpp") for state, weights in pairs]

    def turn(self, token: Work, where: Tensor, tokens: int) -> None:
        self.position.copy_(where)
        for _ in range(tokens):
            token()

    def where(self, n: int, apart: bool = False) -> Tensor:
        """``[B]``: every row at n, or one behind the other."""
        rows = torch.arange(self.sizes.rows, device=self.x.device)
        return self.sizes.length(n) + (rows if apart else torch.zeros_like(rows))

    def check(self) -> float:
        """The error against the reference in float32 at the end of a long chain.

        Raises:
            AssertionError: it is wrong: nothing of it is timed.
        """
        exact = copy.deepcopy(self.layers[0]).float().step_weights()
        start = self.states[0].replace(position=self.where(MIDDLE) - 1 - self.where(MIDDLE, True) % 8)
        expected = decode_(self.x.float(), start.to(dtype=torch.float32).clone(), exact, backend="reference")
        found = error(decode_(self.x, start.clone(), self.weights[0], backend="cpp"), expected)
        assert found <= allowed(self.dtype), f"error {found:.3g} is over {allowed(self.dtype):.3g}"
        return found


def backends(device: torch.device) -> dict[str, SDPBackend]:
    if device.type == "cuda":
        return {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {"math": SDPBackend.MATH}


def attention_weights(sizes: Sizes, context: Context) -> list[tuple[Tensor, Tensor]]:
    """Those of q, k and v in one, and of the output, of as many layers as may take turns."""
    size = sizes.width

    def matrix(rows: int) -> Tensor:
        return torch.randn(rows, size, dtype=context.dtype, device=context.device) * size**-0.5

    each = 4 * size * size * context.dtype.itemsize
    return [(matrix(3 * size), matrix(size)) for _ in range(layers_for(each, l2_bytes(context.device)))]


class Attention:
    """Attention layers over KV caches of n tokens: one product for q, k and v, a write, SDPA, one product.

    Each has a cache of its own as far as ``memory`` goes; those that must share one are far larger than any L2 cache.
    """

    def __init__(self, sizes: Sizes, n: int, memory: Tensor, weights: list[tuple[Tensor, Tensor]], context: Context):
        self.sizes, self.device, self.weights = sizes, context.device, weights
        size, taken = sizes.width, sizes.cache(n, context.dtype.itemsize)
        self.count = layers_for(4 * size * size * context.dtype.itemsize + taken, l2_bytes(self.device))
        shape = (2, sizes.rows, sizes.heads, sizes.length(n), size // sizes.heads)
        own, each = min(self.count, memory.nbytes // taken), taken // context.dtype.itemsize
        self.caches = [memory[i * each : (i + 1) * each].view(shape) for i in range(own)]
        self.x = torch.randn(sizes.rows, size, dtype=context.dtype, device=self.device)
        self.tried: Row = {}
        self.backend = self.fastest()

    def layer(self, index: int, backend: SDPBackend) -> Tensor:
        keys, values = cache = self.caches[index % len(self.caches)]
        project, out = self.weights[index]
        qkv = F.linear(self.x, project).view(self.sizes.rows, 3, self.sizes.heads, -1)
        cache[:, :, :, -1].copy_(qkv[:, 1:].transpose(0, 1))
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(qkv[:, 0, :, None], keys, values, is_causal=False)
        return F.linear(mixed.reshape(self.x.shape), out)

    def token(self) -> list[Tensor]:
        return [self.layer(index, self.backend) for index in range(self.count)]

    def fastest(self) -> SDPBackend:
        """The fastest backend that is right; ``tried`` tells what each took, or why it did not run.

        Raises:
            RuntimeError: there is none.
        """
        clock, found = Clock(self.device, flush=False), {}
        for name, backend in backends(self.device).items():
            try:
                self.check(backend)
                work = graphed(functools.partial(self.layer, 0, backend), self.device)
                self.tried[f"{name}_us"] = round(1e6 * min(clock.seconds(work, 3) for _ in range(3)), 3)
                found[self.tried[f"{name}_us"]] = name
            except (RuntimeError, AssertionError) as reason:
                self.tried[name] = first_line(reason)
        if not found:
            raise RuntimeError(f"no backend of SDPA serves: {self.tried}")
        self.tried["sdpa"] = found[min(found)]
        return backends(self.device)[found[min(found)]]

    def check(self, backend: SDPBackend) -> None:
        """Compare the last head of the last row with its definition: there a 32-bit offset would have overflowed.

        Raises:
            AssertionError: it is wrong.
        """
        keys, values = self.caches[0]
        q = torch.randn_like(keys[:, :, :1])
        with sdpa_kernel(backend):
            got = F.scaled_dot_product_attention(q, keys, values, is_causal=False)[-1, -1, 0]
        k, v = keys[-1, -1].float(), values[-1, -1].float()
        expected = torch.softmax(k @ q[-1, -1, 0].float() * k.shape[1] ** -0.5, 0) @ v
        found = error(got, expected)
        assert found <= allowed(got.dtype), f"wrong by {found:.3g}"


def cache_memory(sizes: Sizes, context: Context) -> Tensor:
    """Random memory for the largest KV cache of a batch that fits, on a GPU beside `RESERVE`."""
    item = context.dtype.itemsize
    free = free_bytes(context.device) - RESERVE if context.device.type == "cuda" else 64e6
    most = max((taken for taken in (sizes.cache(n, item) for n in LENGTHS) if taken <= free), default=0)
    return torch.empty(most // item, dtype=context.dtype, device=context.device).normal_()


class Measurement:
    """One layer and batch at all lengths, both contenders and all lengths in turns."""

    def __init__(self, sizes: Sizes, context: Context):
        self.sizes, self.context = sizes, context
        self.clock = Clock(context.device, flush=False)

    def head(self, provider: str, n: int | None = None) -> Row:
        shape = {"batch": self.sizes.batch, "embedding": self.sizes.embedding, "heads": self.sizes.heads, "bank": 1}
        dtype = str(self.context.dtype).removeprefix("torch.")
        found = {"provider": provider, "operation": "step", "dtype": dtype, "shape": shape}
        return found if n is None else {**found, "position": n}

    @torch.no_grad()
    def rows(self) -> list[Row]:
        reason = why_not("cpp", "step", self.context.device, self.context.dtype)
        if reason is None:
            ours = Ours(self.sizes, self.context)
            try:
                wrong_by = ours.check()
            except AssertionError as wrong:
                reason = f"gate: {wrong}"
        if reason is not None:
            return [{**self.head(OURS, n), "gap": reason} for n in LENGTHS]
        token = graphed(ours.token, self.context.device)
        tokens = 4 if self.context.quick else turn_tokens(min(self.clock.seconds(token) for _ in range(3)))
        return [*self.timed(ours, token, tokens, wrong_by), *self.tail(ours, token)]

    def timed(self, ours: Ours, token: Work, tokens: int, wrong_by: float) -> list[Row]:
        """Rows of all lengths, and how much longer a far token takes than a near one."""
        sizes = self.sizes
        # Its work, the layers times tokens of a call of it, and its row.
        found: dict[tuple[str, int], tuple[Work, int, Row]] = {}
        gaps = []
        memory, weights = cache_memory(sizes, self.context), attention_weights(sizes, self.context)
        for n in LENGTHS:
            moved = decode_bytes(sizes.rows, sizes.width, sizes.length(n))
            facts = {"bytes": moved, "tokens": tokens, "layers": ours.count, "backend": "cpp"}
            facts |= {"error": float(f"{wrong_by:.3g}"), "tolerance": allowed(ours.dtype)}
            for name in (OURS, APART) if n == MIDDLE and sizes.rows > 1 else (OURS,):
                turn = functools.partial(ours.turn, token, ours.where(n, apart=name == APART), tokens)
                found[name, n] = turn, tokens * ours.count, self.head(name, n) | facts
            try:
                work, count, facts = self.cached(n, memory, weights)
                found[CACHE, n] = work, count, self.head(CACHE, n) | facts
            except RuntimeError as reason:
                gaps.append({**self.head(CACHE, n), "gap": first_line(reason)})
        works = {f"{name}/{n}": work for (name, n), (work, _, _) in found.items()}
        taken = take_turns(works, self.clock, 0 if self.context.quick else SECONDS)
        each = {key: [s / count for s in taken["{}/{}".format(*key)]] for key, (_, count, _) in found.items()}
        rows = []
        for (name, n), (_, _, row) in found.items():
            rows.append({**row, **spread(each[name, n], "us").row()})
            rows[-1]["gbs"] = round(row["bytes"] / rows[-1]["median"] / 1e3, 3)
            if name != OURS:
                rows[-1]["ratio"] = float(f"{pair_ratio(each[name, n], each[OURS, n]):.4g}")
        far = pair_ratio(each[OURS, FAR], each[OURS, NEAR])
        return [*rows, *gaps, {**self.head(OURS), "fact": "far_over_near", "value": round(far, 3)}]

    def cached(self, n: int, memory: Tensor, weights: list[tuple[Tensor, Tensor]]) -> tuple[Work, int, Row]:
        """Attention at a length: its work, its layers, and what its row tells.

        Raises:
            RuntimeError: it cannot run.
        """
        sizes, item = self.sizes, self.context.dtype.itemsize
        taken = sizes.cache(n, item)
        if taken > memory.nbytes:
            raise RuntimeError(f"a cache of {taken / 1e9:.3g} GB does not fit, with {RESERVE / 1e9:.0f} GB to spare")
        kv = Attention(sizes, n, memory, weights, self.context)
        facts = {"bytes": 4 * item * sizes.width**2 + taken, "layers": kv.count, "caches": len(kv.caches)}
        return graphed(kv.token, self.context.device), kv.count, facts | kv.tried

    def tail(self, ours: Ours, token: Work) -> list[Row]:
        """Tokens one by one: the one that merges on every level, and the 99th percentile of many in a row."""
        worst: list[float] = []
        while len(worst) < LEAST:
            ours.turn(token, ours.where(FAR) - 1, 0)
            worst.append(self.clock.seconds(token) / ours.count)
        ours.turn(token, ours.where(MIDDLE), 0)
        count = 100 if self.context.quick else 512
        singles = [1e6 * second / ours.count for second in self.clock.each(token, count)]
        median, p99 = statistics.median(singles), statistics.quantiles(singles, n=100)[98]
        head = self.head(OURS)
        return [
            {**head, "fact": "worst_token", "value": spread(worst, "us").median, "unit": "us", "at": FAR},
            {
                **head, "fact": "p99_over_median", "value": round(p99 / median, 3), "at": MIDDLE, "repeats": count,
                "median_us": float(f"{median:.4g}"), "p99_us": float(f"{p99:.4g}"),
            },
        ]  # fmt: skip


def cases(context: Context) -> list[Case]:
    found = []
    for embedding, batch in ORDER:
        measurement = Measurement(Sizes(embedding, batch, context.quick), context)
        found.append(Case(f"E={embedding}/B={batch}", measurement.rows))
    return found
