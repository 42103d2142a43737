"""Compile every Triton kernel × configuration × dtype for every architecture, without a GPU.

    python -m bench.gpu.compile_kernels [--arch 80 90] [--dtype float16] [--only attend] [--jobs 2] [--out FILE]

Reports registers, spilled bytes and shared memory of each, and fails where a kernel does not compile,
where no configuration of a kernel fits the shared memory of an architecture, or where a default
configuration spills on sm_80 or sm_90.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.errors import InputError
from bench.extras import need, tqdm
from bench.files import write_file
from lmn_kernels._triton import attention, look_ahead, tree_compile
from lmn_kernels._triton.common import CompileCase

# Shared memory that one program may use (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
NO_SPILLS = (80, 90)


def cases(arch: int) -> list[CompileCase]:
    """What a GPU of compute capability ``arch`` may be given."""
    return [*attention.compile_cases(arch), *look_ahead.compile_cases(arch), *tree_compile.compile_cases(arch)]


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def measure(case: CompileCase, arch: int) -> dict[str, Any]:
    """Compile one case and read what the assembler made of it."""
    row: dict[str, Any] = {
        "kernel": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "arch": arch,
        "config": {k: v for k, v in case.constexprs.items() if isinstance(v, int)} | dict(case.options),
        "default": case.default,
    }
    signature = _full_signature(case)
    # As at a launch: what PyTorch allocates is aligned, and loads of it are vectors.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(case.kernel, signature=signature, constexprs=case.constexprs, attrs=aligned)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    except Exception as error:  # whatever a compiler throws is the finding
        return row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = found.get("LOCAL", 0) + found.get("STACK", 0)
    return row | {"registers": found.get("REG"), "spilled": spilled, "shared": compiled.metadata.shared}


def _measure_numbered(wanted: tuple[int, int]) -> dict[str, Any]:
    number, arch = wanted
    return measure(cases(arch)[number], arch)


def _full_signature(case: CompileCase) -> dict[str, str]:
    return {name: "constexpr" if name in case.constexprs else case.signature[name] for name in case.kernel.arg_names}


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What breaks a promise, one line each."""
    found = [f"{r['kernel']} {r['dtype']} sm_{r['arch']}: {r['error']}" for r in rows if "error" in r]
    good = [r for r in rows if "error" not in r]
    fits: dict[tuple[str, str, int], bool] = {}
    for r in good:
        key = (r["kernel"], r["dtype"], r["arch"])
        fits[key] = fits.get(key, False) or r["shared"] <= SHARED_LIMIT[r["arch"]]
        if r["default"] and r["arch"] in NO_SPILLS and r["spilled"]:
            found.append(f"{r['kernel']} {r['dtype']} sm_{r['arch']}: spills {r['spilled']} bytes")
    found += [f"{name} {dtype} sm_{arch}: no configuration fits" for (name, dtype, arch), ok in fits.items() if not ok]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.compile_kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED_LIMIT), help="compute capabilities")
    parser.add_argument("--dtype", nargs="*", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(argv)
    try:
        need("tqdm")
    except InputError as error:
        parser.error(str(error))
    wanted = [
        (number, arch)
        for arch in options.arch
        for number, case in enumerate(cases(arch))
        if str(case.dtype).removeprefix("torch.") in options.dtype and options.only in case.name
    ]
    # Spawned: each process imports Triton itself. A case holds a kernel, which does not travel; its number does.
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        rows = list(tqdm(pool.imap(_measure_numbered, wanted), total=len(wanted), desc="compile", disable=None))
    print(f"{'kernel':28} {'dtype':9} {'arch':>5} {'registers':>9} {'spilled':>8} {'shared':>8}  configuration")
    for r in rows:
        config = " ".join(f"{k}={v}" for k, v in r["config"].items()) + (" (default)" if r["default"] else "")
        numbers = r["error"] if "error" in r else f"{r['registers']:>9} {r['spilled']:>8} {r['shared']:>8}"
        print(f"{r['kernel']:28} {r['dtype']:9} sm_{r['arch']:<3} {numbers}  {config}")
    if options.out:
        stored = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        write_file(options.out, json.dumps(stored, indent=1).encode())
    broken = faults(rows)
    print("\n".join(broken) or f"{len(rows)} compilations, all within limits")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
