"""The paper's Figure 9: time of its network and of attention over length, sequential and parallel (E=32, 1 head)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.close import TOLERANCE, error
from bench.contenders.providers import compare
from bench.contenders.shapes import Shape
from bench.contenders.streams import CachedAttention, RecomputedAttention
from bench.measure.comparison import Comparison, Limits
from bench.measure.gate import FORWARD
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.measure.timing import spread
from bench.report.terminal import timed_table
from lmn_kernels import LogarithmicMixing
from lmn_kernels.backend.choice import why_not

SHAPE = Shape("", 1, 1, 32, 1, 1)
PARALLEL = ("ours", "materialised", "sdpa-math", "sdpa-flash")
# The paper's attention is the one that makes its matrix of scores.
NAMES = {"sdpa-math": "attention", "sdpa-flash": "attention, flash"}
OURS, RECOMPUTED, CACHED = "ours", "attention", "attention, cached"
SHORTEST, LONGEST, QUICK_LONGEST = 5, 15, 9
# Where a form is given up, at this length and at longer ones.
MOST_SECONDS, QUICK_SECONDS = 15.0, 0.5


def add_arguments(add: Callable[..., Any]) -> None:
    """None of its own."""


def lengths(context: Context) -> list[int]:
    return [1 << power for power in range(SHORTEST, (QUICK_LONGEST if context.quick else LONGEST) + 1)]


def parallel(context: Context, length: int) -> Comparison:
    shape = replace(SHAPE, name=str(length), length=length)
    limits = Limits(0.5, 0.1, least=2) if context.quick else Limits(20, 1.0, least=3)
    return compare(context, "layer", shape, PARALLEL, (FORWARD,), limits)


def in_parallel(row: Row) -> Row:
    return {**row, "mode": "parallel", "provider": NAMES.get(row["provider"], row["provider"])}


class Sequential:
    """Our step and two ways of attention, from an empty memory to ``length`` tokens, one at a time.

    Args:
        given_up: by form, the length at which it took too long.
    """

    def __init__(self, context: Context, length: int, given_up: dict[str, int]):
        torch.manual_seed(0)
        self.context, self.length, self.given_up = context, length, given_up
        # By name: the reference must not be timed in the extension's place without a word.
        absent = why_not("cpp", "step", context.device, context.dtype)
        self.step_backend = "reference" if absent else "cpp"
        self.layer = LogarithmicMixing(
            SHAPE.embedding, SHAPE.heads, SHAPE.bank, init="variance_preserving", backend=context.backend,
            dtype=context.dtype, device=context.device, step_backend=self.step_backend,
        )  # fmt: skip
        self.x = torch.randn(length, SHAPE.embedding, dtype=context.dtype, device=context.device)

    def ours(self) -> Iterator[Tensor]:
        state = self.layer.init_state(1, max_position=self.length)
        for token in self.x.split(1):
            y, state = self.layer.step(token[None], state)
            yield y[0]

    def recomputed(self) -> Iterator[Tensor]:
        stream = RecomputedAttention(self.layer)
        yield from map(stream, self.x.split(1))

    def cached(self) -> Iterator[Tensor]:
        stream = CachedAttention(self.layer, self.length)
        yield from map(stream, self.x.split(1))

    def check(self, forms: dict[str, Callable[[], Iterator[Tensor]]]) -> dict[str, float]:
        """The error of the first tokens of each form, against the parallel form in float64."""
        count, found = min(self.length, 256), {}
        exact = LogarithmicMixing(SHAPE.embedding, SHAPE.heads, SHAPE.bank, backend="reference", dtype=torch.float64)
        exact.load_state_dict(self.layer.state_dict())
        exact.to(self.x.device)
        x = self.x[:count].double()
        scores = exact.sva.q(x) @ exact.sva.k(x).T / SHAPE.embedding**0.5
        later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        mixed = torch.softmax(scores.masked_fill(later, -torch.inf), 1) @ exact.sva.v(x)
        attention = exact.sva.out_proj(mixed)
        expected = {OURS: exact(x[None])[0], RECOMPUTED: attention, CACHED: attention}
        for name, form in forms.items():
            got = torch.cat([y for y, _ in zip(form(), range(count), strict=False)])
            found[name] = error(got, expected[name])
        return found

    @property
    def tolerance(self) -> float:
        return 3 * TOLERANCE[self.context.dtype][0]

    @torch.no_grad()
    def rows(self) -> list[Row]:
        """A row for each form: milliseconds for all tokens."""
        forms = {OURS: self.ours, RECOMPUTED: self.recomputed, CACHED: self.cached}
        errors, most = self.check(forms), QUICK_SECONDS if self.context.quick else MOST_SECONDS
        taken: dict[str, list[float]] = defaultdict(list)
        wrong = {name: found for name, found in errors.items() if not found <= self.tolerance}
        shorter = {name: n for name, n in self.given_up.items() if n < self.length}
        gaps = {name: f"not done after {most:g} s with {n:,} tokens" for name, n in shorter.items()}
        gaps |= {name: f"gate: error {found:.3g} is over {self.tolerance:.3g}" for name, found in wrong.items()}
        for _ in range(2 if self.context.quick else 3):
            for name, form in forms.items():
                if name not in gaps:
                    self._once(name, form, taken, gaps, most)
        rows = []
        for name in forms:
            head: Row = {
                "provider": name, "operation": "layer", "mode": "sequential", "direction": FORWARD,
                "dtype": str(self.context.dtype).removeprefix("torch."),
                "shape": {
                    "name": str(self.length), "batch": 1, "length": self.length, "embedding": SHAPE.embedding,
                    "heads": SHAPE.heads, "bank": SHAPE.bank,
                },
            }  # fmt: skip
            if name == OURS:
                head["backend"] = self.step_backend
            if name in gaps:
                rows.append({**head, "gap": gaps[name]})
                continue
            found = spread(taken[name])
            row = {**head, **found.row(), "error": float(f"{errors[name]:.3g}"), "tolerance": self.tolerance}
            if name != OURS and OURS not in gaps:
                row["ratio"] = float(f"{found.median / spread(taken[OURS]).median:.4g}")
            rows.append(row)
        return rows

    def _once(
        self, name: str, form: Callable[[], Iterator[Tensor]], taken: dict[str, list[float]],
        gaps: dict[str, str], most: float,
    ) -> None:  # fmt: skip
        begin = time.perf_counter()
        for done, _ in enumerate(form(), 1):
            if time.perf_counter() - begin > most:
                self.given_up[name] = self.length
                gaps[name] = f"not done after {most:g} s: {done:,} of {self.length:,} tokens"
                return
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()
        taken[name].append(time.perf_counter() - begin)


def sequential_rows(context: Context, given_up: dict[str, int], length: int) -> list[Row]:
    return Sequential(context, length, given_up).rows()


def cases(context: Context) -> list[Case]:
    found = []
    for length in lengths(context):
        one = parallel(context, length)

        def measure(one: Comparison = one) -> list[Row]:
            return [in_parallel(row) for row in one.time()]

        found.append(Case(f"parallel/{length}", measure, one.check))
    given_up: dict[str, int] = {}
    for length in lengths(context):
        found.append(Case(f"sequential/{length}", partial(sequential_rows, context, given_up, length)))
    return found


def show(rows: list[Row]) -> str:
    modes = ("parallel", "sequential")
    return "\n\n".join(f"{mode}:\n{timed_table([row for row in rows if row['mode'] == mode])}" for mode in modes)
