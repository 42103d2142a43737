"""The drawings: every provider with rows, on labelled axes, alike for like rows, for light pages and dark ones.

The rows in ``bench_rows`` are made up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.report import plots
from tests.bench.rows import row as _row
from tests.bench.rows import rows as _rows


@pytest.fixture
def draw() -> Iterator[Callable[..., Figure]]:
    def one(run: str, rows: list[dict[str, Any]], theme: str = "light") -> Figure:
        order = plots.styles(str(row.get("provider")) for run in plots.PROVIDERS for row in _rows(run))
        figure = plots.FIGURES[run](rows, theme, order)
        assert figure is not None
        return figure

    with plots.settings("light"):
        yield one


def _legend(figure: Figure) -> set[str]:
    return {entry.get_text() for legend in figure.legends for entry in legend.get_texts()}


@pytest.mark.parametrize(
    ("run", "names", "across", "up", "scales"),
    [
        ("scaling", {"ours", "sdpa-flash", "materialised", "LSTM"}, "sequence length L, tokens (1k = 1,024)",
         "forward+backward, ms", ("log", "log")),
        ("memory", {"ours", "sdpa-flash", "materialised"}, "sequence length L, tokens (1k = 1,024)",
         "peak memory, bytes", ("log", "log")),
        ("paper-fig9", {"ours", "attention", "attention, cached"}, "sequence length L, tokens (1k = 1,024)",
         "time, ms", ("log", "log")),
        ("paper-fig10", {"ours", "attention", "attention, cached"}, "sequence length L, tokens (1k = 1,024)",
         "peak memory, bytes", ("log", "log")),
        ("recall", {"bank 1", "bank 4", "chance"}, "distance, tokens (1k = 1,024)", "accuracy", ("log", "linear")),
        ("paper-table1", {"logmem", "gpt2", "the paper's, at the end"}, "step", "validation loss, nats per character",
         ("linear", "linear")),
        ("lamemo-training", {"lamemo", "transformer-xl", "gpt2", "logmem"}, "step",
         "validation loss, nats per character", ("linear", "linear")),
    ],
)  # fmt: skip
def test_drawings_show_every_provider_on_labelled_axes(
    draw: Callable[..., Figure], run: str, names: set[str], across: str, up: str, scales: tuple[str, str]
) -> None:
    figure = draw(run, _rows(run))
    assert _legend(figure) == names
    assert {axes.get_xlabel() for axes in figure.axes} == {across} and figure.axes[0].get_ylabel() == up
    assert {(axes.get_xscale(), axes.get_yscale()) for axes in figure.axes} == {scales}
    drawn = {line.get_label() for axes in figure.axes for line in axes.lines if len(line.get_xdata())}  # type: ignore[arg-type]
    assert names - {"the paper's, at the end"} <= drawn
    titles = {
        **dict.fromkeys(("paper-fig9", "paper-fig10"), ["parallel", "sequential"]),
        **dict.fromkeys(("paper-table1", "lamemo-training"), ["E = 32"]),
    }
    assert [axes.get_title() for axes in figure.axes] == titles.get(run, [""])


def test_drawings_hold_the_rows(draw: Callable[..., Figure]) -> None:
    [axes] = draw("scaling", _rows("scaling")).axes
    lines = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axes.lines}
    assert lines["ours"] == [(128, 3.0), (512, 4.5), (2048, 12.0)]
    assert lines["materialised"] == [(128, 12.0), (512, 18.0)]
    bands = [band.get_paths()[0].vertices for band in axes.collections]
    assert len(bands) == 4 and {(128.0, 2.7), (128.0, 3.3)} <= {tuple(map(float, at)) for at in bands[0]}
    [axes] = draw("recall", _rows("recall")).axes
    assert [*axes.lines[-1].get_ydata()] == [0.25, 0.25]  # type: ignore[arg-type]


def test_gaps_are_not_drawn(draw: Callable[..., Figure]) -> None:
    rows = [{**row, "gap": "gate: wrong"} if row.get("provider") == "LSTM" else row for row in _rows("scaling")]
    assert _legend(draw("scaling", rows)) == {"ours", "sdpa-flash", "materialised"}
    none = [{**row, "gap": "gate: wrong"} for row in _rows("scaling")]
    assert plots.scaling(none, "light", plots.styles(["ours"])) is None


def test_ticks_can_be_read(draw: Callable[..., Figure]) -> None:
    rows = [_row(1 << k, "ours", median=float(k), direction="training") for k in range(7, 21)]
    [axes] = draw("scaling", rows).axes
    locator = axes.xaxis.get_major_locator()
    assert isinstance(locator, FixedLocator)
    shown = [axes.xaxis.get_major_formatter()(at, None) for at in locator.locs]  # type: ignore[arg-type]
    assert shown == ["1M", "256k", "64k", "16k", "4k", "1k", "256"]
    assert [plots.amount(size) for size in (100, 1e5, 1e6, 1e10)] == ["100 B", "100 kB", "1 MB", "10 GB"]


def test_a_provider_has_one_colour_and_one_marker_everywhere(draw: Callable[..., Figure]) -> None:
    looks: dict[str, set[tuple[str, str]]] = {}
    for run in plots.PROVIDERS:
        for axes in draw(run, _rows(run)).axes:
            for line in axes.lines:
                looks.setdefault(str(line.get_label()), set()).add((str(line.get_color()), str(line.get_marker())))
    assert all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == len(looks) == 6
    many = plots.styles(["ours", *(f"provider {i}" for i in range(20))])
    lines = [tuple(style.line("dark").values()) for style in many.values()]
    assert len(set(lines)) == 21 and [line[0] for line in lines].count(plots.COLOURS["dark"][0]) == 1


def test_drawings_are_small_alike_and_made_for_both_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"cpu": {"scaling": _rows("scaling"), "recall": _rows("recall")}}
    made = plots.draw(results)
    assert {*made} == {f"{run}-cpu-{theme}.svg" for run in ("scaling", "recall") for theme in plots.THEMES}
    with matplotlib.rc_context({"axes.linewidth": 9.0, "svg.fonttype": "path"}):
        assert plots.draw(results) == made
    for name, data in made.items():
        content = data.decode()
        theme = name.removesuffix(".svg").rpartition("-")[2]
        assert len(data) < 150_000
        # Words are text, which can be searched, with fonts that every page has behind those that it may not have.
        assert re.search(r"<text [^>]*sans-serif[^>]*>(accuracy|forward\+backward, ms)</text>", content)
        assert "<dc:date>" not in content and "Matplotlib v" not in content
        assert plots.INK[theme] in content
        assert not {ink for other, ink in plots.INK.items() if other != theme and ink in content}
        assert not re.search(r"fill: (#ffffff|white)", content)
