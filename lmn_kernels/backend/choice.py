"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any, NamedTuple

import torch

from . import env, extension

BACKENDS = ("auto", "reference", "triton", "cpp")

# Backends that serve a type of device only who asks for them by name: these kernels were compiled, but have
# not run on a GPU. To be taken out with the first green result of `bench.gpu.check`.
UNPROVEN = {
    ("triton", "cuda"): "the Triton kernels have not run on a GPU yet; backend='triton' takes them all the same",
    ("cpp", "cuda"): "the CUDA half of the extension has not run on a GPU yet; the backend 'cpp' takes it all the same",
}


class Operation(NamedTuple):
    """Who computes an operation.

    Attributes:
        backends: that implement it, and the types of device that each is made for; the reference serves all.
        widest: features of a head that the Triton kernels take at most: in 16 bits, and where products are of
            float32; None for any.
    """

    backends: dict[str, tuple[str, ...]]
    widest: tuple[int, int] | None = None


# By name, as the modules of `ops` declare them.
OPERATIONS: dict[str, Operation] = {}

_warned: set[tuple[str, str, str]] = set()
_chosen: dict[tuple[Any, ...], tuple[str, None]] = {}


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


def _triton_obstacle(operation: str, index: int | None, dtype: torch.dtype, head_size: int) -> str | None:
    """Why the Triton kernels cannot run on a CUDA device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install lmn-kernels[triton])"
    if torch.version.hip is not None:
        return "the Triton kernels are not made for ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    capability = torch.cuda.get_device_capability(index)
    if capability < (7, 5):
        return f"the Triton kernels need compute capability 7.5, this device has {capability[0]}.{capability[1]}"
    # Below sm_80 every product is one of float32.
    limits = OPERATIONS[operation].widest
    if limits is not None and head_size > (widest := limits[dtype == torch.float32 or capability < (8, 0)]):
        return f"the Triton kernels take heads of up to {widest} features in {dtype} on this device, not {head_size}"
    return None


# What torch.compiler.assume_constant_result does, but for importing the compiler, and Triton with it.
_triton_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def declare(operation: str, widest: tuple[int, int] | None = None, **backends: tuple[str, ...]) -> None:
    """Say who computes an operation, ``triton=("cuda",)``; see `Operation`."""
    OPERATIONS[operation] = Operation(backends, widest)


def why_not(
    backend: str, operation: str, device: torch.device | str, dtype: torch.dtype, head_size: int = 1
) -> str | None:
    """Why a backend cannot serve an operation; None where it can.

    Args:
        backend: ``"reference"``, ``"triton"`` or ``"cpp"``.
        operation: ``"build_tree"``, ``"attend"``, ``"look_ahead_attend"`` or ``"step"``.
        device, dtype: of the tensors.
        head_size: features of a head, where the operation has heads.

    Returns:
        Every reason that holds, separated by semicolons.

    Raises:
        ValueError: no such backend or operation; the message lists those that there are.
    """
    device = torch.device(device)
    if backend not in BACKENDS[1:]:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS[1:])}, got {backend!r}")
    if operation not in OPERATIONS:
        raise ValueError(f"operation: expected one of {', '.join(OPERATIONS)}, got {operation!r}")
    if backend == "reference":
        return None
    made = OPERATIONS[operation].backends.get(backend)
    if made is None:
        return f"the {backend} implementation of {operation} is not part of this version of lmn_kernels"
    if backend == "triton":
        found: list[str | None] = (
            [] if device.type == "cuda" else [f"the Triton kernels need a CUDA device, not {device.type}"]
        )
        if dtype == torch.float64:
            found.append("the Triton kernels do not compute in float64")
        elif not found:
            found = [_triton_obstacle(operation, device.index, dtype, head_size)]
    elif device.type not in made:
        served = " and ".join(kind.upper() for kind in made)
        found = [f"the extension serves {operation} on {served} devices, not on {device.type}"]
    else:
        half = (torch.float16,) if device.type == "cuda" else ()
        known = dtype in (torch.float32, torch.bfloat16, *half)
        found = [None if known else f"the extension does not compute in {dtype}", extension.obstacle(device.type)]
    return "; ".join(reason for reason in found if reason is not None) or None


def preferred(operation: str, device: torch.device) -> str:
    """The backend made for an operation on a device; the reference itself where there is no faster one."""
    found = (backend for backend, types in OPERATIONS[operation].backends.items() if device.type in types)
    return next(found, "reference")


def check_name(backend: str, name: str = "backend", operation: str | None = None) -> None:
    """Whether there is a backend of that name, and where an operation is named, one that implements it.

    Raises:
        ValueError: there is none; the message names the argument ``name`` and lists them.
    """
    known = BACKENDS if operation is None else ("auto", "reference", *OPERATIONS[operation].backends)
    if backend not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {backend!r}")


def wanted(backend: str, operation: str) -> str:
    """The backend that is asked for: by the argument or, where that is ``"auto"``, by the environment.

    The environment speaks for all operations at once: where what it names does not implement one, that is ``"auto"``.
    """
    if backend != "auto":
        check_name(backend)
        return backend
    backend = env.backend()
    check_name(backend, env.BACKEND)
    return backend if backend in ("reference", *OPERATIONS[operation].backends) else "auto"


def resolve(
    backend: str, operation: str, device: torch.device, dtype: torch.dtype = torch.float32, head_size: int = 1
) -> str:
    """The backend that serves a call.

    ``"auto"`` (after `env.backend`) takes the preferred one and falls back to the reference with one
    warning per reason; any other name is obeyed.

    Raises:
        ValueError: no such backend.
        BackendError: the named backend cannot serve the call.
    """
    asked = wanted(backend, operation)
    if torch.compiler.is_compiling():
        chosen, reason = choose(asked, operation, device, dtype, head_size)
    else:
        # Worked out once: it would cost more than the step of a small layer. A changed rule is another key.
        key = (asked, operation, device, dtype, head_size, why_not, id(UNPROVEN))
        chosen, reason = _chosen.get(key) or choose(asked, operation, device, dtype, head_size)
        if reason is None:
            _chosen[key] = chosen, None
    if reason is None:
        return chosen
    if asked != "auto":
        raise BackendError(f"backend={asked!r} cannot serve {operation} on {device.type}: {reason}")
    _warn_once(operation, device.type, reason)
    return "reference"


def under_torch_func() -> bool:
    """Whether a transform of torch.func is at work: its tensors look like any other, and belong to it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, but for importing the compiler; transforms are guarded in any case.
