"""Checks that need a GPU are skipped where there is none; their rehearsals on the CPU are not."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _finished():
    """A kernel's fault belongs to the test that launched it."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
