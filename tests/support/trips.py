"""The way of data through the code: which of the package's files a call enters, and how often it changes from one to
another. Functions of a kernel, which run in Triton's interpreter alone, count as the one call that its launch is."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import lmn_kernels

ROOT = Path(lmn_kernels.__file__).parents[1]
ROOMS = tuple(f"{ROOT / name}{os.sep}" for name in ("lmn_kernels", "python_ref"))
DEVICE = ("_kernels.py", "tree_tiles.py")


class Trip(NamedTuple):
    """Calls inside the package, files that they enter, and changes of file from one call to the next."""

    calls: int
    files: int
    changes: int


def trace(run: Callable[[], Any]) -> list[str]:
    """The file of every call inside the package while ``run`` runs."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(ROOMS):
            return
        name = "kernel" if file.endswith(DEVICE) else file
        if name != "kernel" or not seen or seen[-1] != name:
            seen.append(name)

    threading.setprofile(note)  # backward runs on a thread of its own
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return seen


def trip(run: Callable[[], Any]) -> Trip:
    """What `trace` saw, counted."""
    seen = trace(run)
    return Trip(len(seen), len(set(seen)), sum(a != b for a, b in zip(seen, seen[1:], strict=False)))
