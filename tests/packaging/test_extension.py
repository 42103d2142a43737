"""How the extension is loaded, and what a binary that does not fit leads to (R1, R14, R20)."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from lmn_kernels import __version__, info
from lmn_kernels.backend import extension

ROOT = Path(__file__).resolve().parents[2]
NAME = f"_C{EXTENSION_SUFFIXES[0]}"

pytestmark = pytest.mark.slow

PROBE = """
import json, sys, warnings
# That of an editable install, which may know of a checkout with an extension.
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import torch, lmn_kernels
loaded = lambda: "lmn_kernels._C" in sys.modules
layer, x = lmn_kernels.LogarithmicMixing(8, 2), torch.randn(1, 5, 8)
early = loaded() or "torch.utils.cpp_extension" in sys.modules
named = lmn_kernels.LogarithmicMixing(8, 2, step_backend="cpp")
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    expected, state = layer(x), layer.init_state(1, max_position=5)
    for t in range(5):
        torch.testing.assert_close(layer.step_(x[:, t:t+1], state), expected[:, t:t+1])
    layer.step(x[:, :1], layer.init_state(1))
    try:
        refusal = named.step(x[:, :1], named.init_state(1)) and None
    except lmn_kernels.BackendError as error:
        refusal = str(error)
found = [line for line in lmn_kernels.info().splitlines() if "step:" in line or line.startswith("C++/CUDA")][:2]
print(json.dumps([early, loaded(), [str(w.message) for w in caught], refusal, *found]))
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """The two packages on a path of their own, without a binary."""
    for name in ("lmn_kernels", "python_ref"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        )
    return tmp_path / "lmn_kernels"


def probe(package: Path) -> tuple[bool, bool, list[str], str | None, str, str]:
    code = f"{PROBE}\nassert lmn_kernels.__file__.startswith(sys.argv[1]), lmn_kernels.__file__"
    command = [sys.executable, "-c", code, str(package)]
    env = {**os.environ, "PYTHONPATH": str(package.parent), "LMN_KERNELS_BACKEND": ""}
    done = subprocess.run(command, cwd=package.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def said_of(reason: str) -> list[str]:
    """The warnings of a process in which the extension cannot be used."""
    operations = "build_tree", "attend", "step"
    return [f"lmn_kernels: {name} on cpu runs on the PyTorch reference: {reason}" for name in operations]


def falls_back(package: Path, *parts: str) -> None:
    early, loaded, warned, refusal, line, step = probe(package)
    assert not early and not loaded
    reason = line.removeprefix("C++/CUDA extension: ")
    assert all(part in reason for part in (*parts, "pip install --no-build-isolation .")), reason
    assert warned == said_of(reason)
    assert refusal == f"backend='cpp' cannot serve step on cpu: {reason}"
    assert step.strip() == f"step: reference ({reason})"


def test_the_reason_that_the_build_recorded(package):
    said = "there is no C++ compiler (c++); install one or set CXX"
    (package / "_build.json").write_text(json.dumps({"extension": said, "cuda": None}))
    reason = f"the extension is not built: {said}"
    _, loaded, warned, refusal, line, step = probe(package)
    assert not loaded and line == f"C++/CUDA extension: {reason}"
    assert warned == said_of(reason)
    assert refusal == f"backend='cpp' cannot serve step on cpu: {reason}"
    assert step.strip() == f"step: reference ({reason})"


PLAIN = "the extension is not built (pip install --no-build-isolation . builds it)"


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", '{"cuda": null}', '{"extension": null, "cuda": "no nvcc"}', b"\xff"]
)
def test_a_record_that_says_nothing_of_it(package, monkeypatch, content):
    monkeypatch.setattr(extension, "_PACKAGE", package)
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    (package / "_build.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert extension.not_built() == PLAIN


class Editable:
    """What an editable install leaves in ``sys.meta_path``."""

    def __init__(self, folder: Path):
        self._folder = folder

    def find_spec(self, name, path=None, target=None):
        if name != "lmn_kernels":
            return None
        return importlib.util.spec_from_file_location(name, self._folder / "__init__.py")


@pytest.mark.parametrize("is_editable", [False, True])
@pytest.mark.parametrize("is_current", [True, False])
def test_an_installed_package_that_a_checkout_shadows(package, tmp_path, monkeypatch, is_editable, is_current):
    other = tmp_path / "site" / "lmn_kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    monkeypatch.setattr(extension, "_PACKAGE", package)
    monkeypatch.setattr(sys, "meta_path", [Editable(other)] if is_editable else [])
    # The package itself is found as well, in a folder of another name.
    (tmp_path / "linked").symlink_to(package.parent)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "linked"), *([] if is_editable else [str(tmp_path / "site")])])
    monkeypatch.chdir(package.parent if is_current else other)
    assert extension.not_built() == PLAIN  # neither has one
    (other / NAME).touch()
    where = "from the current folder" if is_current else "on sys.path"
    said = f"; the lmn_kernels in {other} has it, but {package} comes first, {where}"
    assert extension.not_built() == PLAIN + said
    (package / "_build.json").write_text('{"extension": "LMN_KERNELS_BUILD=0"}')
    assert extension.not_built() == f"the extension is not built: LMN_KERNELS_BUILD=0{said}"


