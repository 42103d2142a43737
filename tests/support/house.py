"""The rules of the house, read from the source: who may import whom, and what one room alone may do.

A module belongs to the room of `ROOMS` whose name is the longest beginning of its own. An import counts wherever it
stands, in a function or in `importlib.import_module("…")` as well; where part of such a name is not known before the
program runs (``f"lmn_kernels._{backend}.tree"``), it stands for every file that the name fits.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

LONGEST = 400
SOURCES = ("lmn_kernels", "python_ref", "bench", "tests", "setup.py")
TOPS = {Path(source).stem for source in SOURCES}

_PRODUCT = {
    "python_ref", "lmn_kernels", "lmn_kernels.layers", "lmn_kernels.ops", "lmn_kernels.backend", "lmn_kernels.states",
    "lmn_kernels._triton", "lmn_kernels._cpp",
}  # fmt: skip
_GROUND = {"bench.close", "bench.errors", "bench.extras", "bench.files"}

# What each room may import beside itself. Whoever adds a room adds a line.
ROOMS: dict[str, set[str]] = {
    "python_ref": set(),
    "lmn_kernels._version": set(),
    "lmn_kernels._C": set(),
    "lmn_kernels._triton": {"python_ref"},
    "lmn_kernels._cpp": {"python_ref", "lmn_kernels._C"},
    "lmn_kernels.states": {"python_ref"},
    "lmn_kernels.backend": {"python_ref", "lmn_kernels._version", "lmn_kernels._C"},
    "lmn_kernels.ops": {"python_ref", "lmn_kernels.backend", "lmn_kernels.states", "lmn_kernels._C"},
    "lmn_kernels.layers": {
        "python_ref", "lmn_kernels.ops", "lmn_kernels.backend", "lmn_kernels.states", "lmn_kernels._C",
    },
    "lmn_kernels": {
        "python_ref", "lmn_kernels.layers", "lmn_kernels.ops", "lmn_kernels.backend", "lmn_kernels.states",
        "lmn_kernels._version",
    },
    "bench.close": set(),
    "bench.errors": set(),
    "bench.extras": {"bench.errors"},
    "bench.files": {"bench.errors", "lmn_kernels.states"},
    "bench.measure": _GROUND,
    "bench.contenders": _PRODUCT | _GROUND | {"bench.measure"},
    "bench.report": _GROUND | {"bench.measure"},
    "bench.lm": _PRODUCT | _GROUND | {"bench.measure"},
    "bench.runs": _PRODUCT | _GROUND | {"bench.measure", "bench.contenders", "bench.report", "bench.lm"},
    "bench": _PRODUCT | _GROUND | {"bench.measure", "bench.contenders", "bench.report", "bench.lm", "bench.runs"},
    "bench.gpu": _PRODUCT | _GROUND | {"bench.measure", "bench.report", "bench.runs"},
    "setup": set(),
}  # fmt: skip
ROOMS["tests"] = set(ROOMS) - {"setup"}
# What a room may import in a function alone, at the first call that needs it.
LAZILY = {"lmn_kernels.ops": {"lmn_kernels._triton", "lmn_kernels._cpp"}}
# What a room may import from outside, beside the standard library; a room that is not named is free.
OUTSIDE = {"python_ref": {"torch"}}

REGISTERS = "lmn_kernels.ops"
READS_ENVIRONMENT = "lmn_kernels.backend.env"
_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


@dataclass(frozen=True, order=True)
class Breach:
    path: str
    line: int
    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.what}"


@dataclass(frozen=True)
class Module:
    """A file of the tree: ``name`` is what one imports, ``path`` is relative to the root."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def breach(self, line: int, rule: str, what: str) -> Breach:
        return Breach(self.path.as_posix(), line, rule, what)


@dataclass(frozen=True)
class Arrow:
    """One import; ``target`` is None where its name is known to the running program alone."""

    target: str | None
    line: int
    lazy: bool


def read(root: Path) -> dict[str, Module]:
    """The Python files of a checkout by the names of their modules."""
    found = {}
    for source in SOURCES:
        top = root / source
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top] * top.is_file():
            relative, text = path.relative_to(root), path.read_text(encoding="utf-8")
            parts = relative.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, relative, text, ast.parse(text, str(relative)))
    return found


def room(module: str) -> str:
    """The room of a module of the tree, whose first part is one of `TOPS`."""
    parts = module.split(".")
    return next(name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in ROOMS)


