"""An operation runs in the module of the backend that it names, in the dtypes that it is given."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from lmn_kernels import attend, build_tree
from lmn_kernels.ops.library import OPS, launcher, pack
from python_ref import attention, look_ahead, tree
from python_ref.sequences import Sequences
from python_ref.tree import LinearMerge

SEQUENCES = Sequences.equal(2, 7)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Calls of a backend ``toy``, which computes what the reference does."""
    found: list[str] = []

    def noted(name, function):
        return lambda *given: (found.append(name), function(*given))[1]

    for module in (tree, attention, look_ahead):
        short = module.__name__.rpartition(".")[2]
        toy = ModuleType(f"lmn_kernels._toy.{short}")
        for name in ("build_tree", "build_tree_backward", "attend", "attend_backward"):
            if hasattr(module, name):
                setattr(toy, name, noted(name, getattr(module, name)))
        monkeypatch.setitem(sys.modules, toy.__name__, toy)
    return found


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, LinearMerge]:
    x = torch.randn(14, 6, dtype=dtype, requires_grad=True)
    return x, LinearMerge(torch.randn(2, 1, 12, 6, dtype=dtype) * 0.3, torch.randn(2, 6, dtype=dtype), None)


def by(backend: str, x: Tensor, merge: LinearMerge) -> Tensor:
    nodes = OPS.build_tree(x, *merge, None, None, *pack(SEQUENCES, 0, backend))
    node_qv, token_qkv = torch.cat([nodes, nodes], -1), torch.cat([x, x, x], -1)
    out: Tensor = OPS.attend(token_qkv, node_qv, 2, *pack(SEQUENCES, 0, backend))[0]
    return out


@pytest.mark.parametrize("name", ["tree", "attention", "look_ahead"])
@pytest.mark.usefixtures("calls")
def test_each_backend_has_a_module_of_its_own(name):
    assert launcher(name, "reference").__name__ == f"python_ref.{name}"
    assert launcher(name, "toy").__name__ == f"lmn_kernels._toy.{name}"


def test_forward_and_backward_run_where_the_call_says(calls):
    x, merge = operands()
    expected = grad(by("reference", x, merge).sum(), x)[0]
    assert not calls
    assert torch.equal(grad(by("toy", x, merge).sum(), x)[0], expected)
    assert calls == ["build_tree", "attend", "attend_backward", "build_tree_backward"]


@pytest.mark.parametrize("name", ["build_tree", "attend"])
@pytest.mark.usefixtures("calls")
def test_a_second_derivative_of_what_is_not_the_reference_is_refused(name):
    x, merge = operands()
    nodes = build_tree(x.detach(), merge, SEQUENCES)
    if name == "build_tree":
        out = OPS.build_tree(x, *merge, None, None, *pack(SEQUENCES, 0, "toy"))
    else:
        given = torch.cat([x, x, x], -1), torch.cat([nodes, nodes], -1)
        out = OPS.attend(*given, 2, *pack(SEQUENCES, 0, "toy"))[0]
    (first,) = grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: second derivatives need backend='reference', got 'toy'"):
        first.square().sum().backward()


def test_autocast_casts_nothing_inside_an_operation():
    """It casts before: what an operation is given in float32 it computes in float32."""
    x, merge = operands()
    expected = by("reference", x, merge)
    gradient = grad(expected.sum(), x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = by("reference", x, merge)
        assert torch.equal(out, expected) and torch.equal(grad(out.sum(), x)[0], gradient)


def test_the_log_sum_exp_has_no_gradient():
    x, merge = operands()
    nodes = build_tree(x, merge, SEQUENCES)
    out, lse = attend(torch.cat([x, x, x], -1), torch.cat([nodes, nodes], -1), 2, SEQUENCES)
    assert out.requires_grad and not lse.requires_grad
