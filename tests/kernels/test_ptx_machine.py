"""The executor of PTX: what lanes do together, the tensor cores, atomics, copies and barriers, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulated_ptx import small
from tests.emulated_ptx.arena import Argument, Storage
from tests.emulated_ptx.counts import Counts
from tests.emulated_ptx.findings import Findings
from tests.emulated_ptx.machine import Program, launch
from tests.emulated_ptx.values import from_bf16, to_bf16, to_f16

U32, F32 = np.uint32, np.float32
LANES = np.arange(32)
# Lane and warp in %r100, %r101; p0 in %d0, p1 in %d1, …
BEGIN = "mov.u32 %r100, %tid.x; shr.u32 %r101, %r100, 5; ld.param.b64 %d0, [p0];"


def words(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(U32).reshape(-1)


def narrow(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """16-bit patterns of float32, and what they stand for."""
    bits = (to_bf16 if kind == "bf16" else to_f16)(x.astype(F32))
    return bits, from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(F32)


SHUFFLES = [
    ("bfly.b32 %r2|%p1, %r1, 5, 31, -1", LANES ^ 5, np.ones(32)),
    ("idx.b32 %r2|%p1, %r1, 9, 31, -1", np.full(32, 9), np.ones(32)),
    ("down.b32 %r2|%p1, %r1, 3, 31, -1", np.where(LANES < 29, LANES + 3, LANES), LANES < 29),
    ("up.b32 %r2|%p1, %r1, 3, 0, -1", np.where(LANES >= 3, LANES - 3, LANES), LANES >= 3),
    ("idx.b32 %r2|%p1, %r1, 1, 6175, -1", LANES & 24 | 1, np.ones(32)),
    ("down.b32 %r2|%p1, %r1, 1, 6175, -1", np.where(LANES % 8 < 7, LANES + 1, LANES), LANES % 8 < 7),
]


@pytest.mark.parametrize(("text", "source", "inside"), SHUFFLES, ids=[one[0] for one in SHUFFLES])
def test_shuffles(text, source, inside):
    out = np.zeros((32, 2), U32)
    body = f"""{BEGIN} add.s32 %r1, %r100, 100; shfl.sync.{text}; selp.b32 %r3, 1, 0, %p1;
    mad.wide.u32 %d1, %r100, 8, %d0; st.global.v2.b32 [%d1], {{%r2, %r3}};"""
    assert not small.run(body, out)
    assert np.array_equal(out[:, 0], source + 100) and np.array_equal(out[:, 1], inside)


def test_votes_and_sums_of_a_warp():
    out = np.zeros((64, 8), U32)
    body = f"""{BEGIN} and.b32 %r1, %r100, 1; setp.eq.b32 %p1, %r1, 0; setp.lt.u32 %p2, %r100, 32;
    vote.sync.ballot.b32 %r2, %p1, -1; vote.sync.any.pred %p3, !%p2, -1; vote.sync.all.pred %p4, %p2, -1;
    vote.sync.uni.pred %p5, %p1, -1; redux.sync.add.s32 %r6, %r100, -1; redux.sync.max.u32 %r7, %r100, -1;
    activemask.b32 %r8;
    selp.b32 %r3, 1, 0, %p3; selp.b32 %r4, 1, 0, %p4; selp.b32 %r5, 1, 0, %p5;
    mad.wide.u32 %d1, %r100, 32, %d0; st.global.v4.b32 [%d1], {{%r2, %r3, %r4, %r5}};
    st.global.v2.b32 [%d1+16], {{%r6, %r7}}; st.global.b32 [%d1+24], %r8; st.global.b32 [%d1+28], %r1;"""
    assert not small.run(body, out, threads=64)
    first, second = out[0], out[32]
    assert first[:7].tolist() == [0x55555555, 0, 1, 0, 496, 31, 2**32 - 1]
    assert second[:7].tolist() == [0x55555555, 1, 0, 0, 496 + 1024, 63, 2**32 - 1]


def operands_of(shape: str, kind: str, generator: np.random.Generator):
    """Matrices, and the registers that hold them, by the tables of the PTX ISA."""
    k = int(shape.rsplit("k", 1)[1])
    a, b = generator.standard_normal((16, k)), generator.standard_normal((k, 8))
    group, part = LANES // 4, LANES % 4
    if kind == "tf32":
        bits = [words(x.astype(F32)).reshape(x.shape) for x in (a, b)]
        exact = [(one & np.uint32(0xFFFFE000)).view(F32) for one in bits]
        left = [bits[0][group + 8 * (r % 2), part + 4 * (r // 2)] for r in range(k // 2)]
        right = [bits[1][part + 4 * r, group] for r in range(k // 4)]
    else:
        (a_bits, a_value), (b_bits, b_value) = narrow(a, kind), narrow(b, kind)
        exact = [a_value, b_value]
        left, right = [], []
        for r in range(k // 4):
            row, column = group + 8 * (r % 2), 2 * part + 8 * (r // 2)
            left.append(words(np.stack([a_bits[row, column], a_bits[row, column + 1]], 1)))
        for r in range(k // 8):
            row = 2 * part + 8 * r
            right.append(words(np.stack([b_bits[row, group], b_bits[row + 1, group]], 1)))
    return exact, left, right


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "f16"), ("m16n8k8", "tf32"), ("m16n8k4", "tf32")],
)
def test_products_of_a_warp(shape, kind):
    (a, b), left, right = operands_of(shape, kind, np.random.default_rng(0))
    c = np.random.default_rng(1).standard_normal((16, 8)).astype(F32)
    group, part = LANES // 4, LANES % 4
    sums = [words(c[group + 8 * (r // 2), 2 * part + r % 2]) for r in range(4)]
    given = np.stack([*left, *right, *sums], 1)
    count = given.shape[1]
    loads = "".join(f"ld.global.b32 %r{k + 1}, [%d2+{4 * k}];" for k in range(count))
    names = [f"%r{k + 1}" for k in range(count)]
    parts = [names[: len(left)], names[len(left) : -4], names[-4:]]
    text = ", ".join(f"{{{', '.join(one)}}}" for one in parts)
    body = f"""{BEGIN} ld.param.b64 %d1, [p1]; mad.wide.u32 %d2, %r100, {4 * count}, %d1; {loads}
    mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%r50, %r51, %r52, %r53}}, {text};
    mad.wide.u32 %d3, %r100, 16, %d0; st.global.v4.b32 [%d3], {{%r50, %r51, %r52, %r53}};"""
    out = np.zeros((32, 4), F32)
    counts = Counts(False)
    assert not small.run(body, out, given, counts=counts)
    want = a.astype(np.float64) @ b.astype(np.float64) + c
    got = np.zeros((16, 8))
    for r in range(4):
        got[group + 8 * (r // 2), 2 * part + r % 2] = out[:, r]
    assert np.abs(got - want).max() < 1e-5
    assert counts.operations == 16 * 8 * a.shape[1] and counts.tensor_instructions == 1


def test_matrices_of_shared_memory():
    """Four matrices of 8 · 8 through ``ldmatrix`` and back through ``stmatrix``, as they are and transposed."""
    source = np.arange(4 * 64, dtype=np.uint16)
    out = np.zeros((2, 2, 4, 8, 8), np.uint16)
    body = f"""{BEGIN} ld.param.b64 %d1, [p1]; shl.b32 %r1, %r100, 4; mov.b32 %r90, memory; add.s32 %r2, %r1, %r90;
    mad.wide.u32 %d2, %r100, 16, %d1; ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d2];
    st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}}; bar.warp.sync -1;"""
    for k, (read, write) in enumerate([("", ""), (".trans", ""), ("", ".trans"), (".trans", ".trans")]):
        body += f"""
        ldmatrix.sync.aligned.m8n8.x4{read}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2];
        stmatrix.sync.aligned.m8n8.x4{write}.shared.b16 [%r2+512], {{%r10, %r11, %r12, %r13}}; bar.warp.sync -1;
        ld.shared.v4.b32 {{%r14, %r15, %r16, %r17}}, [%r2+512]; bar.warp.sync -1;
        mad.wide.u32 %d3, %r100, 16, %d0; st.global.v4.b32 [%d3+{512 * k}], {{%r14, %r15, %r16, %r17}};"""
    assert not small.run(body, out, source)
    plain = source.reshape(4, 8, 8)
    assert np.array_equal(out[0, 0], plain) and np.array_equal(out[1, 1], plain)
    assert np.array_equal(out[0, 1], plain.transpose(0, 2, 1)) and np.array_equal(out[1, 0], plain.transpose(0, 2, 1))


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_matrices(count):
    source, out = np.arange(count * 64, dtype=np.uint16), np.zeros((32, count), U32)
    names = ", ".join(f"%r{10 + k}" for k in range(count))
    stores = "".join(f"st.global.b32 [%d3+{4 * k}], %r{10 + k};" for k in range(count))
    body = f"""{BEGIN} ld.param.b64 %d1, [p1]; shl.b32 %r1, %r100, 4; setp.lt.u32 %p1, %r100, {8 * count};
    mad.wide.u32 %d2, %r100, 16, %d1; mov.b32 %r3, 0; mov.b32 %r4, 0; mov.b32 %r5, 0; mov.b32 %r6, 0;
    @%p1 ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d2]; @%p1 st.shared.v4.b32 [%r1], {{%r3, %r4, %r5, %r6}};
    bar.sync 0; ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{names}}}, [%r1];
    mad.wide.u32 %d3, %r100, {4 * count}, %d0; {stores}"""
    assert not small.run(body, out, source)
    assert np.array_equal(out.T, words(source).reshape(count, 32))


def swizzled(matrix: np.ndarray, width: int) -> np.ndarray:
    """Rows of ``width`` bytes as shared memory holds them: 16-byte parts of a row moved by its number."""
    raw = np.ascontiguousarray(matrix).view(np.uint8).reshape(-1)
    place = np.arange(len(raw))
    found = np.zeros_like(raw)
    found[place ^ ((place >> 7 & (width // 16 - 1)) << 4)] = raw
    return found


@pytest.mark.parametrize(
    ("kind", "width", "size"), [("bf16", 32, 16), ("f16", 64, 8), ("bf16", 128, 64), ("f16", 128, 32)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_products_of_a_warp_group(kind, width, size, transposed, inside):
    """64 · 16 times 16 · size, twice; operands swizzled in shared memory, the left one in registers as well."""
    generator = np.random.default_rng(0)
    depth = width // 2
    a_bits, a = narrow(generator.standard_normal((64, depth)), kind)
    across = -(-size // depth) * depth if transposed else size
    b_bits, b = narrow(generator.standard_normal((depth, across)), kind)
    if transposed:
        # Rows of 16 sums by `depth` columns; further columns lie behind all rows.
        stored = b_bits.reshape(depth, across // depth, depth).transpose(1, 0, 2)
        lead, stride, step = depth * width, 8 * width, 16 * width
    else:
        stored = b_bits.T
        lead, stride, step = 16, 8 * width, 32
    memory = np.concatenate([swizzled(a_bits, width), swizzled(stored, width)])
    base = 64 * width
    layout = {128: 1, 64: 2, 32: 3}[width]

    def descriptor(start: int, lead: int, stride: int) -> int:
        return start >> 4 | (lead >> 4) << 16 | (stride >> 4) << 32 | layout << 62

    sums = [f"%r{10 + k}" for k in range(size // 2)]
    total = ", ".join(sums)
    body = f"""{BEGIN} ld.param.b64 %d1, [p1]; mad.wide.u32 %d2, %r100, 4, %d1; shl.b32 %r1, %r100, 2;"""
    for at in range(0, len(memory), 512):
        body += f"ld.global.b32 %r2, [%d2+{at}]; st.shared.b32 [%r1+{at}], %r2;\n"
    body += "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned; mov.pred %p1, -1; mov.pred %p2, 0;\n"
    if inside:
        # Row of the warp group, and the pair of columns, as `operands_of` has them.
        body += """and.b32 %r3, %r100, 31; shr.u32 %r4, %r3, 2; shl.b32 %r5, %r101, 4; add.s32 %r4, %r4, %r5;
        and.b32 %r5, %r3, 3; ld.param.b64 %d10, [p2];"""
        body += f"""mul.lo.s32 %r6, %r4, {width}; shl.b32 %r5, %r5, 2; add.s32 %r6, %r6, %r5; cvt.u64.u32 %d11, %r6;
        add.s64 %d10, %d10, %d11;"""
    for k in range(depth // 16):
        left = f"{descriptor(32 * k, 16, 8 * width)}"
        if inside:
            for r in range(4):
                body += f"ld.global.b32 %r{90 + r}, [%d10+{32 * k + 8 * width * (r % 2) + 16 * (r // 2)}];"
            left = "{%r90, %r91, %r92, %r93}"
        right = descriptor(base + step * k, lead, stride)
        signs = f"1, 1, {int(transposed)}" if inside else f"1, 1, 0, {int(transposed)}"
        body += f"""mov.b64 %d5, {right}; {"" if inside else f"mov.b64 %d4, {left};"}
        wgmma.mma_async.sync.aligned.m64n{size}k16.f32.{kind}.{kind} {{{total}}}, {left if inside else "%d4"}, %d5,
        {"%p1" if k else "%p2"}, {signs};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
    body += f"mad.wide.u32 %d3, %r100, {2 * size}, %d0;"
    body += "".join(f"st.global.b32 [%d3+{4 * k}], {one};" for k, one in enumerate(sums))
    out = np.zeros((128, size // 2), F32)
    found = small.run(body, out, np.resize(memory, -(-len(memory) // 512) * 512), a_bits, threads=128, shared=1 << 15)
    assert not found, found
    lane = np.arange(128)
    got = np.zeros((64, size))
    for k in range(size // 2):
        row = lane // 32 * 16 + lane % 32 // 4 + 8 * (k // 2 % 2)
        got[row, 8 * (k // 4) + 2 * (lane % 4) + k % 2] = out[:, k]
    want = a.astype(np.float64) @ b[:, :size].astype(np.float64)
    assert np.abs(got - want).max() < 1e-4 and np.abs(want).max() > 1


ATOMICS = [
    ("add.u32", [1] * 32, 32, 0), ("add.f32", [0.5] * 32, 16.0, 0.0), ("max.s32", list(range(32)), 31, -5),
    ("min.u32", list(range(3, 35)), 3, 99), ("or.b32", [1 << k for k in range(32)], 2**32 - 1, 0),
    ("and.b32", [~(1 << k) & 0xFFFFFFFF for k in range(32)], 0, 2**32 - 1), ("xor.b32", [3] * 31 + [0], 3, 0),
    ("exch.b32", [7] * 32, 7, 1), ("inc.u32", [9] * 32, 2, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "expected", "begin"), ATOMICS, ids=[one[0] for one in ATOMICS])
def test_atomics(name, values, expected, begin):
    kind = {"f": F32, "s": np.int32}.get(name.rsplit(".", 1)[1][0], U32)
    given, cell, out = np.array(values, kind), np.array([begin], kind), np.zeros(32, kind)
    body = f"""{BEGIN} ld.param.b64 %d1, [p1]; ld.param.b64 %d2, [p2]; mad.wide.u32 %d3, %r100, 4, %d1;
    ld.global.b32 %r1, [%d3]; atom.global.gpu.relaxed.{name} %r2, [%d2], %r1; mad.wide.u32 %d4, %r100, 4, %d0;
    st.global.b32 [%d4], %r2; setp.eq.b32 %p1, %r100, 99; @%p1 red.global.gpu.relaxed.{name} [%d2], %r1;"""
    assert not small.run(body, out, given, cell)
    assert cell[0] == expected and out[0] == begin
    if name.startswith("add"):
        assert sorted(out.tolist()) == [k * values[0] for k in range(32)]


def test_compare_and_swap():
    cell, out = np.array([5], U32), np.zeros(32, U32)
    body = f"""{BEGIN} ld.param.b64 %d1, [p1]; add.s32 %r1, %r100, 5; add.s32 %r2, %r1, 1;
    atom.global.gpu.acq_rel.cas.b32 %r3, [%d1], %r1, %r2; mad.wide.u32 %d2, %r100, 4, %d0; st.global.b32 [%d2], %r3;"""
    assert not small.run(body, out, cell)
    assert cell[0] == 37 and out.tolist() == [k + 5 for k in range(32)]


@pytest.mark.parametrize(("form", "size"), [("ca", 4), ("ca", 8), ("cg", 16)])
def test_asynchronous_copies(form, size):
    source = np.random.default_rng(0).integers(1, 256, 32 * size, np.uint8)
    out = np.full(32 * size, 9, np.uint8)
    body = f"""{BEGIN} ld.param.b64 %d1, [p1]; mad.wide.u32 %d2, %r100, {size}, %d1; mul.lo.s32 %r1, %r100, {size};
    setp.lt.u32 %p1, %r100, 20; selp.b32 %r2, {size}, 0, %p1;
    cp.async.{form}.shared.global [%r1], [%d2], {size}, %r2; cp.async.commit_group; cp.async.wait_group 0;
    mad.wide.u32 %d3, %r100, {size}, %d0;"""
    for k in range(0, size, 4):
        body += f"ld.shared.b32 %r3, [%r1+{k}]; st.global.b32 [%d3+{k}], %r3;"
    assert not small.run(body, out, source)
    assert np.array_equal(out[: 20 * size], source[: 20 * size]) and not out[20 * size :].any()


def test_groups_of_copies_are_waited_for_in_order():
    """With one group left the first is there, and only the first: the second still shows what was there before."""
    source, out = np.arange(64, dtype=U32), np.zeros(32, U32)
    body = f"""{BEGIN} ld.param.b64 %d1, [p1]; mad.wide.u32 %d2, %r100, 4, %d1; shl.b32 %r1, %r100, 2;
    cp.async.ca.shared.global [%r1], [%d2], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r1+128], [%d2+128], 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.b32 %r2, [%r1]; mad.wide.u32 %d3, %r100, 4, %d0; st.global.b32 [%d3], %r2;
    cp.async.wait_all;"""
    assert not small.run(body, out, source)
    assert np.array_equal(out, source[:32])


def test_a_grid_that_meets():
    """Each CTA writes, arrives, waits for all, and reads its neighbour's."""
    for release, acquire, fence in (
        ("atom.global.gpu.acq_rel.add.u32", "ld.global.gpu.acquire.b32", ""),
        ("atom.global.gpu.relaxed.add.u32", "ld.relaxed.gpu.global.b32", "fence.acq_rel.gpu;"),
        ("atom.global.add.u32", "ld.volatile.global.b32", "membar.gl;"),
    ):
        out, data, counter = np.zeros(128, U32), np.zeros(128, U32), np.zeros(1, U32)
        body = meeting(release, acquire, fence)
        found = small.run(body, out, data, counter, grid=4)
        assert not found, found
        assert np.array_equal(out.reshape(4, 32), np.roll(np.arange(128).reshape(4, 32), -1, 0))


def meeting(
    release: str, acquire: str, fence: str = "", before: str = "bar.sync 0;", after: str = "bar.sync 0;"
) -> str:
    return f"""{BEGIN} ld.param.b64 %d1, [p1]; ld.param.b64 %d2, [p2]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x;
    mad.lo.s32 %r3, %r1, 32, %r100; mad.wide.u32 %d3, %r3, 4, %d1; st.global.b32 [%d3], %r3;
    {before} {fence} setp.eq.b32 %p1, %r100, 0; mov.b32 %r4, 1; @%p1 {release} %r5, [%d2], %r4;
    $wait: mov.b32 %r6, %r2; @%p1 {acquire} %r6, [%d2]; setp.lt.u32 %p2, %r6, %r2; @%p2 bra $wait;
    {fence} {after} add.s32 %r7, %r1, 1; rem.u32 %r7, %r7, %r2; mad.lo.s32 %r8, %r7, 32, %r100;
    mad.wide.u32 %d4, %r8, 4, %d1; ld.global.b32 %r9, [%d4]; mad.wide.u32 %d5, %r3, 4, %d0;
    st.global.b32 [%d5], %r9;"""


def test_loops_and_branches_of_single_lanes():
    """Each lane goes round as often as its number says; odd ones by another way."""
    out = np.zeros(64, U32)
    body = f"""{BEGIN} mov.b32 %r1, 0; mov.b32 %r2, 0;
    $next: setp.ge.u32 %p1, %r1, %r100; @%p1 bra $end; and.b32 %r3, %r1, 1; setp.ne.b32 %p2, %r3, 0; @%p2 bra $odd;
    add.s32 %r2, %r2, 10; bra.uni $both;
    $odd: add.s32 %r2, %r2, 1;
    $both: add.s32 %r1, %r1, 1; bra $next;
    $end: mad.wide.u32 %d1, %r100, 4, %d0; st.global.b32 [%d1], %r2;"""
    assert not small.run(body, out, threads=64)
    assert out.tolist() == [10 * ((k + 1) // 2) + k // 2 for k in range(64)]


def test_counts():
    """A block's instructions by warps; sectors and passes over the banks of strided accesses."""
    out = np.zeros(32 * 8, U32)
    counts = Counts(True)
    body = f"""{BEGIN} mad.wide.u32 %d1, %r100, 32, %d0; mul.lo.s32 %r1, %r100, 8; st.shared.b32 [%r1], %r100;
    st.global.b32 [%d1], %r100;"""
    assert not small.run(body, out, counts=counts)
    found = counts.as_json()
    assert found["by_kind"]["st.global.b32"] == 1 and found["warp_instructions"] == 8
    assert found["global_sectors_written"] == 32 and found["global_bytes_written"] == 128
    assert found["shared_passes"] == 2 and found["shared_requests"] == 1


def test_scopes_and_variables_of_shared_memory():
    """Registers of an inner scope hide outer ones; variables lie side by side, and what has no size last."""
    out = np.zeros((32, 2), U32)
    text = small.HEADER.format(
        parameters="\n.param .u64 p0",
        threads=32,
        body=f"""{BEGIN}
    mov.b32 %r1, 5; {{ .reg .b32 %r1, other; mov.b32 %r1, 7; {{ .reg .b32 %r1; mov.b32 %r1, 9; }} mov.b32 other, %r1;
    mov.b32 %r2, other; }} add.s32 %r3, %r1, %r2; mov.b32 %r4, memory; mad.wide.u32 %d1, %r100, 8, %d0;
    st.shared.b32 [small+4], %r1; st.global.v2.b32 [%d1], {{%r3, %r4}}; st.shared.b32 [%r4], %r3;""",
    )
    text = text.replace(".visible", ".shared .align 8 .b8 small[12];\n.shared .align 16 .b8 unused[64];\n.visible", 1)
    program = Program(text)
    assert program.kernel.shared == {"small": 0, "memory": 16} and program.kernel.shared_bytes == 12
    findings = Findings()
    data = out.reshape(-1).view(np.uint8)
    launch(program, [Argument(Storage(data), 0, len(data))], 1, shared=20, findings=findings)
    assert not findings.take() and (out == [12, 16]).all()
