"""What surrounds a call: autocast, torch.func, forward-mode differentiation, checkpointing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from python_ref.tree import LinearMerge

from .choice import under_torch_func


def autocasts(device_type: str) -> bool:
    """Whether a ``torch.autocast`` region is active for a type of device; some (meta) have none."""
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def under_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of an active ``torch.autocast`` region, as `torch.nn.functional.linear` takes it."""
    kind = tensor.device.type
    if autocasts(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def tree_under_autocast(tokens: Tensor, merge: LinearMerge | None) -> tuple[Tensor, LinearMerge | None]:
    """`under_autocast` of what a tree is built from: tokens, and a summarizer's map where it has one."""
    if merge is not None:
        scale = None if merge.scale is None else under_autocast(merge.scale)
        merge = LinearMerge(under_autocast(merge.weight), under_autocast(merge.bias), scale)
    return under_autocast(tokens), merge


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, of which the step's operations know nothing."""
    return forward_ad._current_level >= 0 or under_torch_func()


def recomputes_reentrantly() -> bool:
    """Whether this is a recomputation of ``checkpoint(use_reentrant=True)``, torch's or one made like it."""
    # Of an autograd.Function in Python the engine's current node is an object of a class with the function's name.
    return type(torch._C._current_autograd_node()).__name__ == "CheckpointFunctionBackward"
