"""Loads and stores, atomics, asynchronous copies."""

from __future__ import annotations

from .emitter import Access, Emitter, family
from .parser import WIDTH, Instruction

_CACHING = {
    "L1__evict_first",
    "L1__evict_last",
    "L1__evict_normal",
    "L1__no_allocate",
    "nc",
    "ca",
    "cg",
    "cs",
    "cv",
    "wb",
    "wt",
    "lu",
}
_ORDERS = {"weak", "volatile", "relaxed", "acquire", "release"}
_SCOPES = {"cta", "cluster", "gpu", "sys"}
_SPACES = {"global", "shared", "shared__cta", "param"}
_CACHING |= {"L2__cache_hint", "L2__64B", "L2__128B", "L2__256B"}


def _asked(e: Emitter, i: Instruction) -> tuple[str, str, str, int]:
    """State space, order, scope and words of a load or store."""
    given = set(i.parts[1:-1])
    spaces, orders, scopes = given & _SPACES, given & _ORDERS, given & _SCOPES
    vectors = given & {"v2", "v4"}
    known = spaces | orders | scopes | vectors | (given & _CACHING)
    if given - known or len(spaces) != 1 or max(len(orders), len(scopes), len(vectors)) > 1:
        raise e.refuse()
    space = spaces.pop().replace("__cta", "")
    order = orders.pop() if orders else "weak"
    return space, order, (scopes.pop() if scopes else "sys"), int((vectors.pop() if vectors else "v1")[1])


def _access(e: Emitter, operand: str, width: int, count: int, order: str = "weak") -> tuple[str, str]:
    """An access as a constant, and the code of its address."""
    address, offset, derived = e.address(operand)
    access = e.constant(Access(e.instruction.site, width, count, derived, order))
    return access, f"{address}, {offset}"


@family("ld", "ldu")
def _load(e: Emitter, i: Instruction) -> None:
    to, where = e.expect(2)
    kind = i.parts[-1]
    space, order, scope, count = _asked(e, i)
    names = e.registers_of(to)
    if len(names) != count:
        raise e.refuse(f"expected {count} registers, got {len(names)}")
    if space == "param":
        return _parameter(e, names, where, kind)
    width = WIDTH[kind]
    access, address = _access(e, where, width, count, f"{order}.{scope}" if order != "weak" else order)
    found = [e.fresh() for _ in names]
    memory = "M.shared" if space == "shared" else "M.arena"
    if order != "weak" and space == "global":
        if count != 1:
            raise e.refuse("only one word is read with an order")
        e.put(f"{found[0]} = M.atomics.load({access}, {address}, {e.mask})")
    else:
        e.put(f"{', '.join(found)}, = {memory}.load({access}, {address}, {e.mask})")
    for name, value in zip(names, found, strict=True):
        e.give_as(
            name, f"{value}.view(S{width})" if kind[0] == "s" else value, kind if kind[0] == "s" else f"b{8 * width}"
        )


def _parameter(e: Emitter, names: list[str], where: str, kind: str) -> None:
    name, _, offset = where.strip("[] ").partition("+")
    places = [one for one, _ in e.kernel.parameters]
    if name not in places:
        raise e.refuse(f"no parameter {name}")
    width = WIDTH[kind]
    for k, one in enumerate(names):
        table = f"{'S' if kind[0] == 's' else 'U'}{width}"
        value = f"M.parameter({places.index(name)}, {int(offset or '0') + k * width}, {table})"
        e.give_as(one, value, kind if kind[0] == "s" else f"b{8 * width}")


@family("st")
def _store(e: Emitter, i: Instruction) -> None:
    where, source = e.expect(2)
    kind = i.parts[-1]
    space, order, scope, count = _asked(e, i)
    parts = [one.strip() for one in source.strip("{} ").split(",")]
    if len(parts) != count:
        raise e.refuse(f"expected {count} values, got {len(parts)}")
    width = WIDTH[kind]
    given = ", ".join(e.array(one, f"b{8 * width}") for one in parts)
    access, address = _access(e, where, width, count, f"{order}.{scope}" if order != "weak" else order)
    if order != "weak" and space == "global":
        if count != 1:
            raise e.refuse("only one word is written with an order")
        e.put(f"M.atomics.store({access}, {address}, {given}, {e.mask})")
    else:
        e.put(f"{'M.shared' if space == 'shared' else 'M.arena'}.store({access}, {address}, ({given},), {e.mask})")


_OPERATIONS = {"add", "and", "or", "xor", "min", "max", "exch", "cas", "inc"}


@family("atom", "red")
def _atomic(e: Emitter, i: Instruction) -> None:
    kind = i.parts[-1]
    given = set(i.parts[1:-1])
    orders = given & {"relaxed", "acquire", "release", "acq_rel"}
    scopes, operations = given & _SCOPES, given & _OPERATIONS
    if given - orders - scopes - operations - {"global"} or "global" not in given or len(operations) != 1:
        raise e.refuse()
    if kind not in ("u32", "s32", "b32", "u64", "b64", "f32"):
        raise e.refuse()
    operation = operations.pop()
    operands = list(e.expect(2 if i.head == "red" else 3, *((4,) if operation == "cas" else ())))
    to = operands.pop(0) if i.head == "atom" else None
    width = WIDTH[kind]
    order = f"{orders.pop() if orders else 'relaxed'}.{scopes.pop() if scopes else 'gpu'}"
    access, address = _access(e, operands[0], width, 1, order)
    values = ", ".join(e.array(one, f"b{8 * width}") for one in operands[1:])
    found = e.fresh()
    e.put(f"{found} = M.atomics.update({access}, {address}, ({values},), {operation!r}, {kind!r}, {e.mask})")
    if to is not None:
        e.give_as(to, found, f"b{8 * width}")


@family("cp")
def _copy(e: Emitter, i: Instruction) -> None:
    if i.parts[1] != "async":
        raise e.refuse()
    site = e.constant(i.site)
    if i.name == "cp.async.commit_group":
        e.expect(0)
        return e.put(f"M.copies.commit({e.mask})")
    if i.name == "cp.async.wait_group":
        (count,) = e.expect(1)
        return e.put(f"M.copies.wait({e.mask}, {int(count)})")
    if i.name == "cp.async.wait_all":
        e.expect(0)
        return e.put(f"M.copies.wait({e.mask}, 0, True)")
    given = set(i.parts[2:])
    if given - {"ca", "cg", "shared", "shared__cta", "global", *_CACHING}:
        raise e.refuse()
    to, source, size, *rest = e.expect(3, 4)
    bytes_ = int(size, 0)
    if bytes_ not in (4, 8, 16) or ("cg" in given and bytes_ != 16):
        raise e.refuse(f"copies of {bytes_} bytes")
    here, target = _access(e, to, bytes_, 1)
    there, origin = _access(e, source, 4, bytes_ // 4)
    taken = e.array(rest[0], "u32") if rest else "None"
    e.put(f"M.copies.issue({here}, {target}, {there}, {origin}, {taken}, {e.mask}, {site})")
