"""What parts of a layer say by their weights, and which of them must be called instead.

Read from their dictionaries: a step of a small layer would notice the cost of `torch.nn.Module.__getattr__`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling
from torch.nn.modules import module as every_module

from python_ref.step import Linear

# Plain ones, and what torch.export and make_fx put in their place while they trace.
TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
# Forwards that use their module's parameters as a road around them does: of marked classes, and of what they hold.
_MARKED: list[Any] = []
_CHILDREN = (nn.Linear.forward, nn.Conv1d.forward, nn.ConvTranspose1d.forward)
Kind = TypeVar("Kind", bound=type[nn.Module])


def parameter(module: Any, name: str) -> Tensor:
    """``module.<name>``: a parameter, or what a parametrization makes of it."""
    found: Tensor | None = module._parameters.get(name)
    if found is None:
        found = getattr(module, name)
    assert found is not None
    return found


def weight_and_bias(module: Any) -> Linear:
    """Weight and bias of a linear map; zeros where it has no bias."""
    weight = parameter(module, "weight")
    if module._parameters.get("bias", module) is None:
        size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        return Linear(weight, zeros(size, weight))
    return Linear(weight, parameter(module, "bias"))


def zeros(size: int, like: Tensor) -> Tensor:
    """A vector of zeros in the place of a bias that is not there; made once, but for one that is traced."""
    if is_compiling() or torch._C._len_torch_dispatch_stack() or type(like) not in (Tensor, nn.Parameter):
        return like.new_zeros(size)
    return _zeros(size, like.dtype, like.device)


def is_zeros(tensor: Tensor) -> bool:
    """Whether it is the one that `zeros` keeps."""
    return tensor.dim() == 1 and tensor is _zeros(tensor.shape[0], tensor.dtype, tensor.device)


@lru_cache(maxsize=64)
def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=dtype, device=device)


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module does what ``kind`` does with its parameters, and nothing of a user's besides.

    Else it must be called: hooks, its own or global ones, may change its parameters, its inputs or its results.
    """
    return _is_known(module, (kind.forward,))


def is_plain_linear(module: Any) -> bool:
    """Whether a weight and maybe a bias are all there is to say; a parametrization may make them."""
    return is_plain(module, nn.Linear)


def drops_nothing(module: Any) -> bool:
    """Whether a place for dropout is empty, or holds what hands on what it gets for now."""
    return module is None or (is_plain(module, nn.Dropout) and not (module.training and module.p))


def hooked_everywhere() -> bool:
    """Whether a hook waits for every module that is called, and may change something."""
    module = every_module
    forward, backward = module._global_forward_hooks, module._global_backward_hooks
    before, before_backward = module._global_forward_pre_hooks, module._global_backward_pre_hooks
    if not (forward or backward or before or before_backward):
        return False
    hooks = (hook for every in (forward, backward, before, before_backward) for hook in every.values())
    return not all(_only_watches(hook) for hook in hooks)


def _only_watches(hook: Any) -> bool:
    """Whether a hook is one by which a counter of torch's knows its module, and must not change what it counts."""
    return type(getattr(hook, "__self__", None)).__module__ in _TRACKERS


_TRACKERS = ("torch.utils.module_tracker", "torch.distributed._tools.mod_tracker")


