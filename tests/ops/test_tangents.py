"""A forward-mode tangent, which the operations have no derivative for, is refused by the operand's name."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from lmn_kernels.ops.attention import attend
from lmn_kernels.ops.tree import build_tree
from python_ref.layout import node_rows
from python_ref.sequences import Sequences
from python_ref.tree import LinearMerge


@pytest.mark.parametrize("name", ["x", "merge.weight", "merge.bias", "token_qkv", "node_qv"])
def test_a_forward_mode_tangent_of_an_operand_is_refused(name):
    sequences = Sequences.equal(1, 4)
    rows = node_rows(sequences, 0)
    given = {
        "x": torch.randn(4, 6), "merge.weight": torch.randn(1, 1, 12, 6), "merge.bias": torch.randn(1, 6),
        "token_qkv": torch.randn(4, 18), "node_qv": torch.randn(1, rows, 12),
    }  # fmt: skip
    with forward_ad.dual_level():
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(NotImplementedError, match=f"^{name}: expected a tensor without a forward-mode tangent"):
            attend(given["token_qkv"], given["node_qv"], 1, sequences)
            build_tree(given["x"], LinearMerge(given["merge.weight"], given["merge.bias"], None), sequences)
