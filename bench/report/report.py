"""Make the tables, the drawings and the README's figures out of the journals: rows alone decide what they say.

`report` writes ``bench/results/README.md`` with everything, the drawings beside it, and what stands between
``<!-- bench:NAME -->`` and ``<!-- /bench -->`` in the README. Results of several devices are several tables.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench.errors import InputError, RunError
from bench.files import write_file
from bench.measure.journal import Invocation, Row, read

from . import goals, plots
from .chapters import RUNS, Body, decode, kernels_compact, lamemo_compact, recall_sentence
from .tables import ABSENT, join, losses, number, peak, text

Loaded = dict[str, dict[str, Invocation]]
_MARK = re.compile(r"<!--\s*(?:bench:(?P<name>.*?)|(?P<end>/bench))\s*-->")


def load(results: Path) -> Loaded:
    """What is reported of every run and device: its newest finished invocation, or else its newest unfinished one.

    Rehearsals (``--quick``) do not count.

    Raises:
        InputError: ``results`` is no folder, or a file in it is no journal.
    """
    if not results.is_dir():
        raise InputError(f"results: expected a folder, got {results}")
    found: Loaded = {}
    for path in sorted(results.glob("*.jsonl")):
        devices: dict[str, list[Invocation]] = defaultdict(list)
        for invocation in read(path):
            if not invocation.start.get("options", {}).get("quick") and invocation.cases:
                devices[str(invocation.start.get("environment", {}).get("device"))].append(invocation)
        if devices:
            found[path.stem] = {name: max(devices[name], key=_rank) for name in sorted(devices)}
    return found


def _is_whole(invocation: Invocation) -> bool:
    """Whether every case of the run was measured; ``--only`` leaves some out."""
    return invocation.finished and not invocation.start.get("options", {}).get("only")


def _rank(invocation: Invocation) -> tuple[bool, int, str]:
    # An option may ask for part of a run: what has fewer cases does not replace what has more.
    return _is_whole(invocation), len(invocation.cases), invocation.start.get("time", "")


def _commit(commit: object, dirty: object) -> str:
    return f"commit {text(commit)[:7] if commit else ABSENT}{' with uncommitted changes' if dirty else ''}"


def _option(value: object) -> str:
    return text(" ".join(map(str, value)) if isinstance(value, list) else value)


def caption(run: str, invocation: Invocation) -> str:
    """Where, with what, when, and how to do it again."""
    start, rows = invocation.start, invocation.rows
    environment = start.get("environment", {})
    threads, device = environment.get("threads"), text(environment.get("device") or ABSENT)
    versions = [(name, environment.get(name)) for name in ("torch", "python", "cuda", "driver", "triton", "fla")]
    words = [
        device,
        f"{threads} thread{'' if threads == 1 else 's'}" if threads is not None else "",
        "/".join(dict.fromkeys(text(row["dtype"]) for row in rows if row.get("dtype"))),
        *(f"{'Python' if name == 'python' else name} {text(found)}" for name, found in versions if found),
        _commit(environment.get("commit"), environment.get("dirty")),
        text(start.get("time", ABSENT))[:10],
    ]
    for field, verb, unit in (("copy_gbs", "copies", "GB/s"), ("matrix_gflops", "multiplies", "GFLOP/s")):
        rates = [row[field] for row in rows if row.get(field)]
        if rates:
            ends = dict.fromkeys((number(min(rates), 3), number(max(rates), 3)))
            words.append(f"{verb} at {' to '.join(ends)} {unit}")
    trainings = {(row["trained_commit"], row.get("trained_dirty")) for row in rows if "trained_commit" in row}
    words += [f"trained at {_commit(*found)}" for found in sorted(trainings, key=str)]
    given = {name: value for name, value in start.get("options", {}).items() if name != "quick" and value is not None}
    options = f" ({', '.join(f'{text(name)}: {_option(value)}' for name, value in given.items())})" if given else ""
    cases = len(invocation.cases)
    missing = "" if _is_whole(invocation) else f" **Incomplete: {cases} case{'' if cases == 1 else 's'}.**"
    return f"{', '.join(filter(None, words))}. Rerun with `python -m bench {run}`{options}.{missing}"


# Putting it together


def device_names(devices: Iterable[str]) -> dict[str, str]:
    """Devices as they stand in names of files: ``cpu``, ``nvidia-h100``; in full where the short names coincide."""

    def slug(name: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"

    every = sorted(set(devices))
    short = [slug(name.split(":")[0]) for name in every]
    return {name: found if short.count(found) == 1 else slug(name) for name, found in zip(every, short, strict=True)}


def _tables(run: str, loaded: Loaded, body: Body | None = None) -> str:
    """Caption and tables of a run, device by device."""
    write = body or RUNS[run][1]
    found = [join(caption(run, invocation), write(invocation.rows)) for invocation in loaded.get(run, {}).values()]
    return join(*found) or f"No results yet; `python -m bench {run}` makes them."


def _on_gpus(loaded: Loaded) -> dict[str, dict[str, list[Row]]]:
    """Rows by GPU and run."""
    found: dict[str, dict[str, list[Row]]] = defaultdict(dict)
    for run, devices in loaded.items():
        for device, invocation in devices.items():
            if not device.startswith("cpu"):
                found[device][run] = invocation.rows
    return dict(sorted(found.items()))


class Pictures:
    """Drawings by file name, and how a page shows them."""

    def __init__(self, loaded: Loaded, folder: Path):
        self.folder, self._loaded = folder, loaded
        self._names = device_names(device for devices in loaded.values() for device in devices)
        rows: dict[str, dict[str, Sequence[Row]]] = defaultdict(dict)
        for run, devices in loaded.items():
            for device, invocation in devices.items():
                rows[self._names[device]][run] = invocation.rows
        self.files = plots.draw(rows)

    def show(self, run: str, page: Path) -> str:
        """Every device's drawing of a run, light or dark as the reader's page is."""
        base = Path(os.path.relpath(self.folder, page.parent)).as_posix()
        found = []
        for device in self._loaded.get(run, {}):
            name = f"{run}-{self._names[device]}"
            if f"{name}-light.svg" in self.files:
                found.append(
                    f'<picture><source media="(prefers-color-scheme: dark)" srcset="{base}/{name}-dark.svg">'
                    f'<img alt="{RUNS[run][0]}, {text(device)}" src="{base}/{name}-light.svg"></picture>'
                )
        return join(*found)


def sections(loaded: Loaded, pictures: Pictures, readme: Path) -> dict[str, str]:
    """The README's, by name."""

    def lost(value: Callable[[Row], float | None] | None, *words: str) -> Body:
        def write(rows: Sequence[Row]) -> str:
            timed = [row for row in rows if "slope" not in row]
            return losses(timed, value, *words) if value else losses(timed)

        return write

    return {
        "kernels": _tables("kernels", loaded, kernels_compact),
        "plots": join(
            pictures.show("scaling", readme),
            _tables("scaling", loaded, lost(None)),
            pictures.show("memory", readme),
            _tables("memory", loaded, lost(peak, "smaller", "peak")),
        ),
        "decode": _tables("decode", loaded, lambda rows: decode(rows, compact=True)),
        "table1": _tables("paper-table1", loaded),
        "recall": join(pictures.show("recall", readme), _tables("recall", loaded, recall_sentence)),
        "agreement": _tables("agreement", loaded),
        "lamemo": _tables("lamemo", loaded, lamemo_compact),
        "lamemo-training": join(pictures.show("lamemo-training", readme), _tables("lamemo-training", loaded)),
    }


