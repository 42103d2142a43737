"""Results as JSON lines that are only ever appended to.

A file holds the *invocations* of one run, one behind the other: a line of kind ``"start"`` (when, where, with which
options), lines of kind ``"row"``, and a line of kind ``"end"`` once nothing is missing. Rows come *case* by case: a
case is measured whole, its rows are written by one call of the system, and each knows how many there are. So what an
interruption leaves is a shorter file, never a wrong one, and the same command goes on behind it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.errors import InputError, RunError

Row = dict[str, Any]

# What every row repeats of its start, so that it can be read alone.
ORIGIN = ("commit", "dirty", "device")


@dataclass
class Invocation:
    """One call of a run, as read back.

    Attributes:
        start: its first line: ``run``, ``invocation``, ``time``, ``environment``, ``options``.
        cases: the rows of every complete case, in the order in which they were measured.
        finished: whether no case is missing.
    """

    start: Row
    cases: dict[str, list[Row]] = field(default_factory=dict)
    finished: bool = False

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.cases.values() for row in rows]

    def same(self, environment: Row, options: Row) -> bool:
        """Whether it was begun by the same code, on the same machine, with the same options."""
        return self.start["environment"] == environment and self.start["options"] == options


def read(path: Path) -> list[Invocation]:
    """The invocations of a file, oldest first; none where there is no file. A torn last line is dropped.

    Raises:
        InputError: another line is not one of a journal.
    """
    if not path.exists():
        return []
    found: dict[str, Invocation] = {}
    parts: dict[tuple[str, str], list[Row]] = defaultdict(list)
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            kind, name = row["kind"], row["invocation"]
            if kind == "start":
                found[name] = Invocation(row)
            elif kind == "end":
                found[name].finished = True
            elif kind == "row":
                place, count = row["part"]
                rows = parts[name, row["case"]]
                if place == 1:
                    rows.clear()  # of an attempt that was cut off
                rows.append(row)
                if len(rows) == count:
                    found[name].cases[row["case"]] = list(rows)
            else:
                raise ValueError(kind)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if number < len(lines):
                # The writer ends a torn line before it writes another one.
                if _is_torn(line):
                    continue
                raise InputError(f"{path}, line {number}: expected a line of a journal, got something else") from error
    return list(found.values())


def _is_torn(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


class Journal:
    """Appends to one invocation.

    Args:
        path: the file; it and its folder are made where they are missing.
        run: name of the run.
        environment: `bench.measure.environment.describe`.
        options: what the command line decided; equal options make results comparable.
        fresh: whether to begin anew although an unfinished invocation of the same kind is there.

    Raises:
        InputError: the file holds something else.
        RunError: it cannot be written.
    """

    def __init__(self, path: Path, run: str, environment: Row, options: Row, fresh: bool = False):
        self.path = path
        invocations = read(path)
        # As it will be read back: tuples are lists there.
        environment, options = json.loads(json.dumps([environment, options]))
        open_ones = [i for i in invocations if not i.finished and i.same(environment, options)]
        if open_ones and not fresh:
            self._invocation = open_ones[-1]
            return
        now = datetime.now(timezone.utc)
        start = {
            "kind": "start",
            "run": run,
            "invocation": f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}",
            "time": f"{now:%Y-%m-%dT%H:%M:%SZ}",
            "environment": environment,
            "options": options,
        }
        self._invocation = Invocation(start)
        self._append([start])

    @property
    def cases(self) -> dict[str, list[Row]]:
        """The rows so far, by case."""
        return self._invocation.cases

    @property
    def rows(self) -> list[Row]:
        return self._invocation.rows

    def write(self, case: str, rows: list[Row]) -> None:
        """Add a case; it is on the disk when this returns.

        Raises:
            RunError: it cannot be written.
        """
        start = self._invocation.start
        head = {"kind": "row", "run": start["run"], "invocation": start["invocation"], "case": case}
        origin = {name: start["environment"].get(name) for name in ORIGIN}
        whole = [{**head, "part": [number, len(rows)], **row, **origin} for number, row in enumerate(rows, 1)]
        self._append(whole)
        self.cases[case] = json.loads(json.dumps(whole))

    def finish(self) -> None:
        """Say that nothing is missing.

        Raises:
            RunError: it cannot be written.
        """
        self._invocation.finished = True
        self._append([{"kind": "end", "invocation": self._invocation.start["invocation"]}])

    def _append(self, rows: list[Row]) -> None:
        data = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    data = b"\n" + data
                if os.write(handle, data) != len(data):
                    raise OSError(0, "the disk is full")
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}") from error
