"""A representative part of `bench.gpu.compile_kernels`: real compilations for GPUs that are not here."""

from __future__ import annotations

import os
from itertools import groupby

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from bench.gpu import compile_kernels  # noqa: E402
from lmn_kernels._triton.common import CompileCase  # noqa: E402

pytestmark = pytest.mark.slow


def representatives(arch: int, dtype: torch.dtype) -> list[CompileCase]:
    """For every kernel, the default configuration of a middle size, for a plain summarizer (the shortest name)."""
    cases = [case for case in compile_kernels.cases(arch) if case.default and case.dtype == dtype]
    cases.sort(key=lambda case: case.kernel.__name__)
    groups = [list(group) for _, group in groupby(cases, key=lambda case: case.kernel.__name__)]
    shortest = [min(len(case.name) for case in group) for group in groups]
    plain = [[case for case in group if len(case.name) == n] for group, n in zip(groups, shortest, strict=True)]
    return [group[len(group) // 2] for group in plain]


# float16, and at each end of the range of architectures also bfloat16.
CHOSEN = [
    (arch, case)
    for arch in compile_kernels.SHARED_LIMIT
    for dtype in ((torch.float16, torch.bfloat16) if arch in (75, 120) else (torch.float16,))
    for case in representatives(arch, dtype)
]


def test_every_kernel_is_represented():
    for arch in compile_kernels.SHARED_LIMIT:
        every = {case.kernel.__name__ for case in compile_kernels.cases(arch)}
        assert {case.kernel.__name__ for chosen, case in CHOSEN if chosen == arch} == every


@pytest.mark.parametrize(
    ("arch", "case"), CHOSEN, ids=[f"sm_{arch}-{case.name}-{str(case.dtype)[6:]}" for arch, case in CHOSEN]
)
def test_compiles_within_the_limits(arch, case):
    row = compile_kernels.measure(case, arch)
    assert not compile_kernels.faults([row])
    assert row["registers"] > 0


def test_a_fault_is_a_fault():
    row = {"kernel": "k", "dtype": "float16", "arch": 90, "default": True, "shared": 0, "spilled": 0}
    assert not compile_kernels.faults([row])
    assert "spills 8 bytes" in compile_kernels.faults([row | {"spilled": 8}])[0]
    assert not compile_kernels.faults([row | {"spilled": 8, "arch": 75}])
    assert "no configuration fits" in compile_kernels.faults([row | {"shared": 232449}])[0]
    assert not compile_kernels.faults([row | {"shared": 232449}, row])
    broken = {"kernel": "k", "dtype": "float16", "arch": 75, "error": "PassManager"}
    assert "PassManager" in compile_kernels.faults([broken])[0]
