"""A representative part of `bench.compile_kernels`: real compilations for GPUs that are not here."""

from __future__ import annotations

import os
from itertools import groupby

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from bench import compile_kernels  # noqa: E402
from lmn_kernels._triton.common import CompileCase  # noqa: E402


def representatives(dtype: torch.dtype) -> list[CompileCase]:
    """For every kernel, the default configuration of a middle size, for a plain summarizer (the shortest name)."""
    cases = [case for case in compile_kernels.cases() if case.default and case.dtype == dtype]
    cases.sort(key=lambda case: case.kernel.__name__)
    groups = [list(group) for _, group in groupby(cases, key=lambda case: case.kernel.__name__)]
    shortest = [min(len(case.name) for case in group) for group in groups]
    plain = [[case for case in group if len(case.name) == n] for group, n in zip(groups, shortest, strict=True)]
    return [group[len(group) // 2] for group in plain]


HALF = representatives(torch.float16)


def test_every_kernel_is_represented():
    assert {case.kernel.__name__ for case in HALF} == {case.kernel.__name__ for case in compile_kernels.cases()}


@pytest.mark.parametrize("arch", [75, 80, 90, 120])
@pytest.mark.parametrize("case", HALF, ids=[case.name for case in HALF])
def test_compiles_within_the_limits(case, arch):
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
