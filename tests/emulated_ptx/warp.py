"""What the lanes of a warp do together: shuffles and votes."""

from __future__ import annotations

from .emitter import Emitter, family
from .parser import Instruction


def whole(e: Emitter, members: str) -> None:
    """Refuses warps of which only some lanes take part; which lanes come is checked as it runs."""
    if not e.register(members) and int(members, 0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise e.refuse("only whole warps are known")


@family("shfl")
def _shuffle(e: Emitter, i: Instruction) -> None:
    to, a, by, clamp, members = e.expect(5)
    if i.parts[1] != "sync" or i.parts[-1] != "b32" or len(i.parts) != 4:
        raise e.refuse()
    whole(e, members)
    mode = i.parts[2]
    to, _, valid = to.partition("|")
    site = e.constant(i.site)
    value, inside = e.fresh(), e.fresh()
    values = ", ".join(e.array(one, "b32") for one in (a, by, clamp))
    e.put(f"{value}, {inside} = M.shuffle({values}, {mode!r}, {e.mask}, {site})")
    e.give(to, value)
    if valid:
        e.give(valid, inside)


@family("vote")
def _vote(e: Emitter, i: Instruction) -> None:
    to, a, members = e.expect(3)
    mode = i.parts[2]
    if i.parts[1] != "sync" or (mode, i.parts[-1]) not in (
        ("any", "pred"),
        ("all", "pred"),
        ("uni", "pred"),
        ("ballot", "b32"),
    ):
        raise e.refuse()
    whole(e, members)
    site = e.constant(i.site)
    negated = "~" if a.startswith("!") else ""
    e.give(to, f"M.vote({negated}{e.array(a.lstrip('!'), 'pred')}, {mode!r}, {e.mask}, {site})")


@family("activemask")
def _active(e: Emitter, i: Instruction) -> None:
    (to,) = e.expect(1)
    e.give(to, f"M.vote({e.mask}, 'ballot', {e.mask}, {e.constant(i.site)}, False)")


@family("redux")
def _reduce(e: Emitter, i: Instruction) -> None:
    to, a, members = e.expect(3)
    operation, kind = i.parts[2], i.parts[-1]
    if (
        i.parts[1] != "sync"
        or operation not in ("add", "min", "max", "and", "or", "xor")
        or kind not in ("u32", "s32", "b32")
    ):
        raise e.refuse()
    whole(e, members)
    e.give_as(to, f"M.reduce({e.array(a, kind)}, {operation!r}, {e.mask}, {e.constant(i.site)})", kind)
