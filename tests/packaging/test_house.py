"""The house keeps its rules, and each breach of one is caught and named by rule, file and line."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.house import LAZILY, LONGEST, ROOMS, SOURCES, breaches, floors, plan, read

ROOT = Path(__file__).resolve().parents[2]


def test_the_house_keeps_its_rules():
    assert [str(breach) for breach in breaches(ROOT)] == []


def test_the_table_of_rooms_is_that_of_the_tree():
    """No line for a room that is gone, bar the compiled one; and no circle that it would allow."""
    names = read(ROOT)
    assert [room for room in ROOMS if room not in names] == ["lmn_kernels._C"]
    assert set().union(*ROOMS.values(), LAZILY, *LAZILY.values()) <= set(ROOMS)
    TopologicalSorter({room: below | LAZILY.get(room, set()) for room, below in ROOMS.items()}).prepare()


def test_a_stranger_finds_few_rooms_and_few_arrows():
    """Of the whole source, and of the package alone."""
    whole, package = plan(ROOT), plan(ROOT, ("lmn_kernels",))
    package = {name: below for name, below in package.items() if not name.startswith(("bench", "setup"))}
    assert len(whole) <= 14 and floors(whole) <= 6 and sum(map(len, whole.values())) <= 45
    assert len(package) <= 10 and floors(package) <= 6 and sum(map(len, package.values())) <= 20
    assert {"python_ref", "bench.runs"} <= set(whole) and "python_ref" in whole["lmn_kernels"]


def test_syntax_of_the_oldest_python():
    for module in read(ROOT).values():
        ast.parse(module.text, str(module.path), feature_version=(3, 10))


def test_no_path_of_one_machine():
    local = re.compile(rb"(?<![\w.])/(?:work|root|home|Users)/")
    inside = [path for top in (*SOURCES, "csrc", "docs", ".ci", ".github") for path in (ROOT / top).rglob("*")]
    top = (path for path in ROOT.glob("*") if path.name != ".git")  # a file, in a work tree that is not the first
    texts = [path for path in (*top, *inside) if path.is_file() and path.suffix not in (".pyc", ".so")]
    assert [str(path.relative_to(ROOT)) for path in texts if local.search(path.read_bytes())] == []


def told(root: Path, files: dict[str, str]) -> list[str]:
    """The breaches of a made-up tree: texts by their files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return [str(breach) for breach in breaches(root)]


LAUNCHER = """
import importlib, torch
from ..backend import env
LIBRARY = torch.library.Library("lmn_kernels", "DEF")
def launcher(backend):
    return importlib.import_module(f"lmn_kernels._{backend}.tree")
"""
SOUND = {
    "setup.py": "import os\nprint(os.environ)\n",
    "python_ref/tree.py": "import math\nimport torch\nfrom . import layout\n",
    "python_ref/layout.py": "import torch.nn\n",
    "lmn_kernels/_triton/tree.py": "import triton\nfrom python_ref.layout import Layout\n",
    "lmn_kernels/backend/env.py": "import os\nfrom os import getenv\nprint(os.environ)\n",
    "lmn_kernels/states/memory.py": "from python_ref import tree\n",
    "lmn_kernels/ops/tree.py": LAUNCHER,
    "lmn_kernels/layers/mixing.py": "from ..ops.tree import LIBRARY\nfrom ..states.memory import tree\n",
    "bench/close.py": "import torch\n",
    "bench/contenders/ours.py": "import lmn_kernels.layers.mixing\nfrom bench.close import torch\n",
    "tests/test_tree.py": "from bench.close import torch\nfrom torch.library import opcheck\n",
}


def test_what_keeps_the_rules_is_left_alone(tmp_path):
    assert told(tmp_path, SOUND) == []


