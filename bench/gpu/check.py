"""One command on one GPU, without a network: is it right, and how fast is what is right.

    python -m bench.gpu.check --out DIR
    python -m bench.gpu.check --out DIR --part first              five minutes, the most telling ones
    python -m bench.gpu.check --out DIR --device cpu --quick      a rehearsal on a CPU, in a minute

Checks are the tests of tests/gpu and of the kernels; timings are cases of the runs of `python -m bench`, each of which
is compared with its own oracle before it is timed. Their rows are journals in DIR/results, which a later part goes on
with, and which `python -m bench report` reads. DIR/gpu_check.json (cpu_check.json for a rehearsal) is written, whole or
not at all, after every stage, and the stages' own output to DIR/log.txt; a short table comes last. Exit status: 0, 1 (a
stage failed or did not end), 2 (bad arguments, or no CUDA device), 130 (Ctrl-C).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.errors import RunError
from bench.files import write_file
from bench.measure.journal import Row, read
from bench.report.goals import NOT_MEASURED, goal_rows
from bench.report.tables import number

from .programs import facts, runs, sanitizer, tests
from .stage import Outcome, Settings, Stage, run_stage

FORMAT, VERSION = "lmn_kernels.gpu_check", 2
# Seconds: a quarter of an hour, less the start of a machine. A part fits a command of ten minutes.
BUDGET = 840.0
# Of a rehearsal, which takes its turns with whatever else the CPU does.
PATIENCE = 4
PARTS = {
    "first": "what shows a fault soonest, and the figures that goals are about",
    "second": "every check",
    "third": "the sanitizer, and what takes long to time",
}
KERNELS = [f"tests/kernels/test_triton_{name}.py" for name in ("attention", "look_ahead", "tree")]
OPS = [f"tests/ops/test_{name}.py" for name in ("golden", "look_ahead_golden", "reference", "step", "step_precision")]
CONFIGURATIONS, LAYERS, LOOK_AHEAD, LARGE, STEP = (
    [f"tests/gpu/test_{name}.py"] for name in ("configurations", "layers", "look_ahead", "large", "step")
)
OPERATIONS = ("tree", "projections", "attention", "output")


def _tests(files: Sequence[str], *chosen: str) -> partial[None]:
    return partial(tests, tuple(files), ("-m", "gpu", *chosen))


def _cases(operations: Sequence[str], shapes: str, group: str = "main") -> partial[None]:
    return partial(runs, "kernels", tuple(f"{name}/{shape}/{group}" for shape in shapes for name in operations))


ALL = [
    Stage("facts", "device, driver, versions, commit, clocks", "facts", 15, facts),
    Stage("smoke", "a case of every kernel", "check", 45,
          partial(tests, (*CONFIGURATIONS, *LAYERS, *LOOK_AHEAD, *STEP), ("-m", "smoke")), 12),
    Stage("kernels", "parts of a layer, forward and backward, at C and D", "timing", 45, _cases(OPERATIONS, "CD")),
    Stage("time_layers", "layers and the materialising form at C and D, with memory", "timing", 45,
          _cases(("layer",), "CD")),
    Stage("small", "shapes P and A, eager and as CUDA graphs", "timing", 35, _cases(("layer", *OPERATIONS), "PA")),
    Stage("time_decode", "a token against attention over a KV cache", "timing", 30,
          partial(runs, "decode", ("E=1024/B=1", "E=1024/B=32"))),
    Stage("attention", "the layer beside flash and cuDNN at C", "timing", 20, _cases(("layer",), "C", "attention")),
    Stage("repeats", "equal runs, side streams, a step as a CUDA graph", "check", 30,
          _tests([*LAYERS, *STEP], "-k", "equal_runs or side_stream or captured"), 4),
    Stage("bfloat16", "every configuration in bfloat16", "check", 35, _tests(CONFIGURATIONS, "-k", "bfloat16"), 14),
    Stage("tests", "the kernels' tests", "check", 80,
          partial(tests, ("tests/bench/test_close.py", *OPS, *KERNELS), ()), 12, "second"),
    Stage("configs", "every other configuration", "check", 50,
          _tests(CONFIGURATIONS, "-k", "not bfloat16"), 14, "second"),
    Stage("poison", "results do not depend on uninitialised memory", "check", 20,
          _tests(LAYERS, "-k", "uninitialised"), 4, "second"),
    Stage("layers", "layers in every form against float64", "check", 40, _tests(LAYERS, "-k", "float64"), 12, "second"),
    Stage("look_ahead", "LaMemo's kernels and models, each run again", "check", 35, _tests(LOOK_AHEAD), 12, "second"),
    Stage("large", "past 2^31 elements and 65,535 sequences", "check", 25, _tests(LARGE), 1, "second"),
    Stage("decode", "the extension's step against float64 and itself", "check", 35,
          _tests(STEP, "-k", "float64"), 4, "second"),
    Stage("sanitizer", "compute-sanitizer, where it is installed", "check", 50, sanitizer, 1, "third"),
    Stage("scaling", "ours from 8k to 1M tokens", "timing", 25, partial(runs, "scaling", ("ours/",)), 1, "third"),
    Stage("long", "layers at M", "timing", 15, _cases(("layer",), "M"), 1, "third"),
    Stage("compiled", "the materialising form under torch.compile at C", "timing", 35,
          _cases(("layer",), "C", "compiled"), 1, "third"),
    Stage("time_look_ahead", "LaMemo against the literal form", "timing", 35, partial(runs, "lamemo", ("look-ahead",)),
          1, "third"),
    Stage("all_decode", "a token at every size", "timing", 35, partial(runs, "decode", ("E=",)), 1, "third"),
    Stage("crossover", "rows of ever more tokens beside flash and cuDNN", "timing", 20,
          partial(runs, "crossover", ("layer/",)), 1, "third"),
    Stage("linear", "layers beside linear attention at C", "timing", 15, _cases(("layer",), "C", "linear"), 1, "third"),
    Stage("beside", "the layer beside flash and cuDNN at D and A", "timing", 15, _cases(("layer",), "DA", "attention"),
          1, "third"),
]  # fmt: skip


def gate(outcomes: list[Outcome], stages: list[Stage]) -> str:
    """``red``; ``green`` where every check was run and none failed; else ``incomplete``."""
    if any(outcome.red for outcome in outcomes):
        return "red"
    done = {outcome.name for outcome in outcomes if outcome.status in ("ok", "skipped")}
    return "green" if {stage.name for stage in stages if stage.kind == "check"} <= done else "incomplete"


def measured(out: Path) -> dict[str, list[Row]]:
    """Rows of every run below the check's folder, those of its newest invocation."""
    found: dict[str, list[Row]] = defaultdict(list)
    for path in sorted((out / "results").glob("*.jsonl")):
        for invocation in read(path)[-1:]:
            found[path.stem] = invocation.rows
    return found


