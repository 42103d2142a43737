"""The checker. It never loosens itself: no environment variable, no retry, no per-test override of a rule."""

from __future__ import annotations

import torch
from torch import Tensor

# Error of a computation in that dtype against float64 on the same rounded inputs, relative to the
# root mean square of the expected value: (values, gradients).
TOLERANCE = {
    torch.float64: (1e-11, 1e-10),
    torch.float32: (2e-6, 1e-5),
    torch.float16: (2e-3, 4e-3),
    torch.bfloat16: (1.6e-2, 3e-2),
}


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected value (the difference itself where that is 0)."""
    difference = (got.double() - expected.double()).square().mean().sqrt().item() if got.numel() else 0.0
    size = expected.double().square().mean().sqrt().item() if expected.numel() else 0.0
    return difference / size if size else difference


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Shape, device, finiteness, then `error`. ``tolerance`` is relative; an expected zero must be zero.

    Raises:
        AssertionError: naming the tensor and the measured error.
    """
    assert isinstance(got, Tensor), f"{name}: expected a tensor, got {type(got).__name__}"
    assert got.shape == expected.shape, f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    assert got.device == expected.device, f"{name}: expected device {expected.device}, got {got.device}"
    assert torch.isfinite(expected).all(), f"{name}: the expected value is not finite"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    measured = error(got, expected)
    assert measured <= tolerance, f"{name}: error {measured:.3g} is over {tolerance:.3g}"


def assert_same_gradients(names: list[str], got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """`assert_close` for every gradient, a vanishing one measured against the largest of them.

    The gradient of q's bias is zero by the shift invariance of the softmax: what either side holds
    there is rounding, and its own size is no yardstick.
    """
    largest = max((e.double().square().mean().sqrt().item() for e in expected if e.numel()), default=0.0)
    for name, g, e in zip(names, got, expected, strict=True):
        assert g.shape == e.shape, f"{name}: expected shape {tuple(e.shape)}, got {tuple(g.shape)}"
        size = e.double().square().mean().sqrt().item() if e.numel() else 0.0
        if size > 1e-12 * largest:
            assert_close(name, g, e, tolerance)
        else:
            measured = g.double().abs().max().item() if g.numel() else 0.0
            assert measured <= tolerance * largest, f"{name}: expected nearly zero, got up to {measured:.3g}"
