"""What all tests share: one thread, fresh seeds, and memory that is never zero by luck."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.support.allocations import filled

with contextlib.suppress(ImportError):
    # The C++ compilation of torch.compile imports it, and it refuses to follow the library's own distutils.
    import setuptools  # noqa: F401


@pytest.fixture(autouse=True)
def _settled():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """Every ``torch.empty`` holds NaN (the largest integer for integers), in all tests (R7)."""
    with filled(True):
        yield


@pytest.fixture
def one_thread():
    """For what is many small operations: a second thread only waits, and far longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
