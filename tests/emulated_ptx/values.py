"""Numbers as the instructions make them: formats of 16 bits, roundings, and what numpy defines differently.

Registers hold unsigned integers; floats are views of them. bfloat16 is computed in float32, float16 in numpy's own.
"""

from __future__ import annotations

import numpy as np

U = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
S = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
F = {2: np.float16, 4: np.float32, 8: np.float64}
NAN16, NAN32 = np.uint16(0x7FFF), np.uint32(0x7FFFFFFF)
_SMALLEST = np.float32(2.0**-126)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, to nearest even; NaN becomes the canonical one."""
    u = np.ascontiguousarray(x).view(np.uint32)
    rounded = (u + (np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), NAN16, rounded.astype(np.uint16))


def to_bf16_rz(x: np.ndarray) -> np.ndarray:
    u = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isnan(x), NAN16, (u >> np.uint32(16)).astype(np.uint16))


def to_f16(x: np.ndarray) -> np.ndarray:
    """float32 or float64 to float16, to nearest even; NaN becomes the canonical one."""
    return np.where(np.isnan(x), NAN16, x.astype(np.float16).view(np.uint16))


def to_f16_rz(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float16)
    away = np.abs(bits.astype(np.float32)) > np.abs(x)
    return np.where(np.isnan(x), NAN16, bits.view(np.uint16) - away.astype(np.uint16))


def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of TF32, to nearest, ties away from zero (``cvt.rna``)."""
    u = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isfinite(x), (u + np.uint32(0x1000)) & np.uint32(0xFFFFE000), u)


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 as zero of the same sign (``.ftz``)."""
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def saturated(x: np.ndarray) -> np.ndarray:
    """To [0, 1], NaN to 0 (``.sat``)."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def odd(total: np.ndarray, error: np.ndarray) -> np.ndarray:
    """A float64 sum rounded to nearest, rounded to odd instead: a second rounding to fewer bits is then right."""
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total)
    away = inexact & ((error < 0) != (total < 0))
    return np.where(inexact, (bits - away) | 1, bits).view(np.float64)


def _exact_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and its error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a·b + c of operands in float64, rounded once.

    The product is exact in float64. Rounding the sum twice is wrong only where the first ends half-way between two
    float32; those few are made again.
    """
    product = a * b
    total = product + c
    half_way = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    small = np.abs(total) < 2.0**-125
    if np.count_nonzero(half_way) or np.count_nonzero(small):
        total = odd(*_exact_sum(product, np.broadcast_to(c, total.shape)))
    return total.astype(np.float32)


def fma_f16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Bits of float16 a·b + c, rounded once: a double holds all of it that the result can depend on."""
    total = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return to_f16(total)


def fma_bf16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 a·b + c of operands in float32, rounded once."""
    total = odd(*_exact_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)))
    narrow = total.astype(np.float32)
    wide = narrow.astype(np.float64)
    inexact = (wide != total) & np.isfinite(total) & np.isfinite(narrow)
    bits = narrow.view(np.uint32) - (inexact & (np.abs(wide) > np.abs(total))).astype(np.uint32)
    return to_bf16((bits | inexact.astype(np.uint32)).view(np.float32))


def largest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``max`` of floats: a NaN gives way to a number, and +0 is more than -0."""
    found = np.fmax(a, b)
    zero = found == 0
    return np.where(zero & (np.signbit(a) != np.signbit(b)), found.dtype.type(0), found) if zero.any() else found


def smallest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found = np.fmin(a, b)
    zero = found == 0
    return np.where(zero & (np.signbit(a) != np.signbit(b)), found.dtype.type(-0.0), found) if zero.any() else found


def largest_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), largest(a, b))


