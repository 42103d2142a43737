"""What is said of each run: its rows as Markdown, one function for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.measure.journal import Row

from .tables import (
    ABSENT,
    DIRECTIONS,
    SYMBOLS,
    Gaps,
    by_operation,
    grid,
    join,
    label,
    losses,
    measured,
    memory_cell,
    number,
    over_seeds,
    peak,
    percent,
    place,
    table,
    text,
    time_cell,
    variant,
    whole,
)


def _timed(rows: Sequence[Row]) -> str:
    return by_operation(rows, lambda group: grid(group, time_cell))


_HOW = "Medians (20th to 80th percentile); × is a contender's time over ours, above 1 where ours is faster."


def kernels(rows: Sequence[Row]) -> str:
    held = [row for row in rows if peak(row) is not None]
    return join(_HOW, _timed(rows), losses(rows), f"### Memory\n\n{memory(held)}" if held else "")


FACTS = {
    "p99_over_median": "99th percentile over the median of tokens in a row",
    "worst_token": "the token that merges on every level",
    "far_over_near": "time of a step far into the sequence, over one near its start",
    "bandwidth": "rate at which the weights are read",
    "original_over_ours": "the original's algorithm over ours",
    "original_over_reference": "the original's algorithm over ours without the extension",
    "original_over_attention": "the original's attention(sequential(x)) over ours",
}


def decode(rows: Sequence[Row]) -> str:
    timed, facts = [row for row in rows if "fact" not in row], [row for row in rows if "fact" in row]
    lines = [
        [
            FACTS.get(row["fact"], text(row["fact"])),
            ", ".join(f"{SYMBOLS[name]} = {whole(size)}" for name, size in place(row).items()) or ABSENT,
            text(row.get("dtype") or ABSENT),
            f"{number(measured('value')(row))} {text(row.get('unit', ''))}".strip(),
        ]
        for row in facts
    ]
    told = table(["fact of ours", "at", "dtype", "value"], lines, 3) if lines else ""
    return join(_HOW, _timed(timed) if timed else "", told, losses(timed))


def scaling(rows: Sequence[Row]) -> str:
    slopes = [row for row in rows if "slope" in row]
    timed = [row for row in rows if "slope" not in row]
    lines = [
        [
            label(row),
            text(DIRECTIONS.get(row.get("direction", ""), row.get("direction") or ABSENT)),
            number(measured("slope")(row)),
            whole(row.get("from_length")),
            whole(row.get("to_length")),
        ]
        for row in slopes
    ]
    headers = ["provider", "direction", "slope of log time over log L", "from L", "to L"]
    return join(_HOW, _timed(timed) if timed else "", table(headers, lines, 2) if lines else "", losses(timed))


def crossover(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if "crossover" not in row]
    found = [row["crossover"] for row in rows if "crossover" in row]
    lengths = " or ".join("at no length" if length is None else f"from L = {whole(length)} on" for length in found)
    return join(_HOW, _timed(timed), f"Ours beats attention {lengths}." if found else "", losses(timed))


_MEMORY_HOW = "Peaks (and what is kept for backward); × is a contender's peak over ours, above 1 where ours needs less."


def memory(rows: Sequence[Row]) -> str:
    drawn = by_operation(rows, lambda group: grid(group, memory_cell, peak, "MB"))
    return join(_MEMORY_HOW, drawn, losses(rows, peak, "smaller", "peak"))


def table1(rows: Sequence[Row]) -> str:
    groups: dict[tuple[Any, Any], list[Row]] = defaultdict(list)
    gaps = Gaps()
    for row in rows:
        groups[row.get("embedding"), row.get("model")].append(row)
    lines = []
    for (embedding, model), group in groups.items():
        marks = [gaps.mark({"label": row.get("model"), **row}) for row in group if row.get("gap")]
        found = [row for row in group if not row.get("gap")]
        first = found[0] if found else group[0]

        def mean(field: str, found: list[Row] = found, marks: list[str] = marks) -> str:
            return over_seeds([row.get(field) for row in found]) if found else " ".join(dict.fromkeys(marks))

        lines.append(
            [
                text(model),
                whole(embedding),
                str(len(found)),
                "/".join(dict.fromkeys(whole(row.get("steps")) for row in found)) or ABSENT,
                whole(first.get("parameters")),
                whole(first.get("paper_parameters")),
                mean("train"),
                over_seeds([first.get("paper_train")]),
                mean("validation"),
                over_seeds([first.get("paper_validation")]),
            ]
        )
    headers = ["model", "E", "seeds", "steps", "parameters", "paper", "train", "paper", "validation", "paper"]
    how = "Nats per character at the last step, mean ± sample standard deviation over the seeds; the paper's beside it."
    return join(how, table(headers, lines), str(gaps))


def lamemo(rows: Sequence[Row]) -> str:
    kept = losses(rows, measured("saved_bytes"), "smaller", "saved bytes")
    return join("### Time", _HOW, _timed(rows), losses(rows), "### Memory", memory(rows), kept)


def lamemo_training(rows: Sequence[Row]) -> str:
    groups: dict[tuple[Any, Any], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.get("model"), row.get("steps")].append(row)
    lines = [
        [
            text(model),
            text(group[0].get("validation_read", ABSENT)),
            str(len(group)),
            whole(steps),
            whole(group[0].get("parameters")),
            *(over_seeds([row.get(name) for row in group]) for name in ("train", "validation", "validation_carried")),
        ]
        for (model, steps), group in groups.items()
    ]
    headers = ["model", "validation is of", "seeds", "steps", "parameters", "train", "validation", "state carried"]
    how = (
        "Nats per character at the last step, mean ± sample standard deviation over the seeds. A character in a window "
        "has half of it before it on average; one that is read with a memory has all that the memory holds. The last "
        "column is LogMem's loss on the text that the recurrent models are asked about, its state carried along."
    )
    return join(how, table(headers, lines, 2))


def paper_fig9(rows: Sequence[Row]) -> str:
    return join(_HOW, _timed(rows), losses(rows))


def _level(value: object) -> str:
    """A mean, or how many queries found their pair at which level."""
    if isinstance(value, Mapping):
        return ", ".join(f"{text(level)}: {whole(count)}" for level, count in value.items())
    return number(value, 3)


def _recalled(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Rows with an accuracy, by variant and distance."""
    rows = [row for row in rows if row.get("distance") is not None and measured("accuracy")(row) is not None]
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        found[variant(row, rows)].setdefault(row["distance"], row)
    return found


