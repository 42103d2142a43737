"""What the GPU check learns from other programs: the machine's facts, pytest, compute-sanitizer."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import torch

from lmn_kernels.backend import extension

from .stage import Report, Row, Settings, Skipped

ROOT = Path(__file__).resolve().parents[2]
TESTS = [
    "tests/bench/test_close.py",
    "tests/ops/test_golden.py",
    "tests/ops/test_look_ahead_golden.py",
    "tests/ops/test_reference.py",
    "tests/ops/test_step.py",
    "tests/ops/test_step_precision.py",
    "tests/kernels/test_triton_attention.py",
    "tests/kernels/test_triton_look_ahead.py",
    "tests/kernels/test_triton_tree.py",
]
QUICK_TESTS = ["tests/bench/test_close.py"]


def _output(*command: str) -> str | None:
    """What a command prints; None where it cannot be run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def clocks() -> str | None:
    fields = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,utilization.gpu"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")


def facts(settings: Settings, report: Report) -> None:
    """Stage: where and with what everything else is measured."""
    dirty = _output("git", "status", "--porcelain")
    build, obstacle = extension.load()
    row: Row = {
        "commit": settings.commit or _output("git", "rev-parse", "HEAD"),
        "dirty": None if dirty is None else bool(dirty),
        "host": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": None,
        "extension": obstacle or build,
    }
    if importlib.util.find_spec("triton"):
        row["triton"] = importlib.import_module("triton").__version__
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row["device"] = properties.name
        row["capability"] = f"{properties.major}.{properties.minor}"
        row["memory_bytes"] = properties.total_memory
        row["multiprocessors"] = properties.multi_processor_count
        row["l2_bytes"] = properties.L2_cache_size
        row["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        row["clocks"] = clocks()
    else:
        row["device"] = f"CPU {platform.machine()}, not a GPU"
    report(row)


def tests(settings: Settings, report: Report) -> None:
    """Stage: the GPU tests, each file with at least one that passed."""
    wanted = QUICK_TESTS if settings.quick else TESTS
    there = [name for name in wanted if (ROOT / name).exists()]
    for name in sorted(set(wanted) - set(there)):
        report({"case": name, "fault": "there is no such file"})
    if not there:
        return
    results = settings.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={results}"]
    if settings.device == "cuda" and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    # Its output goes to the stage's log, and whoever kills the stage kills it, too.
    status = subprocess.run([*command, *there], cwd=ROOT).returncode
    counts: dict[str, Row] = {name: {"passed": 0, "failed": 0, "skipped": 0} for name in there}
    for name, verdict in _verdicts(results):
        counts.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0})[verdict] += 1
    for name, row in counts.items():
        if row["failed"]:
            row["fault"] = f"{row['failed']} tests failed"
        elif not row["passed"]:
            row["fault"] = f"no test passed, {row['skipped']} were skipped"
        report({"case": name, **row})
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with exit status {status}")


def _verdicts(results: Path) -> Iterator[tuple[str, str]]:
    """File and verdict of every test of a JUnit report; the report is removed."""
    for test in ElementTree.parse(results).iter("testcase"):
        tags = {child.tag for child in test}
        verdict = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        # A module that does not import, or skips as a whole, has no class name.
        module = test.get("classname") or test.get("name") or ""
        # What is behind the file is a class.
        yield "/".join(part for part in module.split(".") if not part[:1].isupper()) + ".py", verdict
    results.unlink()


def sanitizer(settings: Settings, report: Report) -> None:
    """Stage: compute-sanitizer over `small_runs`: memory errors and, with time left races in shared memory."""
    found = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if settings.device != "cuda":
        raise Skipped("compute-sanitizer needs a CUDA device")
    if found is None:
        raise Skipped("compute-sanitizer is not installed")
    end = time.monotonic() + settings.seconds - 5
    for tool in ("memcheck", "racecheck"):
        seconds = end - time.monotonic()
        reason = "no time left" if seconds < 15 else _sanitize(found, tool, seconds, report)
        if reason:
            report({"case": tool, "skipped": reason})


def _sanitize(program: str, tool: str, seconds: float, report: Report) -> str | None:
    """Run one tool; why it gave no verdict, or None where it did."""
    script = "from bench.gpu.correctness import small_runs; small_runs('cuda')"
    command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
    # Only our kernels: instrumenting those of the matrix library takes minutes.
    for kernel in ("attend_", "look_ahead_", "tree_", "step_kernel"):
        command += ["--kernel-name", f"kns={kernel}"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]
    # Without the caching allocator an access past a tensor is one past an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        ended = subprocess.run(
            [*command, sys.executable, "-c", script],
            cwd=ROOT, env=environment, timeout=seconds, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    print(ended.stdout[-20000:])
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", ended.stdout)
    row: Row = {"case": tool, "seconds": round(time.monotonic() - start, 1), "summary": (summary or [None])[-1]}
    if ended.returncode == 86:
        lines = [line.strip("= ") for line in ended.stdout.splitlines() if line.startswith("=========")]
        report(row | {"fault": " / ".join(lines[1:4])})
    elif ended.returncode == 0 and summary and "small runs done" in ended.stdout:
        report(row)
    else:
        tail = ended.stdout.strip().splitlines()[-1:] or ["it printed nothing"]
        return f"exit status {ended.returncode}: {tail[0]}"
    return None