def update(content: str, new: Mapping[str, str]) -> str:
    """``content`` with other words between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``.

    Raises:
        InputError: a marker's name is unknown, or it is not closed, or a closing one has none before it.
    """
    parts, opened, copied = [], "", 0
    for mark in _MARK.finditer(content):
        if mark["end"]:
            if not opened:
                line = content.count("\n", 0, mark.start()) + 1
                raise InputError(f"marker: expected one that opens before <!-- /bench --> in line {line}, got none")
            parts.append(f"\n{new[opened].strip()}\n")
            opened, copied = "", mark.start()
            continue
        if opened:
            break
        opened = mark["name"]
        if opened not in new:
            raise InputError(f"marker bench:{opened}: expected one of {', '.join(sorted(new))}")
        parts.append(content[copied : mark.end()])
    if opened:
        raise InputError(f"marker bench:{opened}: expected <!-- /bench --> behind it, got none")
    return "".join([*parts, content[copied:]])


def report(results: Path, readme: Path, drawings: Path) -> None:
    """Write the drawings, ``results/README.md`` and the README's sections, in this order, once all are made.

    Args:
        results: folder of the journals.
        readme: the file with markers.
        drawings: folder of the drawings; made where it is missing.

    Raises:
        InputError: a journal or the README cannot be read; nothing was written.
        RunError: a file cannot be written.
    """
    loaded = load(results)
    try:
        old = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"readme: expected a text file at {readme}, got {error}") from error
    pictures = Pictures(loaded, drawings)
    full = results / "README.md"
    new = update(old, sections(loaded, pictures, readme))
    chapters = [join(f"## {title}", pictures.show(run, full), _tables(run, loaded)) for run, (title, _) in RUNS.items()]
    chapters += [join(f"## Goals, {text(device)}", goals.chapter(rows)) for device, rows in _on_gpus(loaded).items()]
    how = "Made by `python -m bench report` from the rows beside it; what is written here by hand is lost."
    everything = join("# Results", how, *chapters) + "\n"
    try:
        drawings.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{drawings}: cannot be made: {error.strerror or error}") from error
    for name, data in pictures.files.items():
        write_file(drawings / name, data)
    write_file(full, everything.encode())
    write_file(readme, new.encode())