def _loads(rows: Sequence[Row]) -> dict[int | None, list[Row]]:
    """Rows by how many pairs their streams held."""
    counts = sorted({row.get("pairs") for row in rows}, key=lambda count: count or 0)
    return {count: [row for row in rows if row.get("pairs") == count] for count in counts}


def _load_name(count: int | None) -> str:
    return "" if count is None else f"{count} pair{'s' if count > 1 else ''} in a stream"


def _over_distance(rows: Sequence[Row]) -> str:
    found = _recalled(rows)
    distances = sorted({at for line in found.values() for at in line})
    lines = [
        [text(name), *(percent(line.get(at, {}).get("accuracy"), 1) for at in distances)]
        for name, line in found.items()
    ]
    chapters = ("chance", "chance"), ("knowing the values, not their keys", "unbound"), ("lowest level", "level")
    for name, field in chapters:
        show = _level if field == "level" else lambda value: percent(value, 1)
        shown = [
            {at: show(row[field]) for at, row in line.items() if row.get(field) is not None} for line in found.values()
        ]
        for line in list({tuple(line.items()): line for line in shown if line}.values()):
            lines.append([f"*{name}*", *(line.get(at, ABSENT) for at in distances)])
    return table(["accuracy at distance", *(whole(at) for at in distances)], lines) if lines else ""


