"""Writes a basic block as a Python function: registers are its variables, conversions of one are made once."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import matrices, values
from .findings import Refused, Site
from .flow import USES, Flow, Touched, after_group, indices
from .parser import WIDTH, Instruction, Kernel

_SPECIAL = {
    "%tid.x": "tid", "%ctaid.x": "cta", "%ntid.x": "threads", "%nctaid.x": "ctas", "%laneid": "lane_id",
    "%warpid": "warp_id",
    **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), "zero"),
    **dict.fromkeys(("%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z"), "one"),
}  # fmt: skip
# How a register's value is held: unsigned, signed, float; or widened: float32 of 16 bits, float64 of float32.
_VIEWS = {"u": "U", "s": "S", "f": "F"}
Translate = Callable[["Emitter", Instruction], None]
FAMILIES: dict[str, Translate] = {}


def family(*heads: str) -> Callable[[Translate], Translate]:
    """Marks the function that translates the instructions of these names."""

    def add(function: Translate) -> Translate:
        FAMILIES.update(dict.fromkeys(heads, function))
        return function

    return add


@dataclass(frozen=True, eq=False)
class Access:
    """What an instruction asks of memory: ``count`` words of ``width`` bytes a lane, through pointers ``derived``."""

    site: Site
    width: int
    count: int = 1
    derived: frozenset[int] = frozenset()
    order: str = "weak"

    @property
    def size(self) -> int:
        return self.width * self.count


class Emitter:
    """Writes one block; families of instructions ask it for operands and hand it results."""

    def __init__(self, kernel: Kernel, flow: Flow, number: int):
        self.kernel, self.flow, self.number = kernel, flow, number
        self.lines: list[str] = []
        self.space: dict[str, Any] = {"np": np, "where": np.where, "V": values, "T": matrices}
        for letter, table in (("U", values.U), ("S", values.S), ("F", values.F)):
            self.space.update({f"{letter}{size}": kind for size, kind in table.items()})
        self.held: dict[str, dict[str, str]] = {}
        self.written: dict[str, None] = {}
        self.made: dict[str, str] = {}
        self.count = 0
        self.mask = "m"
        self.instruction: Instruction
        self.ended = False

    def function(self) -> Callable[..., None]:
        groups = self.flow.in_flight[self.number]
        for instruction, touched in zip(self.kernel.blocks[self.number], self.flow.touched[self.number], strict=True):
            self.instruction = instruction
            try:
                self._guard()
                self._follow(touched)
                if instruction.head != "wgmma":
                    self._check_in_flight(groups, touched.reads | touched.writes)
                groups = after_group(groups, instruction, touched)
                FAMILIES.get(instruction.head, _unknown)(self, instruction)
            except (KeyError, IndexError, ValueError, AssertionError) as error:
                raise Refused(f"{instruction.site}: {type(error).__name__}: {error}") from error
        if not self.ended:
            self.keep()
            self.put(f"M.jump(m, full, {self.number + 1})")
        text = "def block(M, R, m, full):\n" + "\n".join(f" {line}" for line in self.lines)
        exec(compile(text, f"<{self.kernel.name}, block {self.number}>", "exec"), self.space)
        return self.space["block"]

    # What a family needs.

    def put(self, line: str) -> None:
        self.lines.append(line)

    def make(self, expression: str) -> str:
        """A variable of an expression whose operands never change: made once."""
        if expression not in self.made:
            self.made[expression] = self.fresh()
            self.put(f"{self.made[expression]} = {expression}")
        return self.made[expression]

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, value: Any) -> str:
        name = f"c{len(self.space)}"
        self.space[name] = value
        return name

    def refuse(self, why: str = "it is not known") -> Refused:
        return Refused(f"{self.instruction.site}: {why}")

    def expect(self, count: int, *more: int) -> tuple[str, ...]:
        """The operands, of which there are so many."""
        if len(self.instruction.operands) not in (count, *more):
            wanted = " or ".join(map(str, (count, *more)))
            raise self.refuse(f"expected {wanted} operands, got {len(self.instruction.operands)}")
        return self.instruction.operands

    def modifiers(self, *known: str) -> set[str]:
        """The modifiers between the name and the last type, all of which are known."""
        given = set(self.instruction.parts[1:-1])
        if given - set(known):
            raise self.refuse(f"its {', '.join(sorted(given - set(known)))} is not known")
        return given

    def register(self, name: str) -> bool:
        return name in self.kernel.registers

    def registers_of(self, operand: str) -> list[str]:
        names = [part.strip() for part in operand.strip("{} ").split(",")]
        if unknown := [name for name in names if name != "_" and not self.register(name)]:
            raise self.refuse(f"expected registers, got {', '.join(unknown)}")
        return names

    def read(self, name: str, how: str) -> str:
        """A register as ``"u"``, ``"s"``, ``"f"``, widened, or as int64.

        ``"h"`` and ``"n"`` are float32 of f16 and of bf16, ``"w"`` float64 of float32, ``"a"`` an address.
        """
        register = self.kernel.registers[name]
        held = self.held.setdefault(name, {})
        if not held:
            held["u"] = self.fresh()
            self.put(f"{held['u']} = R[{register.index}]")
        if how in held or register.is_predicate:
            return held.get(how, held.get("u", ""))
        if how in _VIEWS:
            source = next(held[one] for one in _VIEWS if one in held)
            expression = f"{source}.view({_VIEWS[how]}{register.width})"
        elif how == "n":
            expression = f"V.from_bf16({self.read(name, 'u')})"
        elif how in ("h", "w"):
            expression = f"{self.read(name, 'f')}.astype({'F4' if how == 'h' else 'F8'})"
        else:
            assert how == "a"
            expression = f"{self.read(name, 'u')}.astype(S8)" if register.width < 8 else self.read(name, "s")
        held[how] = self.fresh()
        self.put(f"{held[how]} = {expression}")
        return held[how]

    def value(self, operand: str, kind: str, widened: bool = False) -> str:
        """An operand in a type: ``"u32"``, ``"s64"``, ``"f32"``, ``"pred"``; of a narrower float as float32."""
        if kind == "pred":
            if self.register(operand):
                assert self.kernel.registers[operand].is_predicate, operand
                return self.read(operand, "u")
            return self.constant(np.bool_({"true": 1, "false": 0}.get(operand, None) or _integer(operand)))
        width = WIDTH[kind.removesuffix("x2")] * (2 if kind.endswith("x2") else 1)
        if operand in _SPECIAL:
            found = f"M.lanes.{_SPECIAL[operand]}"
            return found if kind[0] in "ub" else f"{found}.view(S{width})"
        if not self.register(operand):
            return self.immediate(operand, kind, widened)
        register = self.kernel.registers[operand]
        if register.is_predicate or register.width < width:
            raise self.refuse(f"{operand} has {8 * register.width} bits, and {kind} was expected")
        if register.width > width:
            name = self.make(f"{self.read(operand, 'u')}.astype(U{width})")
            return f"{name}.view(S{width})" if kind[0] == "s" else name
        if kind.endswith("x2") or kind[0] in "ub" and kind != "bf16":
            return self.read(operand, "u")
        if kind == "bf16":
            return self.read(operand, "n" if widened else "u")
        if kind[0] == "s":
            return self.read(operand, "s")
        return self.read(operand, {"f16": "h", "f32": "w"}.get(kind, "f") if widened else "f")

    def immediate(self, operand: str, kind: str, widened: bool = False) -> str:
        width = WIDTH[kind.removesuffix("x2")] * (2 if kind.endswith("x2") else 1)
        if operand in self.kernel.shared:
            number = self.kernel.shared[operand]
        elif operand[:2] in ("0f", "0F") and width == 4:
            number = int(operand[2:], 16)
        elif operand[:2] in ("0d", "0D"):
            number = int(operand[2:], 16)
            if width == 4:
                value = struct.unpack("d", struct.pack("Q", number))[0]
                number = struct.unpack("I", struct.pack("f", value))[0]
        else:
            number = _integer(operand)
        bits = np.array(number & ((1 << 8 * width) - 1), dtype=values.U[width])
        if kind in ("bf16", "f16") and widened:
            wide = values.from_bf16(bits.reshape(1))[0] if kind == "bf16" else bits.view(np.float16).astype(np.float32)
            return self.constant(np.float32(wide))
        table = {"s": values.S, "f": values.F}.get(kind[0], values.U) if not kind.endswith("x2") else values.U
        found = bits.view(table[width])[()]
        return self.constant(np.float64(found) if widened and kind == "f32" else found)

    def array(self, operand: str, kind: str, widened: bool = False) -> str:
        """An operand of one value a lane, an immediate as well."""
        found = self.value(operand, kind, widened)
        return found if self.register(operand) or operand in _SPECIAL else f"M.lanes.full({found})"

    def pair(self, kind: str, first: str, second: str, widened: bool = False) -> tuple[str, str]:
        """Two operands, one of which at least is an array."""
        if self.register(first) or self.register(second):
            return self.value(first, kind, widened), self.value(second, kind, widened)
        return self.array(first, kind, widened), self.value(second, kind, widened)

    def address(self, operand: str) -> tuple[str, int, frozenset[int]]:
        """``[register + offset]``: lanes' int64, the offset, and the parameters that the register is derived from."""
        found = re.fullmatch(r"\[\s*([%\w$@]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if found is None:
            raise self.refuse(f"the address {operand}")
        name, offset = found[1], int(found[2] or "0", 0)
        if self.register(name):
            index = self.kernel.registers[name].index
            return self.read(name, "a"), offset, self.flow.derived.get(index, frozenset())
        base = self.kernel.shared[name] if name in self.kernel.shared else _integer(name)
        return f"M.lanes.full({self.constant(np.int64(base))})", offset, frozenset()

    def give(self, name: str, expression: str, how: str = "u") -> None:
        """A register becomes an expression, in the lanes under the guard; ``how`` it is held as for `read`."""
        if name == "_":
            return
        if self.instruction.guard is not None:
            expression = f"where({self.mask}, {expression}, {self.read(name, how)})"
        variable = self.fresh()
        self.put(f"{variable} = {expression}")
        self.held[name] = {how: variable}
        self.written[name] = None

    def give_as(self, name: str, expression: str, kind: str) -> None:
        """`give` of an expression in a type, extended where the register is wider."""
        how = "u" if kind[0] == "b" or kind.endswith("x2") else kind[0]
        if name == "_":
            return
        register = self.kernel.registers[name]
        width = WIDTH[kind.removesuffix("x2")] * (2 if kind.endswith("x2") else 1)
        if register.width < width:
            raise self.refuse(f"{name} has {8 * register.width} bits, and takes {kind}")
        if register.width > width:
            assert how in "us", kind
            expression = f"({expression}).astype({'S' if how == 's' else 'U'}{register.width})"
        self.give(name, expression, how)

    def keep(self) -> None:
        """Writes back what is read after the block."""
        alive = self.flow.alive[self.number]
        kept = [name for name in self.written if alive >> self.kernel.registers[name].index & 1]
        pairs = [(self.kernel.registers[name].index, self.read(name, "u")) for name in kept]
        if pairs:
            self.put("if full:")
            self.lines += [f" R[{index}] = {name}" for index, name in pairs]
            self.put("else:")
            self.lines += [f" R[{index}] = where(m, {name}, R[{index}])" for index, name in pairs]

    # Guards and what the analyses found.

    def _guard(self) -> None:
        guard = self.instruction.guard
        if guard is None:
            self.mask = "m"
        else:
            predicate = self.value(guard.lstrip("!"), "pred")
            self.mask = self.make(f"m & {'~' if guard[0] == '!' else ''}{predicate}")

    def _follow(self, touched: Touched) -> None:
        """Where a value that nobody wrote goes: on to a result, or to what makes use of it."""
        instruction, suspect = self.instruction, self.flow.suspect
        reads, writes = indices(touched.reads & suspect), indices(touched.writes & suspect)
        if not reads and not writes:
            return
        site, mask, guards = self.constant(instruction.site), self.mask, 0
        if instruction.guard is not None:
            guards = self.flow.bits(instruction.guard.lstrip("!")) & suspect
            if guards:
                self.put(f"M.check_set({indices(guards)}, m, {site})")
        if instruction.head in USES:
            if instruction.name.startswith("wgmma.mma") and self.register(scale := instruction.operands[3]):
                # Of a sum that begins here nothing is read.
                mask = self.make(f"{mask} & {self.value(scale, 'pred')}")
            if reads:
                self.put(f"M.check_set({reads}, {mask}, {site})")
            reads = []
        if writes:
            chosen = None
            if instruction.head == "selp":
                parts = [indices(self.flow.bits(part) & suspect) for part in instruction.operands[1:3]]
                chosen = f"({self.value(instruction.operands[3], 'pred')}, {parts[0]}, {parts[1]})"
            elif instruction.head == "mov" and instruction.operands[1].startswith("{"):
                # A pair is of nothing where both parts are: of some, one half is never looked at (sm_120).
                parts = [self.flow.bits(part) for part in instruction.operands[1].strip("{} ").split(",")]
                reads = reads if all(part & suspect for part in parts) else []
                chosen = "'pair'"
            elif instruction.head == "shfl":
                by, clamp = (self.array(one, "b32") for one in instruction.operands[2:4])
                chosen = f"({by}, {clamp}, {instruction.parts[2]!r})"
            self.put(f"M.follow({writes}, {reads}, {self.mask}, {chosen})")

    def _check_in_flight(self, groups: tuple[int, ...], touched: int) -> None:
        for group in groups:
            if group & touched:
                site = self.constant(self.instruction.site)
                self.put(f"M.note_in_flight({self.mask}, {site})")
                return


def _unknown(emitter: Emitter, instruction: Instruction) -> None:
    raise emitter.refuse()


def _integer(text: str) -> int:
    return int(text.rstrip("U"), 0) if not re.fullmatch(r"0\d+", text) else int(text, 8)
