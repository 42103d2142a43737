"""What the tensor cores are given beyond what is needed: none, or what is listed here with its reason.

Where the warps of a layout cover more rows or columns than a product has, some do again what others do. The figures are
of the default configurations in bfloat16; float16 has the same layouts, and float32 no products there.
"""

from __future__ import annotations

import json

import pytest
import torch

from tests.support import kernel_place

if not kernel_place.EXECUTED:
    pytest.skip("needs --ptx ARCH", allow_module_level=True)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bench.gpu import compile_kernels  # noqa: E402
from lmn_kernels._triton.common import CompileCase  # noqa: E402
from tests.emulated_ptx import counted  # noqa: E402
from tests.emulated_ptx.needed import executed  # noqa: E402
from tests.emulated_ptx.parser import parse  # noqa: E402

pytestmark = kernel_place.mark()

# Done over needed, by architecture, kernel and width.
_BOTH = {
    # With fewer warps 16 to 1208 bytes of a thread spill, on one architecture or both.
    "attend_fwd D=256": 1.5, "attend_bwd D=128": 1.4, "attend_bwd D=256": 2.2, "look_ahead_fwd D=32": 1.75,
    "look_ahead_fwd D=128": 1.75, "look_ahead_bwd_dq D=32": 2.0, "look_ahead_bwd_dq D=128": 1.57,
    "look_ahead_bwd_dkv D=128": 1.67,
    # A level of few rows has 16 of them and 16 columns, two instructions for four warps; others have work for all.
    "tree_tail_fwd E=16": 1.2, "tree_tail_bwd E=16": 1.2,
}  # fmt: skip
# There a warp group has 64 rows of products with 64 columns, and the second one does them again.
LISTED = {80: _BOTH, 90: _BOTH | {"attend_fwd D=128": 1.5}}


def plain(arch: int) -> list[CompileCase]:
    """The default configurations of every kernel with a plain summarizer."""
    cases = [case for case in compile_kernels.cases(arch) if case.default and case.dtype == torch.bfloat16]
    ends = ("_odd", "_continued", "_mixed", "_expander", "_separable", "_scale")
    return [case for case in cases if not case.name.endswith(ends) and "reduce" not in case.name]


def named(case: CompileCase) -> str:
    return case.name if "D=" in case.name else f"{case.name} E={case.constexprs['E']}"


@pytest.mark.slow
def test_products_that_are_done_more_than_once(_executed):
    arch, found = _executed.arch, {}
    if arch not in LISTED:
        pytest.skip("the table is of sm_80 and sm_90")
    for case in plain(arch):
        signature = compile_kernels._full_signature(case)
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = ASTSource(case.kernel, signature=signature, constexprs=case.constexprs, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
        needed, done = compiled.metadata.products_needed, compiled.metadata.products_done
        (kernel,) = parse(compiled.asm["ptx"]).values()
        # The back end may repeat a product's code, where two ways lead to it.
        assert executed(kernel) >= done, case.name
        if case.name.startswith(("attend", "look_ahead")):
            assert executed(kernel) == done, case.name
        if done != needed:
            found[named(case)] = round(done / needed, 2)
    assert found == LISTED[arch]


def test_counts_of_a_call(_executed, tmp_path):
    """Of 128 tokens, two banks and two heads of 64: products of three tiles with their keys, and no more."""
    (shape,) = (one for one in counted.shapes(128) if one.operation == "attend" and one.size == 64)
    found = {row["kernel"]: row for row in counted.rows(_executed.arch, [shape])}
    assert json.loads(json.dumps(found)) == found
    forward, backward = found["attend_fwd_kernel"], found["attend_bwd_kernel"]
    assert forward["programs"] == 6 and forward["global_sectors_read"] > 0 and forward["shared_passes"] > 0
    if _executed.arch >= 80:
        # A tile of 64 queries has 80 keys of a bank at the most, in steps of 32 or 64; two products of 64 features.
        products = 6 * 2 * 64 * 64 * 2
        assert forward["tensor_multiplications_needed"] % products == 0
        assert 64 <= forward["tensor_multiplications_needed"] // products <= 128
        assert forward["tensor_multiplications"] == forward["tensor_multiplications_needed"]
        assert backward["tensor_multiplications_needed"] * 2 == forward["tensor_multiplications_needed"] * 5
