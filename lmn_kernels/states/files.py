"""States in safetensors files: written whole or not at all, read with a check of what they are."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

LAYOUT_VERSION = 1
_VERSION_KEY = "lmn_kernels.layout"

State = TypeVar("State")


def save(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], sizes: Any) -> None:
    """Write tensors by name, and sizes (what JSON can hold) as metadata of a kind.

    Raises:
        OSError: the file cannot be written; an older file of that name is left as it was.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save as to_bytes

    copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    data = to_bytes(copies, {_VERSION_KEY: str(LAYOUT_VERSION), f"lmn_kernels.{kind}": json.dumps(sizes)})
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(
    path: str | os.PathLike[str],
    kind: str,
    device: torch.device | str,
    build: Callable[[Any, Callable[[str], Tensor]], State],
) -> State:
    """What ``build(sizes, tensor by name)`` makes of a file that `save` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no state file of that kind, or one of a layout version that this package does not know.
        ImportError: safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            version = metadata.get(_VERSION_KEY)
            if version != str(LAYOUT_VERSION):
                raise ValueError(f"{path}: expected state layout {LAYOUT_VERSION}, got {version}")
            return build(json.loads(metadata[f"lmn_kernels.{kind}"]), file.get_tensor)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a safetensors file of {kind}, got {error}") from error
