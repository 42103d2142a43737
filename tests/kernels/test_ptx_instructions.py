"""Every instruction that the executor of PTX knows, against known values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.emulated_ptx import small
from tests.emulated_ptx.emitter import FAMILIES
from tests.emulated_ptx.findings import Refused
from tests.emulated_ptx.machine import Program, launch

U16, U32, U64, S16, S32, S64 = np.uint16, np.uint32, np.uint64, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
NAN, INF = math.nan, math.inf
TINY = 2.0**-140


class Case(NamedTuple):
    """An instruction with its destination R and operands A, B, …: their types and values, and those of the result."""

    text: str
    operands: tuple[tuple[type, list], ...]
    result: type
    expected: list

    def __str__(self) -> str:
        return self.text.split()[0].split(";")[0]


def b16(*values: float) -> list[int]:
    """bfloat16 bits of values that have one."""
    bits = np.array(values, F32).view(U32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).tolist()


CASES = [
    Case("add.s32 R, A, B", ((S32, [5, -1, 2**31 - 1]), (S32, [-7, 1, 1])), S32, [-2, 0, -(2**31)]),
    Case("add.u32 R, A, -4", ((U32, [10, 3]),), U32, [6, 2**32 - 1]),
    Case("add.s64 R, A, B", ((S64, [2**40, -1]), (S64, [2**40, 1])), S64, [2**41, 0]),
    Case("add.s16 R, A, B", ((S16, [32767]), (S16, [1])), S16, [-32768]),
    Case("sub.s32 R, A, B", ((S32, [5, -(2**31)]), (S32, [7, 1])), S32, [-2, 2**31 - 1]),
    Case("sub.s64 R, A, B", ((S64, [0]), (S64, [1])), S64, [-1]),
    Case("add.f32 R, A, B", ((F32, [1, INF, 2**24]), (F32, [2, -INF, 1])), F32, [3, NAN, 2**24]),
    Case("add.ftz.f32 R, A, B", ((F32, [TINY, -TINY]), (F32, [TINY, -TINY])), F32, [0.0, -0.0]),
    Case("add.sat.f32 R, A, B", ((F32, [0.75, -1, NAN]), (F32, [0.75, 0.5, 1])), F32, [1, 0, 0]),
    Case("sub.f32 R, A, B", ((F32, [1]), (F32, [3])), F32, [-2]),
    Case("add.f64 R, A, B", ((F64, [1]), (F64, [2**-52])), F64, [1 + 2**-52]),
    Case("mul.lo.s32 R, A, B", ((S32, [-3, 65536]), (S32, [5, 65536])), S32, [-15, 0]),
    Case("mul.lo.s64 R, A, B", ((S64, [-3]), (S64, [2**40])), S64, [-3 * 2**40]),
    Case("mul.wide.s32 R, A, B", ((S32, [-3]), (S32, [2**30])), S64, [-3 * 2**30]),
    Case("mul.wide.u32 R, A, B", ((U32, [2**32 - 1]), (U32, [2**32 - 1])), U64, [(2**32 - 1) ** 2]),
    Case("mul.wide.u16 R, A, B", ((U16, [65535]), (U16, [65535])), U32, [65535**2]),
    Case("mul.hi.s32 R, A, B", ((S32, [-(2**31), -1]), (S32, [2, 1])), S32, [-1, -1]),
    Case("mul.hi.u32 R, A, B", ((U32, [2**32 - 1]), (U32, [2**32 - 1])), U32, [2**32 - 2]),
    Case("mul.hi.u64 R, A, B", ((U64, [2**64 - 1, 2**33]), (U64, [2**64 - 1, 2**33])), U64, [2**64 - 2, 4]),
    Case("mul.hi.s64 R, A, B", ((S64, [-1, -(2**62)]), (S64, [1, 8])), S64, [-1, -2]),
    Case("mul.f32 R, A, B", ((F32, [3, 1 + 2**-23]), (F32, [0.5, 1 + 2**-23])), F32, [1.5, 1 + 2**-22]),
    Case("mul.f64 R, A, B", ((F64, [3]), (F64, [1 / 3])), F64, [1]),
    Case("mad.lo.s32 R, A, B, C", ((S32, [-3]), (S32, [5]), (S32, [1])), S32, [-14]),
    Case("mad.lo.s64 R, A, 24, B", ((S64, [-1]), (S64, [5])), S64, [-19]),
    Case("mad.wide.s32 R, A, 4, B", ((S32, [-3]), (S64, [2**40])), S64, [2**40 - 12]),
    Case("mad.wide.u32 R, A, 2, B", ((U32, [2**32 - 1]), (U64, [1])), U64, [2**33 - 1]),
    Case("fma.rn.f32 R, A, B, C", ((F32, [1 + 2**-23]), (F32, [1 - 2**-23]), (F32, [-1])), F32, [-(2.0**-46)]),
    # Just below half-way between two float32, which float64 rounds to half-way, and a second rounding would go up.
    Case(
        "fma.rn.f32 R, A, B, C",
        ((F32, [1 + 2**-18]), (F32, [2**-24 * (1 - 2**-18)]), (F32, [1 + 2**-23])),
        F32,
        [1 + 2**-23],
    ),
    Case("fma.rn.f32 R, A, B, C", ((F32, [2**-30]), (F32, [2**-60]), (F32, [1 + 3 * 2**-23])), F32, [1 + 3 * 2**-23]),
    Case("fma.rn.ftz.f32 R, A, B, C", ((F32, [TINY]), (F32, [2**20]), (F32, [1])), F32, [1]),
    Case("div.s32 R, A, B", ((S32, [-7, 7, -7, 7]), (S32, [2, -2, -2, 2])), S32, [-3, -3, 3, 3]),
    Case("div.s64 R, A, B", ((S64, [-(2**40) - 1]), (S64, [2])), S64, [-(2**39)]),
    Case("div.u32 R, A, B", ((U32, [2**32 - 1]), (U32, [2])), U32, [2**31 - 1]),
    Case("rem.s32 R, A, B", ((S32, [-7, 7, -7]), (S32, [2, -2, -2])), S32, [-1, 1, -1]),
    Case("rem.s64 R, A, B", ((S64, [-7]), (S64, [4])), S64, [-3]),
    Case("rem.u32 R, A, B", ((U32, [7]), (U32, [4])), U32, [3]),
    Case("div.full.f32 R, A, B", ((F32, [1, 1]), (F32, [4, 0])), F32, [0.25, INF]),
    Case("max.s32 R, A, B", ((S32, [-1]), (S32, [1])), S32, [1]),
    Case("max.u32 R, A, B", ((U32, [2**32 - 1]), (U32, [1])), U32, [2**32 - 1]),
    Case("min.s64 R, A, B", ((S64, [-1]), (S64, [1])), S64, [-1]),
    Case("max.s64 R, A, B", ((S64, [-1]), (S64, [1])), S64, [1]),
    Case("max.f32 R, A, B", ((F32, [NAN, 1, -0.0]), (F32, [2, NAN, 0.0])), F32, [2, 1, 0.0]),
    Case("min.f32 R, A, B", ((F32, [NAN, 1, 0.0]), (F32, [2, -INF, -0.0])), F32, [2, -INF, -0.0]),
    Case("max.f32 R, A, B, C", ((F32, [1, 5]), (F32, [3, 2]), (F32, [2, 9])), F32, [3, 9]),
    Case("max.NaN.f32 R, A, B", ((F32, [NAN, 1]), (F32, [2, 3])), F32, [NAN, 3]),
    Case("max.bf16x2 R, A, B", ((U32, [0x3F8040A0]), (U32, [0x4040C000])), U32, [0x404040A0]),
    Case("max.bf16 R, A, B", ((U16, b16(1, 5)), (U16, b16(3, -2))), U16, b16(3, 5)),
    Case("max.f16 R, A, B", ((F16, [1, 5]), (F16, [3, -2])), F16, [3, 5]),
    Case("neg.s32 R, A", ((S32, [3]),), S32, [-3]),
    Case("neg.s64 R, A", ((S64, [3]),), S64, [-3]),
    Case("neg.f32 R, A", ((F32, [3, 0.0]),), F32, [-3, -0.0]),
    Case("abs.f32 R, A", ((F32, [-3, -0.0]),), F32, [3, 0.0]),
    Case("abs.s32 R, A", ((S32, [-3]),), S32, [3]),
    Case("neg.bf16 R, A", ((U16, b16(2)),), U16, b16(-2)),
    Case("ex2.approx.ftz.f32 R, A", ((F32, [3, -INF, -130]),), F32, [8, 0, 0]),
    Case("lg2.approx.ftz.f32 R, A", ((F32, [8, 0]),), F32, [3, -INF]),
    Case("rcp.rn.f32 R, A", ((F32, [4]),), F32, [0.25]),
    Case("sqrt.rn.f32 R, A", ((F32, [9]),), F32, [3]),
    Case("rsqrt.approx.ftz.f32 R, A", ((F32, [16]),), F32, [0.25]),
    Case("sin.approx.f32 R, A", ((F32, [0]),), F32, [0]),
    Case("cos.approx.f32 R, A", ((F32, [0]),), F32, [1]),
    Case("tanh.approx.f32 R, A", ((F32, [0]),), F32, [0]),
    # 16 bits: to nearest even, once.
    Case("add.f16 R, A, B", ((F16, [2048, 65504]), (F16, [1, 65504])), F16, [2048, INF]),
    Case("sub.f16 R, A, B", ((F16, [2050]), (F16, [1])), F16, [2048]),
    Case("mul.f16 R, A, B", ((F16, [1 + 2**-10, 2**-14]), (F16, [1 + 2**-10, 2**-11])), F16, [1 + 2**-9, 0]),
    Case("fma.rn.f16 R, A, B, C", ((F16, [1 + 2**-10]), (F16, [1 + 2**-10]), (F16, [-1])), F16, [2**-9]),
    Case("add.bf16 R, A, B", ((U16, b16(256, 1)), (U16, b16(1, 2**-8))), U16, b16(256, 1)),
    Case("sub.bf16 R, A, B", ((U16, b16(258)), (U16, b16(1))), U16, b16(256)),
    Case("mul.bf16 R, A, B", ((U16, b16(1 + 2**-7)),) * 2, U16, b16(1 + 2**-6)),
    # 1 + 2^-8 + 2^-60 is above half-way between 1 and its neighbour, which neither float32 nor float64 sees.
    Case("fma.rn.bf16 R, A, B, C", ((U16, b16(2**-8, 2**-60)), (U16, b16(1, 1)), (U16, b16(1, 1))), U16, b16(1, 1)),
    Case(
        "mul.bf16 R, A, B; fma.rn.bf16 R, C, R, A",
        ((U16, b16(1)), (U16, b16(2**-8)), (U16, b16(1 + 2**-7))),
        U16,
        b16(1 + 2**-7),
    ),
    Case("fma.rn.f16x2 R, A, B, C", ((U32, [0x3C003C01]), (U32, [0x3C003C01]), (U32, [0x0000BC00])), U32, [0x3C001800]),
    Case("add.bf16x2 R, A, B", ((U32, [0x3F804380]), (U32, [0x3F803F80])), U32, [0x40004380]),
    Case(
        "fma.rn.bf16x2 R, A, B, C", ((U32, [0x3F804000]), (U32, [0x3F804000]), (U32, [0x3F803F80])), U32, [0x400040A0]
    ),
    Case("mul.f16x2 R, A, B", ((U32, [0x40003C00]), (U32, [0x40003C00])), U32, [0x44003C00]),
    Case("fma.rn.f32.bf16 R, A, B, C", ((U16, b16(3)), (U16, b16(5)), (F32, [2**-20])), F32, [15 + 2**-20]),
    Case("add.f32.f16 R, A, B", ((F16, [3]), (F32, [2**-20])), F32, [3 + 2**-20]),
    Case(
        "fma.rn.f32x2 R, A, B, C",
        ((U64, [0x40000000_3F800000]), (U64, [0x40400000_40000000]), (U64, [0x3F800000_00000000])),
        U64,
        [0x40E00000_40000000],
    ),
    # Conversions.
    Case(
        "cvt.rn.f16.f32 R, A",
        ((F32, [1 + 2**-11, 1 + 3 * 2**-11, 65520, 65519, 2**-25, 1.5 * 2**-25]),),
        F16,
        [1, 1 + 2**-9, INF, 65504, 0, 2**-24],
    ),
    Case("cvt.rn.f16.f32 R, A", ((F32, [NAN]),), U16, [0x7FFF]),
    Case("cvt.rz.f16.f32 R, A", ((F32, [1 + 2**-11 + 2**-12, -65519, 2049]),), F16, [1, -65504, 2048]),
    Case(
        "cvt.rn.bf16.f32 R, A",
        ((F32, [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38]),),
        U16,
        [0x3F80, 0x3F82, 0x3F81, 0x7F80],
    ),
    Case("cvt.rn.bf16.f32 R, A", ((F32, [NAN, -INF]),), U16, [0x7FFF, 0xFF80]),
    Case("cvt.rz.bf16.f32 R, A", ((F32, [1 + 3 * 2**-8]),), U16, [0x3F81]),
    Case("cvt.rn.bf16x2.f32 R, A, B", ((F32, [2]), (F32, [1])), U32, [0x40003F80]),
    Case("cvt.rn.f16x2.f32 R, A, B", ((F32, [2]), (F32, [1])), U32, [0x40003C00]),
    Case("cvt.f32.f16 R, A", ((F16, [2**-24, INF]),), F32, [2**-24, INF]),
    Case("cvt.f32.bf16 R, A", ((U16, [0x3F81, 0x0001]),), F32, [1 + 2**-7, 2.0**-133]),
    Case("cvt.rn.f32.s32 R, A", ((S32, [-(2**24) - 1, 2**24 + 3]),), F32, [-(2**24), 2**24 + 4]),
    Case("cvt.rn.f32.u32 R, A", ((U32, [2**32 - 1]),), F32, [2**32]),
    Case("cvt.rn.f16.s16 R, A", ((S16, [-3]),), F16, [-3]),
    Case("cvt.rn.bf16.s16 R, A", ((S16, [257]),), U16, b16(256)),
    Case("cvt.rzi.s32.f32 R, A", ((F32, [-1.9, 1e20, -1e20, NAN]),), S32, [-1, 2**31 - 1, -(2**31), 0]),
    Case("cvt.rni.s32.f32 R, A", ((F32, [2.5, 3.5]),), S32, [2, 4]),
    Case("cvt.rzi.u32.f32 R, A", ((F32, [-1, 3e9]),), U32, [0, 3_000_000_000]),
    Case("cvt.rmi.f32.f32 R, A", ((F32, [-1.5]),), F32, [-2]),
    Case("cvt.rpi.ftz.f32.f32 R, A", ((F32, [1.5]),), F32, [2]),
    Case("cvt.ftz.f32.f32 R, A", ((F32, [TINY]),), F32, [0]),
    Case("cvt.rna.tf32.f32 R, A", ((F32, [1 + 2**-11, 1 + 2**-12]),), F32, [1 + 2**-10, 1]),
    Case("cvt.f64.f32 R, A", ((F32, [0.1]),), F64, [float(F32(0.1))]),
    Case("cvt.rn.f32.f64 R, A", ((F64, [1 + 2**-24]),), F32, [1]),
    Case("cvt.s64.s32 R, A", ((S32, [-5]),), S64, [-5]),
    Case("cvt.u64.u32 R, A", ((U32, [2**32 - 1]),), U64, [2**32 - 1]),
    Case("cvt.u32.u64 R, A", ((U64, [2**40 + 7]),), U32, [7]),
    Case("cvt.u16.u32 R, A", ((U32, [65536 + 9]),), U16, [9]),
    Case("cvt.u32.u16 R, A", ((U16, [65535]),), U32, [65535]),
    Case("cvt.s32.s8 R, A", ((U32, [0x180]),), S32, [-128]),
    # Bits.
    Case("and.b32 R, A, B", ((U32, [0xF0F0]), (U32, [0xFF00])), U32, [0xF000]),
    Case("and.b16 R, A, B", ((U16, [0xF0F0]), (U16, [0xFF00])), U16, [0xF000]),
    Case("and.b64 R, A, -4294967296", ((U64, [2**40 + 7]),), U64, [2**40]),
    Case("or.b32 R, A, B", ((U32, [0xF0]), (U32, [0x0F])), U32, [0xFF]),
    Case("xor.b32 R, A, B", ((U32, [0xFF]), (U32, [0x0F])), U32, [0xF0]),
    Case("not.b32 R, A", ((U32, [0]),), U32, [2**32 - 1]),
    Case("shl.b32 R, A, B", ((U32, [1, 1, 3]), (U32, [31, 32, 1])), U32, [2**31, 0, 6]),
    Case("shl.b64 R, A, B", ((U64, [1, 1]), (U32, [63, 64])), U64, [2**63, 0]),
    Case("shr.u32 R, A, B", ((U32, [2**31, 5]), (U32, [31, 40])), U32, [1, 0]),
    Case("shr.s32 R, A, B", ((S32, [-8, -8]), (U32, [1, 99])), S32, [-4, -1]),
    Case("shr.s64 R, A, B", ((S64, [-8]), (U32, [64])), S64, [-1]),
    Case("shr.u16 R, A, B", ((U16, [0x8000]), (U32, [15])), U16, [1]),
    Case("shf.l.wrap.b32 R, A, B, C", ((U32, [0x80000000]), (U32, [1]), (U32, [33])), U32, [3]),
    Case("shf.r.clamp.b32 R, A, B, C", ((U32, [0]), (U32, [1]), (U32, [99])), U32, [1]),
    Case("bfe.u32 R, A, 4, 8", ((U32, [0x12345678]),), U32, [0x67]),
    Case("bfe.s32 R, A, B, C", ((S32, [0x80, 0x80]), (U32, [0, 0]), (U32, [8, 9])), S32, [-128, 128]),
    Case("bfe.u64 R, A, 32, 40", ((U64, [2**63]),), U64, [2**31]),
    Case("bfi.b32 R, A, B, 8, 4", ((U32, [0xFF]), (U32, [0])), U32, [0xF00]),
    Case("prmt.b32 R, A, B, 0x5410", ((U32, [0x33221100]), (U32, [0x77665544])), U32, [0x55441100]),
    Case("prmt.b32 R, A, B, 0x8888", ((U32, [0x80]), (U32, [0])), U32, [0xFFFFFFFF]),
    Case("popc.b32 R, A", ((U32, [0xF0F0]),), U32, [8]),
    Case("clz.b32 R, A", ((U32, [1, 0]),), U32, [31, 32]),
    Case("brev.b32 R, A", ((U32, [1, 0x80000002]),), U32, [2**31, 0x40000001]),
    Case("mov.b32 R, A", ((U32, [7]),), U32, [7]),
    Case("mov.b32 R, {A, B}", ((U16, [1]), (U16, [2])), U32, [0x20001]),
    Case("mov.b64 R, {A, B}", ((U32, [1]), (U32, [2])), U64, [2**33 + 1]),
    Case("mov.b32 {R, _}, A", ((U32, [0x20001]),), U16, [1]),
    Case("mov.b32 {_, R}, A", ((U32, [0x20001]),), U16, [2]),
    Case("mov.b64 {_, R}, A", ((U64, [2**33 + 1]),), U32, [2]),
    Case("cvta.to.global.u64 R, A", ((U64, [7]),), U64, [7]),
]

CHOICES = [
    ("eq.s32", S32, [1, 2], [1, 3], [1, 0]), ("ne.b64", U64, [1], [2], [1]), ("lt.s32", S32, [-1], [1], [1]),
    ("lt.u32", U32, [2**32 - 1], [1], [0]), ("ge.s64", S64, [-1, 1], [-1, 2], [1, 0]), ("hi.u32", U32, [2], [1], [1]),
    ("gt.f32", F32, [1, NAN], [0, 0], [1, 0]), ("gtu.f32", F32, [1, NAN, 0], [0, 0, 1], [1, 1, 0]),
    ("ne.f32", F32, [NAN, 1], [1, 2], [0, 1]), ("neu.f32", F32, [NAN, 1], [1, 1], [1, 0]),
    ("num.f32", F32, [NAN, 1], [1, 1], [0, 1]), ("nan.f32", F32, [NAN, 1], [1, 1], [1, 0]),
    ("eq.f16", F16, [1, NAN], [1, NAN], [1, 0]), ("lt.ftz.f32", F32, [-TINY], [0], [0]),
]  # fmt: skip


def same(got: np.ndarray, expected: list) -> None:
    want = np.array(expected, got.dtype)
    equal = got.view(np.uint8).reshape(len(got), -1) == want.view(np.uint8).reshape(len(want), -1)
    nan = np.isnan(got) & np.isnan(want) if got.dtype.kind == "f" else False
    assert (equal.all(1) | nan).all(), f"{got} is not {want}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case):
    operands = [np.array(values, kind) for kind, values in case.operands]
    same(small.apply(case.text, operands, case.result), case.expected)


@pytest.mark.parametrize(("how", "kind", "a", "b", "expected"), CHOICES, ids=[one[0] for one in CHOICES])
def test_comparisons(how, kind, a, b, expected):
    text = f"setp.{how} %p1, A, B; selp.b32 R, 1, 0, %p1"
    same(small.apply(text, [np.array(a, kind), np.array(b, kind)], U32), expected)


def test_predicates():
    a, b = np.array([0, 0, 1, 1], U32), np.array([0, 1, 0, 1], U32)
    begin = "setp.ne.b32 %p1, A, 0; setp.ne.b32 %p2, B, 0;"
    for text, expected in (
        ("and.pred %p3, %p1, %p2", [0, 0, 0, 1]), ("or.pred %p3, %p1, %p2", [0, 1, 1, 1]),
        ("xor.pred %p3, %p1, %p2", [0, 1, 1, 0]), ("not.pred %p3, %p1", [1, 1, 0, 0]), ("mov.pred %p3, -1", [1] * 4),
        ("setp.ne.and.b32 %p3, A, 0, %p2", [0, 0, 0, 1]), ("setp.ne.or.b32 %p3, A, 0, !%p2", [1, 0, 1, 1]),
    ):  # fmt: skip
        same(small.apply(f"{begin} {text}; selp.b32 R, 1, 0, %p3", [a, b], U32), expected)
    guarded = f"{begin} mov.b32 R, 5; @%p1 mov.b32 R, 6; @!%p2 add.s32 R, R, 10"
    same(small.apply(guarded, [a, b], U32), [15, 5, 16, 6])


def test_a_random_fma_is_rounded_once():
    generator = np.random.default_rng(0)
    for kind, bits, text in ((F32, 23, "fma.rn.f32"), (F16, 10, "fma.rn.f16")):
        # Few bits of mantissa over a range of exponents: ties, and nearly ties.
        a, b, c = (
            (1 + generator.integers(0, 8, 4096) * 2.0 ** -generator.integers(1, bits + 1, 4096))
            * 2.0 ** generator.integers(-5, 5, 4096)
            for _ in range(3)
        )
        a, b, c = (one.astype(kind) for one in (a, b, c * generator.choice([-1.0, 1.0], 4096)))
        got = np.concatenate(
            [small.apply(f"{text} R, A, B, C", [one[k : k + 32] for one in (a, b, c)], kind) for k in range(0, 512, 32)]
        )
        wide = np.longdouble
        assert np.isfinite(got).all()
        exact = a[:512].astype(wide) * b[:512].astype(wide) + c[:512].astype(wide)
        step = np.spacing(np.abs(got)).astype(wide)
        assert (np.abs(got.astype(wide) - exact) <= step / 2).all()


def test_bfloat16_is_rounded_once():
    """1 + 2^-8 is half-way; what decides lies 2^-40 and 2^-70 below."""
    a, b = np.array(b16(1 + 2**-4, 2**-30), U16), np.array(b16(2**-8, 2**-40), U16)
    got = small.apply("fma.rn.bf16 R, A, B, C", [a, b, np.array(b16(1, 1), U16)], U16)
    same(got, b16(1 + 2**-7, 1))


def test_special_registers():
    body = """
    ld.param.b64 %d0, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %nctaid.x;
    mov.u32 %r4, %laneid; mov.u32 %r8, %tid.y;
    mad.lo.s32 %r5, %r1, %r2, %r0; mul.wide.u32 %d1, %r5, 16; add.s64 %d2, %d0, %d1;
    add.s32 %r2, %r2, %r8; st.global.v4.b32 [%d2], {%r0, %r1, %r3, %r4};
    """
    out = np.zeros((128, 4), U32)
    assert not small.run(body, out, grid=2, threads=64)
    number = np.arange(128)
    assert np.array_equal(out, np.stack([number % 64, number // 64, np.full(128, 2), number % 32], 1))


LOADS = [
    ("ld.global.b8", "%h1", "st.global.b16", 1), ("ld.global.u8", "%r1", "st.global.b32", 1),
    ("ld.global.b16", "%h1", "st.global.b16", 2), ("ld.global.nc.b32", "%r1", "st.global.b32", 4),
    ("ld.global.L1::evict_first.b64", "%d1", "st.global.b64", 8),
]  # fmt: skip


@pytest.mark.parametrize(("load", "register", "store", "width"), LOADS, ids=[one[0] for one in LOADS])
def test_loads_and_stores_of_one_word(load, register, store, width):
    source = np.random.default_rng(0).integers(0, 256, 32 * width, np.uint8)
    size = int(store.rsplit("b", 1)[1]) // 8
    out = np.zeros(32 * size, np.uint8)
    body = f"""
    ld.param.b64 %d10, [p0]; ld.param.b64 %d11, [p1]; mov.u32 %r10, %tid.x;
    mad.wide.u32 %d12, %r10, {width}, %d10; mad.wide.u32 %d13, %r10, {size}, %d11;
    {load} {register}, [%d12]; {store} [%d13+0], {register};
    """
    assert not small.run(body, source, out)
    want = np.zeros((32, size), np.uint8)
    want[:, :width] = source.reshape(32, width)
    assert np.array_equal(out.reshape(32, size), want)


@pytest.mark.parametrize(("kind", "count"), [("b32", 2), ("b32", 4), ("b16", 2), ("b16", 4), ("b64", 2)])
def test_vectors_through_shared_memory(kind, count):
    width = int(kind[1:]) // 8
    size = width * count
    source, out = np.random.default_rng(0).integers(0, 256, 32 * size, np.uint8), np.zeros(32 * size, np.uint8)
    names = ", ".join(f"{ {2: '%h', 4: '%r', 8: '%d'}[width] }{k + 1}" for k in range(count))
    turned = ", ".join(reversed(names.split(", ")))
    body = f"""
    ld.param.b64 %d30, [p0]; ld.param.b64 %d31, [p1]; mov.u32 %r30, %tid.x; mul.lo.s32 %r31, %r30, {size};
    mad.wide.u32 %d32, %r30, {size}, %d30; mad.wide.u32 %d33, %r30, {size}, %d31; mov.b32 %r32, memory;
    add.s32 %r33, %r31, %r32;
    ld.global.v{count}.{kind} {{{names}}}, [%d32]; st.shared.v{count}.{kind} [%r33+64], {{{turned}}};
    ld.shared.v{count}.{kind} {{{names}}}, [%r33+64]; st.global.v{count}.{kind} [%d33], {{{names}}};
    """
    assert not small.run(body, source, out)
    assert np.array_equal(out.reshape(32, count, width), source.reshape(32, count, width)[:, ::-1])


def test_unknown_instructions_are_refused_by_name_and_line():
    for text, message in (
        ("tcgen05.wait.sync.aligned", "PTX line 14 .tcgen05.wait.sync.aligned.*not known"),
        ("add.f32 %r1, %r2", "PTX line 14 .*expected 3 operands, got 2"),
        ("max.f32 %r1, %r2, %r3, %r4, %r5", "expected 3 or 4 operands, got 5"),
        ("add.rz.f32 %r1, %r2, %r3", "its rz is not known"),
        ("ld.global.v2.b32 {%r1}, [%d1]", "expected 2 registers, got 1"),
        ("add.s64 %d1, %d2, %r1", "%r1 has 32 bits"),
        ("bar.sync 1", "only the barrier 0"),
        ("ld.const.b32 %r1, [%d1]", "ld.const.b32.*not known"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4}", "mma.*not known"),
        ("mbarrier.init.shared.b64 [%r1], 1", "mbarrier.init.*not known"),
    ):
        with pytest.raises(Refused, match=message):
            small.program(f"{text};", 1).blocks  # noqa: B018
    with pytest.raises(Refused, match="expected 0 arguments, got 2"):
        launch(Program(small.HEADER.format(parameters="", threads=32, body="")), [1, 2], 1)


def test_every_family_is_tested():
    """Each has a test that names it, here or in `tests.kernels.test_ptx_machine`."""
    text = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_ptx_*.py"))
    assert not [name for name in FAMILIES if f"{name}." not in text and name not in ("ret", "exit", "ldu", "cnot")]
