"""The paper's Table 1: GPT-2, LogMem, TinyLogMem and ExpSum trained on Tiny Shakespeare.

A case is one training by `bench.lm.train_lm`, with its preset, in ``<scratch>/<model>-<embedding>-<seed>``. What is in
that folder already, a finished training or a checkpoint, is taken as it is where its settings and its corpus are
those of the case; so trainings of hours may come from elsewhere. A rehearsal (``--quick``) always trains; the command
line gives it a folder of its own. Parameters are float32 throughout, as the paper's.

Rows: ``embedding``, ``model``, ``seed``, ``parameters``, ``train`` and ``validation`` (nats per character at the last
step, mean over the batches of an evaluation), ``steps``, ``curve`` ([[step, train, validation], …]),
``tokens_per_second``, ``corpus`` and its ``corpus_sha256``, ``paper_parameters``, ``paper_train``,
``paper_validation``, and what the training says of its own origin: ``trained_commit``, ``trained_dirty``,
``trained_threads``, ``trained_torch`` (of its last part, where it was interrupted).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from bench.lm import arguments
from bench.lm.settings import resolve
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.report.terminal import table

from .trainings import Training, digest_of, flags

# Parameters, losses on the training and the validation split (docs/definition.md, section 7).
PAPER: dict[tuple[int, str], tuple[int, float, float]] = {
    (32, "gpt2"): (71_105, 1.8438, 1.9704),
    (32, "logmem"): (71_489, 1.5733, 1.7742),
    (32, "tinylogmem"): (42_305, 1.6556, 1.8540),
    (32, "expsum"): (71_489, 1.6312, 1.8222),
    (128, "gpt2"): (841_281, 1.3503, 1.5925),
    (128, "logmem"): (1_072_193, 1.2680, 1.5581),
    (128, "tinylogmem"): (677_441, 1.3132, 1.5699),
    (128, "expsum"): (1_072_193, 1.2981, 1.5508),
}
PAPER_STEPS = 5000
NAMES = {"gpt2": "GPT-2", "logmem": "LogMem", "tinylogmem": "TinyLogMem", "expsum": "ExpSum"}

QUICK: dict[str, Any] = {
    "layers": 2,
    "block": 64,
    "batch": 4,
    "steps": 20,
    "eval_every": 10,
    "eval_batches": 2,
    "save_every": 10,
}


def add_arguments(add: Callable[..., Any]) -> None:
    add("--data", help="tinyshakespeare (default; --quick: stdlib), stdlib, or the path of a UTF-8 text file")
    add("--embedding", choices=("32", "128", "all"), default="32", help="width of the models (default: 32)")
    add("--models", nargs="+", choices=tuple(NAMES), default=list(NAMES), help="default: all four")
    add("--seeds", nargs="+", type=arguments.seed, default=[1337], help="one training each (default: 1337)")


def cases(context: Context) -> list[Case]:
    options = context.options
    data = options["data"] or ("stdlib" if context.quick else "tinyshakespeare")
    digest = digest_of(data)
    widths = (32, 128) if options["embedding"] == "all" else (int(options["embedding"]),)
    found = []
    for embedding, model, seed in itertools.product(
        widths, dict.fromkeys(options["models"]), dict.fromkeys(options["seeds"])
    ):
        name = f"{model}-{embedding}-{seed}"
        given = {
            **flags(context, name, model, seed, data),
            "preset": f"paper-{embedding}",
            **(QUICK if context.quick else {}),
        }
        training = Cell(resolve(given, None), digest, context.device, anew=context.quick)
        found.append(Case(name, training.measure, training.check))
    return found


class Cell(Training):
    """One cell of the table."""

    def row(self, metrics: Row) -> Row:
        parameters, train, validation = PAPER[self.settings.embedding, self.settings.model]
        paper = {"paper_parameters": parameters, "paper_train": train, "paper_validation": validation}
        return {**super().row(metrics), **paper}


def show(rows: list[Row]) -> str:
    order = list(NAMES)
    rows = sorted(rows, key=lambda row: (row["embedding"], order.index(row["model"]), row["seed"]))
    headers = ["E", "model", "seed", "parameters", "paper", "train", "paper", "validation", "paper"]
    body = [
        [
            row["embedding"],
            NAMES[row["model"]],
            row["seed"],
            f"{row['parameters']:,}",
            f"{row['paper_parameters']:,}",
            *(f"{row[name]:.4f}" for name in ("train", "paper_train", "validation", "paper_validation")),
        ]
        for row in rows
    ]
    notes = ["Nats per character at the last step; beside each figure, the paper's."]
    shorter = sorted({row["steps"] for row in rows} - {PAPER_STEPS})
    if shorter:
        notes.append(
            f"Not comparable: {', '.join(f'{steps:,}' for steps in shorter)} steps; the paper's {PAPER_STEPS:,}."
        )
    return "\n".join([table(headers, body), *notes])
