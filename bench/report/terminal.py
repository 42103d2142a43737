"""Rows as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tabulate import tabulate

from bench.measure.journal import Row

from .tables import SYMBOLS


def table(headers: list[str], lines: Iterable[list[Any]]) -> str:
    return tabulate(list(lines), headers, tablefmt="simple", disable_numparse=True)


def where(row: Row) -> str:
    """The operation, shape and direction of a row."""
    shape = row["shape"]
    found = ", ".join(str(shape[name]) for name in SYMBOLS if name in shape)
    return f"{row['operation']} ({found}) {row.get('direction', '')}".strip()


def sizes(rows: Iterable[Row]) -> str:
    """What the numbers are that `where` has."""
    shape: Row = next((row["shape"] for row in rows if "shape" in row), {})
    return f"({', '.join(symbol for name, symbol in SYMBOLS.items() if name in shape)})"


def spread(row: Row) -> str:
    return f"{row['median']:.4g} ({row['p20']:.4g} to {row['p80']:.4g})"


def timed_table(rows: list[Row]) -> str:
    """Median (20th to 80th percentile), how many times longer than ours, and the share of the floor."""
    lines = []
    for row in rows:
        if "gap" in row:
            lines.append([where(row), row["provider"], row["gap"], "", "", ""])
        elif "median" in row:
            ratio = f"{row['ratio']:.3g}x" if "ratio" in row else ""
            share = f"{100 * row['share']:.3g} %" if "share" in row else ""
            lines.append([where(row), row["provider"], spread(row), ratio, share, f"{row['error']:.1e}"])
    unit = next((row["unit"] for row in rows if "unit" in row), "ms")
    headers = [sizes(rows), "", unit, "of ours", "of the floor", "error"]
    return table(headers, lines)


def slope_table(rows: list[Row]) -> str:
    """Slopes of time over length."""
    lines = [
        [row["provider"], row["direction"], f"{row['slope']:.3f}", f"{row['from_length']:,} to {row['to_length']:,}"]
        for row in rows
        if row.get("slope") is not None
    ]
    return table(["", "", "slope", "over"], lines)


def memory_table(rows: list[Row]) -> str:
    """Megabytes at the peak, and kept for backward."""
    lines = []
    for row in rows:
        if "gap" in row:
            lines.append([where(row), row["provider"], row["gap"], ""])
            continue
        saved = f"{row['saved_bytes'] / 1e6:.4g}" if "saved_bytes" in row else ""
        lines.append([where(row), row["provider"], f"{row['peak_bytes'] / 1e6:.4g}", saved])
    return table([sizes(rows), "", "peak MB", "kept MB"], lines)
