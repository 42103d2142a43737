"""What setup.py decides to build on each machine (R1, R20)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from lmn_kernels import __version__

cpp_extension = pytest.importorskip("torch.utils.cpp_extension", reason="needs setuptools", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

VARIABLES = [f"LMN_KERNELS_{name}" for name in ("BUILD", "CUDA", "CFLAGS")]
VARIABLES += ["CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"]
NO_COMPILER = "no-such-compiler"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    """None of the machine's own, and none left behind: setup.py sets some."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path) -> Path:
    ignore = shutil.ignore_patterns(
        ".*", "tests", "bench", "build", "runs", "*.egg-info", "*.so", "_build.json", "__pycache__"
    )
    return shutil.copytree(ROOT, tmp_path / "check out", ignore=ignore)


def build(checkout: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """What a PEP 517 front end runs, and the wheels that come of it."""
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('out')"]
    done = subprocess.run(command, cwd=checkout, env={**os.environ, **env}, capture_output=True, text=True)
    return done, list((checkout / "out").glob("*.whl"))


def extension_line(site: Path) -> str:
    """What ``python -m lmn_kernels`` says of the extension, with no other lmn_kernels about."""
    code = "import runpy, sys; sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith('__edit')]; "
    code += "runpy.run_module('lmn_kernels', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=site, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("C++/CUDA extension"))


def sentences(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("lmn_kernels:")]


# How a machine differs, what its torch raises on import, what is printed, and what is recorded in the package.
NO_TORCH = "torch cannot be imported (not today); pip install --no-build-isolation . lets the build see it"
WITHOUT = f"there is no C++ compiler ({NO_COMPILER}); install one or set CXX"
PURE = {
    "nothing wanted": ({"LMN_KERNELS_BUILD": "0"}, "SystemExit", [], "LMN_KERNELS_BUILD=0"),  # nor is torch asked for
    "no torch": ({}, "ImportError", [NO_TORCH], NO_TORCH),
    "a torch that lacks a library": ({}, "OSError", [NO_TORCH], NO_TORCH),
    "no compiler": ({"CXX": NO_COMPILER}, None, [WITHOUT], WITHOUT),
}


@pytest.mark.parametrize("machine", PURE)
def test_a_pure_wheel_and_one_sentence(checkout, tmp_path, machine):
    env, raised, printed, recorded = PURE[machine]
    if raised is not None:
        (tmp_path / "torch.py").write_text(f"raise {raised}('not today')\n")
    done, wheels = build(checkout, PYTHONPATH=str(tmp_path), **env)
    assert done.returncode == 0, done.stderr
    assert [wheel.name for wheel in wheels] == [f"lmn_kernels-{__version__}-py3-none-any.whl"]
    assert sentences(done.stderr) == [f"lmn_kernels: a pure-Python build: {reason}" for reason in printed]
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(tmp_path / "site")
    assert extension_line(tmp_path / "site") == f"C++/CUDA extension: the extension is not built: {recorded}"
    assert not (checkout / "lmn_kernels" / "_build.json").exists()


# How a build leaves the package in the checkout.
IN_PLACE = {
    "build_ext": [sys.executable, "setup.py", "build_ext", "--inplace"],
    "editable": [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_editable('out')"],
}


@pytest.mark.parametrize("command", IN_PLACE)
def test_the_sentence_stands_in_the_checkout_where_that_is_what_is_used(checkout, command):
    for env, reason in (({"CXX": NO_COMPILER}, WITHOUT), ({"LMN_KERNELS_BUILD": "0"}, "LMN_KERNELS_BUILD=0")):
        done = subprocess.run(
            IN_PLACE[command], cwd=checkout, env={**os.environ, **env}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert extension_line(checkout) == f"C++/CUDA extension: the extension is not built: {reason}"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/lmn_kernels/_build.json" in ignored
    assert "_build.json" not in "".join(path.name for path in checkout.rglob("*.egg-info/SOURCES.txt"))


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="needs a C++ compiler and Python's headers",
)


@needs_compiler
def test_a_compiler_that_fails_is_an_error(checkout):
    for source in (checkout / "csrc").rglob("*.cpp"):
        source.write_text("#error broken\n")
    done, wheels = build(checkout)
    assert done.returncode != 0 and not wheels
    assert "#error broken" in done.stdout + done.stderr
    assert "LMN_KERNELS_BUILD=0" in sentences(done.stderr)[-1]


@pytest.mark.parametrize("name", ["LMN_KERNELS_BUILD", "LMN_KERNELS_CUDA"])
def test_a_setting_with_a_typo_is_an_error(setup_py, monkeypatch, name):
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"{name}: expected auto, 0 or 1, got 'yes'"):
        setup_py.plan()


@pytest.mark.parametrize("lacking", ["compiler", "torch", "headers"])
def test_what_is_not_there_is_fatal_only_where_it_is_asked_for(setup_py, monkeypatch, capsys, tmp_path, lacking):
    if lacking == "compiler":
        monkeypatch.setenv("CXX", NO_COMPILER)
    elif lacking == "torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert "ext_modules" not in setup_py.plan()
    (said,) = sentences(capsys.readouterr().err)
    for name in ("LMN_KERNELS_BUILD", "LMN_KERNELS_CUDA"):
        with monkeypatch.context() as demanding, pytest.raises(SystemExit) as raised:
            demanding.setenv(name, "1")
            setup_py.plan()
        assert str(raised.value).split(": ", 2)[2] == said.split(": ", 2)[2]


@pytest.mark.parametrize("given", [None, "", "ccache g++"])
def test_the_compiler_that_is_found_is_the_one_that_torch_takes(setup_py, monkeypatch, tmp_path, given):
    """Torch takes ``c++`` where CXX is not set, whatever a machine has in its place."""
    for name in ("g++", "ccache"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    if given is not None:
        monkeypatch.setenv("CXX", given)
    setup_py.check_compiler()
    assert os.environ["CXX"] == (given or "g++")


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """A machine with a torch for CUDA and a toolkit, both as told."""

    def machine(torch_cuda: str | None, nvcc: str | None, header: bool = True, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
        (tmp_path / "bin").mkdir()
        (tmp_path / "include").mkdir()
        if nvcc is not None:
            (tmp_path / "bin" / "nvcc").touch(0o755)
            (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '{nvcc}'\n" if nvcc else "no program")
        if header:
            (tmp_path / "include" / "cuda_runtime.h").touch()

    return machine


REASONS = [
    ({"torch_cuda": None, "nvcc": "release 13.0"}, ["torch is built without CUDA"]),
    ({"torch_cuda": None, "nvcc": "release 13.0", "hip": "7.0"}, ["ROCm"]),
    ({"torch_cuda": "13.0", "nvcc": None}, ["nvcc is not found", "13.0", "CUDA_HOME"]),
    ({"torch_cuda": "13.0", "nvcc": "release 13.0", "header": False}, ["cuda_runtime.h", "CUDA_HOME"]),
    ({"torch_cuda": "13.0", "nvcc": "Build, release 12.8, V12.8.9"}, ["nvcc is of CUDA 12.8", "torch of CUDA 13.0"]),
    ({"torch_cuda": "13.0", "nvcc": "no compiler at all"}, ["an unknown version", "torch of CUDA 13.0"]),
    ({"torch_cuda": "13.0", "nvcc": ""}, ["does not run", "CUDA_HOME"]),
]


@pytest.mark.parametrize("machine, parts", REASONS)
def test_no_cuda_half_and_one_sentence(setup_py, cuda, capsys, machine, parts):
    cuda(**machine)
    record = {}
    module = setup_py.extension("auto", record)
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ
    assert not any(source.endswith(".cu") for source in module.sources)
    assert dict(module.define_macros)["LMN_CUDA_VERSION"] == "none" and "LMN_CUDA" not in dict(module.define_macros)
    (said,) = sentences(capsys.readouterr().err)
    assert all(part in said for part in parts), said
    assert said == f"lmn_kernels: the CUDA half is not built: {record['cuda']}"
    with pytest.raises(setup_py.NotBuilt, match=parts[0]):
        setup_py.extension("1", {})


ARCHS = [
    ("13.0", None, "7.5;8.0;9.0;12.0+PTX"),
    ("12.6", None, "7.5;8.0;9.0+PTX"),  # this nvcc has not heard of 12.0
    ("13.0", "", "7.5;8.0;9.0;12.0+PTX"),  # not set, as torch reads it
    ("13.0", "8.6 9.0+PTX", "8.6 9.0+PTX"),
]


@pytest.mark.parametrize("release, given, archs", ARCHS)
def test_the_cuda_half(setup_py, cuda, monkeypatch, capsys, release, given, archs):
    cuda(release, f"Cuda compilation tools, release {release}, V{release}.1")
    if given is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    module = setup_py.extension("1", record := {"cuda": None})
    assert record == {"cuda": None}
    macros = dict(module.define_macros)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == macros["LMN_ARCHS"] == archs
    assert macros["LMN_CUDA_VERSION"] == release and "LMN_CUDA" in macros
    assert set(setup_py.CUDA_SOURCES) < set(module.sources)
    assert not any("gencode" in flag for flag in module.extra_compile_args["nvcc"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("memory, jobs", [(5 << 30, "2"), (1 << 30, "1"), (1 << 40, "8"), (None, "4")])
def test_jobs_follow_free_memory(setup_py, monkeypatch, memory, jobs):
    def sysconf(name: str) -> int:
        if memory is None:
            raise ValueError("unrecognized configuration name")  # as on macOS
        return 1 if name == "SC_PAGE_SIZE" else memory

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    setup_py.limit_jobs()
    assert os.environ["MAX_JOBS"] == jobs
    monkeypatch.setenv("MAX_JOBS", "3")
    setup_py.limit_jobs()
    assert os.environ["MAX_JOBS"] == "3"


@needs_compiler
def test_another_torch_is_another_build(setup_py, monkeypatch):
    """No file is newer than the last binary, yet what is baked into it has changed; ninja alone looks for that."""
    monkeypatch.setattr(cpp_extension.BuildExtension, "finalize_options", lambda self: None)
    kind = setup_py.plan()["cmdclass"]["build_ext"]
    command = kind.__new__(kind)
    command.finalize_options()
    assert command.force
