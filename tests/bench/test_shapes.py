"""FLOPs, bytes and floors of layers and of decoding are those of docs/costs.md."""

from __future__ import annotations

import math

import pytest

from bench.contenders.shapes import (
    DIRECTIONS,
    SHAPES,
    Shape,
    cache_bytes,
    decode_bytes,
    floor_ms,
    flops,
    moved_bytes,
    naive_peak_bytes,
)
from bench.runs.decode_gpu import LENGTHS, ORDER

# Of docs/costs.md: GFLOP and MB of tree, projections, attention, output projection.
TABLE = {
    ("A", "forward"): ((17, 43, 0.3, 8.6), (51, 119, 101, 34)),
    ("A", "backward"): ((34, 86, 0.8, 17), (137, 238, 201, 69)),
    ("C", "forward"): ((137, 344, 1.9, 69), (206, 476, 403, 136)),
    ("C", "backward"): ((275, 687, 4.7, 137), (550, 952, 805, 275)),
    ("D", "forward"): ((1100, 1924, 17, 275), (1351, 2691, 2147, 539)),
    ("D", "backward"): ((2199, 3848, 42, 550), (3515, 5381, 4295, 1080)),
    ("M", "forward"): ((1100, 2749, 41, 550), (3222, 7518, 6442, 2148)),
    ("M", "backward"): ((2199, 5498, 102, 1100), (8593, 15036, 12885, 4297)),
    ("P", "forward"): ((0.07, 0.12, 0.016, 0.02), (2.6, 5.2, 4.2, 1.1)),
    ("P", "backward"): ((0.14, 0.24, 0.04, 0.04), (6.8, 10.5, 8.4, 2.1)),
}
PEAKS = (790e12, 3.0e12)


def printed(value: float, like: float) -> bool:
    """Whether ``value`` could be printed as ``like``: off by at most one of its last digit."""
    digits = 0 if like >= 10 and like == int(like) else len(str(like).split(".")[-1])
    return abs(value - like) <= max(10.0**-digits, 0.005 * like)


@pytest.mark.parametrize(("name", "direction"), TABLE, ids="-".join)
def test_counts_are_those_of_the_table(name, direction):
    shape = SHAPES[name]
    for stage, giga, mega in zip(("tree", "project", "attend", "out"), *TABLE[name, direction], strict=True):
        assert printed(flops(shape, stage, direction) / 1e9, giga), (stage, flops(shape, stage, direction))
        assert printed(moved_bytes(shape, stage, direction) / 1e6, mega), (stage, moved_bytes(shape, stage, direction))


@pytest.mark.parametrize(("name", "milliseconds"), [("A", 0.366), ("C", 2.49), ("D", 14.7), ("M", 23.3), ("P", 0.014)])
def test_staged_floors_are_those_of_the_table(name, milliseconds):
    assert SHAPES[name].least_ms("layer", DIRECTIONS, *PEAKS, 2) == pytest.approx(milliseconds, rel=0.05)
    assert SHAPES["C"].least_ms("layer", DIRECTIONS, *PEAKS, 2) == pytest.approx(2.49, abs=0.005)


def test_stage_floors_take_the_slower_of_the_two():
    c = SHAPES["C"]
    expected = {"tree": 0.174, "project": 0.435, "attend": 0.134, "out": 0.087}
    for stage, milliseconds in expected.items():
        assert floor_ms(c, stage, "forward", *PEAKS) == pytest.approx(milliseconds, abs=0.0006)


@pytest.mark.parametrize(("name", "naive"), [("C", 6.4), ("D", 54), ("M", 132)])
def test_peaks_are_those_of_the_table(name, naive):
    assert naive_peak_bytes(SHAPES[name]) / 1e9 == pytest.approx(naive, rel=0.03)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 1000, 1024])
def test_mean_slots_is_the_mean(length):
    shape = Shape("", 1, length, 8, 1, 3)
    assert shape.mean_slots == pytest.approx(1 + 3 * sum(n.bit_length() - 1 for n in range(1, length + 1)) / length)
    assert shape.slots == 1 + 3 * int(math.log2(length))


# Of docs/costs.md: MB of weights and of the state at 131k, microseconds of attention at 3.0 TB/s.
DECODE_TABLE = {
    (512, 1): (3.1, 0.04, (23, 90, 717)),
    (512, 32): (3.1, 1.3, (717, 2864, 22907)),
    (512, 256): (3.1, 10.8, (5727, 22907)),
    (1024, 1): (12.6, 0.08, (48, 182, 1434)),
    (1024, 32): (12.6, 2.7, (1434, 5729)),
    (1024, 256): (12.6, 21.5, (11456,)),
    (4096, 1): (201, 0.3, (224, 761, 5771)),
    (4096, 32): (201, 10.8, (5771, 22951)),
    (4096, 256): (201, 86, ()),
}


@pytest.mark.parametrize("sizes", DECODE_TABLE, ids=str)
def test_bytes_are_those_of_the_table(sizes):
    (embedding, batch), (weights, state, attention) = sizes, DECODE_TABLE[sizes]
    found = decode_bytes(0, embedding, 1)
    assert printed(found / 1e6, weights)
    assert printed((decode_bytes(batch, embedding, 1 << 17) - found) / 1e6, state)
    for n, microseconds in zip((1 << 15, 1 << 17, 1 << 20), attention, strict=False):
        total = 8 * embedding**2 + cache_bytes(batch, embedding, n)
        assert total / 3.0e6 == pytest.approx(microseconds, abs=1.01, rel=1e-3)


def test_every_size_of_the_table_is_timed():
    assert set(ORDER) == set(DECODE_TABLE) and set(LENGTHS) == {1 << 10, 1 << 15, 1 << 17, 1 << 20}
