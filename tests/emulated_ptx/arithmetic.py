"""Sums, products and what is near them, of integers and floats; to the bit, but for the approximate functions."""

from __future__ import annotations

from .emitter import Emitter, family
from .parser import Instruction

_INTEGERS = {"u16", "s16", "u32", "s32", "u64", "s64"}
_HALVES = {"f16", "bf16", "f16x2", "bf16x2"}
_SIGN = {"add": "+", "sub": "-", "mul": "*"}
_ROUNDINGS = ("rn", "ftz", "sat")


def finished(expression: str, given: set[str]) -> str:
    """A float32 result flushed and saturated as the modifiers say."""
    if "ftz" in given:
        expression = f"V.flushed({expression})"
    return f"V.saturated({expression})" if "sat" in given else expression


def floats(e: Emitter, operands: tuple[str, ...], given: set[str], widened: bool = False) -> list[str]:
    """float32 operands, the first of which is an array, flushed as the modifiers say."""
    found = [e.array(operands[0], "f32", widened), *(e.value(one, "f32", widened) for one in operands[1:])]
    return [e.make(f"V.flushed({one})") for one in found] if "ftz" in given else found


@family("add", "sub")
def _sum(e: Emitter, i: Instruction) -> None:
    kind, sign = i.parts[-1], _SIGN[i.head]
    if kind in ("f16", "bf16") and i.parts[-2] == "f32":
        to, a, b = e.expect(3)
        _mixed(e)
        return e.give(to, f"{e.array(a, kind, widened=True)} {sign} {e.value(b, 'f32')}", "f")
    if kind in _HALVES:
        return _halves(e, i)
    to, a, b = e.expect(3)
    if kind in _INTEGERS:
        if e.modifiers("sat"):
            raise e.refuse("sums that saturate are not known")
        x, y = e.pair("u" + kind[1:], a, b)
        return e.give_as(to, f"{x} {sign} {y}", "u" + kind[1:])
    if kind == "f32":
        given = e.modifiers(*_ROUNDINGS)
        x, y = floats(e, (a, b), given)
        return e.give(to, finished(f"{x} {sign} {y}", given), "f")
    if kind == "f64":
        e.modifiers("rn")
        x, y = e.pair(kind, a, b)
        return e.give(to, f"{x} {sign} {y}", "f")
    if kind == "f32x2":
        return _pairs(e, i)
    raise e.refuse()


@family("mul")
def _product(e: Emitter, i: Instruction) -> None:
    kind = i.parts[-1]
    if kind in _INTEGERS:
        to, a, b = e.expect(3)
        return _integer_product(e, to, a, b, kind)
    return _sum(e, i)


def _integer_product(e: Emitter, to: str, a: str, b: str, kind: str, c: str | None = None) -> None:
    (part,) = e.modifiers("lo", "hi", "wide")
    bits = int(kind[1:])
    if part == "wide":
        wide = f"{kind[0]}{2 * bits}"
        table = f"{'S' if kind[0] == 's' else 'U'}{2 * bits // 8}"
        x, y = e.pair(kind, a, b)
        found = f"{e.make(f'{x}.astype({table})')} * {e.make(f'{y}.astype({table})')}"
        kind = wide
    elif part == "hi":
        x, y = e.array(a, kind), e.array(b, kind)
        found = f"V.high({x}, {y})"
    else:
        # The lower half does not ask for the sign.
        kind = "u" + kind[1:]
        x, y = e.pair(kind, a, b)
        found = f"{x} * {y}"
    if c is not None:
        found = f"{found} + {e.value(c, kind)}"
    e.give_as(to, found, kind)


@family("mad", "fma")
def _product_and_sum(e: Emitter, i: Instruction) -> None:
    kind = i.parts[-1]
    to, a, b, c = e.expect(4)
    if i.head == "mad" and kind in _INTEGERS:
        return _integer_product(e, to, a, b, kind, c)
    if i.head == "mad":
        raise e.refuse()
    if kind in ("f16", "bf16") and i.parts[-2] == "f32":
        _mixed(e)
        x, y = (e.make(f"{e.array(one, kind, widened=True)}.astype(F8)") for one in (a, b))
        return e.give(to, f"V.fma32({x}, {y}, {e.value(c, 'f32', widened=True)})", "f")
    if kind in _HALVES:
        return _halves(e, i)
    if kind == "f32":
        given = e.modifiers(*_ROUNDINGS)
        if "ftz" in given:
            x, y, z = (e.make(f"{one}.astype(F8)") for one in floats(e, (a, b, c), given))
        else:
            x, y, z = floats(e, (a, b, c), given, widened=True)
        return e.give(to, finished(f"V.fma32({x}, {y}, {z})", given), "f")
    if kind == "f32x2":
        return _pairs(e, i)
    raise e.refuse()


def _mixed(e: Emitter) -> None:
    """Operands of 16 bits added to float32 (sm_100 and later)."""
    e.modifiers("rn", "f32")


