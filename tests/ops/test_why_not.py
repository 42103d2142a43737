"""Every reason why a backend cannot serve, and who may ask."""

from __future__ import annotations

import pytest
import torch

import lmn_kernels
from lmn_kernels import BackendError, LogarithmicMixing
from lmn_kernels.backend import extension

CPU = torch.device("cpu")


@pytest.fixture
def no_extension(monkeypatch) -> str:
    reason = "the extension is not built on this machine"
    monkeypatch.setattr(extension, "load", lambda: ({}, reason))
    return reason


def test_why_not_is_public_and_refuses_what_it_does_not_know():
    assert lmn_kernels.why_not("reference", "attend", "cpu", torch.float64) is None
    assert "need a CUDA device" in lmn_kernels.why_not("triton", "attend", "cpu", torch.float32)
    assert "not part of this version" in lmn_kernels.why_not("cpp", "attend", CPU, torch.float32)
    with pytest.raises(ValueError, match="^backend: expected one of reference, triton, cpp, got 'auto'"):
        lmn_kernels.why_not("auto", "attend", CPU, torch.float32)
    with pytest.raises(ValueError, match="^operation: expected one of .*step.*, got 'steps'"):
        lmn_kernels.why_not("cpp", "steps", CPU, torch.float32)


def test_every_reason_is_named(no_extension):
    """That float16 is missing on a CPU, and that the extension is; that a layer's summarizer is a callable besides."""
    assert lmn_kernels.why_not("cpp", "step", CPU, torch.float16) == (
        f"the extension does not compute in torch.float16; {no_extension}"
    )
    both = lmn_kernels.why_not("triton", "attend", CPU, torch.float64)
    assert "need a CUDA device" in both and "float64" in both
    layer = LogarithmicMixing(8, summarizer=lambda a, b: a + b, step_backend="cpp", dtype=torch.float16)
    with torch.no_grad(), pytest.raises(BackendError) as raised:
        layer.step(torch.randn(1, 1, 8).half(), layer.init_state(1))
    assert all(part in str(raised.value) for part in ("a callable", "torch.float16", no_extension))
