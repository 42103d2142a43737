"""The only reader of environment variables at run time; docs/install.md lists them."""

from __future__ import annotations

import os

BACKEND = "LMN_KERNELS_BACKEND"
DEBUG = "LMN_KERNELS_DEBUG"


def backend() -> str:
    """``LMN_KERNELS_BACKEND``: what ``backend="auto"`` means; ``auto`` where unset."""
    return os.environ.get(BACKEND) or "auto"


def debug() -> bool:
    """``LMN_KERNELS_DEBUG``: whether to check, at the price of a synchronisation, what lies on a GPU."""
    return os.environ.get(DEBUG, "0") not in ("", "0")
