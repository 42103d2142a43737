"""Bits, comparisons, choices and moves."""

from __future__ import annotations

from .arithmetic import floats
from .emitter import Emitter, family
from .parser import WIDTH, Instruction
from .values import COMPARISONS

_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_BITS = ("b16", "b32", "b64")


@family(*_LOGIC)
def _logic(e: Emitter, i: Instruction) -> None:
    to, a, b = e.expect(3)
    e.modifiers()
    kind = i.parts[-1]
    if kind == "pred":
        x, y = e.value(a, kind), e.value(b, kind)
    elif kind in _BITS:
        x, y = e.pair(kind, a, b)
    else:
        raise e.refuse()
    e.give(to, f"{x} {_LOGIC[i.head]} {y}")


@family("not", "cnot")
def _not(e: Emitter, i: Instruction) -> None:
    to, a = e.expect(2)
    e.modifiers()
    kind = i.parts[-1]
    if i.head == "cnot" or kind not in ("pred", *_BITS):
        raise e.refuse()
    e.give(to, f"~{e.value(a, kind) if kind == 'pred' else e.array(a, kind)}")


@family("shl", "shr")
def _shift(e: Emitter, i: Instruction) -> None:
    to, a, b = e.expect(3)
    e.modifiers()
    kind = i.parts[-1]
    if kind not in (_BITS if i.head == "shl" else (*_BITS, "u16", "s16", "u32", "s32", "u64", "s64")):
        raise e.refuse()
    # numpy shifts by more than all bits as PTX does: to zero, or to the sign.
    by = e.value(b, "u32")
    table = f"{'S' if kind[0] == 's' else 'U'}{WIDTH[kind]}"
    by = by if table == "U4" else e.make(f"{by}.astype({table})")
    e.give_as(to, f"{e.array(a, kind)} {'<<' if i.head == 'shl' else '>>'} {by}", kind)


@family("shf")
def _funnel(e: Emitter, i: Instruction) -> None:
    to, a, b, c = e.expect(4)
    given = e.modifiers("l", "r", "wrap", "clamp")
    if i.parts[-1] != "b32":
        raise e.refuse()
    x, y, by = (e.array(one, "b32") for one in (a, b, c))
    e.give(to, f"V.funnel({x}, {y}, {by}, {'l' in given}, {'wrap' in given})")


@family("bfe")
def _field(e: Emitter, i: Instruction) -> None:
    to, a, b, c = e.expect(4)
    e.modifiers()
    if i.parts[-1] not in ("u32", "s32", "u64", "s64"):
        raise e.refuse()
    e.give(to, f"V.extracted({e.array(a, i.parts[-1])}, {e.value(b, 'u32')}, {e.value(c, 'u32')})")


@family("bfi")
def _insert(e: Emitter, i: Instruction) -> None:
    to, a, b, c, d = e.expect(5)
    e.modifiers()
    if i.parts[-1] not in ("b32", "b64"):
        raise e.refuse()
    x, y = e.array(a, i.parts[-1]), e.array(b, i.parts[-1])
    e.give(to, f"V.inserted({x}, {y}, {e.value(c, 'u32')}, {e.value(d, 'u32')})")


@family("prmt")
def _permute(e: Emitter, i: Instruction) -> None:
    to, a, b, c = e.expect(4)
    e.modifiers()
    if i.parts[-1] != "b32":
        raise e.refuse()
    e.give(to, f"V.permuted({e.array(a, 'b32')}, {e.value(b, 'b32')}, {e.value(c, 'b32')})")


@family("popc", "clz", "brev")
def _count(e: Emitter, i: Instruction) -> None:
    to, a = e.expect(2)
    e.modifiers()
    if i.parts[-1] not in ("b32", "b64"):
        raise e.refuse()
    name = {"popc": "ones", "clz": "leading_zeros", "brev": "reversed_bits"}[i.head]
    e.give(to, f"V.{name}({e.array(a, i.parts[-1])})")


@family("setp")
def _compare(e: Emitter, i: Instruction) -> None:
    to, a, b, *more = e.expect(3, 4)
    how, kind = i.parts[1], i.parts[-1]
    given = set(i.parts[2:-1])
    combined = given & set(_LOGIC)
    if how not in COMPARISONS[kind[0]] or given - {*_LOGIC, "ftz"} or len(combined) != len(more) or "|" in to:
        raise e.refuse()
    if kind == "f32":
        x, y = floats(e, (a, b), given)
    elif kind in ("f16", "bf16"):
        x, y = e.array(a, kind, widened=True), e.value(b, kind, widened=True)
    else:
        x, y = e.pair(kind, a, b)
    found = f"V.compared({how!r}, {x}, {y})"
    if combined:
        negated = more[0].startswith("!")
        third = e.value(more[0].lstrip("!"), "pred")
        found = f"{found} {_LOGIC[combined.pop()]} {'~' if negated else ''}{third}"
    e.give(to, found)


@family("selp")
def _choose(e: Emitter, i: Instruction) -> None:
    to, a, b, c = e.expect(4)
    e.modifiers()
    kind = f"b{8 * WIDTH[i.parts[-1]]}"
    x, y = e.value(a, kind), e.value(b, kind)
    e.give(to, f"where({e.array(c, 'pred')}, {x}, {y})")


@family("mov")
def _move(e: Emitter, i: Instruction) -> None:
    to, a = e.expect(2)
    e.modifiers()
    kind = i.parts[-1]
    if kind == "pred":
        return e.give(to, e.array(a, kind))
    bits = f"b{8 * WIDTH[kind]}"
    if to.startswith("{"):
        names = e.registers_of(to)
        width = WIDTH[kind] // len(names)
        whole = e.array(a, bits)
        for place, name in enumerate(names):
            shifted = f"({whole} >> U{WIDTH[kind]}({8 * width * place}))" if place else whole
            e.give_as(name, f"{shifted}.astype(U{width})", f"b{8 * width}")
        return
    if a.startswith("{"):
        parts = [one.strip() for one in a.strip("{} ").split(",")]
        width = WIDTH[kind] // len(parts)
        wide = [f"{e.array(one, f'b{8 * width}')}.astype(U{WIDTH[kind]})" for one in parts]
        shifted = [f"({one} << U{WIDTH[kind]}({8 * width * place}))" for place, one in enumerate(wide)]
        return e.give(to, " | ".join(shifted))
    e.give_as(to, e.array(a, bits), bits)


@family("cvta")
def _address_space(e: Emitter, i: Instruction) -> None:
    to, a = e.expect(2)
    e.modifiers("to", "global")
    if "global" not in i.parts or i.parts[-1] != "u64":
        raise e.refuse("only addresses of global memory are generic ones here")
    e.give(to, e.array(a, "b64"))
