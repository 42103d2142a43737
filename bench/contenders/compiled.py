"""torch.compile for contenders: one compilation a shape, and never a silent return to uncompiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Shapes and directions of a run; past the compiler's own limit of 8 it would run a function uncompiled.
LIMIT = 128


def compile_whole(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """``function`` compiled for static shapes. Sets the limit for the whole process."""
    torch._dynamo.config.recompile_limit = LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, mode=mode)
