"""The compiled half: found, checked and loaded at the first call that asks for it."""

from __future__ import annotations

import importlib
import json
import mmap
import re
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from .._version import __version__

REBUILD = "rebuild it: pip install --no-build-isolation ."
_MARKER = re.compile(rb"lmn_kernels build: (\{[^}\0]*\})")


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
    spec = PathFinder.find_spec("lmn_kernels._C", [str(Path(__file__).parent.parent)])
    if spec is None or spec.origin is None:
        return {}, "the extension is not built (pip install --no-build-isolation . builds it)"
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
        return f"the extension was built without CUDA; {REBUILD}"
    return reason


# What torch.compiler.assume_constant_result does, but for importing the compiler, and Triton with it.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
