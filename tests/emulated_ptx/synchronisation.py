"""Jumps, barriers and fences."""

from __future__ import annotations

from .emitter import Emitter, family
from .parser import Instruction


@family("bra")
def _jump(e: Emitter, i: Instruction) -> None:
    (target,) = e.expect(1)
    e.modifiers() if i.parts[-1] != "uni" else None
    e.keep()
    e.ended = True
    number = e.kernel.labels[target]
    if i.guard is None:
        e.put(f"M.jump(m, full, {number})")
    else:
        e.put(f"M.branch(m, {e.mask}, {number}, {e.number + 1})")
    if number <= e.number:
        e.put(f"M.came_round({e.mask}, {number}, {e.constant(i.site)})")


def _end_block(e: Emitter) -> None:
    """What is written is kept, and lanes go on with the next block."""
    e.keep()
    e.ended = True
    e.put(f"M.jump(m, full, {e.number + 1})")


@family("ret", "exit")
def _leave(e: Emitter, i: Instruction) -> None:
    e.expect(0)
    _end_block(e)
    e.put(f"M.leave({e.mask}, {e.constant(i.site)})")


@family("bar", "barrier")
def _barrier(e: Emitter, i: Instruction) -> None:
    site = e.constant(i.site)
    if i.name == "bar.warp.sync":
        (members,) = e.expect(1)
        if not e.register(members) and int(members, 0) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise e.refuse("only whole warps are known")
        return e.put(f"M.warp_barrier({e.mask}, {site})")
    name = i.name.replace(".cta", "")
    (which,) = e.expect(1)
    if name not in ("bar.sync", "barrier.sync", "barrier.sync.aligned") or e.register(which) or int(which, 0) != 0:
        raise e.refuse("only the barrier 0 of all threads is known")
    _end_block(e)
    e.put(f"M.barrier({e.mask}, {e.number + 1}, {site})")


@family("fence", "membar")
def _fence(e: Emitter, i: Instruction) -> None:
    e.expect(0)
    if i.name in ("fence.proxy.async", "fence.proxy.async.shared::cta"):
        return e.put(f"M.shared.fence({e.mask})")
    if i.name in ("membar.cta", "fence.acq_rel.cta", "fence.sc.cta"):
        return
    if i.name in ("membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.sc.gpu", "fence.acq_rel.sys", "fence.sc.sys"):
        return e.put(f"M.atomics.fence({e.mask})")
    raise e.refuse()
