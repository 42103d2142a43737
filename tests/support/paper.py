"""How the runs ``paper-table1`` and ``agreement`` are called, with settings so small that a training takes a moment."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.measure.journal import Row
from bench.measure.runner import Context, Run, execute
from bench.runs import agreement, paper_table1

RUNS: dict[str, Run] = {"paper-table1": paper_table1, "agreement": agreement}
TINY = {
    "embedding": 32,
    "heads": 2,
    "layers": 1,
    "block": 12,
    "batch": 2,
    "steps": 4,
    "eval_every": 2,
    "eval_batches": 1,
    "save_every": 2,
    "warmup": 0,
}


def context_of(run: str, folder: Path, *flags: str, quick: bool = False) -> Context:
    parser = argparse.ArgumentParser()
    RUNS[run].add_arguments(parser.add_argument)
    options = vars(parser.parse_args(list(flags)))
    return Context(
        torch.device("cpu"), torch.float32, "reference", quick, folder / "results", folder / "runs" / run, options
    )


def rows_of(run: str, context: Context) -> list[Row]:
    cases = execute(run, RUNS[run], context, fresh=False).cases
    return [row for rows in cases.values() for row in rows]


def train(folder: Path, text: Path, *flags: str) -> list[Row]:
    return rows_of("paper-table1", context_of("paper-table1", folder, "--data", str(text), *flags))
