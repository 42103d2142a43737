"""The only reader of environment variables at run time; the README lists them."""

from __future__ import annotations

import os

BACKEND = "LMN_KERNELS_BACKEND"


def backend() -> str:
    """``LMN_KERNELS_BACKEND``: what ``backend="auto"`` means; ``auto`` where unset."""
    return os.environ.get(BACKEND) or "auto"
