"""Tensors of more than 2^31 elements, and more sequences than a grid's second axis holds (R4, R5)."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close
from lmn_kernels import Sequences, attend, build_tree
from tests.support.operands import cast, layout_of, merge_of
from tests.support.places import Place, everywhere
from tests.support.served import Served

BF16 = torch.bfloat16


class LargeCase(NamedTuple):
    """So many equal sequences: the last one of them must be what it is alone."""

    count: int
    length: int
    size: int

    def __str__(self) -> str:
        return f"{self.count} of {self.length} at E={self.size}"


def large_cases(count: int):
    return lambda place: [LargeCase(3, 16, 16) if place.quick else LargeCase(count, 8192, 1024)]


def room(place: Place) -> None:
    if place.device == "cuda" and torch.cuda.mem_get_info(0)[0] < 60e9:
        pytest.skip("tensors of 2^31 elements and their gradients need 60 GB of free memory")


def assert_last(whole: tuple[Tensor, Tensor], alone: tuple[Tensor, Tensor], length: int) -> None:
    for name, part, expected in zip(("out", "gradient"), whole, alone, strict=True):
        assert_close(name, part[-length:].double(), expected.double(), TOLERANCE[BF16][1])


@everywhere(large_cases(263), large=True)
def test_a_large_tree(place, case):
    room(place)
    (count, length, size), device = case, place.torch_device
    tree = importlib.import_module(f"{place.package}.tree")
    merge = cast(merge_of("linear", size, 1, device), BF16)
    x = torch.randn(count * length, size, dtype=BF16, device=device)

    def grown(sequences: Sequences) -> tuple[Tensor, Tensor]:
        layout, rows = layout_of(sequences, 0, device), x[-sequences.tokens :]
        nodes = tree.build_tree(rows, merge, 1, None, None, layout)
        level = nodes[0, layout.level_rows[1]].repeat_interleave(2, 0)
        return level, tree.build_tree_backward(nodes, rows, nodes, merge, None, layout)[0]

    assert_last(grown(Sequences.equal(count, length)), grown(Sequences.equal(1, length)), length)


@everywhere(large_cases(88), large=True)
def test_a_large_attention(place, case):
    room(place)
    (count, length, size), device = case, place.torch_device
    attention = importlib.import_module(f"{place.package}.attention")
    token_qkv = torch.randn(count * length, 3 * size, dtype=BF16, device=device)
    node_qv = torch.randn(1, count * length + 1, 2 * size, dtype=BF16, device=device)

    def attended(sequences: Sequences, nodes: Tensor) -> tuple[Tensor, Tensor]:
        layout, rows = layout_of(sequences, 0, device), token_qkv[-sequences.tokens :]
        out, lse = attention.attend(rows, nodes, 16 if size > 16 else 2, layout)
        heads = lse.shape[1]
        return out, attention.attend_backward(out, rows, nodes, out, lse, heads, layout)[0]

    layout, own = (layout_of(Sequences.equal(n, length), 0, device) for n in (count, 1))
    nodes = torch.zeros(1, own.rows, 2 * size, dtype=BF16, device=device)
    for level in range(1, own.levels + 1):
        nodes[:, own.level_rows[level]] = node_qv[:, layout.level_rows[level]][:, -own.level_nodes[level] :]
    alone = attended(Sequences.equal(1, length), nodes)
    assert_last(attended(Sequences.equal(count, length), node_qv), alone, length)


class ManyCase(NamedTuple):
    many: int
    form: str

    def __str__(self) -> str:
        return f"{self.many} sequences, {self.form}"


def many_cases(place: Place) -> list[ManyCase]:
    counts = (6, 7) if place.quick else (65536, 70001)
    return [ManyCase(many, form) for many in counts for form in ("equal", "packed")]


@everywhere(many_cases)
def test_many_short_sequences_are_their_two_halves(place, case):
    """To the bit where kernels compute them."""
    (many, form), device = case, place.torch_device
    merge = merge_of("linear", 16, 1, device)
    x, cotangent = torch.randn(2, 3 * many, 16, device=device)

    def run(part: slice) -> tuple[Tensor, Tensor]:
        tokens = x[part].clone().requires_grad_()
        count = len(tokens) // 3
        bounds = 3 * torch.arange(count + 1, device=device)
        equal = form == "equal"
        sequences = Sequences.equal(count, 3) if equal else Sequences.packed(3 * count, bounds, max_length=3)
        nodes = build_tree(tokens, merge, sequences, backend=place.backend)
        # No matrix product: those of the library may change with the number of rows.
        qkv, node_qv = torch.cat([tokens, 0.5 * tokens, 2 * tokens], 1), torch.cat([nodes, -nodes], 2)
        out, _ = attend(qkv, node_qv, 1, sequences, backend=place.backend)
        return out.detach(), torch.autograd.grad(out, tokens, cotangent[part])[0]

    with Served() as served:
        whole = run(slice(None))
    served.check(place.backend, "build_tree", "build_tree_backward", "attend", "attend_backward")
    for part in (slice(many // 2 * 3), slice(many // 2 * 3, None)):
        for name, a, b in zip(("out", "gradient"), whole, run(part), strict=True):
            if place.backend == "reference":
                assert_close(name, b, a[part], TOLERANCE[torch.float32][1])
            else:
                assert torch.equal(b, a[part]), f"{name} of {part} differs"
