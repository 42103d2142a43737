"""The tree kernels against the float64 reference: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.support import kernel_place

DEVICE = kernel_place.device()

from bench.close import TOLERANCE, assert_close, error  # noqa: E402
from lmn_kernels._triton import tree, tree_compile  # noqa: E402
from lmn_kernels._triton.launch import KERNELS  # noqa: E402
from python_ref import tree as reference  # noqa: E402
from python_ref.layout import Layout  # noqa: E402
from python_ref.sequences import Sequences  # noqa: E402
from tests.support.launches import every_launch  # noqa: E402

pytestmark = kernel_place.mark()

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
EDGES = (0, *range(1, 10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
GRADIENTS = ("grad_x", "grad_weight", "grad_bias", "grad_scale", "grad_token", "grad_carried")


@pytest.fixture(autouse=True)
def _on_device():
    with DEVICE:
        yield


@dataclass(frozen=True)
class Case:
    """A summarizer and a batch: S sequences of one length, or spans of given lengths and offsets."""

    name: str
    size: int
    bank: int = 1
    mixed: bool = False
    expand: int = 0
    scale: bool = False
    dtype: torch.dtype = SINGLE
    equal: tuple[int, int] | None = None
    lengths: tuple[int, ...] = ()
    offsets: tuple[int, ...] | None = None
    slots: int | None = None  # rows of x per sequence (right-padded); None: packed, with padding behind
    small_tail: bool = False  # levels one by one, as they are where they have many rows

    def __str__(self) -> str:
        return self.name

    def layout(self) -> Layout:
        if self.equal is not None:
            count, length = self.equal
            return Layout(Sequences.equal(count, length), self.expand, DEVICE)
        length = torch.tensor(self.lengths, dtype=torch.int64)
        offset = torch.zeros_like(length) if self.offsets is None else torch.tensor(self.offsets)
        count = len(self.lengths)
        start = length.cumsum(0) - length if self.slots is None else torch.arange(count) * self.slots
        tokens = int(length.sum()) + 3 if self.slots is None else count * self.slots
        carried = None if self.offsets is None else max(self.offsets).bit_length() - 1
        last = int((length + offset).max()) if count else 0
        spans = torch.stack([start, length, offset], 1)
        return Layout(Sequences(tokens, count, last, spans, carried), self.expand, DEVICE)


@dataclass
class Call:
    """What the kernels and the reference are called with; rows that hold nodes, and their gradients."""

    layout: Layout
    x: torch.Tensor
    merge: reference.LinearMerge
    bank: int
    token: torch.Tensor | None
    carried: torch.Tensor | None
    is_node: torch.Tensor
    grad: torch.Tensor

    def wide(self) -> Call:
        widened = [t if t is None else t.double() for t in (self.x, self.token, self.carried, self.grad)]
        x, token, carried, grad = widened
        merge = reference.LinearMerge(*[t if t is None else t.double() for t in self.merge])
        return Call(self.layout, x, merge, self.bank, token, carried, self.is_node, grad)

    def forward(self, module) -> torch.Tensor:
        return module.build_tree(self.x, self.merge, self.bank, self.token, self.carried, self.layout)

    def backward(self, module, nodes: torch.Tensor):
        return module.build_tree_backward(self.grad, self.x, nodes, self.merge, self.token, self.layout)


def make(case: Case) -> Call:
    layout, bank, size = case.layout(), case.bank, case.size
    groups = 1 if case.mixed else bank
    features = bank * size // groups
    depth = features if case.scale else 2 * features

    def draw(*shape, std=1.0):
        return (torch.randn(*shape) * std).to(case.dtype)

    weight = draw(groups, 1 + case.expand, depth, features, std=(depth * (1 + case.expand)) ** -0.5)
    merge = reference.LinearMerge(weight, draw(groups, features), draw(2, groups, features) if case.scale else None)
    continued = layout.carried_levels is not None
    is_node = torch.zeros(layout.rows, dtype=torch.bool)
    is_node[layout.carry_base : layout.null_row] = True
    for level in range(1, layout.levels + 1):
        count = int(layout.tables()[4][level, -1]) * (1 + level * case.expand)
        is_node[layout.level_base[level] : layout.level_base[level] + count] = True
    return Call(
        layout,
        draw(layout.tokens, size),
        merge,
        bank,
        draw(layout.sequences, size) if continued else None,
        draw(layout.sequences, layout.carry_rows, bank, size) if continued else None,
        is_node,
        draw(bank, layout.rows, size) * is_node[:, None],
    )


def check(case: Case, call: Call) -> None:
    """Nodes and all gradients against float64 on the same rounded inputs."""
    values, gradients = TOLERANCE[case.dtype]
    wide = call.wide()
    nodes, expected = call.forward(tree), wide.forward(reference)
    assert nodes.dtype == case.dtype and nodes.shape == expected.shape
    assert torch.isfinite(nodes).all()
    assert (nodes[:, call.layout.unused_base : call.layout.carry_base] == 0).all() and (nodes[:, -1] == 0).all()
    assert_close("nodes", nodes[:, call.is_node], expected[:, call.is_node], values)
    found, wanted = call.backward(tree, nodes), wide.backward(reference, expected)
    for name, got, want in zip(GRADIENTS, found, wanted, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            assert got.dtype == case.dtype and got.is_contiguous(), name
            assert_close(name, got, want, gradients)


CONTINUED = {"lengths": (5, 0, 1, 9, 2, 16, 3, 1), "offsets": (3, 7, 15, 6, 0, 16, 31, 1)}
RAGGED = {"lengths": (5, 0, 9, 17, 1, 4)}

CASES = [
    Case("packed_every_edge_length", 8, lengths=EDGES),
    Case("padded", 3, lengths=(0, 33, *range(1, 10), 15, 16, 17, 31, 32), slots=33),
    Case("packed_banks", 8, 2, **RAGGED),
    Case("packed_mixed", 8, 2, mixed=True, **RAGGED),
    Case("packed_separable", 8, 2, scale=True, **RAGGED),
    Case("packed_half", 17, dtype=HALF, **RAGGED),
    Case("continued", 8, 2, **CONTINUED),
    Case("continued_mixed_expander_k1", 4, 2, mixed=True, expand=1, lengths=(5, 0, 9), offsets=(3, 7, 6)),
    Case("continued_separable", 8, 2, scale=True, **CONTINUED),
    Case("continued_expander_k2", 3, expand=2, lengths=(5, 1, 4), offsets=(3, 7, 0)),
    Case("continued_half", 8, 2, dtype=HALF, **CONTINUED),
    Case("continued_brain", 8, dtype=BRAIN, **CONTINUED),
    Case("continued_one_by_one", 8, 2, small_tail=True, **CONTINUED),
    Case("E1", 1, 2, equal=(2, 9)),
    Case("E3", 3, 2, equal=(2, 13)),
    Case("E17_half", 17, equal=(2, 9), dtype=HALF),
    Case("E33", 33, equal=(1, 12)),
    Case("E64_half", 64, 2, equal=(1, 17), dtype=HALF),
    Case("E80", 80, equal=(1, 8)),
    Case("E96_half", 96, equal=(2, 8), dtype=HALF),
    Case("E128_brain", 128, equal=(1, 16), dtype=BRAIN),
    Case("three_banks", 8, 3, equal=(2, 21)),
    Case("mixed", 8, 2, mixed=True, equal=(2, 11)),
    Case("mixed_beyond_blocks", 80, 2, mixed=True, equal=(1, 4), dtype=HALF),
    Case("separable", 8, 2, scale=True, equal=(2, 11)),
    Case("separable_half", 33, scale=True, equal=(1, 8), dtype=HALF),
    Case("separable_wide", 144, scale=True, equal=(1, 8), dtype=HALF),
    Case("expander_k1", 8, 2, expand=1, equal=(2, 11)),
    Case("expander_k2", 5, expand=2, equal=(1, 17)),
    Case("expander_mixed", 4, 2, mixed=True, expand=1, equal=(1, 9)),
    Case("expander_separable", 4, 2, scale=True, expand=1, equal=(1, 9)),
    Case("wide_tail", 144, equal=(1, 9), dtype=HALF),
    Case("wide_tail_odd_banks", 144, 2, equal=(2, 6), dtype=HALF),
    Case("wide_library", 144, 2, equal=(2, 16), small_tail=True),
    Case("wide_library_odd", 144, equal=(3, 29), small_tail=True),
    Case("wide_library_one_sequence", 144, equal=(1, 53), small_tail=True),
    Case("wide_library_half", 144, 2, equal=(2, 37), dtype=HALF, small_tail=True),
    Case("wide_library_brain", 144, equal=(2, 12), dtype=BRAIN, small_tail=True),
    Case("wide_packed", 144, lengths=(5, 0, 2), dtype=HALF),
    Case("wide_separable_one_by_one", 144, scale=True, equal=(1, 4), dtype=HALF, small_tail=True),
    Case("no_tokens", 8, 2, equal=(0, 0)),
    Case("no_tokens_in_sequences", 8, 2, equal=(3, 0)),
    Case("no_sequences", 8, 2, lengths=()),
]


IN_OTHER_DTYPES = [
    (replace(case, name=f"{case}_in_{str(dtype)[6:]}", dtype=dtype),)
    for case in CASES
    for dtype in (SINGLE, HALF, BRAIN)
    if dtype != case.dtype
]


@pytest.mark.parametrize("case", [*CASES, *kernel_place.in_other_dtypes(IN_OTHER_DTYPES)], ids=str)
def test_values_and_gradients(case, monkeypatch):
    if case.small_tail:
        monkeypatch.setattr(tree, "TAIL_ELEMENTS", 0)
    check(case, make(case))


@pytest.mark.parametrize("length", EDGES)
def test_every_edge_length(length):
    case = Case(f"L{length}", 3, equal=(2 if length < 32 else 1, length))
    check(case, make(case))


@pytest.mark.parametrize("case", [Case("blocks", 8, 2, equal=(1, 5)), Case("tail", 8, **RAGGED)], ids=str)
def test_left_is_not_right(case):
    call = make(case)
    nodes = call.forward(tree)
    halves = call.merge.weight.unflatten(2, (2, -1)).flip(2).flatten(2, 3)
    call.merge = call.merge._replace(weight=halves)
    swapped = call.wide().forward(reference)
    assert error(nodes[:, call.is_node], swapped[:, call.is_node]) > 0.1


def test_strided_inputs():
    case = Case("", 8, 2, lengths=(5, 3), offsets=(3, 1))
    call = make(case)
    call.x = call.x.t().contiguous().t()
    call.token = torch.stack([call.token, call.token], 1)[:, 1]
    call.carried = call.carried.transpose(0, 1).contiguous().transpose(0, 1)
    call.merge = call.merge._replace(
        weight=call.merge.weight.transpose(2, 3).contiguous().transpose(2, 3), bias=call.merge.bias.t().contiguous().t()
    )
    call.grad = torch.stack([call.grad, call.grad], -1)[..., 0]
    before = call.grad.clone()
    check(case, call)
    assert torch.equal(call.grad, before)


@pytest.mark.parametrize(
    "case", [Case("blocks", 8, 2, equal=(2, 6)), Case("wide", 144, equal=(1, 5), dtype=HALF)], ids=str
)
def test_expanded_gradient(case):
    call = make(case)
    call.grad = torch.ones((), dtype=case.dtype).expand(call.grad.shape)
    nodes = call.forward(tree)
    wanted = call.wide().backward(reference, nodes.double())
    for name, got, want in zip(GRADIENTS, call.backward(tree, nodes), wanted, strict=True):
        if got is not None:
            assert_close(name, got, want, TOLERANCE[case.dtype][1])


@pytest.mark.parametrize(
    "case",
    [Case("blocks", 17, 2, equal=(1, 9)), Case("tail", 8, 2, **RAGGED), Case("wide", 144, equal=(1, 5), dtype=HALF)],
    ids=str,
)
def test_two_runs_are_equal(case):
    call = make(case)
    nodes = call.forward(tree)
    assert torch.equal(nodes, call.forward(tree))
    for name, one, other in zip(GRADIENTS, call.backward(tree, nodes), call.backward(tree, nodes), strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), name


@pytest.mark.parametrize(
    "case",
    [
        Case("packed", 1, expand=1, lengths=EDGES),
        Case("padded", 1, lengths=(0, 7, 2), slots=9),
        Case("continued", 1, **CONTINUED),
    ],
    ids=str,
)
def test_child_table(case):
    layout = case.layout()
    table, begin = tree.child_table(layout), 0
    for level in range(1, layout.levels + 1):
        real = int(layout.tables()[4][level, -1])
        assert torch.equal(table[begin : begin + real], layout.children(level)[:real])
        assert (table[begin + real : begin + layout.level_nodes[level]] == -1).all()
        begin += layout.level_nodes[level]
    assert begin == len(table)


def test_double_precision_takes_the_reference():
    call = make(Case("", 3, equal=(2, 5))).wide()
    assert torch.equal(call.forward(tree), call.forward(reference))
    nodes = call.forward(reference)
    for got, want in zip(call.backward(tree, nodes), call.backward(reference, nodes), strict=True):
        assert got is want is None or torch.equal(got, want)


def test_compile_cases_are_complete():
    names = set()
    for case in tree_compile.compile_cases(80):
        assert set(case.kernel.arg_names) == set(case.signature) | set(case.constexprs)
        names.add((case.name, case.dtype, case.constexprs["E"]))
    assert len(names) == len(list(tree_compile.compile_cases(80)))
    for kernel in (name for name in KERNELS if name.startswith("tree_")):
        found = every_launch(kernel)
        sizes = {launch.blocks[name] for launch in found for name in launch.blocks if name.endswith(("BM", "BN", "BK"))}
        assert len(found) <= 12 and all(part >= 16 and part & (part - 1) == 0 for part in sizes), kernel
    assert tree.launch_for("tree_block_fwd", 80, HALF, DEVICE) == tree.launch_for("tree_block_fwd", 128, HALF, DEVICE)
