"""What providers have in common: forms of our own network, and why one cannot run here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from bench.measure.contender import BaseProblem, Form, Outputs
from lmn_kernels.backend.choice import why_not


def own(call: Callable[[Any], Outputs]) -> Callable[[Any], Form]:
    """A form of our own network, on the problem's leaves."""
    return lambda problem: Form(lambda: call(problem), problem.leaves())


def ours_missing(operation: str, head_size: Callable[[Any], int] = lambda _: 1) -> Callable[[Any], str | None]:
    """Why the problem's backend cannot serve an operation of the package, or None."""

    def missing(problem: BaseProblem) -> str | None:
        if problem.backend in ("auto", "reference"):
            return None
        return why_not(problem.backend, operation, problem.device, problem.dtype, head_size(problem))

    return missing


def no_compiler(problem: BaseProblem) -> str | None:
    if problem.device.type == "cpu" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler"
    return None


def compile_mode(problem: BaseProblem) -> str | None:
    """Of torch.compile for a contender: the strongest that every device has."""
    return "max-autotune-no-cudagraphs" if problem.device.type == "cuda" else None
