"""One operation at one shape: every provider checked, then all of them timed in turns.

No figure without a check: the result and, for training, every gradient are compared with the provider's oracle in
float64 first. A provider that fails, cannot run here or would take too long becomes a row with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.close import TOLERANCE, assert_same_gradients, error

from . import timing
from .footprint import footprint, free_bytes
from .journal import Row
from .problems import Form, Outputs, Problem
from .providers import OURS, REGISTRY, Provider
from .runner import Ceilings
from .shapes import DIRECTIONS, STAGES, Shape, floor_ms
from .timing import Clock, Work, pair_ratio, spread, take_turns

FORWARD, TRAINING = "forward", "training"

# A layer's stages each round: three times what one operation is allowed.
STAGES_OF_ROUNDING = 3
# Gradients are checked on so many tokens at most, and results at so many positions of longer sequences.
CHECKED_TOKENS, CHECKED_POSITIONS = 1 << 14, 64
# Sequences that are cut for a check are cut to this.
CUT = 1 << 10
_STAGE = {"tree": ("tree",), "projections": ("project",), "attention": ("attend",), "layer": STAGES}


@dataclass(frozen=True)
class Limits:
    """What a comparison may take.

    Attributes:
        seconds: a call of one provider; what would take longer is left out.
        budget: the turns of one direction, within ``least`` and `timing.MOST` rounds.
        least: rounds at least.
    """

    seconds: float
    budget: float
    least: int = timing.LEAST


@dataclass
class Comparison:
    """Providers of an operation at a shape.

    Attributes:
        names: providers, ours first.
        directions: ``"forward"``, ``"training"`` (forward and backward).
        backend: of our own path.
    """

    operation: str
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    names: Sequence[str]
    directions: Sequence[str]
    limits: Limits
    quick: bool = False
    backend: str = "auto"
    _gaps: dict[tuple[str, str], str] = field(default_factory=dict)
    _errors: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def providers(self) -> list[Provider]:
        return [REGISTRY[self.operation][name] for name in self.names]

    def problem(self) -> Problem:
        return Problem(self.operation, self.shape, self.dtype, self.device, self.backend)

    def tolerance(self, direction: str) -> float:
        return STAGES_OF_ROUNDING * TOLERANCE[self.dtype][direction == TRAINING]

    def check(self) -> None:
        """Find out who can run, and who is right; warms everybody up."""
        whole = self.problem()
        # Predicted from a shorter one, where a shape may be out of reach.
        cut = whole if self.shape.tokens <= CHECKED_TOKENS else whole.shortened(CUT)
        for provider in self.providers:
            reason = provider.missing(whole) or self._too_large(provider)
            for direction in self.directions:
                refused = reason or (provider.no_training(whole) if direction == TRAINING else None)
                fault = refused or self._attempt(provider, direction, whole, cut)
                if fault:
                    self._gaps[provider.name, direction] = fault
                timing.release(self.device)

    def _attempt(self, provider: Provider, direction: str, whole: Problem, cut: Problem) -> str | None:
        try:
            found = self._compare(provider, direction, whole, cut)
        except AssertionError as wrong:
            return f"gate: {_first_line(wrong)}"
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as reason:  # a peer's fault, whatever its type, is that peer's gap; ours must not pass
            if provider.name == OURS:
                raise
            return f"{type(reason).__name__}: {_first_line(reason)}"
        if isinstance(found, str):
            return found
        self._errors[provider.name, direction] = found
        return None

    def _compare(self, provider: Provider, direction: str, whole: Problem, cut: Problem) -> float | str:
        """The error of a provider, or why it would take too long.

        Raises:
            AssertionError: it is wrong.
        """
        form = provider.build(cut)
        if direction == TRAINING:
            found = _gradient_error(provider, form, cut, self.tolerance(direction))
        else:
            found = self._value_error(provider, form, cut)
        if cut is not whole:
            # Ours is what the table is about, however long it takes.
            predicted = 0.0 if provider.name == OURS else self._predict(provider, form, direction)
            if predicted > self.limits.seconds:
                return f"would take about {predicted:.2g} s a call"
            if direction == FORWARD:
                found = max(found, self._value_error(provider, provider.build(whole), whole))
        return found

    def _predict(self, provider: Provider, form: Form, direction: str) -> float:
        work = direction_work(form, direction)
        begin = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - begin) * (self.shape.length / min(CUT, self.shape.length)) ** provider.growth

    def _value_error(self, provider: Provider, form: Form, problem: Problem) -> float:
        length, positions = problem.shape.length, None
        if provider.by_position and length > CUT:
            chosen = torch.linspace(0, length - 1, CHECKED_POSITIONS, dtype=torch.float64)
            positions = chosen.long().unique().to(self.device)
        with torch.no_grad():
            got = _real(problem, provider, form.call())
            expected = _real(problem, provider, provider.oracle(problem.exact(), positions))
        worst = 0.0
        for y, z in zip(got, expected, strict=True):
            y = y if positions is None else y[:, positions]
            assert y.dtype == self.dtype, f"expected a result in {self.dtype}, got {y.dtype}"
            assert y.shape == z.shape, f"expected shape {tuple(z.shape)}, got {tuple(y.shape)}"
            worst = max(worst, error(y, z))
        limit = self.tolerance(FORWARD)
        assert worst <= limit, f"error {worst:.3g} is over {limit:.3g}"
        return worst

    def _too_large(self, provider: Provider) -> str | None:
        if provider.peak_bytes is None:
            return None
        # Predictions are for two bytes an element.
        predicted = provider.peak_bytes(self.shape) * self.dtype.itemsize / 2
        free = free_bytes(self.device)
        return f"needs about {predicted / 1e9:.3g} GB" if predicted > free else None

    def time(self) -> list[Row]:
        """A row for every provider and direction; `check` comes first."""
        rows = []
        for direction in self.directions:
            ceilings = Ceilings.measure(self.device, self.dtype, self.quick)
            works = self._works(direction)
            taken = take_turns(
                works, Clock(self.device), self.limits.budget, least=self.limits.least,
                warm_up=1 if self.limits.least < timing.LEAST else timing.WARM_UP,
            )  # fmt: skip
            for provider in self.providers:
                rows.append(self._timed_row(provider, direction, taken, ceilings))
            del works
            timing.release(self.device)
        return rows

    def _works(self, direction: str) -> dict[str, Work]:
        problem = self.problem()
        able = [p for p in self.providers if (p.name, direction) not in self._gaps]
        return {p.name: direction_work(p.build(problem), direction, problem, p) for p in able}

    def _head(self, provider: Provider, direction: str) -> Row:
        shape = self.shape
        return {
            "provider": provider.name,
            "operation": self.operation,
            "shape": {
                "name": shape.name, "batch": shape.batch, "length": shape.length,
                "embedding": shape.embedding, "heads": shape.heads, "bank": shape.bank,
            },
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": direction,
            **({"backend": self.backend} if provider.name.startswith(OURS) else {}),
        }  # fmt: skip

    def _checked(self, provider: Provider, direction: str) -> Row:
        found = self._errors[provider.name, direction]
        return {"error": float(f"{found:.3g}"), "tolerance": self.tolerance(direction)}

    def _timed_row(self, provider: Provider, direction: str, taken: dict[str, list[float]], ceilings: Ceilings) -> Row:
        head = self._head(provider, direction)
        gap = self._gaps.get((provider.name, direction))
        if gap:
            return {**head, "gap": gap}
        seconds = taken[provider.name]
        found = spread(seconds)
        row = {
            **head, "unit": "ms", "median": found.median, "p20": found.p20, "p80": found.p80,
            "repeats": found.repeats, **self._checked(provider, direction), **ceilings.row(),
        }  # fmt: skip
        if provider.name != OURS and OURS in taken:
            row["ratio"] = float(f"{pair_ratio(seconds, taken[OURS]):.4g}")
        if provider.ours:
            floor = self._floor(direction, ceilings)
            row |= {"floor_ms": float(f"{floor:.4g}"), "share": float(f"{floor / found.median:.3g}")}
        return row

    def _floor(self, direction: str, ceilings: Ceilings) -> float:
        """Milliseconds at the measured ceilings, every stage at its own."""
        ways = DIRECTIONS if direction == TRAINING else DIRECTIONS[:1]
        bandwidth = ceilings.copy_bytes * 2 / self.dtype.itemsize
        stages = [(stage, way) for stage in _STAGE[self.operation] for way in ways]
        return sum(floor_ms(self.shape, stage, way, ceilings.matrix_flops, bandwidth) for stage, way in stages)

    def memory(self) -> list[Row]:
        """Peak and saved bytes of every provider and direction; `check` comes first."""
        rows = []
        for direction in self.directions:
            for provider in self.providers:
                head = self._head(provider, direction)
                gap = self._gaps.get((provider.name, direction))
                if gap:
                    rows.append({**head, "gap": gap})
                    continue
                problem = self.problem()
                form = provider.build(problem)
                work = direction_work(form, direction, problem, provider)
                found = footprint(work, form.call if direction == TRAINING else None, self.device)
                rows.append({**head, "unit": "bytes", **found, **self._checked(provider, direction)})
                del problem, form, work
                timing.release(self.device)
        return rows


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _real(problem: Problem, provider: Provider, outputs: Outputs) -> tuple[Tensor, ...]:
    """What of a result means something: a tree's matrix has a bound of rows, not all of them nodes."""
    if problem.operation == "tree" and provider.ours and not provider.by_position:
        return tuple(y[:, : problem.layout.unused_base] for y in _tuple(outputs))
    return _tuple(outputs)