def arrows(module: Module, modules: dict[str, Module]) -> Iterator[Arrow]:
    """All imports of a file, of the tree and from outside."""
    for node, lazy in _nodes(module.tree, False):
        if isinstance(node, ast.Import):
            yield from (Arrow(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Arrow(whole if whole in modules or whole in ROOMS else base, node.lineno, lazy)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            for pattern in _patterns(node.args[0]):
                for target in _fitting(pattern, modules):
                    yield Arrow(target, node.lineno, lazy)


def _nodes(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        yield from _nodes(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def _base(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parts = module.package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _called(node: ast.Call) -> str | None:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def _patterns(node: ast.expr) -> list[str]:
    """What a name may be, as regular expressions; ``.*`` stands for what is not known."""
    if isinstance(node, ast.Constant):
        return [re.escape(str(node.value))]
    if isinstance(node, ast.IfExp):
        return _patterns(node.body) + _patterns(node.orelse)
    if isinstance(node, ast.JoinedStr):
        return ["".join(_patterns(part)[0] for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _patterns(node.left) for right in _patterns(node.right)]
    return [".*"]


def _fitting(pattern: str, modules: dict[str, Module]) -> list[str | None]:
    if pattern.startswith(".*"):
        return [None]
    if ".*" not in pattern:
        return [re.sub(r"\\(.)", r"\1", pattern)]
    return [name for name in modules if re.fullmatch(pattern, name)]


def breaches(root: Path) -> list[Breach]:
    """Where a checkout breaks a rule, in the order of files and lines."""
    modules = read(root)
    found = set(_circle(modules))
    for module in modules.values():
        found.update(_place(module))
        found.update(_imports(module, modules))
        found.update(_registration(module))
        found.update(_environment(module))
    return sorted(found)


def _place(module: Module) -> Iterator[Breach]:
    lines = module.text.count("\n") + (not module.text.endswith("\n"))
    if lines > LONGEST:
        yield module.breach(LONGEST + 1, "length", f"{lines} lines, and a file has at most {LONGEST}")
    folder = ".".join(module.path.parts[:2])
    if room(module.name) in ("lmn_kernels", "bench") and len(module.path.parts) > 2:
        yield module.breach(1, "rooms", f"{folder} is not a room: tests/support/house.py lists them")


def _imports(module: Module, modules: dict[str, Module]) -> Iterator[Breach]:
    here = room(module.name)
    for arrow in arrows(module, modules):
        if arrow.target is None:
            if module.name.split(".")[0] in ("lmn_kernels", "python_ref"):
                yield module.breach(arrow.line, "imports", "the name of an imported module begins with a literal")
        elif (top := arrow.target.split(".")[0]) not in TOPS:
            if here in OUTSIDE and top not in OUTSIDE[here] | sys.stdlib_module_names:
                allowed = ", ".join(sorted(OUTSIDE[here]))
                yield module.breach(
                    arrow.line, "imports", f"{here} imports {allowed} and the standard library, not {arrow.target}"
                )
        elif (there := room(arrow.target)) != here and there not in ROOMS[here]:
            if there not in LAZILY.get(here, ()):
                allowed = ", ".join(sorted(ROOMS[here])) or "no other room"
                what = f"{here} may not import {there} ({arrow.target}), but {allowed}"
                yield module.breach(arrow.line, "imports", what)
            elif not arrow.lazy:
                yield module.breach(arrow.line, "imports", f"{here} imports {there} in a function alone")


def _circle(modules: dict[str, Module]) -> Iterator[Breach]:
    found = {name: {a.target: a.line for a in arrows(module, modules)} for name, module in modules.items()}
    graph = {name: [t for t in targets if t in modules and t != name] for name, targets in found.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # Each file of it is imported by the one behind it.
        circle = error.args[1][::-1]
        module = modules[circle[0]]
        yield module.breach(found[circle[0]][circle[1]], "circle", " -> ".join(circle))


def _registration(module: Module) -> Iterator[Breach]:
    if room(module.name) in (REGISTERS, "tests"):
        return
    for node, _ in _nodes(module.tree, False):
        names = []
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(re.match(r"torch\.library(\.|$)", name) for name in names):
            yield module.breach(node.lineno, "registration", f"{REGISTERS} alone uses torch.library")


def _environment(module: Module) -> Iterator[Breach]:
    if module.name.split(".")[0] not in ("lmn_kernels", "python_ref") or module.name == READS_ENVIRONMENT:
        return
    for node, _ in _nodes(module.tree, False):
        attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in _ENVIRONMENT
        imported = isinstance(node, ast.ImportFrom) and node.module == "os" and not node.level
        if attribute or (imported and any(alias.name in _ENVIRONMENT for alias in node.names)):
            yield module.breach(node.lineno, "environment", f"{READS_ENVIRONMENT} alone reads the environment")


def plan(root: Path, inside: tuple[str, ...] = ("bench",)) -> dict[str, set[str]]:
    """The source tree as rooms and what each imports: packages, and what lies at the top of those ``inside``."""
    modules = read(root)

    def place(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:2]) if parts[0] in inside and len(parts) > 1 else parts[0]

    found: dict[str, set[str]] = {}
    for module in modules.values():
        if (here := place(module.name)) in ("tests", *inside):
            continue
        targets = (a.target for a in arrows(module, modules) if a.target and a.target.split(".")[0] in TOPS)
        found.setdefault(here, set()).update(there for target in targets if (there := place(target)) != here)
    return found


def floors(rooms: dict[str, set[str]]) -> int:
    """How many rooms stand above each other at the most."""
    height: dict[str, int] = {}
    for name in TopologicalSorter(rooms).static_order():
        height[name] = 1 + max((height[below] for below in rooms.get(name, ())), default=0)
    return max(height.values())
