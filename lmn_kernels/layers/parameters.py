"""Parameters without the cost of `torch.nn.Module.__getattr__`, which a step of a small layer would notice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _all

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
    """Whether a module does what ``kind`` does with its parameters, and nothing of a user's besides.

    Else it must be called: hooks, its own or global ones, may change its parameters, its inputs or its results.
    """
    calls_its_own = getattr(type(module), "forward", None) is kind.forward and "forward" not in module.__dict__
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return calls_its_own and not hooks and not hooked_everywhere()


def is_plain_linear(module: Any) -> bool:
    """Whether a weight and a bias are all there is to say; a parametrization may make them."""
    return is_plain(module, nn.Linear) and module._parameters.get("bias", module) is not None


def takes_any_product(module: Any) -> bool:
    """Whether a plain linear module's weight and bias are plain tensors, which can be joined with others."""
    return is_plain_linear(module) and all(type(parameter(module, name)) in _TENSORS for name in ("weight", "bias"))


def has_plain_tensors(module: nn.Module) -> bool:
    """Whether all parameters below are plain tensors, which any operation takes."""
    return all(type(parameter) in _TENSORS for parameter in module.parameters())


def hooked_everywhere() -> bool:
    """Whether a hook waits for every module that is called."""
    forward = _all._global_forward_hooks or _all._global_forward_pre_hooks
    return bool(forward or _all._global_backward_hooks or _all._global_backward_pre_hooks)


_TENSORS = (Tensor, nn.Parameter)
