"""What is shipped, what it asks for, and that importing it stays light."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lmn_kernels
from lmn_kernels._triton import launch

ROOT = Path(__file__).resolve().parents[2]
TUNED = launch.TUNED.relative_to(ROOT)
RECORD = "lmn_kernels/_build.json"
NOT_COPIED = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build.json")

pytestmark = pytest.mark.slow

needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="this machine has no C++ compiler, or no headers of Python",
)


def pip(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    own = {key: value for key, value in os.environ.items() if not key.startswith("LMN_KERNELS")}
    return subprocess.run(command, env={**own, "PIP_RETRIES": "1", **env}, capture_output=True, text=True)


def build(tree: Path, out: Path, *flags: str, **env: str) -> Path:
    done = pip("wheel", "--no-deps", "--wheel-dir", out, *flags, tree, **env)
    # "from versions: none": not one version of a build requirement was found, so no index answered.
    if lost := re.search(r"requirement (setuptools|wheel)\S* \(from versions: none\)", done.stderr):
        pytest.skip(f"an isolated build fetches {lost[1]}, and no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout: a build leaves files behind, as one of another Python has done here."""
    copy = shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=NOT_COPIED)
    (copy / "lmn_kernels" / "_C.cpython-27m.so").touch()
    (copy / RECORD).write_text('{"extension": "an earlier build", "cuda": null}')
    # A tuned file of launches, whether or not there is one here.
    (copy / TUNED).mkdir(exist_ok=True)
    (copy / TUNED / "Made-up_GPU.json").write_text('{"device": "Made-up GPU", "arch": 90, "launches": {}}')
    return copy


@pytest.fixture(scope="module")
def setuptools_here() -> None:
    if find_spec("setuptools") is None:
        pytest.skip("this environment has no setuptools")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory, setuptools_here) -> Path:
    """The pure wheel as the installed setuptools makes it, which needs no network."""
    return build(tree, tmp_path_factory.mktemp("wheel"), "--no-build-isolation", LMN_KERNELS_BUILD="0")


def test_build_requirements():
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r'"([\w-]+)', requires[1])) == {"setuptools", "wheel"}


def shipped(wheel: Path, tree: Path) -> set[str]:
    """The files of a wheel beside those of Python and of tuned launches, which are all of both packages'."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    tops = [tree / "lmn_kernels", tree / "python_ref"]
    modules = (path for top in tops for path in (*top.rglob("*.py"), top / "py.typed"))
    tuned = {path.relative_to(tree).as_posix() for path in (tree / TUNED).iterdir()}
    expected = {path.relative_to(tree).as_posix() for path in modules} | tuned
    assert tuned and expected <= names
    return names - expected


@needs_pip
def test_isolated_build_is_pure_and_ships_both_packages(tree, tmp_path):
    """Torch is not in it, and neither an extension nor a complaint comes of that."""
    wheel = build(tree, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert shipped(wheel, tree) == {RECORD}
    with zipfile.ZipFile(wheel) as archive:
        reason = json.loads(archive.read(RECORD))["extension"]
    assert reason == (
        "torch cannot be imported (No module named 'torch'); pip install --no-build-isolation . lets the build see it"
    )


@needs_pip
@needs_compiler
def test_a_build_that_sees_torch_ships_the_extension(tree, tmp_path, setuptools_here):
    wheel = build(tree, tmp_path, "--no-build-isolation", LMN_KERNELS_BUILD="1", LMN_KERNELS_CUDA="0")
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert re.search(rf"-cp3\d+-cp3\d+-{platform}\.whl$", wheel.name)
    (binary,) = shipped(wheel, tree) - {RECORD}
    assert re.fullmatch(r"lmn_kernels/_C\..*\.(so|pyd)", binary) and "27m" not in binary
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    env = {**os.environ, "PYTHONPATH": str(site), "LMN_KERNELS_BACKEND": ""}
    command = [sys.executable, "-m", "lmn_kernels.info"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert f"built for torch {torch.__version__}, CPU alone (LMN_KERNELS_CUDA=0)" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "step: cpp" in done.stdout


def test_the_source_distribution_holds_what_the_extension_is_made_of(tree, tmp_path, setuptools_here):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    env = {**os.environ, "LMN_KERNELS_BUILD": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file()}
    tuned = (TUNED / "Made-up_GPU.json").as_posix()
    assert sources and sources | {"setup.py", "pyproject.toml", "lmn_kernels/backend/extension.py", tuned} <= names
    assert not [
        name
        for name in names
        if name.endswith(".so") or name == RECORD or name.startswith(("tests/", "bench/", "build/"))
    ]


@needs_pip
def test_requirements(wheel):
    """A lower bound on torch is all; and `make setup` installs whatever an extra names, pinned."""
    requirements = metadata(wheel).get_all("Requires-Dist")
    extras = {re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" in line}
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.11"]
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert extras - {"triton"} <= pinned  # triton comes with a CUDA build of torch
    assert "+" not in re.sub(r"#.*", "", (ROOT / "constraints.txt").read_text())


def test_commits_are_linted_as_here():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    ruff = re.search(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"/ruff-pre-commit\n +rev: v(\S+)", hooks) == [ruff[1]]


@needs_pip
def test_version(wheel):
    assert metadata(wheel)["Version"] == lmn_kernels.__version__


@needs_pip
def test_installing_leaves_torch_alone(wheel):
    """With no index to turn to, pip must be content with the torch that is here."""
    done = pip("install", "--dry-run", "--quiet", "--no-index", "--no-build-isolation", "--report", "-", wheel)
    assert done.returncode == 0, done.stderr
    names = {item["metadata"]["name"] for item in json.loads(done.stdout)["install"]}
    assert names <= {"lmn_kernels"}


IMPORTED = """
import sys, torch
before = set(sys.modules)
import lmn_kernels, python_ref
new = set(sys.modules) - before
for package in (lmn_kernels, python_ref):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
heavy = {name for name in new if name.split(".")[0] in {"triton", "transformers", "safetensors"}}
assert not heavy, heavy
assert "lmn_kernels._C" not in new
assert not torch.cuda.is_initialized()
layer = lmn_kernels.LogarithmicMemory(16, 2, 1)
x = torch.randn(2, 5, 16, requires_grad=True)
layer(x).sum().backward()
assert x.grad.isfinite().all() and x.grad.any()
assert all(parameter.grad is not None for parameter in layer.parameters())
assert not torch.cuda.is_initialized()
"""


@needs_pip
def test_import_is_light_and_the_layer_runs(wheel, tmp_path):
    """The installed wheel, away from the checkout."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    assert done.returncode == 0, done.stderr
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LMN_KERNELS"))}
    command = [sys.executable, "-c", IMPORTED, str(site)]
    done = subprocess.run(command, cwd=elsewhere, env={**env, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
