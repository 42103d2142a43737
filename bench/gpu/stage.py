"""A stage of the GPU check: a function that runs in processes of its own.

A kernel that faults spoils its process's CUDA context for good, and one that never ends cannot be
interrupted from inside: so no stage shares a process with another, and a stage past its time is killed.
What it reported until then is kept.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Report = Callable[[Row], None]

# Imported once by the server that stages are forked from. None of them touches a device when imported.
PRELOAD = ["bench.gpu.programs"]


class Skipped(Exception):
    """A stage has nothing to do here; the text is the reason."""


@dataclass(frozen=True)
class Settings:
    """What every stage is told.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        quick: tiny shapes.
        out: folder of logs and rows.
        commit: what to record where the checkout is no git repository; None asks git.
        seconds: time that the stage has.
        shard, shards: which share of its work this process takes.
    """

    device: str
    quick: bool
    out: Path
    commit: str | None = None
    seconds: float = 60.0
    shard: int = 0
    shards: int = 1

    @property
    def real(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device == "cuda" and not self.quick


@dataclass(frozen=True)
class Stage:
    """A named part of the check.

    Attributes:
        name, what: for the command line.
        kind: ``"facts"``, ``"check"`` (its failure turns the gate red) or ``"timing"``, each of whose cases is checked
            by itself.
        limit: seconds that it may take.
        run: the work; a row with the key ``fault``, or an exception, makes the stage fail.
        shards: processes that share its cases on a GPU, mostly to compile side by side.
        part: which of `bench.gpu.check.PARTS` it belongs to.
    """

    name: str
    what: str
    kind: str
    limit: float
    run: Callable[[Settings, Report], None]
    shards: int = 1
    part: str = "first"


@dataclass
class Outcome:
    """What became of a stage: ``ok``, ``failed``, ``skipped``, ``out of time`` or ``not run``."""

    name: str
    kind: str
    status: str
    message: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def red(self) -> bool:
        return self.kind == "check" and self.status in ("failed", "out of time")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _plain(value: Any) -> Any:
    """A value that JSON has a notation for."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _child(run: Callable[[Settings, Report], None], settings: Settings, sender: Connection) -> None:
    # A group of its own, so that killing the stage ends what it started, too.
    os.setpgid(0, 0)
    with open(settings.out / "log.txt", "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if settings.device == "cpu":
        torch.set_num_threads(1)
    status, message = "ok", ""
    try:
        run(settings, lambda row: sender.send({key: _plain(value) for key, value in row.items()}))
    except Skipped as reason:
        status, message = "skipped", str(reason)
    except BaseException as error:
        traceback.print_exc()
        status, message = "failed", f"{type(error).__name__}: {error}"
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send((status, message))
    sender.close()


def _kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)


def run_stage(stage: Stage, settings: Settings, seconds: float) -> Outcome:
    """Run a stage for at most ``seconds``."""
    outcome = Outcome(stage.name, stage.kind, "ok")
    start = time.monotonic()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    shards = stage.shards if settings.device == "cuda" else 1
    running: dict[Connection, Any] = {}
    try:
        for shard in range(shards):
            receiver, sender = context.Pipe(duplex=False)
            told = replace(settings, seconds=seconds, shard=shard, shards=shards)
            process = context.Process(target=_child, args=(stage.run, told, sender))
            process.start()
            sender.close()
            running[receiver] = process
        ends = _collect(running, outcome, start + seconds)
    finally:
        for process in running.values():
            _kill(process)
    outcome.seconds = round(time.monotonic() - start, 2)
    faults = [f"{row.get('case', stage.name)}: {row['fault']}" for row in outcome.rows if "fault" in row]
    broken = [message for status, message in ends if status == "failed"]
    late = [message for status, message in ends if status == "out of time"]
    if faults or broken:
        outcome.status, outcome.message = "failed", "; ".join([*broken, *faults])
    elif late:
        outcome.status, outcome.message = "out of time", f"killed after {seconds:.0f} s"
    elif ends and all(status == "skipped" for status, _ in ends):
        outcome.status, outcome.message = "skipped", ends[0][1]
    return outcome


def _collect(running: dict[Connection, Any], outcome: Outcome, deadline: float) -> list[tuple[str, str]]:
    """Rows into ``outcome`` until every process has ended; removes those that did."""
    ends: list[tuple[str, str]] = []
    while running:
        ready = wait(list(running), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            ends += [("out of time", "")] * len(running)
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            try:
                message = receiver.recv()
            except EOFError:
                process = running.pop(receiver)
                process.join(10)
                ends.append(("failed", f"the process died with exit status {process.exitcode}"))
                continue
            if isinstance(message, dict):
                outcome.rows.append(message)
                continue
            ends.append(message)
            process = running.pop(receiver)
            process.join(10)
            if process.is_alive():
                _kill(process)
    return ends
