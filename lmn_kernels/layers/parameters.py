"""Parameters without the cost of `torch.nn.Module.__getattr__`, which a step of a small layer would notice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from python_ref.step import Linear


def parameter(module: Any, name: str) -> Tensor:
    """``module.<name>``: a parameter, or what a parametrization makes of it."""
    found: Tensor | None = module._parameters.get(name)
    if found is None:
        found = getattr(module, name)
    assert found is not None
    return found


def weight_and_bias(module: Any) -> Linear:
    return Linear(parameter(module, "weight"), parameter(module, "bias"))


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module does what ``kind`` does with its parameters, and nothing of a user's besides."""
    calls_its_own = getattr(type(module), "forward", None) is kind.forward and "forward" not in module.__dict__
    return calls_its_own and not module._forward_hooks and not module._forward_pre_hooks


def is_plain_linear(module: Any) -> bool:
    """Whether a weight and a bias are all there is to say; a parametrization may make them."""
    return is_plain(module, nn.Linear) and module._parameters.get("bias", module) is not None