under_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]


def functional(backend: str, operation: str) -> bool:
    """Whether a transform of torch.func is at work, which knows nothing of operations: the reference's plain functions.

    Raises:
        BackendError: another backend was asked for by name.
    """
    if not under_torch_func():
        return False
    asked = wanted(backend, operation)
    if asked not in ("auto", "reference"):
        raise BackendError(
            f"backend={asked!r} cannot serve {operation} under torch.func (grad, vmap, …): use backend='reference'"
        )
    return True


def choose(
    asked: str, operation: str, device: torch.device, dtype: torch.dtype, head_size: int = 1
) -> tuple[str, str | None]:
    """The backend that ``asked`` (of `wanted`) names for an operation, and why it may not serve; None where it may."""
    if asked != "auto":
        return asked, why_not(asked, operation, device, dtype, head_size)
    if dtype == torch.float64:
        return "reference", None  # no kernel computes in it, and none is missed
    chosen = preferred(operation, device)
    return chosen, why_not(chosen, operation, device, dtype, head_size) or UNPROVEN.get((chosen, device.type))


def _warn_once(operation: str, device_type: str, reason: str) -> None:
    # While tracing, silence: a warning would break the graph, and `lmn_kernels.info` tells.
    if torch.compiler.is_compiling() or (operation, device_type, reason) in _warned:
        return
    _warned.add((operation, device_type, reason))
    message = f"lmn_kernels: {operation} on {device_type} runs on the PyTorch reference: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