LAYERS, OPS, BACKEND, STATES, TRITON, REFERENCE = ROOM_FILES = (
    "lmn_kernels/layers/new.py", "lmn_kernels/ops/new.py", "lmn_kernels/backend/new.py", "lmn_kernels/states/new.py",
    "lmn_kernels/_triton/new.py", "python_ref/new.py",
)  # fmt: skip
BY_NAME = "from importlib import import_module\n"
# The file of the breach, its text, whose last line it is, and words of what is said.
IMPORTS = {
    "up": (OPS, "import math\nfrom ..layers.mixing import x", "ops may not import lmn_kernels.layers"),
    "absolute": (OPS, "import lmn_kernels.layers.mixing", "ops may not import lmn_kernels.layers"),
    "of a name": (STATES, "from ..backend import env", "states may not import lmn_kernels.backend"),
    "of the package": (STATES, "from lmn_kernels import x", "states may not import lmn_kernels (lmn_kernels)"),
    "in a function": (BACKEND, "def f():\n    from ..ops import x", "backend may not import lmn_kernels.ops"),
    "in a branch": (STATES, "if True:\n    from ..ops import tree", "states may not import lmn_kernels.ops"),
    "by a string": (
        BACKEND, "import importlib\nimportlib.import_module('lmn_kernels.ops.tree')",
        "backend may not import lmn_kernels.ops (lmn_kernels.ops.tree)",
    ),
    "by a bare function": (STATES, BY_NAME + "import_module('lmn_kernels.ops')", "states may not import"),
    "by the builtin": (STATES, "__import__('lmn_kernels.ops.tree')", "states may not import lmn_kernels.ops"),
    "by half a string": (
        REFERENCE, BY_NAME + "def f(x):\n    import_module('lmn_kernels._triton.' + x)",
        "python_ref may not import lmn_kernels._triton (lmn_kernels._triton.tree)",
    ),
    "by one of two strings": (
        STATES, BY_NAME + "def f(x):\n    import_module(f'python_ref.{x}' if x else f'lmn_kernels.ops.{x}')",
        "states may not import lmn_kernels.ops (lmn_kernels.ops.tree)",
    ),
    "by no name": (
        BACKEND, BY_NAME + "def f(x):\n    import_module(x)", "the name of an imported module begins with a literal",
    ),
    "of Triton at once": (OPS, "from .._triton import tree", "ops imports lmn_kernels._triton in a function alone"),
    "of Triton at once, by a string": (
        OPS, BY_NAME + "import_module('lmn_kernels._triton.tree')", "lmn_kernels._triton in a function alone",
    ),
    "of Triton from a layer": (LAYERS, "def f():\n    from .._triton import tree", "layers may not import"),
    "of the package from its kernels": (TRITON, "from ..backend import env", "_triton may not import"),
    "of the product from the reference": (REFERENCE, "import lmn_kernels", "python_ref may not import lmn_kernels"),
    "of NumPy from the reference": (REFERENCE, "import torch\nimport numpy as np", "not numpy"),
    "of tests from bench": ("bench/contenders/new.py", "from tests.support import x", "may not import tests"),
    "of tests from the product": (LAYERS, "import tests", "layers may not import tests"),
    "of bench from the product": (LAYERS, "import bench.close", "layers may not import bench.close"),
    "of a run from a contender": ("bench/contenders/new.py", "from ..runs import x", "may not import bench.runs"),
    "of a training from a report": ("bench/report/new.py", "from bench.lm import x", "may not import bench.lm"),
    "of a report from a training": ("bench/lm/new.py", "from bench.report import x", "may not import bench.report"),
    "of the GPU's from a run": ("bench/runs/new.py", "from bench.gpu import x", "may not import bench.gpu"),
    "of the tree from its set-up": ("setup.py", "import lmn_kernels", "setup may not import lmn_kernels"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPORTS)
def test_an_import_against_the_rules_is_caught(tmp_path, case):
    name, text, words = IMPORTS[case]
    (said,) = told(tmp_path, SOUND | {name: text})
    line = text.count("\n") + 1
    assert said.startswith(f"{name}:{line}: imports: ") and words in said


def test_a_package_imports_from_where_it_stands(tmp_path):
    """One dot is the package in its ``__init__`` and the package around it in any other file."""
    name = "lmn_kernels/states/__init__.py"
    (said,) = told(tmp_path, SOUND | {name: "from . import memory\nfrom ..layers import mixing\n"})
    assert said.startswith(f"{name}:2: imports: lmn_kernels.states may not import lmn_kernels.layers")


@pytest.mark.parametrize("package", ["lmn_kernels", "bench"])
def test_a_folder_that_is_no_room_is_caught(tmp_path, package):
    (said,) = told(tmp_path, {f"{package}/attic/old.py": ""})
    assert said.startswith(f"{package}/attic/old.py:1: rooms: {package}.attic is not a room")


# Files of a made-up python_ref, in each of which the last line is the import.
CIRCLES = {
    "of two": {"a": "import torch\nfrom . import b", "b": "from .a import x"},
    "through a function": {"a": "import torch\nimport python_ref.b", "b": "def f():\n    from . import a"},
    "through a string": {"a": "from . import b", "b": BY_NAME + "import_module('python_ref.a')"},
    "of three": {"a": "\nfrom . import b", "b": "from . import c", "c": "\n\nfrom . import a"},
}


@pytest.mark.parametrize("case", CIRCLES)
def test_a_circle_is_caught(tmp_path, case):
    files = {f"python_ref/{name}.py": text for name, text in CIRCLES[case].items()}
    (said,) = told(tmp_path, files | {"python_ref/alone.py": "from . import a"})
    where, rule, circle = said.split(": ")
    first, *others = circle.split(" -> ")
    assert rule == "circle" and first == others[-1]
    assert sorted(others) == [f"python_ref.{name}" for name in CIRCLES[case]]
    path = first.replace(".", "/") + ".py"
    line = files[path].count("\n") + 1
    assert where == f"{path}:{line}"


@pytest.mark.parametrize(
    "text",
    [
        "import torch\n@torch.library.custom_op('a::b', mutates_args=())\ndef f(): ...\n",
        "import math\nfrom torch.library import Library\n",
        "import math\nfrom torch import library\n",
        "import math\nimport torch.library as registry\n",
    ],
)
@pytest.mark.parametrize("name", [BACKEND, REFERENCE, "bench/contenders/new.py"])
def test_registering_elsewhere_is_caught(tmp_path, name, text):
    (said,) = told(tmp_path, SOUND | {name: text})
    assert said == f"{name}:2: registration: lmn_kernels.ops alone uses torch.library"


@pytest.mark.parametrize(
    "text",
    ["import os\nX = os.environ.get('X')", "import os\nX = os.getenv('X')", "import math\nfrom os import environ"],
)
@pytest.mark.parametrize("name", ROOM_FILES)
def test_reading_the_environment_elsewhere_is_caught(tmp_path, name, text):
    (said,) = told(tmp_path, SOUND | {name: text})
    assert said == f"{name}:2: environment: lmn_kernels.backend.env alone reads the environment"


@pytest.mark.parametrize("name", [LAYERS, REFERENCE, "bench/lm/new.py", "tests/new.py", "setup.py"])
def test_a_file_that_is_too_long_is_caught(tmp_path, name):
    assert told(tmp_path, {name: "#\n" * LONGEST}) == []
    for text in ("#\n" * (LONGEST + 1), "#\n" * LONGEST + "#"):
        assert told(tmp_path, {name: text}) == [f"{name}:401: length: 401 lines, and a file has at most 400"]
