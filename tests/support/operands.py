"""Batches of every form and random summarizers, as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from lmn_kernels import LinearMerge, Sequences
from python_ref.layout import Layout, level_count

FORMS = ("equal", "odd", "padded", "packed", "continued")


def sequences_of(form: str, length: int, device: torch.device) -> Sequences:
    """A batch of the form whose longest sequence has ``length`` tokens."""

    def ids(*values: int) -> Tensor:
        return torch.tensor(values, device=device)

    if form == "equal":
        return Sequences.equal(2, length)
    if form == "odd":
        return Sequences.equal(3, length - 1 + length % 2)
    if form == "padded":
        return Sequences.padded(3, length, ids(length, 0, length // 3))
    if form == "packed":
        return Sequences.packed(2 * length + 10, ids(0, 3, 3, length, length + 1, 2 * length))
    before = 2 * length + 3
    return Sequences.equal(2, length).after(ids(before, 5), before, level_count(before))


def layout_of(sequences: Sequences, expand: int, device: torch.device) -> Layout:
    return Layout(sequences, expand, device)


def merge_of(kind: str, size: int, bank: int, device: torch.device) -> LinearMerge:
    """Random weights under which a node varies as much as its children."""
    groups, features = (1, bank * size) if kind == "mixed" else (bank, size)
    taps = 2 if kind == "expander" else 1
    rows = features if kind == "separable" else 2 * features
    weight = torch.randn(groups, taps, rows, features, device=device) * (taps * rows) ** -0.5
    scale = torch.randn(2, groups, features, device=device) * 0.5**0.5 if kind == "separable" else None
    return LinearMerge(weight, torch.randn(groups, features, device=device) * 0.1, scale)


def cast(merge: LinearMerge, dtype: torch.dtype) -> LinearMerge:
    scale = None if merge.scale is None else merge.scale.to(dtype)
    return LinearMerge(merge.weight.to(dtype), merge.bias.to(dtype), scale)