def _over_level(rows: Sequence[Row]) -> str:
    """Accuracy by the lowest level that holds a whole pair."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.get("by") == "level" and measured("accuracy")(row) is not None:
            found[variant(row, rows)][row["level"]] = row
    levels = sorted({at for line in found.values() for at in line})
    lines = [
        [text(name), *(percent(line.get(at, {}).get("accuracy"), 1) for at in levels)] for name, line in found.items()
    ]
    return table(["accuracy at level", *(whole(at) for at in levels)], lines) if lines else ""


def recall(rows: Sequence[Row]) -> str:
    gaps = Gaps()
    parts = []
    for count, some in _loads([row for row in rows if row.get("accuracy") is not None]).items():
        name = _load_name(count)
        parts += [f"{name.capitalize()}:" if name else "", _over_distance(some), _over_level(some)]
    trained = {
        name: next((row for row in rows if variant(row, rows) == name and row.get("parameters")), None)
        for name in dict.fromkeys(variant(row, rows) for row in rows)
    }
    spent = [
        [text(name), *(whole(row.get(field)) for field in ("parameters", "steps")), number(row.get("seconds"))]
        for name, row in trained.items()
        if row
    ]
    if spent:
        parts.append(table(["variant", "parameters", "steps", "seconds"], spent))
    for row in rows:
        if row.get("gap"):
            gaps.mark({**row, "label": variant(row, rows)})
    return join(recall_sentence(rows), *parts, str(gaps))


def recall_sentence(rows: Sequence[Row]) -> str:
    """What is left at the greatest distance that all variants were asked at."""
    return join(*(_recall_sentence(some, _load_name(count)) for count, some in _loads(rows).items()))


def _recall_sentence(rows: Sequence[Row], load: str) -> str:
    found = _recalled(rows)
    shared = sorted(set.intersection(*(set(line) for line in found.values()))) if found else []
    if not shared:
        return ""
    near, far = shared[0], shared[-1]
    said = [
        f"{text(name)} {percent(line[far]['accuracy'], 1)} ({percent(line[near]['accuracy'], 1)})"
        for name, line in sorted(found.items(), key=lambda item: -item[1][far]["accuracy"])
    ]
    first = next(iter(found.values()))[far]
    guesses = [
        f"{name} {percent(first.get(field), 1)}"
        for name, field in (("chance is", "chance"), ("knowing the values but not their keys,", "unbound"))
        if first.get(field) is not None
    ]
    where = f"{load}, accuracy" if load else "Accuracy"
    told = "".join(f"; {guess}" for guess in guesses)
    return f"{where} at distance {whole(far)} (in parentheses at {whole(near)}): {'; '.join(said)}{told}."


def agreement(rows: Sequence[Row]) -> str:
    words = [name for name in ("comparison", "dtype", "served", "parallel_served") if any(name in row for row in rows)]
    titles = {"comparison": "compared", "served": "step by", "parallel_served": "parallel by"}
    gaps, lines = Gaps(), []
    for row in rows:
        first = "none" if row.get("first_disagreement", 0) is None else whole(row.get("first_disagreement"))
        shown = [number(row.get("max_difference")), number(row.get("mean_difference")), first]
        shown.append(whole(row.get("disagreements")))
        if row.get("gap"):
            shown = [gaps.mark({**row, "label": row.get("comparison", row.get("dtype"))})] * len(shown)
        lines.append([*(text(row.get(name) or ABSENT) for name in words), whole(row.get("tokens")), *shown])
    headers = ["tokens", "largest difference", "mean difference", "first disagreement", "disagreements"]
    told = {
        ", ".join([str(row["model"]), str(row.get("label") or f"{whole(row.get('trained_steps'))} steps")])
        for row in rows
        if row.get("model")
    }
    how = "Differences are of logits; a disagreement is a position whose likeliest symbols differ."
    models = f"Model: {text('; '.join(sorted(told)))}." if told else ""
    return join(
        how, models, table([*(titles.get(name, name) for name in words), *headers], lines, len(words)), str(gaps)
    )


Body = Callable[[Sequence[Row]], str]
RUNS: dict[str, tuple[str, Body]] = {
    "kernels": ("Kernels", kernels),
    "decode": ("Decoding", decode),
    "scaling": ("Time over length", scaling),
    "crossover": ("Rows of ever more tokens", crossover),
    "memory": ("Memory over length", memory),
    "paper-table1": ("The paper's Table 1", table1),
    "paper-fig9": ("The paper's Figure 9: time", paper_fig9),
    "paper-fig10": ("The paper's Figure 10: memory", memory),
    "recall": ("Recall over distance", recall),
    "agreement": ("Agreement of the parallel and the sequential form", agreement),
    "lamemo": ("LaMemo: time and memory", lamemo),
    "lamemo-training": ("LaMemo: trained beside Transformer-XL, GPT-2 and LogMem", lamemo_training),
}
