"""What the GPU check times of decoding: a layer's step against attention over a KV cache, both as CUDA graphs.

A graph is one token of several layers in a row, as in a model, so that the weights of none are in the L2 cache
when its turn comes. A measurement of ours is a run of 64 tokens from n on: on average one merge a token. Keys of
rows end in the sizes: ``decode/kv/B=1 E=1024 n=32768``, microseconds a layer and token.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.close import error
from bench.contenders.shapes import cache_bytes, decode_bytes, decode_name
from bench.measure import timing
from bench.measure.timing import LEAST, WARM_UP, Clock, Work, graphed, pair_ratio, spread, take_turns
from lmn_kernels import LogarithmicMixing, decode_

from .decode import extension, made_up
from .stage import Report, Row, Settings
from .timings import DTYPE, SAME, attempt, backends, first_line

# Embedding and batch, by importance: the goals are of the first two.
ORDER = [(1024, 1), (1024, 32), (512, 1), (512, 32), (4096, 1), (1024, 256), (512, 256), (4096, 32), (4096, 256)]
LENGTHS = (1 << 15, 1 << 17, 1 << 20, 1 << 10)
NEAR, MIDDLE, FAR = 1 << 10, 1 << 17, 1 << 20
# Layers that take turns at least, and the multiple of the L2 cache that they read before the first comes again.
LAYERS, CACHES = 8, 4
TURN = 64
# Bytes that no KV cache takes: weights, states and workspaces are there.
RESERVE = 10e9
# Seconds without which no other size is begun.
SETTING_UP = 6


@dataclass(frozen=True)
class Sizes:
    """A layer and a batch; tiny ones under the same names in a rehearsal."""

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

    def name(self, n: int) -> str:
        return decode_name(self.batch, self.embedding, n)

    def cache(self, n: int) -> int:
        """Bytes of a KV cache."""
        return cache_bytes(self.rows, self.width, self.length(n))


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


class Ours:
    """Layers, each with a state that ends where told."""

    def __init__(self, sizes: Sizes, settings: Settings):
        torch.manual_seed(0)
        device, self.sizes = settings.torch_device, sizes
        self.count = layers_for(decode_bytes(0, sizes.width, 1), l2_bytes(device))
        self.layers = [
            LogarithmicMixing(
                sizes.width, sizes.heads, init="variance_preserving", backend="reference", step_backend="cpp",
                dtype=DTYPE, device=device,
            )
            for _ in range(self.count)
        ]  # fmt: skip
        self.weights = [layer.step_weights() for layer in self.layers]
        self.position = torch.zeros(self.count, sizes.rows, dtype=torch.int64, device=device)
        last = 2 * sizes.length(FAR)
        self.states = [made_up(layer, p, DTYPE, last) for layer, p in zip(self.layers, self.position, strict=True)]
        self.x = torch.randn(sizes.rows, 1, sizes.width, dtype=DTYPE, device=device)

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

    def check(self, report: Report) -> None:
        """Compare with the reference in float32 at the end of a long chain: what disagrees is not timed.

        Raises:
            ValueError: a result is wrong.
        """
        exact = copy.deepcopy(self.layers[0]).float().step_weights()
        start = replace(self.states[0], position=self.where(MIDDLE) - 1 - self.where(MIDDLE, True) % 8)
        expected = decode_(self.x.float(), start.to(dtype=torch.float32).clone(), exact, backend="reference")
        found = error(decode_(self.x, start.clone(), self.weights[0], backend="cpp"), expected)
        report({"case": f"ours at {self.sizes.name(MIDDLE)}", "error": found, "layers": self.count})
        if not found <= SAME:
            raise ValueError(f"error {found:.3g} is over {SAME:.3g}: no time is reported")


def attention_weights(sizes: Sizes, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Those of q, k and v in one, and of the output, of as many layers as may take turns."""
    size = sizes.width

    def matrix(rows: int) -> Tensor:
        return torch.randn(rows, size, dtype=DTYPE, device=device) * size**-0.5

    return [(matrix(3 * size), matrix(size)) for _ in range(layers_for(8 * size * size, l2_bytes(device)))]


