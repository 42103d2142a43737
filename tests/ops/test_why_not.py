"""Every reason why a backend cannot serve, and who may ask."""

from __future__ import annotations

import pytest
import torch

import lmn_kernels
from lmn_kernels import BackendError, LogarithmicMixing
from lmn_kernels.backend import choice, extension

CPU = torch.device("cpu")


@pytest.fixture
def no_extension(monkeypatch) -> str:
    reason = "the extension is not built on this machine"
    monkeypatch.setattr(extension, "load", lambda: ({}, reason))
    return reason


def test_why_not_is_public_and_refuses_what_it_does_not_know():
    assert lmn_kernels.why_not("reference", "attend", "cpu", torch.float64) is None
    assert "need a CUDA device" in lmn_kernels.why_not("triton", "attend", "cpu", torch.float32)
    assert "not part of this version" in lmn_kernels.why_not("cpp", "look_ahead_attend", CPU, torch.float32)
    assert lmn_kernels.why_not("cpp", "attend", "cuda", torch.float32) == (
        "the extension serves attend on CPU devices, not on cuda"
    )
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


@pytest.fixture
def old_device(monkeypatch) -> None:
    """A GPU of compute capability 7.5 with Triton, as far as one asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(choice, "_chosen", {})


@pytest.mark.usefixtures("old_device")
def test_the_widest_head_is_that_of_products_in_float32_before_sm_80():
    assert lmn_kernels.why_not("triton", "attend", "cuda", torch.float16, 128) is None
    assert "heads of up to 128 features" in lmn_kernels.why_not("triton", "attend", "cuda", torch.float16, 129)


@pytest.mark.usefixtures("old_device")
def test_what_serves_one_width_of_heads_is_not_taken_for_another():
    given = "triton", "attend", torch.device("cuda"), torch.float32
    for _ in range(2):
        assert choice.resolve(*given, 64) == "triton"
        with pytest.raises(BackendError, match="heads of up to 128 features in torch.float32"):
            choice.resolve(*given, 129)
