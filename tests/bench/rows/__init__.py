"""Stored rows of every run, made up, and how tests read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import report

FOLDER = Path(__file__).parent


def rows(run: str) -> list[dict[str, Any]]:
    """The rows of a run."""
    [invocation] = report.load(FOLDER)[run].values()
    return invocation.rows


def row(length: int, provider: str, **fields: Any) -> dict[str, Any]:
    """One more row, of a layer at a length."""
    shape = {"batch": 1, "length": length, "embedding": 64, "heads": 4, "bank": 1}
    head = {"provider": provider, "operation": "layer", "shape": shape, "direction": "forward", "dtype": "float32"}
    return {**head, **fields}
