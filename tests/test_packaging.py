"""What is shipped, what it asks for, and that importing it stays light."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import lmn_kernels

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("lmn_kernels", "python_ref", "bench", "tests")
NOT_COPIED = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")

needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip")


def pip(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PIP_RETRIES": "1"}, capture_output=True, text=True)


def build(tree: Path, out: Path, *flags: str) -> Path:
    done = pip("wheel", "--no-deps", "--wheel-dir", out, *flags, tree)
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
    """A copy of the checkout: a build leaves files behind."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=NOT_COPIED)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """The wheel as the installed setuptools makes it, which needs no network."""
    if find_spec("setuptools") is None:
        pytest.skip("this environment has no setuptools")
    return build(tree, tmp_path_factory.mktemp("wheel"), "--no-build-isolation")


def test_build_requirements():
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r'"([\w-]+)', requires[1])) == {"setuptools", "wheel"}


@needs_pip
def test_isolated_build_is_pure_and_ships_both_packages(tree, tmp_path):
    wheel = build(tree, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lmn_kernels", "python_ref"}
    modules = (path for top in ("lmn_kernels", "python_ref") for path in (tree / top).rglob("*.py"))
    assert {path.relative_to(tree).as_posix() for path in modules} <= names
    assert any(name.endswith("LICENSE") for name in names)


@needs_pip
def test_requirements(wheel):
    """A lower bound on torch is all; and `make setup` installs whatever an extra names, pinned."""
    requirements = metadata(wheel).get_all("Requires-Dist")
    extras = {re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" in line}
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.11"]
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert extras - {"triton"} <= pinned  # triton comes with a CUDA build of torch
    assert "+" not in re.sub(r"#.*", "", (ROOT / "constraints.txt").read_text())


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
    done = subprocess.run(
        command, cwd=elsewhere, env={**env, "PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_syntax_of_the_oldest_python():
    for path in (path for top in SOURCES for path in (ROOT / top).rglob("*.py")):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def test_no_path_of_one_machine():
    local = re.compile(rb"(?<![\w.])/(?:work|root|home|Users)/")
    inside = [path for top in (*SOURCES, "csrc", ".ci") for path in (ROOT / top).rglob("*")]
    texts = [path for path in (*ROOT.glob("*"), *inside) if path.is_file() and path.suffix != ".pyc"]
    assert [str(path.relative_to(ROOT)) for path in texts if local.search(path.read_bytes())] == []
