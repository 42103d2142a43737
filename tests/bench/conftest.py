"""A corpus and settings for the runs that train."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.lm import settings
from tests.support.paper import TINY


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat\nand the dog sat on the cat\n" * 10)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's settings, so small that a training takes a moment."""
    monkeypatch.setitem(settings._PRESETS, "paper-32", TINY)
