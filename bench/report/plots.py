"""Rows of results as SVG drawings, one for light pages and one for dark ones, the same bytes for the same rows.

Text is text, for who reads or searches it; it is drawn in what the reader has of the fonts that are named.
"""

from __future__ import annotations

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.measure.journal import Row

from .tables import OURS, Value, is_ours, measured, milliseconds, peak, place, variant

# Legible on white and on GitHub's dark page, and apart for the colour-blind (after Okabe and Ito, and Tol).
COLOURS = {
    "light": ("#0072b2", "#d55e00", "#007a5a", "#b5489a", "#8a6d00", "#5b3a9e", "#57606a", "#a4133c"),
    "dark": ("#58a6ff", "#ff8c42", "#2fc79a", "#f08fcf", "#e6c229", "#b39dff", "#aab4be", "#ff6b81"),
}
INK = {"light": "#1f2328", "dark": "#e6edf3"}
GRID = {"light": "#d1d9e0", "dark": "#3d444d"}
THEMES = tuple(COLOURS)
MARKERS = "osD^vPX*<>hp"
DASHES = ("-", "--", ":", "-.")
MOST_TICKS = 8

# Which runs show providers; they have one colour each in all of them.
PROVIDERS = ("scaling", "memory", "paper-fig9", "paper-fig10")


@dataclass(frozen=True)
class Style:
    """Colour, marker and dashes of the ``index``-th name."""

    index: int

    def line(self, theme: str, dash: int = 0) -> dict[str, Any]:
        first, *others = COLOURS[theme]
        turn, at = divmod(self.index - 1, len(others))
        turn = max(turn, 0) + dash
        return {
            # The first one's is nobody else's.
            "color": others[at] if self.index else first,
            "marker": MARKERS[self.index % len(MARKERS)],
            "linestyle": DASHES[turn % len(DASHES)],
        }


Styles = Mapping[str, Style]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name; the first one is kept for ours."""
    others = sorted({*names} - {OURS}, key=lambda name: (not is_ours({"provider": name}), name.lower(), name))
    return {name: Style(index) for index, name in enumerate([OURS, *others])}


def tokens(count: float) -> str:
    """Powers of two as they are read: 128, 1k, 32k, 1M."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def amount(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