class Check:
    """A run: stages in order, the record on disk after each of them.

    Args:
        settings: for every stage.
        stages: those that there are; their order is the run's.
        only: names of those wanted, or None for all.
        budget: seconds; no stage starts past them, and none goes on past them.
    """

    def __init__(self, settings: Settings, stages: list[Stage], only: Sequence[str] | None, budget: float):
        self.settings, self.stages, self.budget = settings, stages, budget
        self.wanted = [stage for stage in stages if only is None or stage.name in only]
        self.outcomes: list[Outcome] = []
        self.start = time.monotonic()

    @property
    def path(self) -> Path:
        return self.settings.out / ("gpu_check.json" if self.settings.device == "cuda" else "cpu_check.json")

    def run(self) -> None:
        for stage in self.wanted:
            left = self.budget - (time.monotonic() - self.start)
            if left > 0:
                limit = stage.limit if self.settings.real else PATIENCE * stage.limit
                outcome = run_stage(stage, self.settings, min(limit, left))
            else:
                outcome = Outcome(stage.name, stage.kind, "not run", f"the budget of {self.budget:g} s was spent")
            self.outcomes.append(outcome)
            write_file(self.path, (json.dumps(self.record(), indent=1, allow_nan=False) + "\n").encode())
            note = f": {_short(outcome.message, 300)}" if outcome.message else ""
            print(f"{stage.name:15} {outcome.status:12} {outcome.seconds:6.1f} s{note}", flush=True)

    def record(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "format": FORMAT,
            "version": VERSION,
            "device": settings.device,
            "quick": settings.quick,
            "note": "" if settings.real else "REHEARSAL on tiny shapes or a CPU: no number below is a result.",
            "facts": next((row for outcome in self.outcomes if outcome.kind == "facts" for row in outcome.rows), {}),
            "gate": gate(self.outcomes, self.stages),
            "seconds": round(time.monotonic() - self.start, 1),
            "stages": [outcome.as_dict() for outcome in self.outcomes],
            "goals": goal_rows(measured(settings.out), settings.real),
            "not_measured": NOT_MEASURED,
        }

    @property
    def status(self) -> int:
        return int(any(outcome.status in ("failed", "out of time") for outcome in self.outcomes))


