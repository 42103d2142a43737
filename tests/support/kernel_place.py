"""Where the tests of Triton's kernels run: on a GPU, in Triton's interpreter, or on the executor of PTX (``--ptx``)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Set by `tests.conftest` before any test is read.
EXECUTED = False
_NOWHERE = (
    "needs a CUDA device, TRITON_INTERPRET=1 in a process of its own, or --ptx ARCH in another (make test runs both)"
)


def device() -> torch.device:
    """Of the tensors that kernels are given; the module that asks is skipped where there is none."""
    if not (INTERPRETED or EXECUTED or torch.cuda.is_available()):
        pytest.skip(_NOWHERE, allow_module_level=True)
    pytest.importorskip("triton", reason="triton is not installed")
    return torch.device("cpu" if INTERPRETED or EXECUTED else "cuda")


def mark() -> pytest.MarkDecorator:
    """What selects the tests of a module there."""
    return pytest.mark.ptx if EXECUTED else pytest.mark.interpret if INTERPRETED else pytest.mark.gpu


def in_other_dtypes(cases: Iterable[Any]) -> list[Any]:
    """Cases that are run on the executor alone, and there where all are asked for."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases] if EXECUTED else []
