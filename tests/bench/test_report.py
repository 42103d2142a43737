"""The report: rows alone decide what it says, gaps and losses are named, files change whole or not at all.

The rows in ``bench_rows`` are made up.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.errors import InputError
from bench.report import chapters as report_chapters
from bench.report import plots, report
from bench.report.tables import grid, losses, milliseconds, number, time_cell
from tests.bench.rows import FOLDER as ROWS
from tests.bench.rows import row as _row
from tests.bench.rows import rows as _rows

README = "# Title\n\n<!-- bench -->\nold\n<!-- /bench -->\n\nEnd\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROWS, tmp_path / "results"))


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(README)
    return path


def _start(path: Path, name: str, finished: bool, rows: int = 1, **fields: Any) -> None:
    """Append an invocation to a journal; fields go to its start, options and environment among them."""
    start = {"kind": "start", "run": path.stem, "invocation": name, "time": "2000-01-01T00:00:00Z"}
    lines: list[dict[str, Any]] = [{**start, "environment": {"device": "cpu: made-up"}, "options": {}, **fields}]
    for case in range(rows):
        row = {"kind": "row", "invocation": name, "case": str(case), "part": [1, 1]}
        lines.append({**row, **_row(128, "ours", median=1.0, unit="ms")})
    lines += [{"kind": "end", "invocation": name}] if finished else []
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


# Tables


def test_kernels() -> None:
    found = report_chapters.kernels(_rows("kernels"))
    head, _, first, *_ = found[found.index("| (B; L; E; m) ") :].splitlines()
    assert head == (
        "| (B; L; E; m)         | direction        |   ours, ms |   share of floor "
        "|       materialised, ms |       sdpa-flash, ms |"
    )
    assert first == (
        "| P (16; 512; 32; 2)   | forward          |  10 (9–11) |             41 % "
        "| 72.25 (65–79.5), 7.23× | 9.1 (8.19–10), 0.91× |"
    )
    assert found.index("**tree**") < found.index("**layer**")
    assert "sdpa-flash is faster at L = 512 (0.91 of our time)" in found


def test_every_reason_for_a_gap_is_named_once_and_a_red_gate_has_no_number() -> None:
    found = report_chapters.kernels(_rows("kernels"))
    gaps = "\n- [1] gla, simple-gla: flash-linear-attention is not installed\n- [2] GRU: gate: error 0.3 above 1e-05\n"
    assert gaps in found
    # Its rows hold a median and a ratio of 0.1 all the same.
    assert found.count("GRU") == 1 and "0.1" not in found.replace(gaps, "")
    scaling = report_chapters.scaling(_rows("scaling"))
    assert "- [1] materialised: would take 9 GB\n" in scaling
    assert re.search(r"\n\| 2,048 \| forward +\| +4 \(3.6–4.4\) \|[^|]*\| +\[1\] \|", scaling)


def test_where_ours_has_no_number_nobody_has_a_ratio() -> None:
    rows = [_row(128, "ours", gap="gate: not equal", median=1.0), _row(128, "GRU", median=2.0, ratio=0.5)]
    assert grid(rows, time_cell).splitlines()[-3:] == ["Gaps:", "", "- [1] ours: gate: not equal"]
    assert "×" not in grid(rows, time_cell)
    assert losses(rows) == "Where we lose: nothing was measured beside ours."


def test_what_is_absent_is_a_dash_and_markup_is_none() -> None:
    rows = [_row(128, "ours", median=1.0), _row(256, "ours", median=2.0), _row(128, "new | <b>", median=None, ratio=2)]
    rows.append(_row(256, "new | <b>", median=3.0))
    assert grid(rows, time_cell).splitlines()[2:] == [
        "| L   | direction   |   ours, ms |   new \\| &lt;b>, ms |",
        "|-----|-------------|------------|---------------------|",
        "| 128 | forward     |          1 |                   – |",
        "| 256 | forward     |          2 |             3, 1.5× |",
    ]


def test_numbers() -> None:
    assert [number(value) for value in (417.56, 9999.6, 1.5e6, 0.00012345, 0, None)] == [
        "417.6", "10,000", "1,500,000", "0.0001234", "0", "–",
    ]  # fmt: skip
    assert number(999.6, 3) == "1,000"


def test_decode_honours_its_unit() -> None:
    rows = _rows("decode")
    assert milliseconds(rows[0]) == pytest.approx(0.002)
    found = report_chapters.decode(rows)
    assert "| n      |        ours, µs |   ours, layer.step, µs |           aten, fused, µs |" in found
    assert "\n| 1,024  | 2 (1–4; p99 10) |  10 (5–20; p99 50), 5× |" in found
    assert re.search(r"\| rate at which the weights are read +\| B = 1, E = 32, .* 9.25 GB/s \|", found)
    assert "- step, E = 32: lstm is faster at n = 32,768 (0.75 of our time)" in found
    with pytest.raises(InputError, match="unit of a row of decode: expected one of us, ms, s, got 'weeks'"):
        milliseconds({**rows[0], "unit": "weeks"})


def test_memory() -> None:
    found = report_chapters.memory(_rows("memory"))
    assert "|            ours, MB |            sdpa-flash, MB |" in found
    assert "| 0.256 (0.128 saved) | 0.128 (0.064 saved), 0.5× | 1.024 (0.512 saved), 4× |" in found
    assert found.endswith("sdpa-flash is smaller below L = 512 (0.5 of our peak)")


def test_slopes() -> None:
    found = report_chapters.scaling(_rows("scaling"))
    assert "| ours       | forward+backward |                          1.004 |      128 |  2,048 |" in found


def test_table1_is_a_mean_with_its_spread_beside_the_papers() -> None:
    found = report_chapters.table1(_rows("paper-table1"))
    # 1.78 and 1.80: mean 1.79, standard deviation 0.02/√2.
    assert re.search(r"\| logmem .*\| +2 \|.*\| 1.7900 ± 0.0141 \| +1.7742 \|", found)
    assert re.search(r"\| gpt2 .*\| +1 \|.*\| +1.9600 \| +1.9704 \|", found)
    assert "| [1]" not in found
    gap = report_chapters.table1([*_rows("paper-table1"), {"model": "expsum", "embedding": 32, "gap": "no time"}])
    assert "| expsum " in gap and gap.endswith("- [1] expsum: no time")


def test_recall_of_one_and_of_two_pairs_stands_apart() -> None:
    head = {"variant": "logmem-1", "model": "logmem", "chance": 0.125, "queries": 128}
    rows = [
        {**head, "by": "distance", "distance": 1, "pairs": 1, "accuracy": 1.0, "unbound": 1.0},
        {**head, "by": "distance", "distance": 64, "pairs": 1, "accuracy": 0.6, "unbound": 1.0},
        {**head, "by": "distance", "distance": 1, "pairs": 2, "accuracy": 0.4, "unbound": 0.5},
        {**head, "by": "distance", "distance": 64, "pairs": 2, "accuracy": 0.2, "unbound": 0.5},
        {**head, "by": "level", "level": 6, "pairs": 2, "accuracy": 0.25, "unbound": 0.5},
    ]
    one, two = report_chapters.recall_sentence(rows).split("\n\n")
    assert one.startswith(
        "1 pair in a stream, accuracy at distance 64 (in parentheses at 1): logmem-1 60.0 % (100.0 %)"
    )
    assert "logmem-1 20.0 % (40.0 %)" in two and "knowing the values but not their keys, 50.0 %" in two
    told = report_chapters.recall(rows)
    assert told.index("1 pair in a stream:") < told.index("2 pairs in a stream:")
    assert "accuracy at level" in told.split("2 pairs in a stream:")[1] and "25.0 %" in told


def test_recall() -> None:
    rows = _rows("recall")
    sentence = (
        "Accuracy at distance 1,024 (in parentheses at 16): bank 4 75.0 % (100.0 %); "
        "bank 1 30.0 % (90.0 %); chance is 25.0 %."
    )
    assert report_chapters.recall_sentence(rows) == sentence
    found = report_chapters.recall(rows)
    assert found.startswith(sentence) and found.endswith("- [1] attention: would take 2 h")
    assert re.search(r"\| \*lowest level\* +\| +4.5 \| +10.2 \|", found)
    levels = [{**row, "level": {"4": 500, "5": 12}} for row in rows if "level" in row]
    assert "4: 500, 5: 12" in report_chapters.recall(levels)


def test_agreement() -> None:
    found = report_chapters.agreement(_rows("agreement"))
    assert re.search(r"\| float32 .* 1.25e-05 \| +1.25e-07 \| +none \| +0 \|", found)
    assert re.search(r"\| bfloat16 .* 0.125 \| +0.00125 \| +17 \| +1,200 \|", found)
    assert re.search(r"\| float32 .*\| +– \| +– \| +– \| +– \|$", report_chapters.agreement([{"dtype": "float32"}]))


# Where ours loses


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((0.41, 0.9, 2, 3), ["below L = 512 (0.41 to 0.9 of our time)"]),
        ((2, 0.9, 0.8, 3), ["from L = 256 to 512 (0.8 to 0.9 of our time)"]),
        ((2, 0.9, 3, 0.5), ["at L = 256 (0.9 of our time)", "at L = 1,024 (0.5 of our time)"]),
        ((0.5, 2, 0.7, 0.6), ["below L = 256 (0.5 of our time)", "from L = 512 to 1,024 (0.6 to 0.7 of our time)"]),
        ((0.5, 0.999, 0.7, 0.6), ["at every L measured, 128 to 1,024 (0.5 to 0.999 of our time)"]),
        ((0.5,), ["at L = 128 (0.5 of our time)"]),
    ],
)
def test_losses_are_ranges(ratios: tuple[float, ...], said: list[str]) -> None:
    rows = []
    for power, ratio in enumerate(ratios):
        rows += [_row(128 << power, "ours", median=1.0), _row(128 << power, "GRU", median=9.0, ratio=ratio)]
    lines = [f"- layer, forward, E = 64: GRU is faster {where}" for where in said]
    assert losses(rows[::-1]).splitlines() == ["Where we lose:", "", *lines]


def test_a_loss_without_a_ratio_is_a_loss() -> None:
    rows = [_row(128, "ours", median=1.0, unit="ms"), _row(128, "GRU", median=900.0, unit="us")]
    assert losses(rows).endswith("GRU is faster at L = 128 (0.9 of our time)")
    assert losses([rows[0], {**rows[1], "median": 1000.0}]).startswith("Where we lose: nowhere")


def test_losses_do_not_mix_what_differs() -> None:
    rows = [
        _row(length, provider, median=median, dtype=dtype)
        for length, theirs in ((128, 0.5), (256, 2.0))
        for dtype, factor in (("float32", 1.0), ("bfloat16", 10.0))
        for provider, median in (("ours", 1.0), ("ours, lean", 0.1), ("GRU", theirs * factor))
    ]
    assert losses(rows).splitlines()[2:] == [
        "- layer, forward, float32, E = 64: GRU is faster below L = 256 (0.5 of our time)"
    ]


# Which rows


def test_the_newest_finished_invocation_counts_and_rehearsals_never(tmp_path: Path) -> None:
    path = tmp_path / "kernels.jsonl"

    def chosen() -> str:
        [invocation] = report.load(tmp_path)["kernels"].values()
        return invocation.start["invocation"]

    _start(path, "rehearsal", True, time="2009-01-01T00:00:00Z", options={"quick": True})
    assert report.load(tmp_path) == {}
    _start(path, "unfinished", False, time="2003-01-01T00:00:00Z")
    assert chosen() == "unfinished"
    _start(path, "part", True, time="2008-01-01T00:00:00Z", options={"only": ["layer"]})
    assert chosen() == "part"
    _start(path, "second", True, time="2002-01-01T00:00:00Z")
    _start(path, "first", True, time="2001-01-01T00:00:00Z")
    assert chosen() == "second"
    _start(path, "empty", False, rows=0, time="2005-01-01T00:00:00Z")
    assert chosen() == "second"
    with pytest.raises(InputError, match="results: expected a folder"):
        report.load(path)


def test_devices_are_apart(results: Path, readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "FIGURES", {})
    environment = {"device": "Made-Up GPU 80GB", "threads": 1, "commit": "1111111aaaa"}
    _start(results / "kernels.jsonl", "gpu", True, environment=environment)
    report.report(results, readme, results / "plots")
    found = (results / "README.md").read_text()
    assert (
        "\nMade-Up GPU 80GB, 1 thread, float32, commit 1111111, 2000-01-01. Rerun with `python -m bench kernels`.\n"
        in found
    )
    assert found.count("Rerun with `python -m bench kernels`") == 2
    # The goals are of GPUs alone.
    assert found.count("\n## Goals") == 1 and "\n## Goals, Made-Up GPU 80GB\n\n|" in found
    assert report.device_names(["cpu: a b", "GPU X"]) == {"cpu: a b": "cpu", "GPU X": "gpu-x"}
    assert report.device_names(["cpu: a", "cpu: b"]) == {"cpu: a": "cpu-a", "cpu: b": "cpu-b"}


def test_what_is_incomplete_or_uncommitted_is_said() -> None:
    loaded = report.load(ROWS)
    said = {run: report.caption(run, invocation) for run, found in loaded.items() for invocation in found.values()}
    assert "commit 0000000 with uncommitted changes, 2000-01-01" in said["paper-table1"]
    assert said["paper-table1"].endswith("Rerun with `python -m bench paper-table1`. **Incomplete: 3 cases.**")
    assert said["scaling"] == (
        "cpu: made-up, 2 threads, float32, torch 2.13.0, Python 3.11.7, commit 0000000, 2000-01-01, "
        "copies at 12 GB/s, multiplies at 45 GFLOP/s. Rerun with `python -m bench scaling` (longest: 2048)."
    )


# The files


def test_update_replaces_what_is_between_markers() -> None:
    content = "a\n<!-- bench -->old<!-- /bench -->\nb <!--bench-->\n\nx<!--/bench--> c\n<!-- other -->\n"
    found = report.update(content, "first\n\n")
    assert found == (
        "a\n<!-- bench -->\nfirst\n<!-- /bench -->\nb <!--bench-->\nfirst\n<!--/bench--> c\n<!-- other -->\n"
    )
    assert report.update(found, "first") == found
    assert report.update("no marker", "first") == "no marker"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "\n<!-- bench:three --><!-- /bench -->",
            "marker in line 2: expected <!-- bench --> or <!-- /bench -->, got <!-- bench:three -->",
        ),
        ("<!-- bench -->", "marker: expected <!-- /bench --> behind the last <!-- bench -->, got none"),
        (
            "<!-- bench -->\n<!-- bench --><!-- /bench -->",
            "marker in line 2: expected <!-- /bench --> before another, got none",
        ),
        ("\n<!-- /bench -->", "marker in line 2: expected one that opens before <!-- /bench -->, got none"),
    ],
)
def test_update_refuses_markers_that_do_not_match(content: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        report.update(content, "first")


def test_report_writes_everything_and_twice_the_same(
    results: Path, readme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {run: plots.FIGURES[run] for run in ("scaling", "memory")}
    monkeypatch.setattr(plots, "FIGURES", figures)
    report.report(results, readme, results / "plots")
    made = {path: path.read_bytes() for path in [readme, results / "README.md", *(results / "plots").iterdir()]}
    content, full = readme.read_text(), (results / "README.md").read_text()
    assert content.startswith("# Title\n\n<!-- bench -->\n<picture>") and content.endswith("\n\nEnd\n")
    assert "old" not in content
    for run, (title, _) in report_chapters.RUNS.items():
        assert f"\n## {title}\n" in full and f"`python -m bench {run}`" in full
    for page, base, drawn in ((content, "results/plots", ("scaling",)), (full, "plots", figures)):
        shown = re.findall(r'(?:src|srcset)="([^"]+)"', page)
        assert {f"{base}/{run}-cpu-{theme}.svg" for run in drawn for theme in plots.THEMES} == {*shown}
        assert all(((readme if page is content else results / "README.md").parent / name).is_file() for name in shown)
    assert len(made) == 2 + 2 * len(figures)
    report.report(results, readme, results / "plots")
    assert {path: path.read_bytes() for path in made} == made


def test_a_run_without_rows_says_how_to_make_them(tmp_path: Path, readme: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    report.report(empty, readme, empty / "plots")
    assert readme.read_text() == README.replace("old", "No results yet; `python -m bench scaling` makes them.")
    assert "\n\nNo results yet; `python -m bench decode` makes them.\n" in (empty / "README.md").read_text()


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_nothing_is_written_where_something_cannot_be_made(
    results: Path, readme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(results.iterdir())
    monkeypatch.setattr(plots, "FIGURES", {})
    readme.write_text("<!-- bench:unheard-of --><!-- /bench -->")
    with pytest.raises(InputError, match="unheard-of"):
        report.report(results, readme, results / "plots")
    readme.write_text(README)
    monkeypatch.setattr(plots, "FIGURES", {"recall": plots.recall, "paper-table1": _raise(KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        report.report(results, readme, results / "plots")
    assert sorted(results.iterdir()) == before and readme.read_text() == README
    with pytest.raises(InputError, match="readme: expected a text file"):
        report.report(results, results / "missing.md", results / "plots")


def test_an_interruption_before_the_end_leaves_the_readme(
    results: Path, readme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(path: Path, data: bytes) -> None:
        if path == readme:
            raise KeyboardInterrupt
        written.append(path)

    monkeypatch.setattr(report, "write_file", write)
    monkeypatch.setattr(plots, "FIGURES", {"recall": plots.recall})
    with pytest.raises(KeyboardInterrupt):
        report.report(results, readme, results / "plots")
    assert readme.read_text() == README
    assert written[-1] == results / "README.md" and len(written) == 3
