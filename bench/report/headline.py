"""The few lines of the README: attention at its longest, a KV cache at its deepest, and the worst of all ratios.

Rules choose them, not we: a rerun, or another device, may change every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.measure.journal import Row

from .tables import (
    DIRECTIONS,
    MICRO,
    OURS,
    SYMBOLS,
    Losing,
    circumstances,
    is_ours,
    join,
    label,
    losing_ranges,
    number,
    peak,
    place,
    ratios,
    table,
    text,
    whole,
)

RUNS = ("scaling", "decode", "memory")
"""The runs that the lines are taken from."""

_FUSED_ATTENTION = ("sdpa-flash", "sdpa-cudnn")
_Pair = tuple[Row, float]


def headline(rows: Mapping[str, Sequence[Row]], source: str) -> str:
    """At most three rows of a table, then, a line each, where others are faster and smaller, and the source."""
    timed = [row for row in rows.get("scaling", ()) if "slope" not in row]
    decoded = [row for row in rows.get("decode", ()) if "fact" not in row]
    found = [
        _line("training, the longest that fused attention was measured at", timed, _longest_attention(timed)),
        _line("one token, the longest past that every KV cache was measured at", decoded, _deepest_cache(decoded)),
        _line("the worst ratio of all lengths and contenders", timed, _worst(timed)),
    ]
    lines = [line for line in found if line]
    ranges = [
        _sentence("Others are faster", timed, losing_ranges(timed)),
        _sentence("Others need less memory", rows.get("memory", ()), losing_ranges(rows.get("memory", ()), peak)),
    ]
    headers = ["", "where", "ours", "theirs", "theirs / ours"]
    return join(table(headers, lines, 2) if lines else "", "\n".join(filter(None, [*ranges, f"- {source}"])))


def _contenders(rows: Sequence[Row], chosen: Callable[[Row], bool] = lambda row: True) -> list[_Pair]:
    return [(row, ratio) for row, ratio in ratios(rows) if not is_ours(row) and chosen(row)]


def _longest_attention(rows: Sequence[Row]) -> _Pair | None:
    """Of the fused forms of attention, while training, the best at the greatest length."""
    pairs = _contenders(rows, lambda row: row["provider"] in _FUSED_ATTENTION and row.get("direction") == "training")
    return min(pairs, key=lambda pair: (-place(pair[0])["length"], pair[1]), default=None)


def _deepest_cache(rows: Sequence[Row]) -> _Pair | None:
    """Of the KV caches the best, at the greatest position at which each layer was measured beside one."""
    pairs = _contenders(rows, lambda row: str(row["provider"]).startswith("KV cache"))
    depths: dict[str, set[int]] = {}
    for row, _ in pairs:
        sizes = place(row)
        depths.setdefault(str(sizes | {"position": None}), set()).add(sizes["position"])
    shared = set.intersection(*depths.values()) if depths else set()
    deepest = [pair for pair in pairs if shared and place(pair[0])["position"] == max(shared)]
    return min(deepest, key=lambda pair: pair[1], default=None)


def _worst(rows: Sequence[Row]) -> _Pair | None:
    return min(_contenders(rows), key=lambda pair: pair[1], default=None)


def _line(what: str, rows: Sequence[Row], pair: _Pair | None) -> list[str] | None:
    if pair is None:
        return None
    row, ratio = pair
    own = next(one for one in rows if one.get("provider") == OURS and circumstances(one) == circumstances(row))
    words = [f"{SYMBOLS[name]} = {whole(size)}" for name, size in place(row).items() if name in _SHOWN]
    words += [text(DIRECTIONS.get(row.get("direction"), row.get("direction") or "")), text(row.get("dtype", ""))]
    return [what, ", ".join(filter(None, words)), _time(own), f"{label(row)} {_time(row)}", f"{number(ratio, 3)}×"]


_SHOWN = ("length", "position", "embedding")


def _time(row: Row) -> str:
    unit = row.get("unit", "ms")
    return f"{number(row.get('median'))} {MICRO.get(unit, unit)}"


def _sentence(what: str, rows: Sequence[Row], ranges: Iterable[Losing]) -> str:
    """``what``, by direction and contender."""
    if not rows:
        return ""
    said: dict[str, dict[str, list[str]]] = {}
    for compared, who, where, _ in ranges:
        said.setdefault(compared, {}).setdefault(who, []).append(where)
    parts = []
    for compared, by in said.items():
        beaten = ", ".join(f"{who} {' and '.join(filter(None, found))}".strip() for who, found in by.items())
        parts.append(f"{compared}: {beaten}")
    return f"- {what}: {'; '.join(parts) or 'nowhere'}."