def _short(text: object, width: int) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def shares(rows: Sequence[Row]) -> list[str]:
    """A line for each shape and direction: milliseconds of every part of a layer, and the share of its floor."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row["provider"] == "ours" and "share" in row:
            where = f"{row['shape']['name']} {row['direction']:8} {row.get('mode', '')}".rstrip()
            told = f"{row['operation']} {row['median']:.4g} ms {row['share']:.0%}"
            cells[where].setdefault(row["operation"], told)
    return [f"{where} of the floor: {', '.join(found.values())}" for where, found in cells.items()]


def decoding(rows: Sequence[Row]) -> list[str]:
    """A line for each layer and batch: its time a token, and how much longer attention takes."""
    cells: dict[str, dict[int, str]] = defaultdict(dict)
    for row in rows:
        if "position" in row and "median" in row:
            found = cells[f"B={row['shape']['batch']} E={row['shape']['embedding']}"]
            n = row["position"]
            if row["provider"] == "ours":
                found[n] = f"{n >> 10}k {row['median']:.4g} us"
            elif row["provider"] == "KV cache" and n in found:
                found[n] += f" {row['ratio']:.3g}x"
    return [f"decode {where}, against a KV cache: {', '.join(found.values())}" for where, found in cells.items()]


def table(record: Mapping[str, Any], results: Mapping[str, Sequence[Row]]) -> str:
    """The end of the output: ceilings, shares of the floors, goals. At most some 8,000 characters."""
    told = record["facts"]
    commit = f"{_short(told.get('commit'), 12)}{' and changes' if told.get('dirty') else ''}"
    lines = [
        *filter(None, [record["note"]]),
        f"{told.get('device')}, torch {told.get('torch')}, Triton {told.get('triton')}, commit {commit}",
        f"gate: {record['gate']}, {record['seconds']} s",
    ]
    rates = [(row["copy_gbs"], row["matrix_gflops"]) for row in results.get("kernels", ()) if "copy_gbs" in row]
    if rates:
        copy, product = (max(found) for found in zip(*rates, strict=True))
        lines.append(f"copy {copy / 1e3:.3g} TB/s, product {product / 1e3:.4g} TFLOP/s")
    lines += [*shares(results.get("kernels", ())), *decoding(results.get("decode", ()))]
    lines.append(f"{'goal':>4}  {'what':44} {'bar':>12} {'limit':>9} {'measured':>9}  met")
    for row in record["goals"]:
        met = {True: "yes", False: "no", None: "-"}[row["met"]]
        value = row["measured"]
        shown = value if isinstance(value, str) else number(value)
        lines.append(f"{row['goal']:>4}  {row['what']:44} {row['bar']:>12} {row['limit']:>9} {shown:>9}  {met}")
    lines.append(f"not measured: {record['not_measured']}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {s.name:15} {s.part:6} {s.kind:6} {s.limit:4.0f} s  {s.what}" for s in ALL)
    seconds = {name: sum(stage.limit for stage in ALL if stage.part == name) for name in PARTS}
    parts = "\n".join(f"  {name:6} {seconds[name]:4.0f} s  {what}" for name, what in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.check",
        description=__doc__,
        epilog=f"parts:\n{parts}\n\nstages, in this order, with the most time that each may take:\n{names}\n\n"
        "A check that fails or does not end turns the gate red; what comes after it still runs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the record, the log and the rows; made if missing")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses on what there is")
    add("--quick", action="store_true", help="tiny shapes: whether it runs, not how fast")
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for all stages; {BUDGET:g}")
    add("--part", nargs="+", choices=list(PARTS), help="the stages of these parts alone")
    add("--only", nargs="+", metavar="STAGE", choices=[s.name for s in ALL], help="these stages alone")
    add("--commit", help="commit to record where the checkout is no git repository")
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
    settings = Settings(options.device, options.quick, options.out.resolve(), options.commit)
    wanted = [s.name for s in ALL if s.part in (options.part or PARTS) and (not options.only or s.name in options.only)]
    check = Check(settings, ALL, wanted, options.budget)
    try:
        check.run()
    except RunError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gpu_check: ended; what was done is in {check.path}", file=sys.stderr)
        return 130
    print(table(check.record(), measured(settings.out)))
    print(f"record: {check.path}")
    return check.status


if __name__ == "__main__":
    sys.exit(main())
