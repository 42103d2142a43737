"""Where the tests of Triton's kernels run: on a GPU, in Triton's interpreter, or on the executor of PTX (``--ptx``)."""

from __future__ import annotations

import os

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
