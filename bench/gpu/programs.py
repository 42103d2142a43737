"""What the stages of the GPU check do: facts of the machine, pytest, compute-sanitizer, the runs of `bench`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.measure.environment import clocks, describe
from bench.measure.journal import read
from bench.runs.command import main as bench
from lmn_kernels.backend import extension

from .stage import Report, Row, Settings, Skipped

ROOT = Path(__file__).resolve().parents[2]
# What compute-sanitizer watches.
SMALL = "tests/gpu/test_small.py"
# Of so many tests in a row a rehearsal takes one: all of them are tests of the CPU in any case.
SAMPLE = 20


def facts(settings: Settings, report: Report) -> None:
    """Stage: where and with what everything else is measured."""
    build, obstacle = extension.load()
    row: Row = {**describe(settings.device, settings.commit), "cpus": os.cpu_count(), "extension": obstacle or build}
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row["capability"] = f"{properties.major}.{properties.minor}"
        row["memory_bytes"] = properties.total_memory
        row["multiprocessors"] = properties.multi_processor_count
        row["l2_bytes"] = properties.L2_cache_size
        row["clocks"] = clocks()
    else:
        row["device"] = f"CPU {platform.machine()}, not a GPU"
    report(row)


def tests(wanted: Sequence[str], chosen: Sequence[str], settings: Settings, report: Report) -> None:
    """Stage: tests by pytest, a row for each file.

    Args:
        wanted: files.
        chosen: further arguments of pytest, for a GPU: which tests of them.
    """
    there = [name for name in wanted if (ROOT / name).exists()]
    for name in sorted(set(wanted) - set(there)):
        report({"case": name, "fault": "there is no such file"})
    if not there:
        return
    results = settings.out / f"tests-{os.getpid()}.xml"
    command = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.gpu.sharding",
        f"--junit-xml={results}",
        "--rootdir",
        str(ROOT),
    ]
    if settings.real:
        command += ["--shard", f"{settings.shard}/{settings.shards}", *chosen]
    else:
        command += ["--shard", f"0/{SAMPLE}", "-m", "not gpu"]
    # Not at the top: the other stages do without it.
    import pytest

    os.chdir(ROOT)
    status = pytest.main([*command, *there])
    rows: dict[str, Row] = {}
    for name, test, verdict, error in verdicts(results):
        row = rows.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0})
        row[verdict] += 1
        if verdict == "failed":
            row["fault"] = f"{row['failed']} failed, {test} for one"
        if error is not None and not error <= row.get("error", -1.0):
            row |= {"error": error, "worst": test}
    for name, row in rows.items():
        if settings.real and not row["passed"] + row["failed"]:
            row["fault"] = f"no test passed, {row['skipped']} were skipped"
        report({"case": name, **row})
    # 5: this share has no test.
    if status not in (0, 1, 5) or (status == 5 and settings.real and settings.shards == 1):
        raise RuntimeError(f"pytest ended with exit status {int(status)}")


def verdicts(results: Path) -> Iterator[tuple[str, str, str, float | None]]:
    """File, name, verdict and error of every test of a JUnit report; the report is removed."""
    for test in ElementTree.parse(results).iter("testcase"):
        tags = {child.tag for child in test}
        verdict = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        # A module that does not import, or skips as a whole, has no class name.
        module = test.get("classname") or test.get("name") or ""
        # What is behind the file is a class.
        file = "/".join(part for part in module.split(".") if not part[:1].isupper()) + ".py"
        told = [float(one.get("value", "nan")) for one in test.iter("property") if one.get("name") == "error"]
        yield file, test.get("name") or "", verdict, told[0] if told else None
    results.unlink()


def runs(run: str, only: Sequence[str], settings: Settings, report: Report) -> None:
    """Stage: cases of a run of `bench`, into the journal below the check's folder; a row for each of them.

    Every case is gated by its own check: ours without a figure is a fault.

    Args:
        run: its name.
        only: parts of the names of cases, as ``--only`` takes them.
    """
    results = settings.out / "results"
    where = ["--device", settings.device, "--results", str(results), *([] if settings.real else ["--rehearse"])]
    commit = ["--commit", settings.commit] if settings.commit else []
    status = bench([run, *where, *commit, "--only", *only])
    for invocation in read(results / f"{run}.jsonl")[-1:]:
        for name, rows in invocation.cases.items():
            if any(part in name for part in only):
                row: Row = {"case": f"{run} {name}", "rows": len(rows)}
                for gap in [row["gap"] for row in rows if "gap" in row and row["provider"].startswith("ours")][:1]:
                    # A rehearsal may be where nothing is built.
                    row["fault" if settings.real or gap.startswith("gate:") else "skipped"] = gap
                report(row)
    if status:
        raise RuntimeError(f"python -m bench {run} ended with exit status {status}")


def sanitizer(settings: Settings, report: Report) -> None:
    """Stage: compute-sanitizer over `SMALL`: memory errors and, with time left, races in shared memory."""
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
            [*command, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", SMALL],
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
    elif ended.returncode == 0 and summary and re.search(r"^\d+ passed", ended.stdout, re.MULTILINE):
        report(row)
    else:
        tail = ended.stdout.strip().splitlines()[-1:] or ["it printed nothing"]
        return f"exit status {ended.returncode}: {tail[0]}"
    return None
