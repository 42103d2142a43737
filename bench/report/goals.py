"""The goals of docs/costs.md, beside what the rows of a GPU say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure.journal import Row

from .tables import OURS, measured, number, table, text

Results = Mapping[str, Sequence[Row]]
"""Rows by run."""
Read = Callable[[Results], float | None]


@dataclass(frozen=True)
class Goal:
    """One bar.

    Attributes:
        number: of the goal there.
        what: what is measured.
        low, high: the bar: at least, at most, or both.
        limit: what the notes hold to be possible.
        read: the value, or None where a measurement that it needs is missing.
    """

    number: int
    what: str
    low: float | None
    high: float | None
    limit: str
    read: Read

    @property
    def bar(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"≥ {self.low:g}" if self.low is not None else f"≤ {self.high:g}"

    def met(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def _find(results: Results, run: str, field: str, **wanted: object) -> float | None:
    """A number of the first row that has it and is of what is ``wanted``, sizes of its shape among that."""
    for row in results.get(run, ()):
        flat, found = {**row, **(row.get("shape") or {})}, measured(field)(row)
        if found is not None and all(flat.get(name) == value for name, value in wanted.items()):
            return found
    return None


def _training(field: str, provider: str, shape: str, mode: str | None = None) -> Read:
    wanted: dict[str, Any] = {"operation": "layer", "direction": "training", "provider": provider, "mode": mode}
    return lambda results: _find(results, "kernels", field, name=shape, **wanted)


def _ratio(provider: str, shape: str, mode: str | None = None) -> Read:
    return _training("ratio", provider, shape, mode)


def _over(more: Read, less: Read) -> Read:
    def read(results: Results) -> float | None:
        above, below = more(results), less(results)
        return above / below if above is not None and below else None

    return read


def _peaks(more: str, less: str, shape: str) -> Read:
    return _over(_training("peak_bytes", more, shape), _training("peak_bytes", less, shape))


def _gigabytes(provider: str, shape: str) -> Read:
    return _over(_training("peak_bytes", provider, shape), lambda _: 1e9)


def _copy_share(shape: str, direction: str) -> Read:
    """Of attention, which memory bounds: its floor over its time."""
    wanted = {"operation": "attention", "direction": direction, "provider": OURS, "name": shape}
    return lambda results: _find(results, "kernels", "share", **wanted)


def _product(shape: str) -> Read:
    wanted = {"operation": "tree", "direction": "forward", "provider": "one product", "name": shape}
    return lambda results: _find(results, "kernels", "ratio", **wanted)


def _runs(results: Results) -> float | None:
    return None if _training("median", OURS, "M")(results) is None else 1.0


def _crossover(results: Results) -> float | None:
    """The shortest length from which on ours wins; infinite where the longest rows lose."""
    for row in results.get("crossover", ()):
        if "crossover" in row:
            return math.inf if row["crossover"] is None else float(row["crossover"])
    return None


def _slope(results: Results) -> float | None:
    return _find(results, "scaling", "slope", provider=OURS, direction="training")


def _cache(batch: int, n: int) -> Read:
    wanted = {"provider": "KV cache", "batch": batch, "embedding": 1024, "position": n}
    return lambda results: _find(results, "decode", "ratio", **wanted)


def _fact(name: str) -> Read:
    return lambda results: _find(results, "decode", "value", fact=name, batch=1, embedding=1024)


_CACHED = [(1, 32, 4, "4.7"), (1, 128, 12, "16"), (1, 1024, 80, "118"), (32, 32, 80, "111"), (32, 128, 300, "438")]
GOALS = [
    Goal(1, "naive / ours, training at C", 10, None, "10.5", _ratio("materialised", "C")),
    Goal(1, "naive / ours, training at D", 14, None, "15.6", _ratio("materialised", "D")),
    Goal(1, "M runs, where naive needs 132 GB", 1, None, "1", _runs),
    Goal(2, "compiled naive / ours, training at C", 5, None, "7, weak", _ratio("materialised, compiled", "C")),
    Goal(3, "flash layer / ours, training at C", 7, None, "10.6", _ratio("sdpa-flash", "C")),
    Goal(3, "cuDNN layer / ours, training at C", 4.5, None, "7.0", _ratio("sdpa-cudnn", "C")),
    Goal(3, "flash layer / ours, training at D", 20, None, "28", _ratio("sdpa-flash", "D")),
    Goal(3, "cuDNN layer / ours, training at D", 13, None, "18", _ratio("sdpa-cudnn", "D")),
    Goal(3, "crossover with attention, L at 32k tokens", None, 4096, "-", _crossover),
    Goal(4, "GLA layer / ours, training at C", 1.25, None, "1.7", _ratio("gla", "C")),
    Goal(4, "simple GLA layer / ours, training at C", 1.1, None, "1.5", _ratio("simple-gla", "C")),
    Goal(4, "GDN layer / ours, training at C", 1.5, None, "2.3", _ratio("gated-delta-rule", "C")),
    Goal(4, "log-linear layer / ours, training at C", 3, None, "unknown", _ratio("log-linear", "C")),
    Goal(5, "attend forward at C, share of copy", 0.85, None, "1", _copy_share("C", "forward")),
    Goal(5, "attend forward at D, share of copy", 0.85, None, "1", _copy_share("D", "forward")),
    Goal(5, "attend backward at C, share of copy", 0.75, None, "1", _copy_share("C", "backward")),
    Goal(5, "attend backward at D, share of copy", 0.75, None, "1", _copy_share("D", "backward")),
    Goal(6, "one product / tree forward at C", 0.85, None, "0.87", _product("C")),
    Goal(6, "one product / tree forward at D", 0.93, None, "0.97", _product("D")),
    Goal(7, "peak memory, naive / ours at C", 6, None, "6.4", _peaks("materialised", OURS, "C")),
    Goal(7, "peak memory, naive / ours at D", 9, None, "10", _peaks("materialised", OURS, "D")),
    Goal(7, "peak memory at M, GB", None, 20, "16", _gigabytes(OURS, "M")),
    Goal(7, "peak memory, naive / lean at C", 12, None, "14", _peaks("materialised", "ours, lean", "C")),
    Goal(7, "peak memory, naive / lean at D", 18, None, "22", _peaks("materialised", "ours, lean", "D")),
    Goal(7, "peak memory at M, lean, GB", None, 10, "7.5", _gigabytes("ours, lean", "M")),
    Goal(7, "lean / ours, training at C", None, 1.25, "1.21", _ratio("ours, lean", "C")),
    Goal(7, "lean / ours, training at D", None, 1.25, "1.19", _ratio("ours, lean", "D")),
    *(
        Goal(8, f"KV cache / ours, a token, B={batch}, n={k}k", bar, None, limit, _cache(batch, k << 10))
        for batch, k, bar, limit in _CACHED
    ),
    Goal(8, "a token at n=1M / at n=1k, B=1", None, 1.2, "1", _fact("far_over_near")),
    Goal(8, "99th percentile / median of a token, B=1", None, 3, "-", _fact("p99_over_median")),
    Goal(9, "slope of log time over log L", 0.95, 1.03, "1", _slope),
    Goal(9, "staged floor / ours, training at C", 0.75, None, "1", _training("share", OURS, "C")),
    Goal(9, "staged floor / ours, training at D", 0.75, None, "1", _training("share", OURS, "D")),
    Goal(9, "staged floor / ours, training at M", 0.75, None, "1", _training("share", OURS, "M")),
    Goal(10, "naive / ours, training at P, both graphs", 8, None, "14 to 17", _ratio("materialised", "P", "graph")),
    Goal(10, "naive / ours, training at P, both eager", 7, None, "14", _ratio("materialised", "P", "eager")),
]
# What section 6 asks for beyond this list, and why it is not on it.
NOT_MEASURED = "goal 3 at M (attention takes 10 s a pass), goal 8 against fla, goal 10's step on a CPU"


def goal_rows(results: Results, real: bool = True) -> list[dict[str, Any]]:
    """Every goal with what was measured, and whether it is met; a rehearsal, which is not ``real``, meets none."""
    rows = []
    for goal in GOALS:
        value = goal.read(results)
        met = goal.met(value) if real and value is not None else None
        shown = value if value is None or math.isfinite(value) else str(value)
        row = {"goal": goal.number, "what": goal.what, "bar": goal.bar, "limit": goal.limit}
        rows.append(row | {"measured": shown, "met": met})
    return rows


def chapter(results: Results) -> str:
    """The goals as Markdown."""
    met = {True: "yes", False: "no", None: ""}
    lines = []
    for row in goal_rows(results):
        shown = text(row["measured"]) if isinstance(row["measured"], str) else number(row["measured"])
        lines.append([str(row["goal"]), row["what"], row["bar"], row["limit"], shown, met[row["met"]]])
    goals = table(["goal", "what", "bar", "limit", "measured", "met"], lines, 2)
    return f"{goals}\n\nNot measured: {text(NOT_MEASURED)}."
