"""What the table of launches holds, for tests that go through it."""

from __future__ import annotations

import torch

from lmn_kernels._triton.launch import LAUNCHES, Launch


def every_launch(*kernels: str) -> set[Launch]:
    """All launches of kernels, for products in 16 bits and in float32."""
    return {
        LAUNCHES.look_up(kernel, width, dtype, 80)
        for kernel in kernels
        for dtype in (torch.float16, torch.float32)
        for width in LAUNCHES.widths(kernel, dtype)
    }