def smallest_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), smallest(a, b))


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integer division towards zero; of nothing by zero is more asked than that it does not stop."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    found = a // divisor
    if a.dtype.kind == "u":
        return found
    return found + ((found * divisor != a) & ((a < 0) != (divisor < 0))).astype(found.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - quotient(a, b) * np.where(b == 0, b.dtype.type(1), b)


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product of integers."""
    size = a.dtype.itemsize
    if size < 8:
        wide = (S if a.dtype.kind == "i" else U)[2 * size]
        return (a.astype(wide) * b.astype(wide) >> wide(8 * size)).astype(a.dtype)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), np.asarray(b).view(np.uint64)
    x0, x1, y0, y1 = x & mask, x >> half, y & mask, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    upper = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & mask)) >> half)
    if a.dtype.kind == "i":
        upper = upper - np.where(a < 0, y, 0).astype(np.uint64) - np.where(np.asarray(b) < 0, x, 0).astype(np.uint64)
    return upper.view(a.dtype)


def extracted(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``bfe``: a field of bits, of a signed operand extended by its own sign."""
    bits = 8 * a.dtype.itemsize
    position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
    kept = np.minimum(length, np.maximum(bits - position, 0))
    plain = a.view(U[a.dtype.itemsize]).astype(np.uint64) >> np.minimum(position, 63).astype(np.uint64)
    mask = (np.uint64(1) << np.minimum(kept, 63).astype(np.uint64)) - np.uint64(1)
    mask = np.where(kept >= 64, np.uint64(0xFFFFFFFFFFFFFFFF), mask)
    found = np.where(position >= bits, np.uint64(0), plain & mask)
    if a.dtype.kind == "i":
        last = np.minimum(position + length - 1, bits - 1)
        sign = ((a >> last.astype(a.dtype)) & a.dtype.type(1)) != 0
        found = np.where(sign & (length > 0), found | ~mask, found)
    return found.astype(U[a.dtype.itemsize])


def inserted(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``bfi``: the low bits of a at a position in b."""
    bits = 8 * b.dtype.itemsize
    position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
    ones = np.where(
        length >= 64,
        np.uint64(0xFFFFFFFFFFFFFFFF),
        (np.uint64(1) << np.minimum(length, 63).astype(np.uint64)) - np.uint64(1),
    )
    mask = np.where(position >= bits, np.uint64(0), ones << np.minimum(position, 63).astype(np.uint64))
    moved = a.astype(np.uint64) << np.minimum(position, 63).astype(np.uint64)
    return ((b.astype(np.uint64) & ~mask) | (moved & mask)).astype(b.dtype)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """``prmt``: four bytes picked from eight, or their signs."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    found = np.zeros(a.shape, np.uint32)
    for place in range(4):
        chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        byte = np.where(chosen & np.uint32(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
        found |= byte << np.uint32(8 * place)
    return found


def funnel(low: np.ndarray, high_word: np.ndarray, by: np.ndarray, left: bool, wrap: bool) -> np.ndarray:
    """``shf``: 64 bits shifted, of which 32 are kept."""
    by = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
    both = low.astype(np.uint64) | (high_word.astype(np.uint64) << np.uint64(32))
    return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)


def ones(a: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a).astype(np.uint32)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < bits:
            a = a | (a >> a.dtype.type(shift))
    return (bits - np.bitwise_count(a)).astype(np.uint32)


def reversed_bits(a: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(a.view(np.uint8).reshape(len(a), -1), axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").view(a.dtype)[:, 0]


def to_integer(x: np.ndarray, kind: type, mode: str) -> np.ndarray:
    """A float as an integer: rounded as asked, clamped to the range, NaN as 0."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(np.float64))
    limits = np.iinfo(kind)
    rounded = np.where(np.isnan(rounded), 0.0, rounded)
    low, top = rounded <= limits.min, rounded >= float(limits.max)
    inside = np.where(low | top, 0.0, rounded).astype(kind)
    return np.where(top, kind(limits.max), np.where(low, kind(limits.min), inside))


_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def compared(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``setp``; floats unordered (``equ`` … ``geu``) or not."""
    if np.asarray(a).dtype.kind != "f":
        return _ORDERED[_UNSIGNED.get(how, how)](a, b)
    if how in ("eq", "lt", "le", "gt", "ge"):
        return _ORDERED[how](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if how == "nan":
        return unordered
    if how == "num":
        return ~unordered
    if how == "ne":
        return np.not_equal(a, b) & ~unordered
    return _ORDERED[how[:-1]](a, b) | unordered


COMPARISONS = {
    "u": {"eq", "ne", "lt", "le", "gt", "ge", *_UNSIGNED},
    "s": {"eq", "ne", "lt", "le", "gt", "ge"},
    "b": {"eq", "ne"},
    "f": {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"},
}
