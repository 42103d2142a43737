"""What a contender is: one way of doing an operation, and the oracle that its result must agree with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lmn_kernels.backend.choice import why_not

from .problems import BaseProblem, Form, Outputs

OURS = "ours"

Oracle = Callable[[Any, Tensor | None], Outputs]


@dataclass(frozen=True)
class Provider:
    """A contender for one operation. Its functions take the kind of problem that the operation has.

    Attributes:
        name: as in tables.
        build: its way of doing the operation.
        oracle: ``(problem in float64, positions [P] or None for all) → what is expected there``.
        missing: why it cannot run here, or None.
        no_training: why it has no backward here, or None.
        ours: whether it computes what our path does, so that our floor is its floor.
        by_position: whether its result is ``[B, L, …]``, so that the oracle may be asked for some positions.
        nodes: where its result is the matrix of a tree's nodes, how many of the rows are nodes.
        token_by_token: whether its oracle is a loop over tokens, and asked for the first of long sequences only.
        growth: power of L with which its time grows.
        peak_bytes: a prediction for bfloat16, from the shape, where it is known to be large.
    """

    name: str
    build: Callable[[Any], Form]
    oracle: Oracle
    missing: Callable[[Any], str | None] = lambda problem: None
    no_training: Callable[[Any], str | None] = lambda problem: None
    ours: bool = True
    by_position: bool = True
    nodes: Callable[[Any], int] | None = None
    token_by_token: bool = False
    growth: float = 1.0
    peak_bytes: Callable[[Any], float] | None = None


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
