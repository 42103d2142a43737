"""Every configuration of every Triton kernel, alone, against the float64 reference.

Configurations are run at the sizes that they are made for. Off a GPU this needs ``TRITON_INTERPRET=1``. The kernels'
own launchers are called: nothing else can serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support import kernel_place

kernel_place.device()

from bench.close import TOLERANCE, assert_close, assert_same_gradients, error  # noqa: E402
from lmn_kernels._triton import attention, tree  # noqa: E402
from lmn_kernels._triton.launch import KERNELS, LAUNCHES, launch_for  # noqa: E402
from python_ref import attention as ref_attention  # noqa: E402
from python_ref import tree as ref_tree  # noqa: E402
from python_ref.layout import Layout, stack_height  # noqa: E402
from tests.support.operands import cast, layout_of, merge_of, sequences_of  # noqa: E402
from tests.support.places import DTYPES, Place, everywhere, short  # noqa: E402

# Off a GPU where all is asked for: on the executor all configurations, in the interpreter a few.
HERE = kernel_place.INTERPRETED or kernel_place.EXECUTED
pytestmark = [kernel_place.mark(), pytest.mark.slow] if HERE else []


class AttendCase(NamedTuple):
    dtype: torch.dtype
    width: int

    def __str__(self) -> str:
        return f"attend {short(self.dtype)} heads of {self.width}"


def attend_cases(place: Place) -> list[AttendCase]:
    found = []
    for dtype in DTYPES:
        widths = {*LAUNCHES.widths("attend_fwd", dtype), *LAUNCHES.widths("attend_bwd", dtype)}
        found += [AttendCase(dtype, width) for width in sorted(widths)]
    few = place.quick and not kernel_place.EXECUTED
    return [c for c in found if c.width == 16 and c.dtype != torch.bfloat16] if few else found


def check_attend(given: AttendCase, length: int, device: torch.device) -> Iterator[tuple[str, float]]:
    """Errors of the forward and the backward in the configuration of ``given``, over three layouts."""
    dtype, width = given
    forward, backward = (launch_for(name, width, dtype, device) for name in ("attend_fwd", "attend_bwd"))
    values, gradients = TOLERANCE[dtype]
    for form, expand in (("equal", 0), ("packed", 0), ("continued", 1)):
        sequences = sequences_of(form, length, device)
        layout = layout_of(sequences, expand, device)
        heads, bank, tokens = 2, 2, sequences.tokens
        token_qkv = torch.randn(tokens, 3 * heads * width, device=device).to(dtype)
        node_qv = torch.randn(bank, layout.rows, 2 * heads * width, device=device).to(dtype)
        grad = torch.randn(tokens, heads * width, device=device).to(dtype)
        exact = token_qkv.double(), node_qv.double()
        expected, expected_lse = ref_attention.attend(*exact, heads, layout)
        want = ref_attention.attend_backward(grad.double(), *exact, expected, expected_lse, heads, layout)
        out, lse = attention.attend(token_qkv, node_qv, heads, layout, launch=forward)
        assert_close(f"{form} out", out, expected, values)
        assert_close(f"{form} lse", lse, expected_lse, TOLERANCE[torch.float32][0])
        got = attention.attend_backward(grad, token_qkv, node_qv, out, lse, heads, layout, launch=backward)
        for name, g, w in zip(("d_token_qkv", "d_node_qv"), got, want, strict=True):
            assert_close(f"{form} {name}", g, w, gradients)
            yield f"{form} {name}", error(g, w)
        yield f"{form} out", error(out, expected)


class TreeCase(NamedTuple):
    """``launch`` is the kind of launch that must serve the case; ``form``, ``kind`` and E decide that it does."""

    launch: str
    dtype: torch.dtype
    size: int
    form: str
    kind: str

    def __str__(self) -> str:
        return f"tree {self.launch} {short(self.dtype)} E={self.size} {self.form} {self.kind}"


BLOCK_SIZES, ALL_SIZES = (16, 32, 64, 128), (16, 32, 64, 128, 256)
LAUNCH_SIZES = {"level": ALL_SIZES, "tail": ALL_SIZES, "block": BLOCK_SIZES, "weight": ALL_SIZES}
# Elements from which on a level has a launch of its own: every level, or none.
TAIL_ELEMENTS = {"level": 0, "library": 0, "tail": 1 << 62}


def launches_of(kind: str) -> tuple[str, ...]:
    """Names of a kind of launch in the table of launches."""
    return ("tree_bwd_weight",) if kind == "weight" else (f"tree_{kind}_fwd", f"tree_{kind}_bwd")


def tree_cases(place: Place) -> list[TreeCase]:
    """Every table entry in every dtype with the plain summarizer, and every other summarizer at E = 64.

    Raises:
        AssertionError: the tables have entries that this list does not know of.
    """
    names = [name for name in KERNELS if name.startswith("tree_")]
    listed = {(name, dtype): LAUNCHES.widths(name, dtype) for name in names for dtype in DTYPES}
    expected = {
        (name, dtype): list(sizes)
        for kind, sizes in LAUNCH_SIZES.items()
        for name in launches_of(kind)
        for dtype in DTYPES
    }
    assert listed == expected, f"the tree has launches {listed}, this check runs {expected}"
    # The weight kernel runs in every backward pass but those that the matrix library serves whole.
    found = [
        TreeCase(launch, dtype, size, form, "linear")
        for launch, form in (("level", "packed"), ("tail", "continued"), ("block", "equal"))
        for size in LAUNCH_SIZES[launch]
        for dtype in DTYPES
    ]
    found += [TreeCase("library", dtype, 256, form, "linear") for dtype in DTYPES for form in ("equal", "odd")]
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("mixed", "separable", "expander"):
            found += [TreeCase("tail", dtype, 64, "padded", kind), TreeCase("block", dtype, 64, "odd", kind)]
    few = place.quick and not kernel_place.EXECUTED
    return [c for c in found if c.size == 16 and c.dtype == torch.float32] if few else found


def real_rows(layout: Layout) -> Tensor:
    """``[rows]`` bool: rows that hold a node, new or carried."""
    place = layout.tables()[4]
    mask = torch.zeros(layout.rows, dtype=torch.bool, device=layout.device)
    for level in range(1, layout.levels + 1):
        end = int(place[level, -1]) * stack_height(level, layout.expand)
        mask[layout.level_base[level] : layout.level_base[level] + end] = True
    mask[layout.carry_base : layout.null_row] = True
    return mask


def check_tree(given: TreeCase, length: int, device: torch.device) -> Iterator[tuple[str, float]]:
    """Errors of the nodes and of the worst gradient, and proof that the launch served them."""
    launch, dtype, size, form, kind = given
    # An embedding that fills no tile where the tables allow it.
    size = size if launch in ("block", "library") or kind != "linear" else size * 3 // 4 + (size == 256) * size // 2
    bank, sequences = 2, sequences_of(form, length, device)
    layout = layout_of(sequences, int(kind == "expander"), device)
    merge = cast(merge_of(kind, size, bank, device), dtype)
    exact = cast(merge, torch.float64)
    x = torch.randn(sequences.tokens, size, device=device).to(dtype)
    token = carried = None
    if sequences.carried_levels is not None:
        token = torch.randn(sequences.count, size, device=device).to(dtype)
        carried = torch.randn(sequences.count, layout.carry_rows, bank, size, device=device).to(dtype)
    real = real_rows(layout)
    grad = torch.where(real[:, None], torch.randn(bank, layout.rows, size, device=device), 0).to(dtype)
    past = (None if token is None else token.double(), None if carried is None else carried.double())
    expected = ref_tree.build_tree(x.double(), exact, bank, *past, layout)
    want = ref_tree.build_tree_backward(grad.double(), x.double(), expected, exact, past[0], layout)

    used: set[str] = set()

    def watched(kernel: str, *args: Any) -> Any:
        used.add(kernel)
        return launch_for(kernel, *args)

    elements = TAIL_ELEMENTS.get(launch, tree.TAIL_ELEMENTS)
    with mock.patch.object(tree, "launch_for", watched), mock.patch.object(tree, "TAIL_ELEMENTS", elements):
        nodes = tree.build_tree(x, merge, bank, token, carried, layout)
        got = tree.build_tree_backward(grad, x, nodes, merge, token, layout)
    values, gradients = TOLERANCE[dtype]
    assert_close("nodes", nodes[:, real], expected[:, real], values)
    names = ["x", "weight", "bias", "scale", "token", "carried"]
    given_names = [name for name, w in zip(names, want, strict=True) if w is not None]
    got_grads, want_grads = ([g for g in grads if g is not None] for grads in (got, want))
    assert_same_gradients(given_names, got_grads, want_grads, gradients)
    wanted = set() if launch == "library" else {*launches_of(launch), "tree_bwd_weight"}
    assert wanted <= used, f"expected launches {sorted(wanted)}, got {sorted(used)}"
    yield "nodes", error(nodes[:, real], expected[:, real])
    yield "gradients", max(error(g, w) for g, w in zip(got_grads, want_grads, strict=True))


def first_attend(case: AttendCase) -> bool:
    return case.width == 64 and case.dtype != torch.float16


def first_tree(case: TreeCase) -> bool:
    return case.size in (64, 128, 256) and case.kind == "linear" and case.dtype != torch.float16


@everywhere(attend_cases, first_attend)
def test_attention_in_every_configuration(place, case, record_property):
    errors = check_attend(case, 20 if place.quick else 1000, place.torch_device)
    record_property("error", max(found for _, found in errors))


@everywhere(tree_cases, first_tree)
def test_the_tree_in_every_configuration(place, case, record_property):
    errors = check_tree(case, 20 if place.quick else 1000, place.torch_device)
    record_property("error", max(found for _, found in errors))
