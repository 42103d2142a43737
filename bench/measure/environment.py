"""Where and with what numbers are taken: commit, machine, versions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def _git(*words: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


@functools.cache
def commit() -> dict[str, Any]:
    """``commit``, ``dirty`` and ``changes`` (a digest of them, or None) of this checkout as the process found it."""
    # A new result is no change of what produced it.
    code = "--", ".", ":!bench/results", ":!README.md"
    changed = _git("status", "--porcelain", "--untracked-files=no", *code)
    digest = hashlib.sha256((_git("diff", "HEAD", *code) or "").encode()).hexdigest()[:12]
    dirty = None if changed is None else bool(changed)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": dirty, "changes": digest if dirty else None}


def cpu() -> str:
    """The CPU's model name, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def extension() -> str | None:
    """A digest of the compiled extension that lies beside the package, or None where there is none."""
    built = sorted((ROOT / "lmn_kernels").glob("_C*.so"))
    return hashlib.sha256(built[0].read_bytes()).hexdigest()[:12] if built else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(*query: str) -> str | None:
    """Its first line; None where it cannot be run or fails."""
    try:
        words = ["nvidia-smi", *query, "--format=csv,noheader"]
        told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
        return told.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def clocks() -> str | None:
    """What the first NVIDIA GPU does now: its clocks and their limits, its temperature, power and use."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,utilization.gpu"
    return _nvidia_smi(f"--query-gpu={fields}", "--id=0")


def describe(device: torch.device | str = "cpu", known: str | None = None) -> dict[str, Any]:
    """What a row of results says of its origin; ``known`` is the commit where the checkout is no git repository."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        **({"commit": known, "dirty": None, "changes": None} if known else commit()),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type}: {cpu()}",
        "driver": _nvidia_smi("--query-gpu=driver_version") if on_gpu else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "fla": _version("fla-core"),
        "extension": extension(),
    }
