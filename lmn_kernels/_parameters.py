"""Parameters without the cost of `torch.nn.Module.__getattr__`, which a step of a small layer would notice."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def parameter(module: Any, name: str) -> Tensor:
    """``module.<name>``: a parameter, or what a parametrization makes of it."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor]:
    return parameter(module, "weight"), parameter(module, "bias")
