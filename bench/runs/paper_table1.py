"""The paper's Table 1: GPT-2, LogMem, TinyLogMem and ExpSum trained on Tiny Shakespeare.

A case is one training by `bench.train_lm`, with its preset, in ``<scratch>/<model>-<embedding>-<seed>``. What is in
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
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.checkpoint import Checkpoint
from bench.corpora import TINYSHAKESPEARE_SHA256, load
from bench.errors import InputError
from bench.journal import Row
from bench.ranks import Ranks
from bench.runner import Case, Context
from bench.settings import Settings, resolve
from bench.terminal import table
from bench.train_lm import CHECKPOINT
from bench.train_lm import Run as TrainingRun

# Parameters, losses on the training and the validation split (specification, section 7).
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
# Where the text lay, and how much was said at the end, change no loss.
_FREE = ("data", "sample_tokens")
_KEYS = {"settings", "corpus", "parameters", "rows", "step", "tokens_per_second"}


def add_arguments(add: Callable[..., Any]) -> None:
    add("--data", help="tinyshakespeare (default; --quick: stdlib), stdlib, or the path of a UTF-8 text file")
    add("--embedding", choices=("32", "128", "all"), default="32", help="width of the models (default: 32)")
    add("--models", nargs="+", choices=tuple(NAMES), default=list(NAMES), help="default: all four")
    add("--seeds", nargs="+", type=int, default=[1337], help="one training each (default: 1337)")


def cases(context: Context) -> list[Case]:
    options = context.options
    data = options["data"] or ("stdlib" if context.quick else "tinyshakespeare")
    # What is finished can be collected without the text.
    digest = TINYSHAKESPEARE_SHA256 if data == "tinyshakespeare" else load(data).digest
    widths = (32, 128) if options["embedding"] == "all" else (int(options["embedding"]),)
    found = []
    for embedding, model, seed in itertools.product(
        widths, dict.fromkeys(options["models"]), dict.fromkeys(options["seeds"])
    ):
        name = f"{model}-{embedding}-{seed}"
        given = {
            "preset": f"paper-{embedding}",
            "model": model,
            "seed": seed,
            "data": data,
            "out": str(context.scratch / name),
            "device": str(context.device),
            "sample_tokens": 100,
            # GPT-2 has none of our operations.
            **({} if model == "gpt2" else {"backend": context.backend}),
            **(QUICK if context.quick else {}),
        }
        training = Training(resolve(given, None), digest, context.device, anew=context.quick)
        found.append(Case(name, training.measure, training.check))
    return found


@dataclass(frozen=True)
class Training:
    """One cell of the table.

    Attributes:
        settings: those of `bench.train_lm`; its files are in ``settings.out``.
        digest: sha256 of the corpus.
        device: where to train.
        anew: whether to leave out of account what is in the folder.
    """

    settings: Settings
    digest: str
    device: torch.device
    anew: bool

    def check(self) -> None:
        """Refuse at once what could only be refused after hours.

        Raises:
            InputError: the folder holds another training, or there is no corpus to train on.
        """
        if not self._is_finished():
            self._checkpoint()
            load(self.settings.data)

    def measure(self) -> list[Row]:
        """Train what is missing and collect the result.

        Raises:
            InputError: as `check`.
            RunError: a file cannot be written, or the loss is not finite.
            KeyboardInterrupt: the checkpoint is in the folder.
        """
        if not self._is_finished():
            # It returns a status: 0, or that of an interruption after which it has saved.
            if TrainingRun(self.settings, Ranks(0, 1, self.device), self._checkpoint()).train():
                raise KeyboardInterrupt
        metrics = self._metrics()
        assert metrics is not None, "train() returns 0 only after it has written them"
        return [self._row(metrics)]

    def _is_finished(self) -> bool:
        if self.anew:
            return False
        metrics = self._metrics()
        # The last losses are written before the last checkpoint, the sample after it.
        return metrics is not None and metrics["step"] == self.settings.steps and "sample" in metrics

    def _metrics(self) -> Row | None:
        """metrics.json of the folder; None where there is none."""
        path = Path(self.settings.out) / "metrics.json"
        try:
            metrics = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: expected the metrics of train_lm, got something else ({error})") from error
        if not isinstance(metrics, dict) or not metrics.keys() >= _KEYS:
            raise InputError(f"{path}: expected the metrics of train_lm, got something else")
        self._check_same(metrics["settings"], metrics["corpus"]["sha256"])
        return metrics

    def _checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from; None where there is none."""
        path = Path(self.settings.out) / CHECKPOINT
        if self.anew or not path.exists():
            return None
        saved = Checkpoint.load(path)
        self._check_same(saved.settings, saved.digest)
        return saved

    def _check_same(self, settings: dict[str, Any], digest: str) -> None:
        wanted = {name: value for name, value in self.settings.to_save().items() if name not in _FREE}
        differing = {name: value for name, value in wanted.items() if settings.get(name) != value}
        expected = [f"{name} {value!r}" for name, value in differing.items()]
        got = [f"{name} {settings.get(name)!r}" for name in differing]
        if digest != self.digest:
            expected.append(f"the corpus {self.settings.data} (sha256 {self.digest[:12]}…)")
            got.append(f"one of sha256 {digest[:12]}…")
        if got:
            raise InputError(
                f"{self.settings.out}: expected a training with {', '.join(expected)}, got one with "
                f"{', '.join(got)}; move that folder away to train anew"
            )

    def _row(self, metrics: Row) -> Row:
        settings, last = self.settings, metrics["rows"][-1]
        environment = metrics.get("environment", {})
        parameters, train, validation = PAPER[settings.embedding, settings.model]
        return {
            "embedding": settings.embedding,
            "model": settings.model,
            "seed": settings.seed,
            "parameters": metrics["parameters"],
            "train": last["train"],
            "validation": last["validation"],
            "steps": last["step"],
            "paper_parameters": parameters,
            "paper_train": train,
            "paper_validation": validation,
            "curve": [[row["step"], row["train"], row["validation"]] for row in metrics["rows"]],
            "corpus": Path(metrics["corpus"]["name"]).name,
            "corpus_sha256": metrics["corpus"]["sha256"],
            **{f"trained_{name}": environment.get(name) for name in ("commit", "dirty", "device", "threads", "torch")},
        }


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