@contextmanager
def settings(theme: str) -> Iterator[None]:
    """matplotlib's own settings, whatever the user's are, in the colours of a theme."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
        ink = dict.fromkeys(inked, INK[theme])
        matplotlib.rcParams.update(
            {
                **ink,  # type: ignore[dict-item]
                "axes.facecolor": "none",
                "axes.grid": True,
                "axes.spines.right": False,
                "axes.spines.top": False,
                "font.size": 11,
                "grid.color": GRID[theme],
                "grid.linewidth": 0.6,
                "legend.frameon": False,
                "lines.linewidth": 1.6,
                "lines.markersize": 5,
                "savefig.facecolor": "none",
                "svg.fonttype": "none",
                "svg.hashsalt": "lmn_kernels",
            }
        )
        yield


def _figure(panels: int = 1, width: float = 8.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, sharey=panels > 1)
    return figure, list(axes[0])


def _powers(axes: Axes, values: Iterable[float], name: str) -> None:
    """A base-two axis across, with as many ticks as fit."""
    found = [value for value in values if value > 0]
    axes.set_xscale("log", base=2)
    low, high = math.floor(math.log2(min(found))), math.ceil(math.log2(max(found)))
    step = max(1, math.ceil((high - low) / MOST_TICKS))
    # From the top: the longest is what one looks for.
    axes.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(high, low - 1, -step)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
    axes.set_xlabel(name)


def _decades(axes: Axes, values: Iterable[float], show: Callable[[float], str]) -> None:
    found = [value for value in values if value > 0]
    axes.set_yscale("log")
    wide = max(found) / min(found) > 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """To the right of everything, each name once."""
    found: dict[str, Any] = {}
    for handle, name in (pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)):
        found.setdefault(name, handle)
    figure.legend(list(found.values()), list(found), loc="outside right upper")


def _series(rows: Sequence[Row], value: Value) -> Iterator[tuple[str, str, int, list[Row]]]:
    """Provider, label, which of its lines, and rows by length; several dtypes or layers are several lines."""
    rows = [row for row in rows if value(row) is not None and "length" in place(row)]
    apart = [
        name
        for name in ("embedding", "heads", "bank", "dtype")
        if len({{**row, **place(row)}.get(name) for row in rows}) > 1
    ]
    found: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        extra = [f"{name} {({**row, **place(row)}).get(name)}" for name in apart]
        title = ", ".join([str(row.get("label") or row.get("provider")), *extra])
        # Ours may have been timed again beside others.
        found[str(row.get("provider"))][title].setdefault(place(row)["length"], row)
    for provider, lines in found.items():
        for dash, (title, line) in enumerate(lines.items()):
            yield provider, title, dash, [line[length] for length in sorted(line)]


def _over_length(axes: Axes, rows: Sequence[Row], value: Value, theme: str, order: Styles) -> list[float]:
    """Draw every provider; returns the values."""
    drawn: list[float] = []
    for provider, title, dash, line in _series(rows, value):
        style = order[provider].line(theme, dash)
        lengths, values = [place(row)["length"] for row in line], [value(row) or 0.0 for row in line]
        front = 3 if is_ours({"provider": provider}) else 2
        axes.plot(lengths, values, label=title, zorder=front, linewidth=2.4 if front == 3 else 1.6, **style)
        band = [(milliseconds(row, "p20"), milliseconds(row, "p80")) for row in line]
        if value is milliseconds and all(low is not None and high is not None for low, high in band):
            low, high = ([edges[i] for edges in band] for i in (0, 1))
            axes.fill_between(lengths, low, high, color=style["color"], alpha=0.2, linewidth=0)  # type: ignore[arg-type]
        drawn += values
    return drawn


def _panels(
    rows: Sequence[Row], modes: Sequence[str | None], value: Value, name: str, theme: str, order: Styles
) -> Figure | None:
    """A panel for each mode, time or memory over length."""
    chosen = {mode: [row for row in rows if mode is None or row.get("mode") == mode] for mode in modes}
    chosen = {mode: found for mode, found in chosen.items() if any(True for _ in _series(found, value))}
    if not chosen:
        return None
    figure, axes = _figure(len(chosen), 8.0 if len(chosen) == 1 else 10.0)
    show = amount if value is peak else lambda ms: f"{ms:,.0f}" if ms >= 1 else f"{ms:g}"
    values: list[float] = []
    for one, (mode, found) in zip(axes, chosen.items(), strict=True):
        values += _over_length(one, found, value, theme, order)
        _powers(one, [place(row)["length"] for *_, line in _series(found, value) for row in line], _LENGTH)
        if mode:
            one.set_title(mode)
    for one in axes:
        _decades(one, values, show)
    axes[0].set_ylabel(name)
    _legend(figure, axes)
    return figure


_LENGTH = "sequence length L, tokens (1k = 1,024)"
_TIME = "ms"
_MEMORY = "peak memory, bytes"


def scaling(rows: Sequence[Row], theme: str, order: Styles) -> Figure | None:
    """Time of forward and backward over length."""
    chosen = [row for row in rows if row.get("direction") == "training"]
    return _panels(chosen, [None], milliseconds, f"forward+backward, {_TIME}", theme, order)


def memory(rows: Sequence[Row], theme: str, order: Styles) -> Figure | None:
    """Peak memory of forward and backward over length."""
    chosen = [row for row in rows if row.get("direction", "training") == "training"]
    return _panels(chosen, [None], peak, _MEMORY, theme, order)


def paper_fig9(rows: Sequence[Row], theme: str, order: Styles) -> Figure | None:
    """Time over length, in parallel and token by token."""
    return _panels(rows, ["parallel", "sequential"], milliseconds, f"time, {_TIME}", theme, order)


def paper_fig10(rows: Sequence[Row], theme: str, order: Styles) -> Figure | None:
    """Peak memory over length, in parallel and token by token."""
    return _panels(rows, ["parallel", "sequential"], peak, _MEMORY, theme, order)


def recall(rows: Sequence[Row], theme: str, _: Styles) -> Figure | None:
    """Accuracy over distance, a panel for each number of pairs in a stream."""
    rows = [row for row in rows if measured("accuracy")(row) is not None and row.get("distance")]
    if not rows:
        return None
    loads = sorted({row.get("pairs") or 0 for row in rows})
    figure, axes = _figure(len(loads), 8.0 if len(loads) == 1 else 11.0)
    order = styles(variant(row, rows) for row in rows)
    for one, load in zip(axes, loads, strict=True):
        some = [row for row in rows if (row.get("pairs") or 0) == load]
        _recall_panel(one, some, rows, theme, order)
        if load:
            one.set_title(f"{load} pair{'s' if load > 1 else ''} in a stream")
    axes[0].set_ylabel("accuracy")
    _legend(figure, axes)
    return figure


def _recall_panel(axes: Axes, rows: Sequence[Row], every: Sequence[Row], theme: str, order: Styles) -> None:
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        lines[variant(row, every)][row["distance"]].append(row["accuracy"])
    for name in lines:
        points = sorted((at, statistics.fmean(found)) for at, found in lines[name].items())
        axes.plot(*zip(*points, strict=True), label=name, **order[name].line(theme))
    for field, name, dashes in (("chance", "chance", ":"), ("unbound", "values known, keys not", "--")):
        # With one pair there is nothing to bind.
        for level in sorted({row[field] for row in rows if row.get(field) not in (None, 1)}):
            axes.axhline(level, color=INK[theme], linestyle=dashes, linewidth=1.2, label=name)
    _powers(axes, [row["distance"] for row in rows], "distance, tokens (1k = 1,024)")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def table1(rows: Sequence[Row], theme: str, _: Styles) -> Figure | None:
    """Validation loss over steps, a panel for each width, a line for each seed."""
    rows = [row for row in rows if row.get("curve") and not row.get("gap")]
    widths = sorted({row.get("embedding", 0) for row in rows})
    if not widths:
        return None
    order = styles(str(row.get("model")) for row in rows)
    figure, axes = _figure(len(widths), 8.0 if len(widths) == 1 else 10.0)
    for one, width in zip(axes, widths, strict=True):
        for row in (row for row in rows if row.get("embedding", 0) == width):
            name = str(row.get("model"))
            style = order[name].line(theme)
            steps, losses = [at[0] for at in row["curve"]], [at[2] for at in row["curve"]]
            one.plot(steps, losses, label=name, markevery=max(1, len(steps) // 8), **style)
            if row.get("paper_validation") is not None:
                one.axhline(row["paper_validation"], color=style["color"], linestyle=":", linewidth=1.3)
        one.set_title(f"E = {width}")
        one.set_xlabel("step")
    if any(row.get("paper_validation") is not None for row in rows):
        axes[-1].plot([], [], color=INK[theme], linestyle=":", linewidth=1.3, label="the paper's, at the end")
    # What comes before is the same steep fall for all.
    late = [at[2] for row in rows for at in row["curve"] if at[0] >= row["curve"][-1][0] / 10]
    shown = [*late, *(row["paper_validation"] for row in rows if row.get("paper_validation") is not None)]
    axes[0].set_ylim(min(shown) - 0.05, max(shown) + 0.05)
    axes[0].set_ylabel("validation loss, nats per character")
    _legend(figure, axes)
    return figure


Draw = Callable[[Sequence[Row], str, Styles], Figure | None]
FIGURES: dict[str, Draw] = {
    "scaling": scaling,
    "memory": memory,
    "paper-fig9": paper_fig9,
    "paper-fig10": paper_fig10,
    "recall": recall,
    "paper-table1": table1,
    "lamemo-training": table1,
}


def svg(figure: Figure) -> bytes:
    """The drawing; nothing in it says when or with which version it was made."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def draw(results: Mapping[str, Mapping[str, Sequence[Row]]]) -> dict[str, bytes]:
    """All drawings that the rows are enough for.

    Args:
        results: rows by device, as it stands in the names of the files, and run.

    Returns:
        contents by file name: ``RUN-DEVICE-light.svg`` and ``RUN-DEVICE-dark.svg``.
    """
    chosen = [rows for runs in results.values() for run, rows in runs.items() if run in PROVIDERS]
    order = styles(str(row.get("provider")) for rows in chosen for row in rows if not row.get("gap"))
    found = {}
    for device, runs in results.items():
        for run, make in FIGURES.items():
            for theme in THEMES:
                with settings(theme):
                    figure = make(runs.get(run, ()), theme, order)
                    if figure is not None:
                        found[f"{run}-{device}-{theme}.svg"] = svg(figure)
    return found
