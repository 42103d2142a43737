"""Make the tables, the drawings and the README's few lines out of the journals: rows alone decide what they say.

`report` writes ``bench/results/README.md`` with everything, a table for each device, the drawings beside it, and what
stands between ``<!-- bench -->`` and ``<!-- /bench -->`` in the README: one drawing and a few lines.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.errors import InputError, RunError
from bench.files import write_file
from bench.measure.journal import Invocation, Row, read

from . import goals
from .chapters import RUNS
from .headline import RUNS as HEADLINE_RUNS
from .headline import headline
from .tables import ABSENT, join, number, text

Loaded = dict[str, dict[str, Invocation]]
_MARK = re.compile(r"<!--\s*(?P<end>/?)bench(?P<name>:.*?)?\s*-->")


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


def _tables(run: str, loaded: Loaded) -> str:
    """Caption and tables of a run, device by device."""
    write = RUNS[run][1]
    found = [join(caption(run, invocation), write(invocation.rows)) for invocation in loaded.get(run, {}).values()]
    return join(*found) or f"No results yet; `python -m bench {run}` makes them."


def _by_device(loaded: Loaded) -> dict[str, dict[str, Sequence[Row]]]:
    """Rows by device and run."""
    found: dict[str, dict[str, Sequence[Row]]] = defaultdict(dict)
    for run, devices in loaded.items():
        for device, invocation in devices.items():
            found[device][run] = invocation.rows
    return found


class Pictures:
    """Drawings by file name, and how a page shows them."""

    def __init__(self, loaded: Loaded, folder: Path):
        self.folder, self._loaded = folder, loaded
        self._names = device_names(device for devices in loaded.values() for device in devices)
        from . import plots  # and matplotlib, without which the rest of `python -m bench` runs

        self.files = plots.draw({self._names[device]: runs for device, runs in _by_device(loaded).items()})

    def show(self, run: str, page: Path, only: str | None = None) -> str:
        """Every device's drawing of a run, or only one's, light or dark as the reader's page is."""
        base = _relative(self.folder, page)
        found = []
        for device in self._loaded.get(run, {}) if only is None else [only]:
            name = f"{run}-{self._names[device]}"
            if f"{name}-light.svg" in self.files:
                found.append(
                    f'<picture><source media="(prefers-color-scheme: dark)" srcset="{base}/{name}-dark.svg">'
                    f'<img alt="{RUNS[run][0]}, {text(device)}" src="{base}/{name}-light.svg"></picture>'
                )
        return join(*found)


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def summary(loaded: Loaded, pictures: Pictures, readme: Path, full: Path) -> str:
    """The README's block, of one device: a GPU where one was measured. At most twelve lines."""
    run = HEADLINE_RUNS[0]
    device = min(loaded.get(run, {}), key=lambda name: (name.startswith("cpu"), name), default=None)
    if device is None:
        return f"No results yet; `python -m bench {run}` makes them."
    found = {name: loaded[name][device] for name in HEADLINE_RUNS if device in loaded.get(name, {})}
    sources = "; ".join(_source(name, invocation) for name, invocation in found.items())
    source = f"{text(device)}, medians: {sources}. [All tables]({_relative(full, readme)})."
    told = headline({name: invocation.rows for name, invocation in found.items()}, source)
    return join(pictures.show(run, readme, device), told)


def _source(run: str, invocation: Invocation) -> str:
    """A caption in few words: the long one stands in the tables."""
    environment = invocation.start.get("environment", {})
    threads = environment.get("threads")
    words = [
        f"`python -m bench {run}`",
        f"{threads} thread{'' if threads == 1 else 's'}" if threads is not None else "",
        _commit(environment.get("commit"), environment.get("dirty")),
        text(invocation.start.get("time", ABSENT))[:10],
        "" if _is_whole(invocation) else "incomplete",
    ]
    return ", ".join(filter(None, words))


def update(content: str, new: str) -> str:
    """``content`` with other words between ``<!-- bench -->`` and ``<!-- /bench -->``.

    Raises:
        InputError: a marker has a name, or it is not closed, or a closing one has none before it.
    """
    parts, copied, opened = [], 0, False
    for mark in _MARK.finditer(content):
        line = content.count("\n", 0, mark.start()) + 1
        if mark["name"]:
            raise InputError(f"marker in line {line}: expected <!-- bench --> or <!-- /bench -->, got {mark[0]}")
        if opened == (not mark["end"]):
            expected = "one that opens before <!-- /bench -->" if mark["end"] else "<!-- /bench --> before another"
            raise InputError(f"marker in line {line}: expected {expected}, got none")
        if mark["end"]:
            parts.append(f"\n{new.strip()}\n")
            copied = mark.start()
        else:
            parts.append(content[copied : mark.end()])
        opened = not mark["end"]
    if opened:
        raise InputError("marker: expected <!-- /bench --> behind the last <!-- bench -->, got none")
    return "".join([*parts, content[copied:]])


def report(results: Path, readme: Path, drawings: Path) -> None:
    """Write the drawings, ``results/README.md`` and the README's block, in this order, once all are made.

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
    new = update(old, summary(loaded, pictures, readme, full))
    chapters = [join(f"## {title}", pictures.show(run, full), _tables(run, loaded)) for run, (title, _) in RUNS.items()]
    for device, rows in sorted(_by_device(loaded).items()):
        if not device.startswith("cpu"):
            chapters.append(join(f"## Goals, {text(device)}", goals.chapter(rows)))
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
