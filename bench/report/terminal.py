"""Rows as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.extras import tabulate


def table(headers: list[str], lines: Iterable[list[Any]]) -> str:
    return tabulate(list(lines), headers, tablefmt="simple", disable_numparse=True)