def _halves(e: Emitter, i: Instruction) -> None:
    """16-bit floats, one or two a register: computed wide enough that the one rounding at the end is right."""
    kind, operands = i.parts[-1], i.operands
    to, *given = e.expect(4 if i.head == "fma" else 3)
    e.modifiers("rn")
    narrow = kind.removesuffix("x2")
    if kind.endswith("x2"):
        bits = [e.make(f"{e.array(one, kind)}.view(U2)") for one in given]
        wide = [e.make(f"V.from_bf16({one})" if narrow == "bf16" else f"{one}.view(F2)") for one in bits]
    else:
        wide = [e.array(given[0], kind, widened=narrow == "bf16")]
        wide += [e.value(one, kind, widened=narrow == "bf16") for one in given[1:]]
    if i.head == "fma":
        found = f"V.fma_{narrow}({', '.join(wide)})"
    elif narrow == "bf16":
        found = f"V.to_bf16({wide[0]} {_SIGN[i.head]} {wide[1]})"
    else:
        found = f"V.to_f16({wide[0]} {_SIGN[i.head]} {wide[1]})"
    assert len(operands) == len(given) + 1
    e.give(to, f"({found}).view(U4)" if kind.endswith("x2") else found)


def _pairs(e: Emitter, i: Instruction) -> None:
    """Two float32 a register (sm_100 and later)."""
    to, *given = e.expect(4 if i.head == "fma" else 3)
    e.modifiers("rn")
    words = [e.make(f"{e.array(one, 'b64')}.view(F4)") for one in given]
    if i.head == "fma":
        words = [e.make(f"{one}.astype(F8)") for one in words]
        return e.give(to, f"V.fma32({', '.join(words)}).view(U8)")
    e.give(to, f"({words[0]} {_SIGN[i.head]} {words[1]}).view(U8)")


@family("div", "rem")
def _division(e: Emitter, i: Instruction) -> None:
    to, a, b = e.expect(3)
    kind = i.parts[-1]
    if kind in _INTEGERS:
        e.modifiers()
        name = "quotient" if i.head == "div" else "remainder"
        return e.give_as(to, f"V.{name}({e.array(a, kind)}, {e.array(b, kind)})", kind)
    if kind == "f32" and i.head == "div":
        given = e.modifiers("rn", "full", "approx", "ftz")
        x, y = floats(e, (a, b), given)
        return e.give(to, finished(f"{x} / {y}", given), "f")
    raise e.refuse()


@family("min", "max")
def _extreme(e: Emitter, i: Instruction) -> None:
    kind = i.parts[-1]
    if kind in _INTEGERS:
        to, a, b = e.expect(3)
        e.modifiers()
        x, y = e.pair(kind, a, b)
        return e.give_as(to, f"np.{i.head}imum({x}, {y})", kind)
    to, *given = e.expect(3, 4) if kind == "f32" else e.expect(3)
    modifiers = e.modifiers("NaN", "ftz")
    name = {"max": "largest", "min": "smallest"}[i.head] + ("_nan" if "NaN" in modifiers else "")
    if kind == "f32":
        operands = floats(e, tuple(given), modifiers)
        found = f"V.{name}({operands[0]}, {operands[1]})"
        return e.give(to, found if len(given) == 2 else f"V.{name}({found}, {operands[2]})", "f")
    if kind not in _HALVES or "ftz" in modifiers:
        raise e.refuse()
    if kind.endswith("x2"):
        bits = [e.make(f"{e.array(one, kind)}.view(U2)") for one in given]
    else:
        bits = [e.array(one, "b16") for one in given]
    if kind.startswith("bf16"):
        found = f"V.to_bf16(V.{name}({', '.join(f'V.from_bf16({one})' for one in bits)}))"
    else:
        found = f"V.to_f16(V.{name}({', '.join(f'{one}.view(F2)' for one in bits)}))"
    e.give(to, f"({found}).view(U4)" if kind.endswith("x2") else found)


@family("neg", "abs")
def _sign(e: Emitter, i: Instruction) -> None:
    to, a = e.expect(2)
    kind = i.parts[-1]
    if kind in ("s16", "s32", "s64"):
        e.modifiers()
        x = e.array(a, kind)
        return e.give_as(to, f"-{x}" if i.head == "neg" else f"np.abs({x})", kind)
    width = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4}.get(kind)
    if width is None:
        raise e.refuse()
    given = e.modifiers("ftz") if kind == "f32" else e.modifiers()
    sign = {2: "0x8000", 4: "0x80000000", 8: "0x8000000000000000"}[width]
    sign = "0x80008000" if kind.endswith("x2") else sign
    if "ftz" in given:
        return e.give(to, f"{'-' if i.head == 'neg' else 'np.abs'}(V.flushed({e.array(a, kind)}))", "f")
    x = e.array(a, f"b{8 * width}")
    e.give(to, f"{x} ^ U{width}({sign})" if i.head == "neg" else f"{x} & ~U{width}({sign})")


_FUNCTIONS = {
    "ex2": "np.exp2({})", "lg2": "np.log2({})", "rcp": "F4(1) / {}", "sqrt": "np.sqrt({})",
    "rsqrt": "F4(1) / np.sqrt({})", "sin": "np.sin({})", "cos": "np.cos({})", "tanh": "np.tanh({})",
}  # fmt: skip


@family(*_FUNCTIONS)
def _function(e: Emitter, i: Instruction) -> None:
    to, a = e.expect(2)
    if i.parts[-1] != "f32":
        raise e.refuse()
    given = e.modifiers("approx", "rn", "ftz") if i.head in ("rcp", "sqrt") else e.modifiers("approx", "ftz")
    (x,) = floats(e, (a,), given)
    e.give(to, finished(_FUNCTIONS[i.head].format(x), given), "f")
