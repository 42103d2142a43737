"""One command on one GPU, without a network: is it right, and, only if it is, how fast.

    python -m bench.gpu.check --out DIR
    python -m bench.gpu.check --out DIR --device cpu --quick      a rehearsal on a CPU, in a minute

Writes DIR/gpu_check.json (cpu_check.json for a rehearsal), whole or not at all, after every stage, and the
stages' own output to DIR/log.txt; a short table comes last. Exit status: 0, 1 (a stage failed or did not
end), 2 (bad arguments, or no CUDA device), 130 (Ctrl-C).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.contenders.shapes import DIRECTIONS, GOALS, NOT_MEASURED, STAGES, Shape, floor_ms
from bench.errors import RunError
from bench.files import write_file

from . import (
    configs as gpu_configs,
)
from . import (
    correctness as gpu_correctness,
)
from . import (
    decode as gpu_decode,
)
from . import (
    decode_timings as gpu_decode_timings,
)
from . import (
    look_ahead as gpu_look_ahead,
)
from . import (
    programs as gpu_programs,
)
from . import (
    timings as gpu_timings,
)
from .stage import Outcome, Settings, Stage, run_stage

FORMAT, VERSION = "lmn_kernels.gpu_check", 1
BUDGET = 520.0

ALL = [
    Stage("facts", "device, driver, versions, commit, clocks", "facts", 30, gpu_programs.facts),
    Stage("tests", "the kernels' tests", "check", 180, gpu_programs.tests),
    Stage("configs", "every configuration of every kernel, alone", "check", 110, gpu_configs.configurations, 8),
    Stage("poison", "results do not depend on uninitialised memory", "check", 50, gpu_correctness.poison, 4),
    Stage("determinism", "20 equal runs", "check", 50, gpu_correctness.determinism),
    Stage("layers", "layers in every form against float64; side streams", "check", 90, gpu_correctness.layers, 8),
    Stage("look_ahead", "LaMemo's kernels and models, each run again", "check", 80, gpu_look_ahead.look_ahead, 8),
    Stage("large", "past 2^31 elements and 65,535 sequences", "check", 50, gpu_correctness.large),
    Stage("decode", "the extension's step against float64 and itself", "check", 60, gpu_decode.decode, 4),
    Stage("replay", "a step as a CUDA graph, replayed 1,000 times", "check", 40, gpu_decode.replay),
    Stage("sanitizer", "compute-sanitizer, where it is installed", "check", 80, gpu_programs.sanitizer),
    Stage("ceilings", "copy bandwidth and matrix products of this run", "timing", 30, gpu_timings.ceilings),
    Stage("kernels", "stages of a layer one by one", "timing", 60, gpu_timings.kernels),
    Stage("time_layers", "layers against the materialising form, with memory", "timing", 70, gpu_timings.layers),
    Stage("attention", "layers against causal attention, flash and cuDNN", "timing", 70, gpu_timings.attention),
    Stage("time_look_ahead", "LaMemo against the literal form", "timing", 60, gpu_look_ahead.time_look_ahead),
    Stage("time_decode", "a token against attention over a KV cache", "timing", 100, gpu_decode_timings.time_decode),
    Stage("small", "shape P, eager and as CUDA graphs", "timing", 40, gpu_timings.small),
    Stage("scaling", "8k to 1M tokens", "timing", 40, gpu_timings.scaling),
    Stage("compiled", "the materialising form under torch.compile", "timing", 120, gpu_timings.compiled),
]


def gate(outcomes: list[Outcome], stages: list[Stage]) -> str:
    """``red``; ``green`` where every check was run and none failed; else ``incomplete``."""
    if any(outcome.red for outcome in outcomes):
        return "red"
    done = {outcome.name for outcome in outcomes if outcome.status in ("ok", "skipped")}
    return "green" if {stage.name for stage in stages if stage.kind == "check"} <= done else "incomplete"


def measured(outcomes: list[Outcome]) -> dict[str, float]:
    rows = [row for outcome in outcomes for row in outcome.rows]
    return {row["key"]: row["value"] for row in rows if isinstance(row.get("value"), int | float)}


def goal_rows(values: Mapping[str, float], settings: Settings) -> list[dict[str, Any]]:
    """Every goal with what was measured; whether it is met, only for the real shapes on a GPU."""
    shapes, real = gpu_timings.shapes_of(settings), settings.device == "cuda" and not settings.quick
    rows = []
    for goal in GOALS:
        value = goal.measure(values, shapes)
        met = goal.met(value) if real and value is not None else None
        shown = value if value is None or math.isfinite(value) else str(value)
        row = {"goal": goal.number, "what": goal.what, "bar": goal.bar, "limit": goal.limit}
        rows.append(row | {"measured": shown, "met": met})
    return rows


def floor_shares(values: Mapping[str, float], shapes: Mapping[str, Shape]) -> list[dict[str, Any]]:
    """Every timed stage of a layer against its roofline by the run's own ceilings."""
    rows = []
    for shape, way, stage in itertools.product(shapes.values(), DIRECTIONS, STAGES):
        ms = values.get(f"kernel/{stage} {way}/{shape.name}")
        if ms and "copy" in values and "product" in values:
            share = floor_ms(shape, stage, way, values["product"], values["copy"]) / ms
            rows.append({"shape": shape.name, "direction": way, "stage": stage, "ms": ms, "floor_share": share})
    return rows


