"""States in safetensors files: written whole or not at all, read with a check of what they are."""

from __future__ import annotations

import json
import os
import shutil
import threading
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
    write_whole(Path(path), data)


def write_whole(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``: after a crash or an error the file is the old one or the new one.

    A link stays one, and its target is written; a file that is there keeps its mode, a new one has the umask's.

    Raises:
        OSError: it cannot be written; an older file of that name is as it was.
    """
    path = Path(os.path.realpath(path))
    # In the same folder: a rename across file systems would be a copy.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
