"""The build: what can be declared is in pyproject.toml, this decides what of csrc/ is compiled.

Without torch or a compiler at hand the answer is a pure-Python wheel and one sentence that says why; with
``LMN_KERNELS_BUILD=1`` that sentence is an error, with ``LMN_KERNELS_BUILD=0`` nothing is compiled. So it is
with the CUDA half, ``LMN_KERNELS_CUDA`` and a build for the CPU alone. The sentences are left in the package, where
``python -m lmn_kernels`` finds them. A compiler that fails is always an error. Building uses no network and never
asks for torch.

The environment that it reads: LMN_KERNELS_BUILD (auto, 0, 1), LMN_KERNELS_CUDA (auto, 0, 1), CXX, CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, LMN_KERNELS_CFLAGS (more flags for the C++ compiler, such as sanitizers).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = (
    *(f"csrc/{part}.cpp" for part in ("register", "layer", "parallel")),
    *(f"csrc/cpu/{part}.cpp" for part in ("step", "matvec", "tree", "attention", "attention_avx2", "attention_avx512")),
)
# Beside the packages' own files, and no part of the sources: `backend/extension.py` reads it.
RECORD = "lmn_kernels/_build.json"
CUDA_SOURCES = tuple(f"csrc/cuda/step{part}.cu" for part in ("", "_f32", "_bf16", "_f16"))
# By the first CUDA that knows the newest of them, which comes as PTX as well, for what is newer still.
DEFAULT_ARCHS = {(12, 8): "7.5;8.0;9.0;12.0+PTX", (0, 0): "7.5;8.0;9.0+PTX"}
BYTES_PER_JOB = 2 << 30


class NotBuilt(Exception):
    """Why something is not compiled, in one sentence."""


def setting(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


def check_compiler() -> None:
    """Look for what every build needs: torch, Python's headers and a C++ compiler, left in CXX for torch to take.

    Raises:
        NotBuilt: one of them is not there.
    """
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a library that torch needs does not load
        reason = f"torch cannot be imported ({error}); pip install --no-build-isolation . lets the build see it"
        raise NotBuilt(reason) from None
    if os.name == "nt":
        return  # setuptools finds the compiler there, on no path
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise NotBuilt(f"{headers} has no Python.h; install Python's headers (Debian, Ubuntu: apt install python3-dev)")
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = [name for name in (wanted[:1] or ("c++", "g++", "clang++")) if shutil.which(name)]
    if not found:
        raise NotBuilt(f"there is no C++ compiler ({wanted[0] if wanted else 'c++'}); install one or set CXX")
    if not wanted:
        os.environ["CXX"] = found[0]


def cuda_release() -> tuple[int, int]:
    """The version of the CUDA toolkit, which matches torch.

    Raises:
        NotBuilt: there is none, or it does not match.
    """
    import torch
    from torch.utils import cpp_extension

    if torch.version.hip is not None:
        raise NotBuilt("this torch is built for ROCm")
    if torch.version.cuda is None:
        raise NotBuilt("this torch is built without CUDA")
    home = cpp_extension.CUDA_HOME
    nvcc = None if home is None else shutil.which("nvcc", path=str(Path(home) / "bin"))
    if home is None or nvcc is None:
        raise NotBuilt(f"nvcc is not found (torch has CUDA {torch.version.cuda}); set CUDA_HOME to a toolkit")
    if not (Path(home) / "include" / "cuda_runtime.h").exists():
        raise NotBuilt(f"{home} has nvcc but no cuda_runtime.h; set CUDA_HOME to a whole toolkit")
    try:
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise NotBuilt(f"{nvcc} does not run ({error}); set CUDA_HOME to a toolkit") from None
    release = re.search(r"release (\d+)\.(\d+)", printed)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        got = "an unknown version" if release is None else f"{release[1]}.{release[2]}"
        raise NotBuilt(f"nvcc is of CUDA {got}, and torch of CUDA {torch.version.cuda}; set CUDA_HOME to one that fits")
    return int(release[1]), int(release[2])


def architectures(release: tuple[int, int]) -> str:
    """TORCH_CUDA_ARCH_LIST as it is, or our own list: torch would ask a GPU, and there may be none."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = next(archs for first, archs in DEFAULT_ARCHS.items() if release >= first)
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def limit_jobs() -> None:
    """MAX_JOBS from free memory and processors, where it is not set."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        free = 4 * BYTES_PER_JOB
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, free // BYTES_PER_JOB))))


def version() -> str:
    found = re.search(r'"(.+)"', (ROOT / "lmn_kernels" / "_version.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def extension(wanted: str, record: dict[str, str | None]):
    """The extension module, with its CUDA half where that can be built, or a reason in ``record["cuda"]``.

    Raises:
        NotBuilt: CUDA is wanted ("1"), and cannot be built.
    """
    import torch
    from torch.utils import cpp_extension

    try:
        if wanted == "0":
            raise NotBuilt("LMN_KERNELS_CUDA=0")
        archs = architectures(cuda_release())
        cuda = torch.version.cuda
    except NotBuilt as reason:
        if wanted == "1":
            raise
        print(f"lmn_kernels: the CUDA half is not built: {reason}", file=sys.stderr)
        record["cuda"] = str(reason)
        cuda, archs = "none", "none"
    baked = {"VERSION": version(), "TORCH": torch.__version__, "CUDA_VERSION": cuda, "ARCHS": archs}
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    if os.name == "nt":
        flags = ["/O2", "/openmp"]
    elif sys.platform != "darwin":
        flags.append("-fopenmp")  # its symbols are those of the runtime that torch has loaded
    flags += shlex.split(os.environ.get("LMN_KERNELS_CFLAGS", ""))
    make = cpp_extension.CppExtension if cuda == "none" else cpp_extension.CUDAExtension
    return make(
        "lmn_kernels._C",
        [*CPU_SOURCES, *(() if cuda == "none" else CUDA_SOURCES)],
        define_macros=[(f"LMN_{name}", value) for name, value in baked.items()]
        + ([] if cuda == "none" else [("LMN_CUDA", None)]),
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--resource-usage", "-Xcompiler", "-Wall"]},
        extra_link_args=[f for f in flags if f.startswith("-fsanitize")],
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")],
    )


def recording(command: type, record: dict[str, str | None]) -> type:
    """A command that leaves a record where it puts the package: in the checkout, if that is what is used."""

    class Recording(command):  # type: ignore[misc, valid-type]
        def run(self):
            super().run()
            in_place = getattr(self, "inplace", False) or getattr(self, "editable_mode", False)
            path = Path(ROOT if in_place else self.build_lib, RECORD)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record) + "\n", encoding="utf-8")

    return Recording


def plan() -> dict:
    """Arguments of setup: the extension, or nothing and the reason."""
    wanted, cuda = setting("LMN_KERNELS_BUILD"), setting("LMN_KERNELS_CUDA")
    # Why something is not compiled; None of what is.
    record: dict[str, str | None] = {"extension": None, "cuda": None}
    pure = {"cmdclass": {"build_py": recording(build_py, record), "build_ext": recording(build_ext, record)}}
    if wanted == "0":
        record["extension"] = "LMN_KERNELS_BUILD=0"
        return pure
    try:
        check_compiler()
        module = extension(cuda, record)
    except NotBuilt as reason:
        if "1" in (wanted, cuda):
            raise SystemExit(f"lmn_kernels: the extension cannot be built: {reason}") from None
        print(f"lmn_kernels: a pure-Python build: {reason}", file=sys.stderr)
        record["extension"] = str(reason)
        return pure
    limit_jobs()
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # The versions baked in are no files that could be newer than what an earlier build has left.
            self.force = True

        def run(self):
            try:
                super().run()
            except Exception:
                print("lmn_kernels: compiling failed; LMN_KERNELS_BUILD=0 builds without it", file=sys.stderr)
                raise

    return {"ext_modules": [module], "cmdclass": {**pure["cmdclass"], "build_ext": recording(Build, record)}}


# Also under a PEP 517 front end. A test imports the rest.
if __name__ == "__main__":
    setup(**plan())