class Attention:
    """Attention layers over KV caches of n tokens: one product for q, k and v, a write, SDPA, one product.

    Each has a cache of its own as far as ``memory`` goes; those that must share one are far larger than any L2 cache.
    """

    def __init__(self, sizes: Sizes, n: int, memory: Tensor, weights: list[tuple[Tensor, Tensor]], settings: Settings):
        device, size = settings.torch_device, sizes.width
        self.sizes, self.settings, self.weights, taken = sizes, settings, weights, sizes.cache(n)
        self.count = layers_for(8 * size * size + taken, l2_bytes(device))
        shape = (2, sizes.rows, sizes.heads, sizes.length(n), size // sizes.heads)
        own = min(self.count, memory.nbytes // taken)
        self.caches = [memory[i * taken // 2 : (i + 1) * taken // 2].view(shape) for i in range(own)]
        self.x = torch.randn(sizes.rows, size, dtype=DTYPE, device=device)
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
        clock, found = Clock(self.settings.torch_device, flush=False), {}
        for name, backend in backends(self.settings).items():
            try:
                self.check(backend)
                work = graphed(functools.partial(self.layer, 0, backend), self.settings.torch_device)
                self.tried[name] = 1e6 * min(clock.seconds(work, 3) for _ in range(3))
                found[self.tried[name]] = name
            except (RuntimeError, ValueError) as reason:
                self.tried[name] = first_line(reason)
        if not found:
            raise RuntimeError(f"no backend of SDPA serves: {self.tried}")
        self.tried["backend"] = found[min(found)]
        return backends(self.settings)[found[min(found)]]

    def check(self, backend: SDPBackend) -> None:
        """Compare the last head of the last row with its definition: there a 32-bit offset would have overflowed.

        Raises:
            ValueError: it is wrong.
        """
        keys, values = self.caches[0]
        q = torch.randn_like(keys[:, :, :1])
        with sdpa_kernel(backend):
            got = F.scaled_dot_product_attention(q, keys, values, is_causal=False)[-1, -1, 0]
        k, v = keys[-1, -1].float(), values[-1, -1].float()
        expected = torch.softmax(k @ q[-1, -1, 0].float() * k.shape[1] ** -0.5, 0) @ v
        found = error(got, expected)
        if not found <= SAME:
            raise ValueError(f"wrong by {found:.3g}")


def cache_memory(settings: Settings) -> Tensor:
    """Random memory for the largest KV cache that fits, on a GPU beside `RESERVE`."""
    device = settings.torch_device
    free = timing.free_bytes(device) - RESERVE if settings.device == "cuda" else 64e6
    wanted = [Sizes(*pair, settings.quick).cache(n) for pair in ORDER for n in LENGTHS]
    most = max((taken for taken in wanted if taken <= free), default=0)
    return torch.empty(most // 2, dtype=DTYPE, device=device).normal_()


@torch.no_grad()
def time_decode(settings: Settings, report: Report) -> None:
    """Stage: a token at every size, by importance and as long as time lasts."""
    extension(settings)
    end = time.monotonic() + settings.seconds - 5
    memory = cache_memory(settings)
    for embedding, batch in ORDER:
        what = f"decoding, B={batch} E={embedding}"
        if time.monotonic() + (0 if settings.quick else SETTING_UP) > end:
            report({"case": what, "skipped": "no time left"})
            continue
        sizes = Sizes(embedding, batch, settings.quick)
        attempt(report, what, settings.torch_device, one_size, sizes, memory, end, settings, report)


def one_size(sizes: Sizes, memory: Tensor, end: float, settings: Settings, report: Report) -> None:
    """One layer and batch at all lengths, both contenders and all lengths in turns."""
    device, clock = settings.torch_device, Clock(settings.torch_device, flush=False)
    ours = Ours(sizes, settings)
    ours.check(report)
    token = graphed(ours.token, device)
    tokens = 4 if settings.quick else turn_tokens(min(clock.seconds(token) for _ in range(3)))
    weights = attention_weights(sizes, device)
    # Work, layers times tokens of a call of it, and what else its row tells.
    found: dict[str, tuple[Work, int, Row]] = {}
    for n in LENGTHS:
        facts: Row = {"bytes": decode_bytes(sizes.rows, sizes.width, sizes.length(n))}
        facts |= {"tokens": tokens, "layers": ours.count}
        turn = functools.partial(ours.turn, token, ours.where(n), tokens)
        found[f"ours/{sizes.name(n)}"] = turn, tokens * ours.count, facts
        if n == MIDDLE and sizes.rows > 1:
            turn = functools.partial(ours.turn, token, ours.where(n, apart=True), tokens)
            found[f"apart/{sizes.name(n)}"] = turn, tokens * ours.count, facts | {"what": "rows at different positions"}
        if sizes.cache(n) > memory.nbytes:
            reason = f"a cache of {sizes.cache(n) / 1e9:.3g} GB does not fit, with {RESERVE / 1e9:.0f} GB to spare"
            report({"case": f"kv at {sizes.name(n)}", "skipped": reason})
            continue
        try:
            kv = Attention(sizes, n, memory, weights, settings)
            work = graphed(kv.token, device)
        except RuntimeError as reason:
            report({"case": f"kv at {sizes.name(n)}", "skipped": first_line(reason)})
            continue
        facts = {"bytes": 8 * sizes.width**2 + sizes.cache(n), "layers": kv.count, "caches": len(kv.caches)}
        found[f"kv/{sizes.name(n)}"] = work, kv.count, facts | {f"sdpa {k}": v for k, v in kv.tried.items()}
    works = affordable({name: work for name, (work, _, _) in found.items()}, clock, end, report)
    taken = take_turns(works, clock, 3 * settings.turn_seconds)
    each = {name: [second / found[name][1] for second in seconds] for name, seconds in taken.items()}
    for name, seconds in each.items():
        # A row is of milliseconds; of thousand times the seconds it is one of microseconds.
        row, facts = spread([1e3 * second for second in seconds]).row(f"decode/{name}"), found[name][2]
        report(row | {"unit": "us"} | facts | {"GB/s": round(facts["bytes"] / row["value"] / 1e3, 3)})
    ratios = {sizes.name(n): (f"kv/{sizes.name(n)}", f"ours/{sizes.name(n)}") for n in LENGTHS}
    ratios[f"far/{sizes.name(FAR)}"] = f"ours/{sizes.name(FAR)}", f"ours/{sizes.name(NEAR)}"
    for name, (slow, fast) in ratios.items():
        if slow in each and fast in each:
            value = float(f"{pair_ratio(each[slow], each[fast]):.4g}")
            report({"key": f"ratio/decode/{name}", "value": value, "unit": "x"})
    tail(ours, token, clock, end, settings, report)


def affordable(works: dict[str, Work], clock: Clock, end: float, report: Report) -> dict[str, Work]:
    """The first works that can have their fewest turns before ``end``."""
    kept: dict[str, Work] = {}
    cost = 0.0
    for name, work in works.items():
        if time.monotonic() + cost < end:
            cost += (WARM_UP + LEAST) * clock.seconds(work)
        if time.monotonic() + cost < end:
            kept[name] = work
        else:
            report({"case": name, "skipped": "no time left"})
    return kept


def tail(ours: Ours, token: Work, clock: Clock, end: float, settings: Settings, report: Report) -> None:
    """Tokens one by one: the 99th percentile of 512 in a row, and the one that merges on every level."""
    ours.turn(token, ours.where(FAR) - 1, 0)
    worst = clock.seconds(token)
    count = 100 if settings.quick else 512
    if time.monotonic() + (count + LEAST) * worst > end:
        report({"case": f"tail at {ours.sizes.name(MIDDLE)}", "skipped": "no time left"})
        return
    found = [worst]
    while len(found) < LEAST:
        ours.turn(token, ours.where(FAR) - 1, 0)
        found.append(clock.seconds(token))
    row = spread([1e3 * second / ours.count for second in found]).row(f"decode/worst/{ours.sizes.name(FAR)}")
    report(row | {"unit": "us", "what": "the token n = 2^20"})
    ours.turn(token, ours.where(MIDDLE), 0)
    singles = [1e6 * second / ours.count for second in clock.each(token, count)]
    median, p99 = statistics.median(singles), statistics.quantiles(singles, n=100)[98]
    facts = {"median us": median, "p99 us": p99, "repeats": count}
    name = ours.sizes.name(MIDDLE)
    report({"key": f"ratio/decode/p99/{name}", "value": round(p99 / median, 3), "unit": "x"} | facts)


def summary(values: Mapping[str, float]) -> list[str]:
    """For the table: a line for each layer and batch, its time a token, and how much longer attention takes."""
    lines = []
    for embedding, batch in ORDER:
        cells = []
        for n in sorted(LENGTHS):
            name = decode_name(batch, embedding, n)
            if f"decode/ours/{name}" in values:
                ratio = f" {values[key]:.3g}x" if (key := f"ratio/decode/{name}") in values else ""
                cells.append(f"{n >> 10}k {values[f'decode/ours/{name}']:.4g} us{ratio}")
        if cells:
            lines.append(f"decode B={batch} E={embedding}, against a KV cache: {', '.join(cells)}")
    return lines
