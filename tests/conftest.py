"""What all tests share: one thread, fresh seeds, and memory that is never zero by luck."""

from __future__ import annotations

import contextlib
import gc
import os

import pytest
import torch

from tests.support import kernel_place
from tests.support.allocations import filled

with contextlib.suppress(ImportError):
    # The C++ compilation of torch.compile imports it, and it refuses to follow the library's own distutils.
    import setuptools  # noqa: F401


# For what tests start; their own processes follow `_settled`. Workers of several tests must not fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption(
        "--ptx",
        type=lambda text: [int(arch) for arch in text.split(",")],
        metavar="ARCH[,ARCH]",
        help="run Triton's kernels on the executor of PTX, compiled for these architectures: 80,90",
    )


def pytest_configure(config):
    if config.getoption("--ptx"):
        from tests.emulated_ptx import driver

        driver.install()
        kernel_place.EXECUTED = True


def pytest_generate_tests(metafunc):
    archs = metafunc.config.getoption("--ptx")
    if archs and any(mark.name == "ptx" for mark in metafunc.definition.iter_markers()):
        metafunc.parametrize("_executed", archs, ids=[f"sm_{arch}" for arch in archs], indirect=True)


@pytest.fixture(autouse=True)
def _executed(request):
    """Kernels compile for the architecture and run on the executor of PTX, which yields it; None without."""
    arch = getattr(request, "param", None)
    if arch is None:
        yield None
    else:
        from tests.emulated_ptx import driver

        with driver.running(arch) as device:
            yield device


@pytest.fixture(autouse=True)
def _settled():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _frozen():
    """What was there before a test lives to the end: measurements collect garbage, and need not walk it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """Every ``torch.empty`` holds NaN (the largest integer for integers), in all tests (R7)."""
    with filled(True):
        yield
