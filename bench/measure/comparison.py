"""One operation at one shape: every provider checked, then all of them timed in turns.

No figure without a check: the result and, for training, every gradient are compared with the provider's oracle in
float64 first. A provider that fails, cannot run here or would take too long becomes a row with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.errors import first_line

from . import timing
from .contender import OURS, BaseProblem, Provider, Size
from .footprint import footprint
from .gate import BACKWARD, FORWARD, TRAINING, Expected, direction_work, gradient_error, tolerance, value_error
from .journal import Row
from .runner import Ceilings, Context
from .timing import Clock, Work, free_bytes, pair_ratio, spread, take_turns

# Gradients are compared with an oracle's on so many tokens and such a length at most; longer sequences are cut for it.
# An oracle's cost may be quadratic.
CHECKED_TOKENS, CHECKED_LENGTH, CUT = 1 << 14, 1 << 12, 1 << 10
# A prediction of time is never for more than so many times the length that was tried.
LEAP = 4
# How calls are launched: one by one, each behind a flush of the cache, or, where launches cost more than work, so many
# in a row, and so many replays of a CUDA graph of one.
EAGER, GRAPH = "eager", "graph"
IN_A_ROW = 20
# Of contenders at lengths below the one that is asked for.
_SECONDS: dict[tuple[Any, ...], float] = {}


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
        kind: of problem that the operation is.
        providers: ours first.
        directions: ``"forward"``, ``"backward"``, ``"training"`` (forward and backward).
        mode: None, `EAGER` or `GRAPH`.
        gaps: why a provider is left out of a direction, as `check` found.
    """

    context: Context
    operation: str
    shape: Size
    kind: type[BaseProblem]
    providers: Sequence[Provider]
    directions: Sequence[str]
    limits: Limits
    mode: str | None = None
    gaps: dict[tuple[str, str], str] = field(default_factory=dict)
    _errors: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.context.device

    def problem(self) -> BaseProblem:
        return self.kind(self.operation, self.shape, self.context.dtype, self.device, self.context.backend)

    def check(self) -> None:
        """Find out who can run, and who is right; warms everybody up."""
        whole, expected = self.problem(), Expected()
        small = self.shape.tokens <= CHECKED_TOKENS and self.shape.length <= CHECKED_LENGTH
        cut = whole if small else whole.shortened(CUT)
        for provider in self.providers:
            reason = provider.missing(whole) or self._too_large(provider)
            for direction in self.directions:
                refused = reason or (provider.no_training(whole) if direction != FORWARD else None)
                fault = refused or self._attempt(provider, direction, whole, cut, expected)
                if fault:
                    self.gaps[provider.name, direction] = fault
                self._release()

    def _attempt(
        self, provider: Provider, direction: str, whole: BaseProblem, cut: BaseProblem, expected: Expected
    ) -> str | None:
        """Why a provider has no figure in a direction, or None."""

        def measure() -> str | None:
            form = provider.build(cut)
            if direction != FORWARD:
                found = gradient_error(provider, form, cut)
            else:
                found = value_error(provider, form, cut, expected)
            if cut is not whole:
                slow = self._too_slow(provider, direction)
                if slow:
                    return slow
                if direction == FORWARD:
                    found = max(found, value_error(provider, provider.build(whole), whole, expected))
            self._errors[provider.name, direction] = found
            return None

        return _gap(provider, measure)

    def _too_slow(self, provider: Provider, direction: str) -> str | None:
        """Whether a call would take too long: tried at growing lengths, so that no prediction leaps far."""
        # Ours is what the table is about, however long it takes.
        if provider.name == OURS:
            return None
        length, target = CUT, self.shape.length
        while length < target:
            following = min(LEAP * length, target)
            predicted = self._seconds(provider, direction, length) * (following / length) ** provider.growth
            if predicted > self.limits.seconds:
                predicted *= (target / following) ** provider.growth
                return f"would take about {predicted:.2g} s a call"
            length = following
        return None

    def _seconds(self, provider: Provider, direction: str, length: int) -> float:
        shape = replace(self.shape, length=length)
        key = self.operation, provider.name, direction, replace(shape, name=""), self.context.dtype, self.device
        if key not in _SECONDS:
            problem = self.problem().shortened(length)
            work = direction_work(provider.build(problem), direction, problem, provider)
            work()
            _SECONDS[key] = Clock(self.device, flush=False).seconds(work)
            del problem, work
            self._release()
        return _SECONDS[key]

    def _too_large(self, provider: Provider) -> str | None:
        if provider.peak_bytes is None:
            return None
        # Predictions are for two bytes an element.
        predicted = provider.peak_bytes(self.shape) * self.context.dtype.itemsize / 2
        return f"needs about {predicted / 1e9:.3g} GB" if predicted > free_bytes(self.device) else None

    def time(self) -> list[Row]:
        """A row for every provider and direction; `check` comes first."""
        rows = []
        for direction in self.directions:
            ceilings = self._ceilings()
            works = self.works(direction)
            in_a_row = 1 if self.mode is None else 2 if self.context.quick else IN_A_ROW
            taken = take_turns(
                works, Clock(self.device, flush=self.mode is None), self.limits.budget, in_a_row, self.limits.least,
                warm_up=1 if self.limits.least < timing.LEAST else timing.WARM_UP,
            )  # fmt: skip
            for provider in self.providers:
                rows.append(self._timed_row(provider, direction, taken, ceilings))
            del works
            self._release()
        return rows

    def _release(self) -> None:
        # Of tiny shapes nothing is worth the time.
        if not self.context.quick:
            timing.release(self.device)

    def _ceilings(self) -> Ceilings:
        if self.context.quick:
            return _rehearsed(self.device, self.context.dtype)
        return Ceilings.measure(self.device, self.context.dtype, False)

    def works(self, direction: str) -> dict[str, Work]:
        """What is timed in a direction, by provider, all of them on one problem and called once."""
        problem, found = self.problem(), {}
        for provider in self.providers:
            if (provider.name, direction) in self.gaps:
                continue
            work = direction_work(provider.build(problem), direction, problem, provider)
            made = [work]

            def warm(work: Work = work, made: list[Work] = made) -> None:
                work()
                if self.mode == GRAPH:
                    made[0] = timing.graphed(work, self.device)

            fault = _gap(provider, warm)
            if fault:
                self.gaps[provider.name, direction] = fault
            else:
                found[provider.name] = made[0]
        return found

    def _head(self, provider: Provider, direction: str) -> Row:
        return {
            "provider": provider.name,
            "operation": self.operation,
            "shape": self.shape.row(),
            "dtype": str(self.context.dtype).removeprefix("torch."),
            "direction": direction,
            **({"mode": self.mode} if self.mode else {}),
            **({"backend": self.context.backend} if provider.name.startswith(OURS) else {}),
        }

    def _checked(self, provider: Provider, direction: str) -> Row:
        found = self._errors[provider.name, direction]
        limit = tolerance(self.operation, self.context.dtype, direction)
        small = self.shape.tokens <= CHECKED_TOKENS and self.shape.length <= CHECKED_LENGTH
        length = self.shape.length if small or direction == FORWARD else CUT
        return {"error": float(f"{found:.3g}"), "tolerance": limit, "checked_length": length}

    def _timed_row(self, provider: Provider, direction: str, taken: dict[str, list[float]], ceilings: Ceilings) -> Row:
        head = self._head(provider, direction)
        gap = self.gaps.get((provider.name, direction))
        if gap:
            return {**head, "gap": gap}
        seconds = taken[provider.name]
        found = spread(seconds)
        row = {**head, **found.row(), **self._checked(provider, direction), **ceilings.row()}
        if provider.name != OURS and OURS in taken:
            row["ratio"] = float(f"{pair_ratio(seconds, taken[OURS]):.4g}")
        if provider.ours:
            floor = self._floor(direction, ceilings)
            row |= {"floor_ms": float(f"{floor:.4g}"), "share": float(f"{floor / found.median:.3g}")}
        return row

    def _floor(self, direction: str, ceilings: Ceilings) -> float:
        """Milliseconds at the measured ceilings, every stage at its own."""
        ways = (FORWARD, BACKWARD) if direction == TRAINING else (direction,)
        rate, bandwidth = ceilings.matrix_flops, ceilings.copy_bytes
        return self.shape.least_ms(self.operation, ways, rate, bandwidth, self.context.dtype.itemsize)

    def time_and_memory(self) -> list[Row]:
        """Rows with both; `check` comes first."""
        # Both go by direction, then by provider.
        return [held | timed for timed, held in zip(self.time(), self.memory(), strict=True)]

    def memory(self) -> list[Row]:
        """Peak and saved bytes of every provider and direction; `check` comes first."""
        rows = []
        for direction in self.directions:
            for provider in self.providers:
                head = self._head(provider, direction)
                gap = self.gaps.get((provider.name, direction))
                if gap:
                    rows.append({**head, "gap": gap})
                    continue
                problem = self.problem()
                form = provider.build(problem)
                work = direction_work(form, direction, problem, provider)
                fault = _gap(provider, work)
                if fault:
                    rows.append({**head, "gap": fault})
                else:
                    found = footprint(work, form.call if direction != FORWARD else None, self.device)
                    rows.append({**head, "unit": "bytes", **found, **self._checked(provider, direction)})
                del problem, form, work
                self._release()
        return rows


@functools.cache
def _rehearsed(device: torch.device, dtype: torch.dtype) -> Ceilings:
    return Ceilings.measure(device, dtype, True)


def _gap(provider: Provider, work: Work) -> str | None:
    """The reason that ``work`` returns or fails for; None where it does neither."""
    try:
        found = work()
    except AssertionError as wrong:
        return f"gate: {first_line(wrong)[:200]}"
    except torch.OutOfMemoryError:
        return "out of memory, in it or in its check"
    except Exception as reason:  # a peer's fault, whatever its type, is that peer's gap; ours must not pass
        if provider.name == OURS:
            raise
        return f"{type(reason).__name__}: {first_line(reason)[:200]}"
    return found if isinstance(found, str) else None
