"""How a run of ``python -m bench`` goes: its cases warmed up, then measured one by one, each written as it comes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.extras import tqdm

from . import timing
from .environment import clocks, describe
from .journal import Journal, Row


@dataclass(frozen=True)
class Context:
    """What the command line says to every run.

    Attributes:
        device, dtype: where, and of inputs and weights.
        backend: of our own path, by name: a silent fallback must not be timed in place of kernels.
        quick: small shapes and few repeats: a rehearsal under two minutes on two cores.
        results: folder of the journals.
        scratch: folder of what is not a result, checkpoints for one.
        rehearsed: whether to take the cases of a GPU, in tiny shapes, whatever the device is.
        commit: of the code, where git cannot tell.
        options: the run's own options, by name.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str
    quick: bool
    results: Path
    scratch: Path
    options: dict[str, Any]
    rehearsed: bool = False
    commit: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the cases are those of a GPU."""
        return self.rehearsed or self.device.type == "cuda"


@dataclass(frozen=True)
class Case:
    """What is measured whole or not at all.

    Attributes:
        name: unique within the run; ``operation/shape/…``.
        measure: returns the rows of the case. A contender that cannot run is a row with ``gap``, the reason.
        warm: compiles, checks and warms up; called for every case before the first is measured.
        derive: in place of ``measure``: rows that follow from those of the cases before, once all of them are there.
    """

    name: str
    measure: Callable[[], list[Row]] | None = None
    warm: Callable[[], None] | None = None
    derive: Callable[[list[Row]], list[Row]] | None = None

    def rows(self, before: list[Row]) -> list[Row]:
        if self.derive:
            return self.derive(before)
        assert self.measure is not None
        return self.measure()


class Run(Protocol):
    """A module of `bench.runs`. The first line of its docstring is its help."""

    __doc__: str | None

    def add_arguments(self, add: Callable[..., Any]) -> None:
        """Declare the run's own options."""

    def cases(self, context: Context) -> list[Case]:
        """All cases, in the order in which they are measured."""

    def show(self, rows: list[Row]) -> str:
        """The rows as text for a terminal."""


@dataclass(frozen=True)
class Ceilings:
    """What the device copies (bytes read and written) and multiplies at, and its clocks just then, beside the cases."""

    copy_bytes: float
    matrix_flops: float
    clocks: str | None = None

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
        clock = timing.Clock(device)
        on_gpu = device.type == "cuda"
        size = (4 << 30 if on_gpu else 256 << 20) >> (4 if quick else 0)
        side = (8192 if on_gpu else 1024) >> (1 if quick else 0)
        copied, multiplied = timing.copy(clock, size), timing.product(clock, side, dtype)
        return cls(2e3 * size / copied.median, 2e3 * side**3 / multiplied.median, clocks() if on_gpu else None)

    def row(self) -> Row:
        return {
            "copy_gbs": float(f"{self.copy_bytes / 1e9:.4g}"),
            "matrix_gflops": float(f"{self.matrix_flops / 1e9:.4g}"),
            **({"clocks": self.clocks} if self.clocks else {}),
        }


def execute(name: str, run: Run, context: Context, fresh: bool, only: Sequence[str] | None = None) -> Journal:
    """Measure what is missing; returns the journal with every row.

    Args:
        only: parts of names: of the missing cases those are measured whose name holds one of them. Where others are
            left, the invocation stays open, and a later call goes on with it.

    Raises:
        KeyboardInterrupt: what was measured until then is in the journal.
        InputError, RunError: the journal cannot be read or written.
    """
    cases = run.cases(context)
    dtype = str(context.dtype).removeprefix("torch.")
    options = {"quick": context.quick, "dtype": dtype, "backend": context.backend, **context.options}
    journal = Journal(context.results / f"{name}.jsonl", name, describe(context.device, context.commit), options, fresh)
    missing = [case for case in cases if case.name not in journal.cases]
    wanted = [case for case in missing if not case.derive and (not only or any(part in case.name for part in only))]
    with _bar(name, sum(2 if case.warm else 1 for case in wanted)) as bar:
        for case in wanted:
            if case.warm:
                bar.set_postfix_str(f"warming up {case.name}")
                case.warm()
                timing.release(context.device)
                bar.update()
        for case in wanted:
            bar.set_postfix_str(case.name)
            journal.write(case.name, case.rows(journal.rows))
            timing.release(context.device)
            bar.update()
    for case in cases:
        if case.name in journal.cases:
            continue
        if not case.derive:
            # What follows from cases waits for all before it.
            return journal
        journal.write(case.name, case.rows(journal.rows))
    journal.finish()
    return journal


@contextlib.contextmanager
def _bar(name: str, steps: int) -> Iterator[tqdm]:
    # A log file is no terminal: a line now and then is enough there.
    often = 0.1 if sys.stderr.isatty() else 15
    with tqdm(total=steps, desc=name, unit="case", mininterval=often, dynamic_ncols=True) as bar:
        yield bar
