"""States in safetensors files: written whole or not at all, read with a check of what they are."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from python_ref.step import Slots

from .memory import MemoryState

LAYOUT_VERSION = 1
_VERSION_KEY = "lmn_kernels.layout"
# What a file of each kind holds, and what reads it.
_KINDS = {
    "states": ("the states of a model's layers", "load_states"),
    "look_ahead_state": ("a LookAheadState", "LookAheadState.load"),
}

State = TypeVar("State")


def save(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], sizes: Any) -> None:
    """Write tensors by name, and sizes (what JSON can hold) as metadata of a kind.

    Raises:
        OSError: the file cannot be written; an older file of that name is left as it was.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors(writes=True)
    copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    data = safetensors.torch.save(copies, {_VERSION_KEY: str(LAYOUT_VERSION), f"lmn_kernels.{kind}": json.dumps(sizes)})
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
    safetensors = _safetensors(writes=False)
    expected = f"{path}: expected a file of {_KINDS[kind][0]}"
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if _VERSION_KEY not in metadata:
                raise ValueError(f"{expected}, got a safetensors file of something else")
            if (version := metadata[_VERSION_KEY]) != str(LAYOUT_VERSION):
                raise ValueError(f"{path}: expected state layout {LAYOUT_VERSION}, got {version}")
            for other, (what, reader) in _KINDS.items():
                if other != kind and f"lmn_kernels.{other}" in metadata:
                    raise ValueError(f"{expected}, got one of {what}, which {reader} reads")
            return build(json.loads(metadata[f"lmn_kernels.{kind}"]), file.get_tensor)
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{expected}, got one that is damaged or of another kind: {error}") from error


def _safetensors(writes: bool) -> Any:
    """The package that reads and, by way of numpy, writes tensors.

    Raises:
        ImportError: it or numpy is not installed.
    """
    try:
        import safetensors.torch

        if writes:
            import numpy  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"files of states need {error.name}, which is not installed: pip install lmn-kernels[state]"
        ) from error
    return safetensors


def save_states(path: str | os.PathLike[str], states: Sequence[MemoryState]) -> None:
    """Write the states of a model's layers to one safetensors file, whole or not at all.

    Raises:
        TypeError: an element is no state.
        OSError: the file cannot be written; an older file of that name is left as it was.
        ImportError: safetensors is not installed (``pip install lmn-kernels[state]``).
    """
    for index, state in enumerate(states):
        if not isinstance(state, MemoryState):
            raise TypeError(f"states[{index}]: expected a MemoryState, got {type(state).__name__}")
    sizes = [{"expand": s.expand, "levels": s.levels, "max_position": s.max_position} for s in states]
    tensors = {f"{n}.{name}": part for n, state in enumerate(states) for name, part in state.slots()._asdict().items()}
    save(path, "states", tensors, sizes)


def load_states(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> list[MemoryState]:
    """Read what `save_states` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no state file, or one of a layout version that this package does not know.
        ImportError: safetensors is not installed (``pip install lmn-kernels[state]``).
    """

    def build(sizes: list[dict[str, int]], tensor: Callable[[str], Tensor]) -> list[MemoryState]:
        return [
            MemoryState(**{name: tensor(f"{layer}.{name}") for name in Slots._fields}, **size)  # type: ignore[arg-type]
            for layer, size in enumerate(sizes)
        ]

    return load(path, "states", device, build)
