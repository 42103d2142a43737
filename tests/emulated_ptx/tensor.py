"""The tensor cores' instructions: ``mma.sync``, ``ldmatrix``, ``stmatrix``, ``wgmma``."""

from __future__ import annotations

import re

from .emitter import Access, Emitter, family
from .matrices import SHAPES
from .parser import Instruction


def _aligned(e: Emitter, i: Instruction) -> None:
    if not {"sync", "aligned"} <= set(i.parts):
        raise e.refuse()


@family("mma")
def _product(e: Emitter, i: Instruction) -> None:
    to, *given = e.expect(4)
    _aligned(e, i)
    shape, *layout, accumulated, left, right, result = i.parts[3:]
    known = SHAPES.get((shape, left))
    if layout != ["row", "col"] or right != left or (accumulated, result) != ("f32", "f32") or known is None:
        raise e.refuse()
    names = [e.registers_of(to), *(_fragment(e, one) for one in given)]
    if tuple(map(len, names)) != (4, known.left, known.right, 4):
        raise e.refuse(
            f"expected 4, {known.left}, {known.right} and 4 registers, got {', '.join(str(len(n)) for n in names)}"
        )
    site = e.constant(i.site)
    a, b = (
        e.make(f"T.{side}({', '.join(e.array(one, 'b32') for one in part)}, {left!r})")
        for side, part in (("rows", names[1]), ("columns", names[2]))
    )
    sums = ", ".join(e.array(one, "f32") for one in names[3])
    found = [e.fresh() for _ in names[0]]
    e.put(f"{', '.join(found)} = T.product({a}, {b}, ({sums},))")
    e.put(f"M.whole_warps({e.mask}, {site})")
    e.put(f"M.counts.tensor({known.operations}, m, 32)")
    for name, value in zip(names[0], found, strict=True):
        e.give(name, value, "f")


def _fragment(e: Emitter, operand: str) -> list[str]:
    """Registers, or zeros for what begins with nothing."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


@family("ldmatrix")
def _load(e: Emitter, i: Instruction) -> None:
    to, where = e.expect(2)
    count, names = _matrices(e, i, to)
    address, offset, _ = e.address(where)
    access = e.constant(Access(i.site, 16))
    found = [e.fresh() for _ in names]
    asked = f"{access}, {address}, {offset}, {count}, {'trans' in i.parts}, {e.mask}"
    e.put(f"{', '.join(found)}, = M.shared.load_matrices({asked})")
    for name, value in zip(names, found, strict=True):
        e.give(name, value)


@family("stmatrix")
def _store(e: Emitter, i: Instruction) -> None:
    where, source = e.expect(2)
    count, names = _matrices(e, i, source)
    address, offset, _ = e.address(where)
    access = e.constant(Access(i.site, 16))
    values = ", ".join(e.array(one, "b32") for one in names)
    e.put(f"M.shared.store_matrices({access}, {address}, {offset}, ({values},), {'trans' in i.parts}, {e.mask})")


def _matrices(e: Emitter, i: Instruction, operand: str) -> tuple[int, list[str]]:
    """How many matrices of eight rows move, and the registers that hold them."""
    _aligned(e, i)
    found = re.search(r"\.m8n8\.x([124])\.(?:trans\.)?shared(?:::cta)?\.b16$", i.name)
    if found is None:
        raise e.refuse()
    count, names = int(found[1]), e.registers_of(operand)
    if len(names) != count:
        raise e.refuse(f"expected {count} registers, got {len(names)}")
    return count, names


@family("wgmma")
def _group(e: Emitter, i: Instruction) -> None:
    _aligned(e, i)
    what, site = i.parts[1], e.constant(i.site)
    if what == "fence":
        e.expect(0)
        return
    if what == "commit_group":
        e.expect(0)
        return e.put(f"M.groups.commit({e.mask})")
    if what == "wait_group":
        (count,) = e.expect(1)
        return e.put(f"M.groups.wait({e.mask}, {int(count)})")
    shape = re.fullmatch(r"m64n(\d+)k16", i.parts[4])
    result, left, right = i.parts[5:]
    if what != "mma_async" or shape is None or result != "f32" or left != right or left not in ("f16", "bf16"):
        raise e.refuse()
    columns = int(shape[1])
    inside = i.operands[1].startswith("{")
    to, a, b, scale, *rest = e.expect(7 if inside else 8)
    names = e.registers_of(to)
    if len(names) != columns // 2 or rest[:2] != ["1", "1"]:
        raise e.refuse(f"expected {columns // 2} registers and no signs")
    flags = [int(one) for one in rest[2:]]
    if inside:
        first = f"({', '.join(e.array(one, 'b32') for one in e.registers_of(a))},)"
        flags = [0, *flags]
    else:
        first = e.array(a, "b64")
    keep = e.array(scale, "pred")
    sums = ", ".join(e.array(one, "f32") for one in names)
    found = [e.fresh() for _ in names]
    e.put(
        f"{', '.join(found)} = M.groups.product(({sums},), {first}, {e.array(b, 'b64')}, {keep}, {tuple(flags)},"
        f" {left!r}, {e.mask}, {site})"
    )
    e.put(f"M.counts.tensor({64 * columns * 16}, m, 128)")
    for name, value in zip(names, found, strict=True):
        e.give(name, value, "f")
