"""LaMemo, Transformer-XL, GPT-2 and LogMem trained on Tiny Shakespeare with equal parameters and steps.

E = 32, four layers, blocks of 128 characters and as many rows of memory; the other settings are those of the preset
``paper-32``. The feed-forwards of the others are so wide that they have as many parameters as LogMem.

A case is one training by `bench.lm.train_lm` in ``<scratch>/<model>-<steps>-<seed>``, taken up or collected as in
``paper-table1``. Rows are those of that run without the paper's figures, and have besides: ``validation_read``, how
the validation loss was taken, and, for LogMem, ``validation_carried``, that of the streams which the recurrent models
are asked about, with the state carried along them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.lm import arguments
from bench.lm.corpora import load, streams
from bench.lm.generate import load_model
from bench.lm.models import RECURRENT, LogMem
from bench.lm.settings import resolve
from bench.lm.train_lm import CHECKPOINT
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.report.tables import over_seeds
from bench.report.terminal import table
from lmn_kernels import MemoryState

from .trainings import Training, digest_of, flags

NAMES = {"lamemo": "LaMemo", "transformer-xl": "Transformer-XL", "gpt2": "GPT-2", "logmem": "LogMem"}
SEEDS = (1337, 1338, 1339)
STEPS, EVALUATIONS = 1000, 5
# Of 2,048 characters each: as many as the validation split has.
EVAL_BATCHES = 55
BLOCK = 128
# Closest to LogMem's 71,489 parameters, with the 65 characters of Tiny Shakespeare.
INNER = {"lamemo": 185, "transformer-xl": 185, "gpt2": 177}
QUICK: dict[str, Any] = {"layers": 2, "block": 32, "batch": 4}
QUICK_STEPS = 10
# The recurrent models read all of a text in every evaluation.
QUICK_TEXT = Path(__file__)
CARRIED = "the whole split, memory carried along"


def add_arguments(add: Callable[..., Any]) -> None:
    add("--data", help="tinyshakespeare (default; --quick: a source file), stdlib, or the path of a UTF-8 text file")
    add("--models", nargs="+", choices=tuple(NAMES), default=list(NAMES), help="default: all four")
    add(
        "--seeds",
        nargs="+",
        type=arguments.seed,
        default=list(SEEDS),
        help="one training each (default: 1337 1338 1339)",
    )
    add("--steps", type=int, help=f"updates of each training (default: {STEPS}; --quick: {QUICK_STEPS})")


def cases(context: Context) -> list[Case]:
    options = context.options
    data = options["data"] or (str(QUICK_TEXT) if context.quick else "tinyshakespeare")
    digest = digest_of(data)
    steps = (QUICK_STEPS if context.quick else STEPS) if options["steps"] is None else options["steps"]
    block = QUICK["block"] if context.quick else BLOCK
    found = []
    for model, seed in itertools.product(dict.fromkeys(options["models"]), dict.fromkeys(options["seeds"])):
        name = f"{model}-{steps}-{seed}"
        often = max(1, steps // EVALUATIONS)
        given = {
            **flags(context, name, model, seed, data),
            "preset": "paper-32",
            "block": block,
            "steps": steps,
            "eval_every": often,
            "save_every": often,
            **({"inner": INNER[model]} if model in INNER else {}),
            **({"memory": block} if model in RECURRENT else {"eval_batches": 2 if context.quick else EVAL_BATCHES}),
            **(QUICK if context.quick else {}),
        }
        training = Contender(resolve(given, None), digest, context.device, anew=context.quick)
        found.append(Case(name, training.measure, training.check))
    return found


class Contender(Training):
    """One training of the comparison."""

    def check(self) -> None:
        super().check()
        if self.settings.model == "logmem":
            # It is read again, also by a training that is finished.
            load(self.settings.data)

    def row(self, metrics: Row) -> Row:
        settings = self.settings
        windows = f"windows of {settings.block} characters"
        row = super().row(metrics) | {"validation_read": CARRIED if settings.model in RECURRENT else windows}
        path = Path(settings.out) / CHECKPOINT
        # A training that was made elsewhere may have come without it.
        if settings.model == "logmem" and path.exists():
            model, _ = load_model(path, settings.backend)
            text = streams(load(settings.data).validation, settings.batch).to(self.device)
            row["validation_carried"] = carried_loss(cast(LogMem, model.to(self.device)), text, settings.block)
        return row


@torch.no_grad()
def carried_loss(model: LogMem, text: Tensor, block: int) -> float:
    """Nats per character of the streams ``text [B, N]``, read in segments, each from the state of the one before."""
    states: list[MemoryState | None] = [None] * len(model.blocks)
    total = 0.0
    for x, target in zip(text[:, :-1].split(block, 1), text[:, 1:].split(block, 1), strict=True):
        hidden = model.embed(x)
        for place, layer in enumerate(model.blocks):
            hidden, states[place] = layer(hidden, state=states[place], return_state=True)
        logits = model.head(model.norm(hidden)).double()
        total += x.shape[1] * F.cross_entropy(logits.flatten(0, 1), target.flatten()).item()
    return total / (text.shape[1] - 1)


def show(rows: list[Row]) -> str:
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["steps"]].append(row)
    order = list(NAMES)
    body = [
        [
            NAMES[model],
            f"{steps:,}",
            len(group),
            f"{group[0]['parameters']:,}",
            *(over_seeds([row.get(name) for row in group]) for name in ("train", "validation", "validation_carried")),
            group[0]["validation_read"],
        ]
        for (model, steps), group in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]
    headers = ["model", "steps", "seeds", "parameters", "train", "validation", "carried", "validation is of"]
    note = "Nats per character at the last step, mean ± sample standard deviation over the seeds."
    return "\n".join([table(headers, body), note])