class Check:
    """A run: stages in order, the record on disk after each of them.

    Args:
        settings: for every stage.
        stages: those that there are; their order is the run's.
        only: names of those wanted, or None for all.
        budget: seconds; no stage starts past them, and none goes on past them.
    """

    def __init__(self, settings: Settings, stages: list[Stage], only: list[str] | None, budget: float):
        self.settings, self.stages, self.budget = settings, stages, budget
        self.wanted = [stage for stage in stages if only is None or stage.name in only]
        self.outcomes: list[Outcome] = []
        self.start = time.monotonic()

    @property
    def path(self) -> Path:
        return self.settings.out / ("gpu_check.json" if self.settings.device == "cuda" else "cpu_check.json")

    def run(self) -> None:
        for stage in self.wanted:
            outcome = self._run(stage)
            self.outcomes.append(outcome)
            write_file(self.path, (json.dumps(self.record(), indent=1, allow_nan=False) + "\n").encode())
            note = f": {_short(outcome.message, 300)}" if outcome.message else ""
            print(f"{stage.name:15} {outcome.status:12} {outcome.seconds:6.1f} s{note}", flush=True)

    def _run(self, stage: Stage) -> Outcome:
        left = self.budget - (time.monotonic() - self.start)
        if left <= 0:
            return Outcome(stage.name, stage.kind, "not run", f"the budget of {self.budget:g} s was spent")
        red = [outcome.name for outcome in self.outcomes if outcome.red]
        if stage.kind == "timing" and red:
            return Outcome(stage.name, stage.kind, "not run", f"nothing is timed on a red gate: {', '.join(red)}")
        return run_stage(stage, self.settings, min(stage.limit, left))

    def record(self) -> dict[str, Any]:
        settings, values = self.settings, measured(self.outcomes)
        real = settings.device == "cuda" and not settings.quick
        return {
            "format": FORMAT,
            "version": VERSION,
            "device": settings.device,
            "backend": settings.backend,
            "quick": settings.quick,
            "note": "" if real else "REHEARSAL on tiny shapes or a CPU: no number below is a result.",
            "facts": next((row for outcome in self.outcomes if outcome.kind == "facts" for row in outcome.rows), {}),
            "gate": gate(self.outcomes, self.stages),
            "seconds": round(time.monotonic() - self.start, 1),
            "stages": [outcome.as_dict() for outcome in self.outcomes],
            "floor_shares": floor_shares(values, gpu_timings.shapes_of(settings)),
            "goals": goal_rows(values, settings),
            "not_measured": NOT_MEASURED,
        }

    @property
    def status(self) -> int:
        return int(any(outcome.status in ("failed", "out of time") for outcome in self.outcomes))


def _short(text: object, width: int) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)


def table(record: Mapping[str, Any]) -> str:
    """The end of the output: ceilings, shares of the floors, goals. At most some 6,000 characters."""
    facts, values = record["facts"], {r["key"]: r["value"] for s in record["stages"] for r in s["rows"] if "key" in r}
    commit = f"{_short(facts.get('commit'), 12)}{' and changes' if facts.get('dirty') else ''}"
    lines = [
        *filter(None, [record["note"]]),
        f"{facts.get('device')}, torch {facts.get('torch')}, Triton {facts.get('triton')}, commit {commit}",
        f"gate: {record['gate']}, {record['seconds']} s",
    ]
    if "copy" in values and "product" in values:
        lines.append(f"copy {values['copy'] / 1e12:.3g} TB/s, product {values['product'] / 1e12:.4g} TFLOP/s")
    shares: dict[tuple[str, str], list[str]] = {}
    for row in record["floor_shares"]:
        cells = shares.setdefault((row["shape"], row["direction"]), [])
        cells.append(f"{row['stage']} {row['ms']:.4g} ms {row['floor_share']:.0%}")
    lines += [f"{shape} {way:8} of the floor: {', '.join(cells)}" for (shape, way), cells in shares.items()]
    lines += gpu_decode_timings.summary(values)
    lines.append(f"{'goal':>4}  {'what':44} {'bar':>12} {'limit':>9} {'measured':>9}  met")
    for row in record["goals"]:
        met = {True: "yes", False: "no", None: "-"}[row["met"]]
        number = _number(row["measured"])
        lines.append(f"{row['goal']:>4}  {row['what']:44} {row['bar']:>12} {row['limit']:>9} {number:>9}  {met}")
    lines.append(f"not measured: {record['not_measured']}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {s.name:12} {s.kind:7} {s.limit:4.0f} s  {s.what}" for s in ALL)
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.check",
        description=__doc__,
        epilog=f"stages, in this order, with the most time that each may take:\n{names}\n\n"
        "A check that fails or does not end turns the gate red; the checks after it still run, and no timing does.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the record and the log; made if missing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses on what there is")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for all stages; {BUDGET:g}")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=[s.name for s in ALL], help="these stages alone")
    parser.add_argument("--commit", help="commit to record where the checkout is no git repository")
    parser.add_argument(
        "--compile-mode", default="default", metavar="MODE",
        help="mode of torch.compile for the compiled contender: default, or max-autotune-no-cudagraphs (minutes)",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: no CUDA device is available (--device cpu --quick rehearses without one)", file=sys.stderr)
        return 2
    if options.device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        print("gpu_check: TRITON_INTERPRET=1 would check the interpreter, not the device; unset it", file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "log.txt").write_text("")
    except OSError as error:
        print(f"gpu_check: out: {options.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    settings = Settings(options.device, options.quick, options.out.resolve(), options.commit, options.compile_mode)
    check = Check(settings, ALL, options.only, options.budget)
    try:
        check.run()
    except RunError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gpu_check: ended; what was done is in {check.path}", file=sys.stderr)
        return 130
    print(table(check.record()))
    print(f"record: {check.path}")
    return check.status


if __name__ == "__main__":
    sys.exit(main())
