"""PTX text as kernels: parameters, registers, basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .findings import Refused, Site

WIDTH = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2} | {
    f"{letter}{bits}": bits // 8 for letter in "busf" for bits in (32, 64)
}
# What ends a basic block: a jump, or a wait at which others go on.
_ENDS = ("bra", "ret", "exit", "bar", "barrier")


@dataclass(frozen=True)
class Instruction:
    """``@guard head.modifiers operands;``"""

    name: str
    operands: tuple[str, ...]
    guard: str | None
    site: Site

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name.replace("::", "__").split("."))

    @property
    def head(self) -> str:
        return self.parts[0]

    @property
    def ends(self) -> bool:
        return self.head in _ENDS and self.parts[1:2] != ("warp",)


@dataclass(frozen=True)
class Register:
    index: int
    width: int
    is_predicate: bool


@dataclass
class Kernel:
    """An entry of a module.

    Attributes:
        parameters: name and size in bytes of each.
        threads: of a CTA, where the text says so.
        shared: offsets of the variables in shared memory; that of an external one is the end of all others.
        shared_bytes: of the variables that have a size.
    """

    name: str
    parameters: list[tuple[str, int]]
    threads: int | None
    registers: dict[str, Register] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block]


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name.

    Raises:
        Refused: a declaration is not known.
    """
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.MULTILINE)}
    return _Reader(files).read(text)


class _Reader:
    def __init__(self, files: dict[str, str]):
        self.files = files
        self.kernels: dict[str, Kernel] = {}
        self.kernel: Kernel | None = None
        self.shared: list[tuple[str, int, int | None]] = []
        self.source = ""
        # Registers of inner scopes hide those of the same name outside.
        self.scopes: list[dict[str, str]] = []

    def read(self, text: str) -> dict[str, Kernel]:
        held, begun = "", 0
        for number, raw in enumerate(text.split("\n"), 1):
            line, _, comment = raw.partition("//")
            if line.strip().startswith((".version", ".target", ".address_size")):
                continue
            if line.strip().startswith((".loc", ".file", ".section")):
                if line.strip().startswith(".section"):
                    break
                self._locate(line.split(), comment.strip())
                continue
            for mark in re.split(r"([;{}]|[$%\w]+:(?!:))", line):
                piece = mark.strip()
                if not piece:
                    held += mark if held else ""
                elif piece == ";":
                    self._statement(held.strip(), begun)
                    held = ""
                elif piece == "{" and (not held.strip() or self.kernel is None) and not _is_data(held):
                    self._open(held.strip(), number)
                    held = ""
                elif piece == "}" and not held.strip():
                    self._close()
                elif piece.endswith(":") and not held.strip() and re.fullmatch(r"[$%\w]+:", piece):
                    self._label(piece[:-1])
                else:
                    begun = begun if held.strip() else number
                    held += mark
            held += " " if held else ""
        for kernel in self.kernels.values():
            _lay_out(kernel, self.shared)
        return self.kernels

    def _locate(self, words: list[str], comment: str) -> None:
        if words[0] == ".loc":
            where = re.match(r"\S+:\d+", comment)
            file, line = self.files.get(words[1], f"file {words[1]}"), words[2]
            self.source = (
                (where[0] if where[0].count(":") == 1 else where[0].rpartition(":")[0]) if where else f"{file}:{line}"
            )

    def _open(self, header: str, number: int) -> None:
        if self.kernel is not None:
            self.scopes.append({})
            return
        found = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?", header, re.DOTALL)
        if found is None:
            raise Refused(f"line {number}: expected an entry, got {header[:80]!r}")
        parameters = [_parameter(part, number) for part in (found[2] or "").split(",") if part.strip()]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", header)
        count = None if threads is None else int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        self.kernel = Kernel(found[1], parameters, count)
        self.scopes, self.source = [{}], ""

    def _close(self) -> None:
        self.scopes.pop()
        if not self.scopes and self.kernel is not None:
            self.kernels[self.kernel.name] = self.kernel
            self.kernel = None

    def _label(self, name: str) -> None:
        assert self.kernel is not None
        if self.kernel.blocks[-1]:
            self.kernel.blocks.append([])
        self.kernel.labels[name] = len(self.kernel.blocks) - 1

    def _statement(self, text: str, number: int) -> None:
        if text.startswith("."):
            self._declare(text, number)
        elif text and self.kernel is not None:
            self._instruction(text, number)

    def _declare(self, text: str, number: int) -> None:
        registers = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        variable = re.match(
            r"(?:\.extern\s+|\.visible\s+|\.weak\s+)*\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?",
            text,
        )
        if registers:
            for name in registers[2].split(","):
                self._registers(name.strip(), registers[1], number)
        elif variable:
            size = variable[4]
            count = None if size == "" else int(size or 1) * WIDTH[variable[2]]
            self.shared.append((variable[3], int(variable[1] or WIDTH[variable[2]]), count))
        elif self.kernel is not None and not re.match(r"\.(pragma|noreturn)\b", text):
            raise Refused(f"line {number}: the declaration {text[:80]!r}")

    def _registers(self, name: str, kind: str, number: int) -> None:
        assert self.kernel is not None
        if kind not in WIDTH:
            raise Refused(f"line {number}: registers of .{kind}")
        ranged = re.match(r"(\S+?)<(\d+)>$", name)
        for one in [f"{ranged[1]}{k}" for k in range(int(ranged[2]))] if ranged else [name]:
            table = self.kernel.registers
            own = one if one not in table else f"{one}@{len(table)}"
            self.scopes[-1][one] = own
            table[own] = Register(len(table), WIDTH[kind], kind == "pred")

    def _instruction(self, text: str, number: int) -> None:
        assert self.kernel is not None
        found = re.match(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.DOTALL)
        if found is None:
            raise Refused(f"line {number}: {text[:80]!r}")
        operands = tuple(self._named(part) for part in _split(found[4]))
        guard = None if found[2] is None else found[1] + self._named(found[2])
        site = Site(self.kernel.name, " ".join(text.split())[:60], number, self.source)
        instruction = Instruction(found[3], operands, guard, site)
        self.kernel.blocks[-1].append(instruction)
        if instruction.ends:
            self.kernel.blocks.append([])

    def _named(self, text: str) -> str:
        """An operand with registers named as the outermost scope knows them."""
        if len(self.scopes) == 1:
            return text
        known = {name: own for scope in self.scopes for name, own in scope.items() if name != own}
        return re.sub(r"[%\w$]+", lambda m: known.get(m[0], m[0]), text) if known else text


def _is_data(held: str) -> bool:
    return "=" in held


def _parameter(text: str, number: int) -> tuple[str, int]:
    found = re.match(
        r"\s*\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.(?:global|shared|const|local)\s+)?(?:\.align\s+\d+\s+)?([\w$]+)(?:\[(\d+)\])?\s*$",
        text,
    )
    if found is None or found[1] not in WIDTH:
        raise Refused(f"line {number}: the parameter {text.strip()!r}")
    return found[2], WIDTH[found[1]] * int(found[3] or 1)


def _split(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, *([current.strip()] if current.strip() else [])]


def _lay_out(kernel: Kernel, variables: list[tuple[str, int, int | None]]) -> None:
    end = 0
    for name, align, size in variables:
        if size is not None and any(
            re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", part)
            for i in kernel.instructions
            for part in i.operands
        ):
            end = -(-end // align) * align
            kernel.shared[name] = end
            end += size
    kernel.shared_bytes = end
    for name, align, size in variables:
        if size is None:
            kernel.shared[name] = -(-end // align) * align
