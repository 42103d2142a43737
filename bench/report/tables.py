"""Rows of results as Markdown: numbers, shapes, gaps, tables of contenders, and where ours loses."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from bench.errors import InputError
from bench.extras import tabulate
from bench.measure.journal import Row

ABSENT = "–"
OURS = "ours"
SYMBOLS = {
    "batch": "B", "length": "L", "tokens": "T", "memory": "M", "embedding": "E", "heads": "heads", "head_size": "D",
    "bank": "m", "position": "n",
}  # fmt: skip
DIRECTIONS: dict[object, str] = {"training": "forward+backward"}
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
MICRO = {"us": "µs"}

Value = Callable[[Row], float | None]
Cell = Callable[[Row, float | None], str]


def text(value: object) -> str:
    """A string from a row as it may stand in a table: one line, no markup of its own."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def number(value: object, digits: int = 4) -> str:
    """A number with so many significant digits, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ABSENT
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:g}"


def whole(value: object) -> str:
    """A count, in full."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else number(value, 6)


def percent(value: object, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %" if isinstance(value, int | float) else ABSENT


def table(headers: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first ``left`` columns are words, the others numbers."""
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=align)


def join(*parts: str) -> str:
    """Paragraphs, without those that are empty."""
    return "\n\n".join(filter(None, parts))


# Fields of rows


def is_ours(row: Row) -> bool:
    """Whether it is our own path, in one of its forms (``"ours"``, ``"ours, layer.step"``)."""
    return str(row.get("provider", "")).split(",")[0] == OURS


def label(row: Row) -> str:
    return text(row.get("label") or row.get("provider") or ABSENT)


def place(row: Row) -> dict[str, Any]:
    """Sizes of the shape, and the position of a step."""
    shape = row.get("shape") or {}
    found = {name: shape.get(name, row.get(name)) for name in SYMBOLS}
    return {name: value for name, value in found.items() if value is not None}


def measured(field: str) -> Value:
    """What reads a number from a row; None where it is absent or the row is a gap."""

    def read(row: Row) -> float | None:
        value = row.get(field)
        return None if row.get("gap") or isinstance(value, str | bool) else value

    return read


def scale(row: Row) -> float:
    """Milliseconds in one unit of the row's times.

    Raises:
        InputError: the row's unit is not one of time.
    """
    unit = row.get("unit", "ms")
    if unit not in MILLISECONDS:
        raise InputError(f"unit of a row of {row.get('run')}: expected one of {', '.join(MILLISECONDS)}, got {unit!r}")
    return MILLISECONDS[unit]


def milliseconds(row: Row, field: str = "median") -> float | None:
    value = measured(field)(row)
    return None if value is None else value * scale(row)


peak = measured("peak_bytes")


def circumstances(row: Row) -> tuple[Any, ...]:
    """What two rows share if their numbers are to be compared, the provider aside."""
    return tuple(row.get(name) for name in ("operation", "mode", "dtype", "direction")), tuple(place(row).items())


def ratios(rows: Iterable[Row], value: Value = milliseconds) -> list[tuple[Row, float]]:
    """Every contender of ours, and its time, or other ``value``, over ours.

    A row's own ``ratio`` comes first: it is a median over pairs. Where ours is a gap there is no ratio.
    """
    rows = list(rows)
    ours = {circumstances(row): row for row in rows if row.get("provider") == OURS}
    found = []
    for row in rows:
        own, theirs = ours.get(circumstances(row), {}), value(row)
        if row.get("provider") == OURS or theirs is None or own.get("gap"):
            continue
        ratio, base = row.get("ratio") if value is milliseconds else None, value(own)
        if ratio is not None:
            found.append((row, ratio))
        elif base:
            found.append((row, theirs / base))
    return found


class Gaps:
    """Reasons for missing numbers, each named once below the table."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def mark(self, row: Row) -> str:
        """What stands in the cell."""
        reason = text(row["gap"])
        labels = self._found.setdefault(reason, [])
        if label(row) not in labels:
            labels.append(label(row))
        return f"[{list(self._found).index(reason) + 1}]"

    def __str__(self) -> str:
        lines = [f"- [{i}] {', '.join(who)}: {why}" for i, (why, who) in enumerate(self._found.items(), 1)]
        return "\n".join(["Gaps:", "", *lines]) if lines else ""


# Tables of contenders


def varying(rows: Iterable[Row]) -> list[str]:
    """Sizes that are not the same in all rows; all of them where nothing varies."""
    places = [place(row) for row in rows]
    known = [name for name in SYMBOLS if any(name in found for found in places)]
    return [name for name in known if len({found.get(name) for found in places}) > 1] or known


def fixed(rows: Iterable[Row]) -> str:
    """The sizes that `varying` leaves out: ``B = 1, E = 512``."""
    rows = list(rows)
    apart, same = varying(rows), place(rows[0]) if rows else {}
    return ", ".join(f"{SYMBOLS[name]} = {whole(size)}" for name, size in same.items() if name not in apart)


def _name(row: Row) -> str:
    name = str((row.get("shape") or {}).get("name", ""))
    return "" if name.isdigit() else text(name)


def _sizes(row: Row, names: list[str]) -> str:
    sizes = [whole(place(row).get(name)) for name in names]
    return sizes[0] if len(sizes) == 1 else f"({'; '.join(sizes)})"


def time_cell(row: Row, ratio: float | None) -> str:
    """Median, percentiles and ratio."""
    spread = f"{number(row.get('p20'), 3)}–{number(row.get('p80'), 3)}" if {"p20", "p80"} <= row.keys() else ""
    tail = f"p99 {number(row.get('p99'), 3)}" if "p99" in row else ""
    inside = "; ".join(filter(None, (spread, tail)))
    shown = f"{number(row.get('median'))} ({inside})" if inside else number(row.get("median"))
    return shown if ratio is None else f"{shown}, {number(ratio, 3)}×"


def memory_cell(row: Row, ratio: float | None) -> str:
    """Peak and what is kept for backward, in MB, and the ratio of the peaks."""
    shown = number(row["peak_bytes"] / 1e6)
    if row.get("saved_bytes") is not None:
        shown += f" ({number(row['saved_bytes'] / 1e6)} saved)"
    return shown if ratio is None else f"{shown}, {number(ratio, 3)}×"


def grid(rows: Sequence[Row], cell: Cell, value: Value = milliseconds, unit: str | None = None) -> str:
    """One line for each shape, direction, mode and dtype, one column for each provider, ours first; gaps below."""
    gaps, ratio = Gaps(), {id(row): found for row, found in ratios(rows, value)}
    lines: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    labels: dict[str, str] = {}
    for row in rows:
        lines[circumstances(row)].setdefault(str(row.get("provider")), row)
        labels.setdefault(str(row.get("provider")), label(row))
        if row.get("gap"):
            gaps.mark(row)
    seen = [name for name in labels if any(name in line and value(line[name]) is not None for line in lines.values())]
    providers = sorted(seen, key=lambda name: (name != OURS, not is_ours({"provider": name})))
    names, named = varying(rows), len({_name(row) for row in rows}) > 1
    several = [key for key in ("mode", "direction", "dtype") if len({row.get(key) for row in rows}) > 1]
    if not several and rows and rows[0].get("direction"):
        several = ["direction"]
    symbols = "; ".join(SYMBOLS[name] for name in names)
    headers = [f"({symbols})" if len(names) > 1 else symbols, *several]
    own = [row for row in rows if row.get("provider") == OURS]
    # Shares are of time.
    shares = value is milliseconds and any(measured("share")(row) is not None for row in own)
    left = len(headers)
    for name in providers:
        units = {row.get("unit", "ms") for row in rows if row.get("provider") == name and not row.get("gap")}
        headers.append(f"{labels[name]}, {unit or '/'.join(sorted(MICRO.get(u, u) for u in units))}")
        if name == OURS and shares:
            headers.append("share of floor")
    found = []
    for line in lines.values():
        first = next(iter(line.values()))
        size = f"{_name(first) if named else ''} {_sizes(first, names)}".strip()
        cells = [size, *(text(DIRECTIONS.get(first.get(key), first.get(key) or ABSENT)) for key in several)]
        for name in providers:
            row = line.get(name, {})
            shown = ABSENT if value(row) is None else cell(row, ratio.get(id(row)))
            cells.append(gaps.mark(row) if row.get("gap") else shown)
            if name == OURS and shares:
                cells.append(percent(measured("share")(row)))
        if any(name in line for name in providers):
            found.append(cells)
    return join(fixed(rows), table(headers, found, left) if providers else "", str(gaps))


def by_operation(rows: Sequence[Row], draw: Callable[[Sequence[Row]], str]) -> str:
    """A table for each operation, under its name where there are several."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[str(row.get("operation", ABSENT))].append(row)
    if len(found) == 1:
        return draw(rows)
    return "\n\n".join(f"**{text(name)}**\n\n{draw(group)}" for name, group in found.items())


# Where ours loses

Points = list[tuple[int, float]]
Losing = tuple[str, str, str, list[float]]
"""What is compared, who beats ours, where along the axis, and the ratios there."""


def _groups(pairs: list[tuple[Row, float]], axis: str) -> Iterable[tuple[str, str, Points]]:
    """What is compared, by whom, and its ratios along the axis."""
    sizes = ("embedding", "heads", "head_size", "bank", "batch", "length", "tokens", "memory", "position")
    others = [name for name in sizes if name != axis]
    rows = [row for row, _ in pairs]
    apart = {name for name in others if len({place(row).get(name) for row in rows}) > 1} | {"embedding"}
    dtypes = len({row.get("dtype") for row in rows}) > 1

    def what(row: Row, names: list[str]) -> str:
        words = [row.get("operation"), row.get("mode"), DIRECTIONS.get(row.get("direction"), row.get("direction"))]
        sizes = place(row)
        words += [row.get("dtype")] if dtypes else []
        words += [f"{SYMBOLS[name]} = {whole(sizes[name])}" for name in names if name in sizes and name in apart]
        return ", ".join(text(word) for word in words if word)

    def split(names: list[str], chosen: list[tuple[Row, float]]) -> Iterable[tuple[str, str, Points]]:
        groups: dict[tuple[str, str], list[tuple[Row, float]]] = defaultdict(list)
        for row, ratio in chosen:
            groups[what(row, names), label(row)].append((row, ratio))
        for (title, who), group in groups.items():
            points = [(place(row).get(axis, 0), ratio) for row, ratio in group]
            batches = {place(row).get("batch") for row, _ in group}
            # A batch that shrinks as rows grow belongs to the axis, unless a length came with two of them.
            if "batch" not in names and (len(batches) == 1 or len({at for at, _ in points}) < len(points)):
                yield from split([*names, "batch"], group)
            else:
                yield title, who, sorted(points)

    yield from split([name for name in others if name != "batch"], pairs)


def _ranges(points: Points, symbol: str) -> Iterable[tuple[str, list[float]]]:
    """Where along the axis ours loses, in words, and the ratios there."""
    runs = [(loses, list(group)) for loses, group in groupby(points, lambda point: point[1] < 1)]
    for i, (loses, group) in enumerate(runs):
        if not loses:
            continue
        low, high = group[0][0], group[-1][0]
        if not low:
            where = ""
        elif i == 0 and len(runs) > 1:
            where = f"below {symbol} = {whole(runs[1][1][0][0])}"
        elif len(group) == 1:
            where = f"at {symbol} = {whole(low)}"
        elif len(runs) == 1:
            where = f"at every {symbol} measured, {whole(low)} to {whole(high)}"
        else:
            where = f"from {symbol} = {whole(low)} to {whole(high)}"
        yield where, [ratio for _, ratio in group]


def losing_ranges(rows: Sequence[Row], value: Value = milliseconds) -> list[Losing]:
    """Every case in which a contender beats ours, as ranges of length or position."""
    pairs = [(row, ratio) for row, ratio in ratios(rows, value) if not is_ours(row)]
    axis = "position" if any("position" in place(row) for row, _ in pairs) else "length"
    return [
        (what, who, where, found)
        for what, who, points in _groups(pairs, axis)
        for where, found in _ranges(points, SYMBOLS[axis])
    ]


def losses(rows: Sequence[Row], value: Value = milliseconds, word: str = "faster", of: str = "time") -> str:
    """`losing_ranges` in words, with the ratios there."""
    count = sum(not is_ours(row) for row, _ in ratios(rows, value))
    if not count:
        return "Where we lose: nothing was measured beside ours."
    lines = []
    for what, who, where, found in losing_ranges(rows, value):
        shares = dict.fromkeys((number(min(found), 3), number(max(found), 3)))
        beaten = " ".join(filter(None, (f"{who} is {word}", where)))
        lines.append(f"- {what}: {beaten} ({' to '.join(shares)} of our {of})")
    if not lines:
        return f"Where we lose: nowhere; no contender is {word} in any of {count} comparisons."
    return "\n".join(["Where we lose:", "", *lines])


def over_seeds(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation; the value alone where there is one."""
    found = [value for value in values if value is not None]
    if not found:
        return ABSENT
    mean = f"{statistics.fmean(found):.4f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.4f}"


def variant(row: Row, rows: Sequence[Row]) -> str:
    """Name of a line of recall: the variant, and the model where there are several."""
    names = [str(row.get("variant", row.get("model")))]
    if len({row.get("model") for row in rows}) > 1 and row.get("model") not in (None, names[0]):
        names.append(str(row["model"]))
    return ", ".join(names)
