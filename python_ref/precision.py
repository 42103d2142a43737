"""Keeping autocast out of code that has chosen its dtypes, and the choice itself."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of scores, softmax and sums over operands in ``dtype``: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A region in which nothing is cast; some devices (meta) have no autocast to leave."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
