"""``cvt``: between integers and floats, rounded as asked."""

from __future__ import annotations

from .arithmetic import finished
from .emitter import Emitter, family
from .parser import WIDTH, Instruction

_TO_INTEGER = ("rzi", "rni", "rmi", "rpi")
_FLOATS = ("f16", "bf16", "f32", "f64")
_INTEGERS = {f"{letter}{bits}" for letter in "us" for bits in (8, 16, 32, 64)}


@family("cvt")
def _convert(e: Emitter, i: Instruction) -> None:
    to, source = i.parts[-2:]
    given = set(i.parts[1:-2])
    if to in ("f16x2", "bf16x2"):
        return _two(e, i, given)
    name, a = e.expect(2)
    if to in _INTEGERS and source in _INTEGERS:
        return _between_integers(e, name, a, to, source, given)
    if to in _INTEGERS and source in _FLOATS:
        return _to_integer(e, name, a, to, source, given)
    if to in ("f16", "bf16", "f32", "f64") and source in _INTEGERS:
        return _from_integer(e, name, a, to, source, given)
    if to == "tf32" and source == "f32" and given == {"rna"}:
        return e.give(name, f"V.to_tf32({e.array(a, 'f32')})")
    pair = (to, source)
    if pair in (("f32", "f16"), ("f32", "bf16")) and not given - {"ftz"}:
        return e.give(name, e.array(a, source, widened=True), "f")
    if pair == ("f16", "f32") and not given - {"rn", "rz"} and given:
        return e.give(name, f"V.to_f16{'_rz' if 'rz' in given else ''}({e.array(a, 'f32')})")
    if pair == ("bf16", "f32") and not given - {"rn", "rz"} and given:
        return e.give(name, f"V.to_bf16{'_rz' if 'rz' in given else ''}({e.array(a, 'f32')})")
    if pair == ("f32", "f32") and len(given & set(_TO_INTEGER)) == 1 and not given - {*_TO_INTEGER, "ftz", "sat"}:
        mode = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[(given & set(_TO_INTEGER)).pop()]
        return e.give(name, finished(f"np.{mode}({e.array(a, 'f32')})", given), "f")
    if pair == ("f32", "f32") and not given - {"rn", "ftz", "sat"}:
        return e.give(name, finished(e.array(a, "f32"), given), "f")
    if pair == ("f64", "f32") and not given:
        return e.give(name, f"{e.array(a, 'f32')}.astype(F8)", "f")
    if pair == ("f32", "f64") and given == {"rn"}:
        return e.give(name, f"{e.array(a, 'f64')}.astype(F4)", "f")
    raise e.refuse()


def _two(e: Emitter, i: Instruction, given: set[str]) -> None:
    """Two float32 to the halves of a register, the first to the upper one."""
    to, upper, lower = e.expect(3)
    if i.parts[-1] != "f32" or given not in ({"rn"}, {"rz"}):
        raise e.refuse()
    name = f"V.to_{i.parts[-2].removesuffix('x2')}{'_rz' if 'rz' in given else ''}"
    low, up = (f"{name}({e.array(one, 'f32')}).astype(U4)" for one in (lower, upper))
    e.give(to, f"{low} | ({up} << U4(16))")


def _between_integers(e: Emitter, name: str, a: str, to: str, source: str, given: set[str]) -> None:
    if given:
        raise e.refuse("only plain conversions of integers are known")
    value = e.array(a, source)
    table = f"{'S' if to[0] == 's' else 'U'}{WIDTH[to]}"
    e.give_as(name, value if to == source else f"{value}.astype({table})", to)


def _to_integer(e: Emitter, name: str, a: str, to: str, source: str, given: set[str]) -> None:
    modes = given & set(_TO_INTEGER)
    if len(modes) != 1 or given - {*_TO_INTEGER, "ftz", "sat"}:
        raise e.refuse()
    table = f"{'S' if to[0] == 's' else 'U'}{WIDTH[to]}"
    value = e.array(a, source, widened=source in ("f16", "bf16"))
    value = f"V.flushed({value})" if "ftz" in given and source == "f32" else value
    e.give_as(name, f"V.to_integer({value}, {table}, {modes.pop()!r})", to)


def _from_integer(e: Emitter, name: str, a: str, to: str, source: str, given: set[str]) -> None:
    if given != {"rn"} or (to in ("f16", "bf16") and WIDTH[source] > 4):
        raise e.refuse()
    value = e.array(a, source)
    if to == "f16":
        return e.give(name, f"V.to_f16({value}.astype(F8))")
    if to == "bf16":
        if WIDTH[source] > 2:
            raise e.refuse("it would be rounded twice")
        return e.give(name, f"V.to_bf16({value}.astype(F4))")
    e.give(name, f"{value}.astype({'F4' if to == 'f32' else 'F8'})", "f")
