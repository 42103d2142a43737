"""Clocks, repetition, statistics and the two ceilings of a device.

Contenders are timed in turns (A, B, A, B, …) in one process, each behind a write that flushes the L2 cache;
a result is the median with its 20th and 80th percentile.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]

LEAST, MOST = 5, 40
UNITS = {"ms": 1e3, "us": 1e6}
WARM_UP = 3


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of so many repeats, in milliseconds or another unit."""

    median: float
    p20: float
    p80: float
    repeats: int
    unit: str = "ms"

    def row(self) -> dict[str, Any]:
        return asdict(self)


def spread(seconds: list[float], unit: str = "ms") -> Spread:
    # Inclusive: of few repeats the other method makes percentiles outside of what was seen.
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    median, low, high = (float(f"{UNITS[unit] * value:.5g}") for value in (statistics.median(seconds), low, high))
    return Spread(median, low, high, len(seconds), unit)


def pair_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the pairs that were timed one after the other: drift of the clocks cancels."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


class Clock:
    """Times work on one device: by events on a GPU, by the host's clock on a CPU.

    Args:
        device: where the work runs.
        flush: whether to overwrite the L2 cache before each measurement.
    """

    def __init__(self, device: torch.device, flush: bool = True):
        self.device = device
        self.flushed = None
        if device.type == "cuda" and flush:
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self.flushed = torch.empty(4 * size, dtype=torch.uint8, device=device)

    def seconds(self, work: Work, calls: int = 1) -> float:
        """Seconds of one call of ``work``, the mean of ``calls`` back to back."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                work()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.flushed is not None:
            self.flushed.zero_()
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def each(self, work: Work, calls: int) -> list[float]:
        """Seconds of every one of ``calls`` calls in a row, on a GPU without a gap between them."""
        if self.device.type != "cuda":
            return [self.seconds(work) for _ in range(calls)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(marks)]


def take_turns(
    works: Mapping[str, Work],
    clock: Clock,
    budget: float = 1.0,
    calls: int = 1,
    least: int = LEAST,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Seconds of every work, timed in turns after a warm-up.

    Args:
        works: by name.
        clock: what times them.
        budget: seconds to spend, within ``least`` and `MOST` rounds.
        calls: as `Clock.seconds` takes them.
        least: rounds at least.
        warm_up: calls of each before the first that counts; one at least.
    """
    for _ in range(warm_up - 1):
        for work in works.values():
            work()
    once = sum(clock.seconds(work, calls) for work in works.values()) * calls
    rounds = min(max(int(budget / max(once, 1e-9)), least), MOST)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(clock.seconds(work, calls))
    return taken


def release(device: torch.device) -> None:
    """Give unused memory back, so that the next shape starts from the same point."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> float:
    """Memory that a measurement may fill: what is free on a GPU, three quarters of it on the host."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 2e9
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return 0.75 * 1024 * float(fields["MemAvailable"].split()[0])


def graphed(work: Work, device: torch.device) -> Work:
    """``work`` as one CUDA graph, replayed; ``work`` itself where there are no such graphs."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay(_kept: object = kept) -> None:
        graph.replay()

    return replay


def copy(clock: Clock, size: int) -> Spread:
    """A device-to-device copy of ``size`` bytes; bytes read and written, 2·size, over its time is the ceiling."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return spread(take_turns({"copy": lambda: target.copy_(source)}, clock)["copy"])


def product(clock: Clock, size: int, dtype: torch.dtype) -> Spread:
    """A ``size``³ matrix product on random data; 2·size³ over its time is the ceiling."""
    left, right = (torch.randn(size, size, dtype=dtype, device=clock.device) for _ in range(2))
    out = torch.empty_like(left)
    return spread(take_turns({"product": lambda: torch.mm(left, right, out=out)}, clock)["product"])