def _cotangents(outputs: Outputs, problem: Problem | None, provider: Provider | None) -> list[Tensor]:
    """Random, the same for equal shapes, and zero where a result means nothing."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for y in _tuple(outputs):
        cotangent = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        if problem is not None and provider is not None:
            real = _real(problem, provider, y)[0]
            if real.shape != y.shape:
                cotangent[:, real.shape[1] :] = 0
        made.append(cotangent)
    return made


def direction_work(
    form: Form, direction: str, problem: Problem | None = None, provider: Provider | None = None
) -> Work:
    """What is timed: the call without a graph, or the call and its backward pass."""
    if direction == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return form.call()

        return forward
    leaves = list(form.leaves.values())
    # Made at the first call, whose result tells the shape: it is the warm-up's.
    kept: list[Tensor] = []

    def training() -> object:
        outputs = form.call()
        if not kept:
            kept.extend(_cotangents(outputs, problem, provider))
        return torch.autograd.grad(_tuple(outputs), leaves, kept)

    return training


def _gradient_error(provider: Provider, form: Form, problem: Problem, tolerance: float) -> float:
    """The largest error of a gradient.

    Raises:
        AssertionError: one is wrong.
    """
    outputs = form.call()
    up = _cotangents(outputs, problem, provider)
    got = torch.autograd.grad(_tuple(outputs), list(form.leaves.values()), up)
    twin = problem.exact()
    leaves = provider.build(twin).leaves
    expected = torch.autograd.grad(
        _tuple(provider.oracle(twin, None)), list(leaves.values()), [cotangent.double() for cotangent in up]
    )
    names = list(form.leaves)
    assert_same_gradients(names, list(got), list(expected), tolerance)
    largest = max(e.square().mean().sqrt().item() for e in expected)
    sizes = [(g, e) for g, e in zip(got, expected, strict=True) if e.square().mean().sqrt().item() > 1e-12 * largest]
    return max(error(g, e) for g, e in sizes)


def _first_line(reason: BaseException) -> str:
    return str(reason).partition("\n")[0][:200]


def shape_named(shape: Shape, **changes: Any) -> Shape:
    return replace(shape, **changes)
