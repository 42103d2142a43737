"""What is installed, what is built, and what each operation would use."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .._version import __version__
from . import choice, env, extension


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    """Type and description of the devices at hand; asks drivers, so only `info` calls it."""
    found = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            found.append(("cuda", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"))
    if torch.backends.mps.is_available():
        found.append(("mps", platform.platform()))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append(("xpu", torch.xpu.get_device_name()))
    return found


def info() -> str:
    """Versions, devices, what is built, and for each operation and device the backend and the reason."""
    lines = [
        f"lmn_kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__} "
        f"(CUDA {torch.version.cuda or 'none'}), Triton {_installed('triton')}",
        f"C++/CUDA extension: {_extension_line()}",
        f"{env.BACKEND}={env.backend()}",
    ]
    for kind, description in _devices():
        lines.append(f"{kind}: {description}")
        lines += [f"  {operation}: {_uses(operation, torch.device(kind))}" for operation in sorted(choice.OPERATIONS)]
    return "\n".join(lines)


def _extension_line() -> str:
    build, reason = extension.load()
    if reason is not None:
        return reason
    alone = f"CPU alone{extension.why_no_cuda()}"
    cuda = alone if build["cuda"] == "none" else f"CPU and CUDA {build['cuda']} for {build['archs']}"
    return f"built for torch {build['torch']}, {cuda}"


def _uses(operation: str, device: torch.device) -> str:
    """What a float32 call with ``backend="auto"`` runs on, and why it is not something faster."""
    try:
        asked = choice.wanted("auto", operation)
    except ValueError as error:
        return f"an error ({error})"
    chosen, reason = choice.choose(asked, operation, device, torch.float32)
    if reason is None:
        return chosen
    return f"reference ({reason})" if asked == "auto" else f"an error ({reason})"
