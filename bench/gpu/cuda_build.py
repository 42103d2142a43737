"""Compile and link the extension with its CUDA half, without a GPU, and say what the assembler made of it.

    python -m bench.gpu.cuda_build [--out FILE]

Needs a CUDA build of torch and the toolkit that matches it; ``make cuda-build`` sets that up. Fails where
something does not compile or link, where a compiler warns, or where a kernel spills.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.files import write_file

ROOT = Path(__file__).resolve().parents[2]
# One line of each for every kernel and architecture (nvcc --resource-usage).
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\d+a?)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def kernels(log: str) -> list[dict[str, Any]]:
    """Registers, shared memory, stack and spilled bytes of each kernel, from the assembler's own words."""
    rows: list[dict[str, Any]] = []
    for line in log.splitlines():
        if found := ENTRY.search(line):
            rows.append({"kernel": readable(found[1]), "arch": found[2]})
        elif rows and (found := SPILL.search(line)):
            rows[-1] |= {"stack": int(found[1]), "spilled": int(found[2]) + int(found[3])}
        elif rows and (found := USED.search(line)):
            rows[-1] |= {"registers": int(found[1]), "shared": int(found[2] or 0)}
    return rows


def readable(mangled: str) -> str:
    """``step_kernel`` and the types it was made for; the mangled name of anything else."""
    found = re.search(r"step_kernelI(f|6__half|13__nv_bfloat16)(f|6__half|13__nv_bfloat16|S\d*_)E", mangled)
    if found is None:
        return mangled
    first = TYPES[found[1]]
    return f"step_kernel x {first} state {TYPES.get(found[2], first)}"


def warnings(log: str) -> list[str]:
    """What compilers warned of in our own files."""
    return [line for line in log.splitlines() if "warning" in line.lower() and ("csrc" in line or "ptxas" in line)]


def build(out: Path) -> tuple[str, Path]:
    """Build into a folder of its own: the compilers' words, and the binary.

    Raises:
        SystemExit: the build failed; its output was printed.
    """
    environment = os.environ | {"LMN_KERNELS_BUILD": "1", "LMN_KERNELS_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(out / "lib"), "--build-temp", str(out / "o")]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            lines.append(line)
            if found := ENTRY.search(line):
                print(f"  {readable(found[1])} for {found[2]}", flush=True)
    log = "".join(lines)
    if run.returncode:
        print(log[-8000:])
        raise SystemExit(f"the build failed with exit status {run.returncode}")
    (binary,) = (out / "lib").rglob("_C*.so")
    return log, binary


def linked(binary: Path) -> str:
    """What the binary says of itself once it is loaded: nothing is missing from it."""
    script = (
        "import importlib.util, sys, torch, lmn_kernels\n"
        "spec = importlib.util.spec_from_file_location('lmn_kernels._C', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "for name in ('update_', 'decode_', 'step'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'lmn_kernels::{name}', 'CUDA'), name\n"
        "print(module.build())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(binary)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the binary does not load:\n{done.stderr}")
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log, binary = build(Path(folder))
        said, size = linked(binary), binary.stat().st_size
    rows, complaints = kernels(log), warnings(log)
    for row in rows:
        print(
            f"{row['kernel']:48} {row['arch']:7} {row['registers']:4} registers {row['shared']:6} shared "
            f"{row['stack']:4} stack {row['spilled']:4} spilled"
        )
    print(f"{said}\n{size / 1e6:.1f} MB in {time.perf_counter() - begin:.0f} s")
    if options.out:
        write_file(options.out, json.dumps({"build": said, "kernels": rows}, indent=1).encode())
    faults = complaints + [f"{row['kernel']} {row['arch']} spills" for row in rows if row["spilled"]]
    if not rows:
        faults.append("no kernel was compiled")
    print("\n".join(faults) or f"{len(rows)} kernels, no warning, no spill")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
