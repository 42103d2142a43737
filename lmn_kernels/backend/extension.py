"""The compiled half: found, checked and loaded at the first call that asks for it."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import re
import sys
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from .._version import __version__

_PACKAGE = Path(__file__).parent.parent
REBUILD = "rebuild it: pip install --no-build-isolation ."
_MARKER = re.compile(rb"lmn_kernels build: (\{[^}\0]*\})")


def record() -> dict[str, str | None]:
    """What the last build of this package left out, and why: of ``"extension"`` and ``"cuda"``, as setup.py says it."""
    try:
        found = json.loads((_PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def not_built() -> str:
    """Why there is no extension in this package; and, where another package of the name has one, why it is not that."""
    reason = record().get("extension")
    said = f": {reason}" if reason else " (pip install --no-build-isolation . builds it)"
    other = _built_elsewhere()
    if other is not None:
        first = "from the current folder" if _is_current(_PACKAGE.parent) else "on sys.path"
        said += f"; the lmn_kernels in {other} has it, but {_PACKAGE} comes first, {first}"
    return f"the extension is not built{said}"


def _is_current(folder: Path) -> bool:
    return os.path.exists(os.curdir) and os.path.samefile(folder, os.curdir)


def _built_elsewhere() -> Path | None:
    """Another package of this name, on the path or known to a finder (of an editable install), with an extension."""
    specs = [PathFinder.find_spec("lmn_kernels", [entry]) for entry in sys.path]
    specs += [finder.find_spec("lmn_kernels", None) for finder in sys.meta_path if finder is not PathFinder]
    folders = (Path(folder) for spec in specs if spec is not None for folder in spec.submodule_search_locations or ())
    own = _PACKAGE.resolve()
    return next((f for f in folders if f.resolve() != own and PathFinder.find_spec("lmn_kernels._C", [str(f)])), None)


def why_no_cuda() -> str:
    """Why the last build left out the CUDA half, in brackets; nothing where it does not say."""
    reason = record().get("cuda")
    return f" ({reason})" if reason else ""


def read_build(path: Path) -> dict[str, str] | None:
    """What a binary was built from and for, read without loading it; None where it does not say."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _MARKER.search(content)
        return None if found is None else json.loads(found[1])


def mismatch(build: dict[str, str] | None) -> str | None:
    """Why a binary is not one for this package and this torch; None where it is."""
    if build is None or not build.keys() >= {"version", "torch", "cuda", "archs"}:
        return f"the extension is not one of lmn_kernels; {REBUILD}"
    for name, here in (("version", __version__), ("torch", torch.__version__)):
        if build[name] != here:
            what = "lmn_kernels" if name == "version" else name
            return f"the extension was built for {what} {build[name]}, this is {here}; {REBUILD}"
    return None


@lru_cache(maxsize=1)
def load() -> tuple[dict[str, str], str | None]:
    """What the extension was built for, and why it cannot be used; None where it is loaded now."""
    # In this package alone: the finder of an editable install would offer the binary of another checkout.
    spec = PathFinder.find_spec("lmn_kernels._C", [str(_PACKAGE)])
    if spec is None or spec.origin is None:
        return {}, not_built()
    try:
        build = read_build(Path(spec.origin))
        reason = mismatch(build)
        if reason is None:
            # It implements the schemas of ops, which the import of the package has registered.
            importlib.import_module("lmn_kernels._C")
    except (ImportError, OSError, ValueError) as error:
        said = str(error).partition("\n")[0].rstrip(".")  # torch's own errors go on with a stack
        build, reason = None, f"the extension does not load ({said}); {REBUILD}"
    return build or {}, reason


def obstacle(device_type: str) -> str | None:
    """Why the extension cannot serve a type of device; None where it can."""
    build, reason = load()
    if reason is None and device_type == "cuda" and build["cuda"] == "none":
        return f"the extension was built without CUDA{why_no_cuda()}; {REBUILD}"
    return reason


# What torch.compiler.assume_constant_result does, but for importing the compiler, and Triton with it.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
