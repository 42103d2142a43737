"""What the executor of PTX watches, each on a small kernel that is right and one with the fault."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest

from tests.emulated_ptx import small
from tests.emulated_ptx.arena import Argument, Storage
from tests.emulated_ptx.findings import Findings
from tests.emulated_ptx.machine import Program, launch
from tests.kernels.test_ptx_machine import BEGIN, meeting

U32 = np.uint32
WORD = f"{BEGIN} mad.wide.u32 %d1, %r100, 4, %d0; shl.b32 %r1, %r100, 2; xor.b32 %r2, %r1, 128;"
COPY = f"""{WORD} ld.param.b64 %d2, [p1]; mad.wide.u32 %d3, %r100, 4, %d2;
cp.async.ca.shared.global [%r1], [%d3], 4; cp.async.commit_group;"""


class Fault(NamedTuple):
    """A kernel, what is replaced in it, and the finding that must come of it."""

    name: str
    body: str
    old: str
    new: str
    finding: str
    threads: int = 64
    grid: int = 1
    buffers: int = 1

    def __str__(self) -> str:
        return self.name


GROUP = f"""{BEGIN} shl.b32 %r1, %r100, 4; mov.b32 %r2, 0; st.shared.v4.b32 [%r1], {{%r2, %r2, %r2, %r2}};
fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %d4, {3 << 62 | (256 >> 4) << 32};
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10, %r11, %r12, %r13}}, {{%r2, %r2, %r2, %r2}}, %d4, 0, 1, 1, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0; mov.b32 %r20, %r10; bar.sync 0; st.shared.b32 [%r1], %r2;
mad.wide.u32 %d1, %r100, 4, %d0; st.global.b32 [%d1], %r20;"""

ATOM, LOAD = "atom.global.gpu.acq_rel.add.u32", "ld.global.gpu.acquire.b32"
MEETING = meeting(ATOM, LOAD)
RELAXED = meeting("atom.global.gpu.relaxed.add.u32", "ld.relaxed.gpu.global.b32", "fence.acq_rel.gpu;")

FAULTS = [
    Fault("a store behind the end", f"{WORD} st.global.b32 [%d1], %r100;", "[%d1]", "[%d1+4]",
          "bounds: 4 bytes of global memory, 1 times.*byte 256 of 256 of parameter 0"),
    Fault("a store before the beginning", f"{WORD} st.global.b32 [%d1], %r100;", "[%d1]", "[%d1+-4]",
          "bounds: 4 bytes of global memory, 1 times.*byte -4 of 256"),
    Fault("a load behind the end", f"{WORD} ld.global.b32 %r3, [%d1]; st.global.b32 [%d1], %r3;", "%r3, [%d1]",
          "%r3, [%d1+4]", "bounds: 4 bytes of global memory"),
    Fault("shared memory behind the end", f"{WORD} st.shared.b32 [%r1], %r100;", "[%r1]", "[%r1+3844]",
          "bounds: 4 bytes of shared memory, 1 times.*byte 4096 of 4096"),
    Fault("a misaligned vector", f"{WORD} mov.b32 %r3, 1; setp.lt.u32 %p1, %r100, 1; @%p1 st.global.v2.b32 [%d1], "
          "{%r3, %r3};", "[%d1]", "[%d1+4]", "misaligned: 8 bytes of global memory"),
    Fault("a misaligned vector of shared memory", f"{WORD} shl.b32 %r3, %r100, 3; st.shared.v2.b32 [%r3], "
          "{%r3, %r3};", "[%r3]", "[%r3+4]", "misaligned: 8 bytes of shared memory, 64 times"),
    Fault("shared memory that nobody wrote", f"{WORD} st.shared.b32 [%r1], %r100; bar.sync 0; ld.shared.b32 %r3, "
          "[%r2]; st.global.b32 [%d1], %r3;", "[%r2]", "[%r2+256]", "uninitialised: shared memory.*64 times"),
    Fault("a register that nobody wrote", f"{WORD} setp.lt.u32 %p1, %r100, 64; @%p1 mov.b32 %r3, 1; "
          "st.global.b32 [%d1], %r3;", "%r100, 64", "%r100, 63", "uninitialised: a register.*%r3 in lane 63"),
    Fault("a value of a lane that nobody wrote", f"{WORD} setp.lt.u32 %p1, %r100, 16; @%p1 mov.b32 %r3, 1; "
          "shfl.sync.bfly.b32 %r4, %r3, 8, 31, -1; add.s32 %r4, %r4, %r3; @%p1 st.global.b32 [%d1], %r4;", "%r3, 8",
          "%r3, 16", "uninitialised: a register.*st.global.*%r4 in lane 0"),
    Fault("a jump by what nobody wrote", f"{WORD} setp.lt.u32 %p1, %r100, 64; mov.b32 %r5, 0; @!%p1 mov.b32 %r5, %r3; "
          "mov.b32 %r3, 1; setp.eq.b32 %p2, %r5, 0; @%p2 bra $end; $end: mov.b32 %r4, 0;", "%r100, 64", "%r100, 63",
          "uninitialised: a register.*bra.*%p2 in lane 63"),
    Fault("a race in shared memory", f"{WORD} st.shared.b32 [%r1], %r100; bar.sync 0; ld.shared.b32 %r3, [%r2]; "
          "st.global.b32 [%d1], %r3;", "bar.sync 0;", "", "race: shared read after a write by another thread"),
    Fault("a write after others read", f"{WORD} st.shared.b32 [%r1], %r100; bar.sync 0; ld.shared.b32 %r3, [%r2]; "
          "bar.sync 0; st.shared.b32 [%r1], %r3; st.global.b32 [%d1], %r3;", "bar.sync 0; st.shared", "st.shared",
          "race: shared write after a read by another thread"),
    Fault("a write after a write", f"{WORD} st.shared.b32 [%r1], %r100; bar.sync 0; st.shared.b32 [%r2], %r100;",
          "bar.sync 0;", "", "race: shared write after a write by another thread"),
    Fault("a race in a warp", f"{WORD} xor.b32 %r2, %r1, 4; st.shared.b32 [%r1], %r100; bar.warp.sync -1; "
          "ld.shared.b32 %r3, [%r2]; st.global.b32 [%d1], %r3;", "bar.warp.sync -1;", "", "race: shared read after"),
    Fault("a warp's barrier between warps", f"{WORD} st.shared.b32 [%r1], %r100; bar.sync 0; ld.shared.b32 %r3, [%r2]; "
          "st.global.b32 [%d1], %r3;", "bar.sync 0;", "bar.warp.sync -1;", "race: shared read after a write"),
    Fault("lanes that write one word", f"{WORD} and.b32 %r3, %r100, 31; shr.u32 %r4, %r100, 6; shl.b32 %r5, %r4, 2; "
          "st.shared.b32 [%r5], %r4;", "%r5], %r4", "%r5], %r3", "race: shared stores of one instruction.*different"),
    Fault("a race in global memory", f"{WORD} st.global.b32 [%d1], %r100; bar.sync 0; xor.b32 %r3, %r100, 32; "
          "mad.wide.u32 %d2, %r3, 4, %d0; ld.global.b32 %r4, [%d2]; st.shared.b32 [%r1], %r4;", "bar.sync 0;", "",
          "race: global read after a write by another thread"),
    Fault("CTAs that write the same", f"{WORD} mov.u32 %r3, %ctaid.x; mad.wide.u32 %d1, %r3, 4, %d0; setp.eq.b32 "
          "%p1, %r100, 0; @%p1 st.global.b32 [%d1], %r3;", "mad.wide.u32 %d1, %r3, 4", "mad.wide.u32 %d1, %r3, 0",
          "race: global write after a write by another CTA", grid=3),
    Fault("CTAs of which one reads what one writes", f"{WORD} mov.u32 %r3, %ctaid.x; mad.wide.u32 %d1, %r3, 4, %d0; "
          "setp.eq.b32 %p1, %r100, 0; @%p1 ld.global.b32 %r4, [%d1]; @%p1 st.global.b32 [%d1], %r3;",
          "%r4, [%d1]", "%r4, [%d0]", "race: global (read after a write|write after a read) by another CTA", grid=3),
    Fault("threads that do not reach a barrier", f"{WORD} setp.lt.u32 %p1, %r100, 64; @%p1 bar.sync 0;", "%r100, 64",
          "%r100, 32", "barrier: threads of the CTA have left before"),
    Fault("threads at different barriers", f"{WORD} setp.lt.u32 %p1, %r100, 64; @%p1 bra $one; bar.sync 0; bra.uni "
          "$end; $one: bar.sync 0; $end: mov.b32 %r3, 0;", "%r100, 64", "%r100, 32", "barrier: .*different barriers"),
    Fault("a barrier that others wait for in a loop", f"{WORD} setp.lt.u32 %p1, %r100, 0; @%p1 bra $end; bar.sync 0; "
          "bra.uni $end; $end: mov.b32 %r3, 0; $more: add.s32 %r3, %r3, 1; @%p1 bra $more;", "%r100, 0", "%r100, 32",
          "spin: no end after"),
    Fault("part of a warp at a shuffle", f"{WORD} setp.lt.u32 %p1, %r100, 64; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, "
          "-1;", "%r100, 64", "%r100, 40", "divergence: part of a warp"),
    Fault("a copy that nobody waits for", f"{COPY} cp.async.wait_group 0; ld.shared.b32 %r3, [%r1]; st.global.b32 "
          "[%d1], %r3;", "cp.async.wait_group 0;", "", "asynchronous: read of what a copy still writes", buffers=2),
    Fault("a copy waited for too little", f"{COPY} cp.async.wait_group 0; ld.shared.b32 %r3, [%r1]; st.global.b32 "
          "[%d1], %r3;", "wait_group 0", "wait_group 1", "asynchronous: read of what a copy still writes", buffers=2),
    Fault("another thread's copy without a barrier", f"{COPY} cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r3, "
          "[%r2]; st.global.b32 [%d1], %r3;", "bar.sync 0;", "", "race: shared read after a write", buffers=2),
    Fault("a copy left at the end", f"{COPY} cp.async.wait_group 0;", "cp.async.wait_group 0;", "",
          "asynchronous: a copy that nobody waits for", buffers=2),
    Fault("a copy onto what others read", f"{WORD} st.shared.b32 [%r1], %r100; bar.sync 0; ld.shared.b32 %r3, [%r2]; "
          f"bar.sync 0; {COPY} cp.async.wait_group 0; st.global.b32 [%d1], %r3;", "[%r2]; bar.sync 0;", "[%r2];",
          "race: shared write after a read", buffers=2),
    Fault("a product's operand without a fence", GROUP, "fence.proxy.async.shared::cta;", "",
          "asynchronous: the operand of a product without a fence", threads=128),
    Fault("a product's result before its wait", GROUP, "wgmma.wait_group.sync.aligned 0; mov.b32 %r20, %r10;",
          "mov.b32 %r20, %r10; wgmma.wait_group.sync.aligned 0;", "asynchronous: a register of a product", threads=128),
    Fault("a product's operand overwritten before its wait", GROUP, "wgmma.wait_group.sync.aligned 0; mov.b32 %r20, "
          "%r10; bar.sync 0; st.shared.b32 [%r1], %r2;", "bar.sync 0; st.shared.b32 [%r1], %r2; "
          "wgmma.wait_group.sync.aligned 0; mov.b32 %r20, %r10;", "asynchronous: write to the operand", threads=128),
    Fault("a product's operand behind the end", GROUP, f"{3 << 62 | 16 << 32}", f"{3 << 62 | 16 << 32 | 4096 >> 4}",
          "bounds: the operand of a product", threads=128),
    *(
        Fault(f"a meeting with {name}", MEETING, old, new, "race: global read after a write by another CTA", 32, 4, 3)
        for name, old, new in (
            ("a relaxed atomic", "acq_rel", "relaxed"),
            ("an atomic of the CTA's scope", "atom.global.gpu", "atom.global.cta"),
            ("a relaxed load", "ld.global.gpu.acquire", "ld.relaxed.gpu.global"),
            ("no barrier before", "bar.sync 0;  setp", "setp"),
            ("no barrier behind", "bar.sync 0; add.s32 %r7", "add.s32 %r7"),
        )
    ),
    Fault("a meeting without fences", RELAXED, "fence.acq_rel.gpu;", "",
          "race: global read after a write by another CTA", 32, 4, 3),
    Fault("a meeting that never comes", MEETING, "%r2, %nctaid.x;", "%r2, %nctaid.x; add.s32 %r2, %r2, 1;",
          "spin: threads wait for what nobody will write", 32, 4, 3),
    Fault("a counter read without an order", MEETING, "ld.global.b32 %r9, [%d4];", "ld.global.b32 %r9, [%d2];",
          "race: global access to what atomics use", 32, 4, 3),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_found_and_nothing_else(fault):
    def run(body: str) -> list[str]:
        size = fault.threads * fault.grid
        buffers = [np.arange(size, dtype=U32) if k < 2 else np.zeros(1, U32) for k in range(fault.buffers)]
        return list(map(str, small.run(body, *buffers, grid=fault.grid, threads=fault.threads)))

    assert run(fault.body) == []
    assert fault.old in fault.body
    found = run(fault.body.replace(fault.old, fault.new))
    assert any(re.search(fault.finding, one) for one in found), found


def test_memory_that_nobody_wrote():
    body = f"""{WORD} ld.param.b64 %d2, [p1]; mad.wide.u32 %d3, %r100, 4, %d2; ld.global.b32 %r3, [%d3];
    st.global.b32 [%d1], %r3;"""
    out, source = np.zeros(32, U32), np.arange(32, dtype=U32)
    assert not small.run(body, out, source)
    assert np.array_equal(out, source)
    (found,) = small.run(body, out, source, unset=[1])
    assert found.kind == "uninitialised" and "parameter 1" in found.example and found.count == 32
    written = body.replace("ld.global.b32 %r3", "st.global.b32 [%d3], %r100; ld.global.b32 %r3")
    assert not small.run(written, out, source, unset=[1])


def test_a_finding_names_the_kernel_and_both_lines():
    body = f"{WORD}\n.loc 1 7 3\nst.global.b32 [%d1+4], %r100;\n"
    text = small.HEADER.format(parameters="\n.param .u64 p0", threads=32, body=body) + '.file 1 "/a/b/source.py"\n'
    findings = Findings()
    launch(Program(text), [Argument(Storage(np.zeros(128, np.uint8)), 0, 128)], 1, findings=findings)
    (found,) = findings.take()
    line = text.split("\n").index("st.global.b32 [%d1+4], %r100;") + 1
    assert f"kernel, PTX line {line} (st.global.b32 [%d1+4], %r100), source.py:7" in str(found)
