"""Tiles of the tensor cores: from the fragments that lanes hold to matrices ``[warps, rows, columns]`` and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .values import from_bf16


class Shape(NamedTuple):
    """Registers of the operands, and multiplications of one instruction."""

    left: int
    right: int
    operations: int


SHAPES = {
    ("m16n8k16", "f16"): Shape(4, 2, 16 * 8 * 16),
    ("m16n8k16", "bf16"): Shape(4, 2, 16 * 8 * 16),
    ("m16n8k8", "f16"): Shape(2, 1, 16 * 8 * 8),
    ("m16n8k8", "bf16"): Shape(2, 1, 16 * 8 * 8),
    ("m16n8k8", "tf32"): Shape(4, 2, 16 * 8 * 8),
    ("m16n8k4", "tf32"): Shape(2, 1, 16 * 8 * 4),
}


def _widened(words: np.ndarray, kind: str) -> np.ndarray:
    """Registers ``[…]`` uint32 as float32 ``[…, 2]``, of TF32 ``[…, 1]``."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    halves = words.view(np.uint16).reshape(*words.shape, 2)
    return from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


def rows(*registers_and_kind: np.ndarray | str) -> np.ndarray:
    """The left operand ``[warps, 16, k]``: a register holds row lane / 4 or 8 more, pairs of columns by lane % 4."""
    *registers, kind = registers_and_kind
    words = np.stack(registers).reshape(len(registers) // 2, 2, -1, 8, 4)
    wide = _widened(words, str(kind))
    return wide.transpose(2, 1, 3, 0, 4, 5).reshape(words.shape[2], 16, -1)


def columns(*registers_and_kind: np.ndarray | str) -> np.ndarray:
    """The right operand as ``[warps, 8, k]``: a register holds column lane / 4, pairs of rows by lane % 4."""
    *registers, kind = registers_and_kind
    words = np.stack(registers).reshape(len(registers), -1, 8, 4)
    return _widened(words, str(kind)).transpose(1, 2, 0, 3, 4).reshape(words.shape[1], 8, -1)


def product(left: np.ndarray, right: np.ndarray, sums: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """The four registers of left · rightᵀ + sums, in float32."""
    found = np.matmul(left, right.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [part + total for part, total in zip(found, sums, strict=True)]


def spread(product_: np.ndarray) -> np.ndarray:
    """``[groups, 64, n]`` of a warp group as ``[n / 2, lanes]`` registers."""
    groups, _, size = product_.shape
    tiles = product_.reshape(groups, 4, 2, 8, size // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    return tiles.reshape(size // 2, groups * 128)
