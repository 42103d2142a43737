"""The README's block: rules choose its lines, a loss among them, and it is what the stored rows say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.report import plots, report
from bench.report.headline import headline
from tests.bench.rows import FOLDER as ROWS
from tests.bench.rows import row as _row
from tests.bench.rows import rows as _rows

ROOT = Path(__file__).resolve().parents[2]


def _lines(scaling: list[dict[str, Any]], decode: list[dict[str, Any]] = ()) -> dict[str, list[str]]:  # type: ignore[assignment]
    """The cells of the table's lines, by the beginning of the first."""
    found = headline({"scaling": scaling, "decode": decode}, "somewhere")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines() if line.startswith("|")]
    return {cells[0].split(",")[0]: cells[1:] for cells in lines[2:]}


def _cache(position: int, provider: str, ratio: float | None = None, embedding: int = 32) -> dict[str, Any]:
    shape = {"batch": 1, "embedding": embedding, "heads": 4, "bank": 2}
    head = {"provider": provider, "operation": "step", "shape": shape, "position": position, "dtype": "float32"}
    return {**head, "unit": "us", "median": 2.0, **({} if ratio is None else {"ratio": ratio, "median": 2 * ratio})}


def test_the_lines_are_the_longest_training_the_deepest_cache_and_the_worst_ratio() -> None:
    scaling = _rows("scaling")
    decode = [_cache(n, "ours", embedding=size) for n in (1024, 32768, 1 << 20) for size in (32, 512)]
    decode += [_cache(n, "KV cache", ratio, size) for n, ratio in ((1024, 3.0), (32768, 40.0)) for size in (32, 512)]
    # Deeper, but beside one of two layers only; and a better cache than the plain one.
    decode += [_cache(1 << 20, "KV cache", 900.0, 32), _cache(32768, "KV cache, fused", 34.0, 512)]
    found = _lines(scaling, decode)
    assert found == {
        "training": ["L = 2,048, E = 64, forward+backward, float32", "12 ms", "sdpa-flash 36 ms", "3×"],
        "one token": ["E = 512, n = 32,768, float32", "2 µs", "KV cache, fused 68 µs", "34×"],
        "the worst ratio of all lengths and contenders": [
            "L = 128, E = 64, forward, float32", "1 ms", "sdpa-flash 0.41 ms", "0.41×",
        ],
    }  # fmt: skip


def test_where_others_win_is_said_by_length_and_contender() -> None:
    rows = {"scaling": _rows("scaling"), "memory": _rows("memory"), "decode": []}
    said = headline(rows, "somewhere").splitlines()
    assert said[-3:] == [
        "- Others are faster: layer, forward, E = 64: sdpa-flash below L = 2,048; "
        "layer, forward+backward, E = 64: sdpa-flash below L = 2,048.",
        "- Others need less memory: layer, forward+backward, E = 64: sdpa-flash below L = 512.",
        "- somewhere",
    ]
    won = [_row(128, "ours", median=1.0), _row(128, "GRU", median=2.0)]
    assert "- Others are faster: nowhere.\n" in headline({"scaling": won}, "somewhere")


def test_our_other_forms_and_gaps_are_no_contenders() -> None:
    rows = [_row(128, "ours", median=1.0, direction="training"), _row(128, "ours, lean", median=0.1)]
    rows += [_row(128, "sdpa-flash", gap="would take 9 GB", direction="training"), _row(128, "ours", median=1.0)]
    assert _lines(rows) == {}
    assert headline({}, "somewhere") == "- somewhere"


def test_a_gpu_comes_before_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "FIGURES", {"scaling": plots.FIGURES["scaling"]})
    results = Path(shutil.copytree(ROWS, tmp_path / "results"))
    readme, full = tmp_path / "README.md", results / "README.md"

    def shown() -> str:
        loaded = report.load(results)
        return report.summary(loaded, report.Pictures(loaded, results / "plots"), readme, full)

    assert "- cpu: made-up, medians: `python -m bench scaling`, 2 threads, commit 0000000, 2000-01-01; " in shown()
    assert shown().endswith(". [All tables](results/README.md).") and "scaling-cpu-dark.svg" in shown()
    gpu = (results / "scaling.jsonl").read_text().replace("cpu: made-up", "Made-Up GPU").replace("made-up", "gpu")
    with open(results / "scaling.jsonl", "a") as file:
        file.write(gpu)
    found = shown()
    assert "- Made-Up GPU, medians: `python -m bench scaling`" in found and "scaling-made-up-gpu-dark.svg" in found
    assert "cpu" not in found and "bench decode" not in found


def test_the_readme_says_what_the_stored_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in twelve lines at most."""
    results, readme = ROOT / "bench" / "results", ROOT / "README.md"
    drawn = {path.name: b"" for path in (results / "plots").glob("*.svg")}
    monkeypatch.setattr(plots, "draw", lambda rows: drawn)
    loaded = report.load(results)
    block = report.summary(loaded, report.Pictures(loaded, results / "plots"), readme, results / "README.md")
    content = readme.read_text(encoding="utf-8")
    assert len(re.findall("<!-- bench -->", content)) == 1
    assert report.update(content, block) == content
    assert len(block.splitlines()) <= 12
