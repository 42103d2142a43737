"""How far a call of the layer travels to a kernel and back: `tests.ops.test_trips` with the Triton kernels."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from lmn_kernels.backend import choice  # noqa: E402
from tests.ops.test_trips import trips  # noqa: E402

# What no executor shows, so that make test runs it in the interpreter too.
pytestmark = [pytest.mark.interpret, pytest.mark.slow]


def test_the_kernels(monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda *_: None)
    forward, backward = trips("triton")
    assert forward.changes <= 90 // 2 and backward.changes <= 75 // 2
    assert forward.files >= 10 and backward.files >= 4, "a tracer that sees nothing"