def test_why_there_is_no_cuda_half(package, monkeypatch):
    monkeypatch.setattr(extension, "_PACKAGE", package)
    built = {"version": __version__, "torch": torch.__version__, "cuda": "none", "archs": "none"}
    monkeypatch.setattr(extension, "load", lambda: (built, None))
    line = f"C++/CUDA extension: built for torch {torch.__version__}, CPU alone"
    rebuild = "rebuild it: pip install --no-build-isolation ."
    assert extension.obstacle("cuda") == f"the extension was built without CUDA; {rebuild}"
    assert line in info().splitlines()
    (package / "_build.json").write_text('{"extension": null, "cuda": "this torch is built without CUDA"}')
    reason = "(this torch is built without CUDA)"
    assert extension.obstacle("cuda") == f"the extension was built without CUDA {reason}; {rebuild}"
    assert f"{line} {reason}" in info().splitlines() and extension.obstacle("cpu") is None


@pytest.fixture
def binary() -> bytes:
    """The extension as it is built here."""
    if (reason := extension.load()[1]) is not None:
        pytest.skip(reason)
    return (ROOT / "lmn_kernels" / NAME).read_bytes()


@pytest.mark.ext
def test_the_extension_is_loaded_by_the_first_call_and_in_silence(package, binary):
    (package / NAME).write_bytes(binary)
    (package / "_C.cpython-27m.so").write_bytes(b"of another Python")
    early, loaded, warned, refusal, line, step = probe(package)
    assert not early and loaded and not warned and refusal is None
    assert torch.__version__ in line and step.strip() == "step: cpp"


MARKER = json.dumps({"version": __version__, "torch": torch.__version__, "cuda": "none", "archs": "none"})
# The file, or what takes the place of what in the binary that is built here; and what is said of it.
UNFIT = {
    "none": (None, ["not built"]),
    "empty": (b"", ["does not load"]),
    "random": (random.Random(0).randbytes(10_000), ["not one of lmn_kernels"]),
    "no library": (f"lmn_kernels build: {MARKER}".encode(), ["does not load"]),
    "another torch": (('"torch": "', '"torch": "?'), ["built for torch ?", f"this is {torch.__version__}"]),
    "another lmn_kernels": (('"version": "', '"version": "?'), ["for lmn_kernels ?", f"this is {__version__}"]),
    "a key is not there": (('"archs": ', '"arches":'), ["not one of lmn_kernels"]),
    "no JSON": (('{"version": ', "{'version': "), ["does not load"]),
    "a symbol that torch lacks": (("_ZN2at4_ops", "_ZN2at4_ups"), ["does not load", "undefined symbol: _ZN2at4_ups"]),
    "no module": (("PyInit__C\0", "PyInit__D\0"), ["does not load", "PyInit__C"]),
}


@pytest.mark.ext
@pytest.mark.parametrize("case", UNFIT)
def test_a_binary_that_does_not_fit_is_left_alone(package, request, case):
    content, parts = UNFIT[case]
    if isinstance(content, tuple):
        old, new = (part.encode() for part in content)
        content = request.getfixturevalue("binary")
        found = content.index(old)
        old = content[found : found + len(new)]  # where a version grows, its first character goes
        content = content.replace(old, new)
    if content is not None:
        (package / NAME).write_bytes(content)
    falls_back(package, *parts)


@pytest.mark.ext
def test_a_binary_of_other_operations_is_left_alone(package, binary):
    (package / NAME).write_bytes(binary)
    library = package / "ops" / "step.py"
    library.write_text(library.read_text(encoding="utf-8").replace('f"step(Tensor x', 'f"step(Tensor x, int more'))
    falls_back(package, "does not load", "schema")