def says_its_weight(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module calls its own weight, which is at hand: neither replaced, nor kept elsewhere by a wrapper."""
    at_hand = all(type(p) in TENSORS and not p.is_meta for p in module._parameters.values() if p is not None)
    return _calls_its_own(module, (kind.forward,)) and at_hand


def expand_of(layer: Any) -> int:
    """k of a layer's expander; 0 without one."""
    expander = layer._modules.get("expander")
    # A wrapper around one does not say.
    return 0 if expander is None else getattr(expander, "expand", layer._expand)


def drawn_by(draw: Callable[[dict[str, Any]], None], module: nn.Module) -> None:
    """Draw a module's parameters, now and whenever its ``reset_parameters`` is called: after `torch.nn.Module.to_empty`
    everyone calls that of every module. Its class stays the one that wrappers and quantisers look for."""
    # Of its parameters, not of itself: a module that holds on to itself is freed late.
    module.__dict__["reset_parameters"] = partial(draw, module._parameters)
    draw(module._parameters)


def known_by_weights(kind: Kind) -> Kind:
    """Mark a class whose parameters may be used without calling it, as long as `survey` finds nothing beside them."""
    _MARKED.append(kind.forward)
    return kind


class Road(NamedTuple):
    """Which parts of a mixing layer say all by their weights; the others are called.

    Attributes:
        merges: the summarizer and the expander.
        attends: the attention as a whole; else it is called with a memory tensor.
        called: ``"sva"``, or projections of it, that must be called.
        joins: whether q, k and v are plain tensors, which one product takes.
        expand: `expand_of` the layer.
        weight: a parameter that has the layer's dtype and device; None where parts fetch theirs when they are called.
    """

    merges: bool
    attends: bool
    called: tuple[str, ...]
    joins: bool
    expand: int
    weight: Tensor | None


def survey(layer: Any) -> Road:
    """What a call of a mixing layer can take of its parts: asked at every call, since a part may have been replaced,
    hooked, wrapped, sharded or quantised since the last."""
    modules: dict[str, Any] = layer._modules
    summarizer, expander, sva = modules.get("summarizer"), modules.get("expander"), modules["sva"]
    merges = summarizer is not None and _only_weights(summarizer) and (expander is None or _only_weights(expander))
    expand = expand_of(layer)
    if not _is_known(sva):
        return Road(merges, False, ("sva",), False, expand, _first_weight(layer))
    names, size = ("q", "k", "v", "out_proj"), sva.embedding
    called = tuple(f"sva.{name}" for name in names if not _is_square(sva._modules[name], size))
    joins = called in ((), ("sva.out_proj",)) and all(_has_plain_tensors(sva._modules[name]) for name in "qkv")
    weight = sva._modules["q"]._parameters.get("weight") if joins else None
    return Road(merges, True, called, joins, expand, _first_weight(layer) if weight is None else weight)


def joins_projections(sva: Any) -> bool:
    """Whether weights and biases of q, k and v are all there is to them, and tensors that one product takes."""
    parts, size = [sva._modules[name] for name in ("q", "k", "v")], sva.embedding
    return all(_is_square(part, size) and _has_plain_tensors(part) for part in parts)


def projects_nodes(sva: Any) -> bool:
    """Whether q and v of a node are those of an attention's own projections, called for its hooks alone or not.

    Weights that a wrapper keeps elsewhere until its module is called are not at hand.
    """
    if not _calls_its_own(sva, _MARKED):
        return False
    return all(_is_at_hand(part) for name in ("q", "v") for part in sva._modules[name].modules())


def may_draw(sva: Any) -> bool:
    """Whether projecting tokens and nodes may draw random numbers: what is called may, and a parametrization."""
    parts = [sva._modules[name] for name in ("q", "k", "v")]
    return any(not is_plain_linear(part) or "parametrizations" in part._modules for part in parts)


def _calls_its_own(module: Any, forwards: Sequence[Any]) -> bool:
    return getattr(type(module), "forward", None) in forwards and "forward" not in module.__dict__


def _is_known(module: Any, forwards: Sequence[Any] = _MARKED) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return _calls_its_own(module, forwards) and not hooked_everywhere()


def _only_weights(module: Any) -> bool:
    below = [child for name, child in module._modules.items() if name != "parametrizations"]
    known = _is_known(module) and all(_is_known(child, (*_MARKED, *_CHILDREN)) for child in below)
    return known and all(map(_has_plain_tensors, (module, *below)))


def _has_plain_tensors(module: Any) -> bool:
    return all(parameter is None or type(parameter) in TENSORS for parameter in module._parameters.values())


def _is_square(module: Any, size: int) -> bool:
    """Whether a projection is a plain linear one of all heads."""
    return is_plain_linear(module) and module.in_features == module.out_features == size


def _is_at_hand(module: Any) -> bool:
    if getattr(module, "_distribute_module_applied", False):  # tensor parallelism; FSDP2 adds a dimension to the mesh
        return all(parameter is None or parameter.device_mesh.ndim == 1 for parameter in module._parameters.values())
    return _has_plain_tensors(module)


def _first_weight(layer: nn.Module) -> Tensor | None:
    return next((p for p in layer.parameters() if p.is_floating_point() and not p.is_meta), None)
