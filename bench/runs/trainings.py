"""Trainings by `bench.lm.train_lm` as rows of results: taken up where they stand, collected where they are finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.errors import InputError
from bench.lm.checkpoint import Checkpoint
from bench.lm.corpora import TINYSHAKESPEARE_SHA256, load
from bench.lm.ranks import Ranks
from bench.lm.settings import Settings
from bench.lm.train_lm import CHECKPOINT
from bench.lm.train_lm import Run as TrainingRun
from bench.measure.journal import Row
from bench.measure.runner import Context

# Where the text lay, and how much was said at the end, change no loss.
_FREE = ("data", "sample_tokens")
_KEYS = {"settings", "corpus", "parameters", "rows", "step", "tokens_per_second"}


def digest_of(data: str) -> str:
    """sha256 of a corpus; what is finished can be collected without the text, where that is known."""
    return TINYSHAKESPEARE_SHA256 if data == "tinyshakespeare" else load(data).digest


def flags(context: Context, name: str, model: str, seed: int, data: str) -> dict[str, Any]:
    """What `bench.lm.train_lm` is given in every run of trainings."""
    return {
        "model": model,
        "seed": seed,
        "data": data,
        "out": str(context.scratch / name),
        "device": str(context.device),
        "sample_tokens": 100,
        # GPT-2 has none of our operations.
        **({} if model == "gpt2" else {"backend": context.backend}),
    }


@dataclass(frozen=True)
class Training:
    """One training. What its folder holds already is taken as it is, where settings and corpus are the same.

    Attributes:
        settings: those of `bench.lm.train_lm`; its files are in ``settings.out``.
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
        return [self.row(metrics)]

    def row(self, metrics: Row) -> Row:
        """What the table has of a finished training."""
        last, environment = metrics["rows"][-1], metrics.get("environment", {})
        return {
            "embedding": self.settings.embedding,
            "model": self.settings.model,
            "seed": self.settings.seed,
            "parameters": metrics["parameters"],
            "train": last["train"],
            "validation": last["validation"],
            "steps": last["step"],
            "curve": [[row["step"], row["train"], row["validation"]] for row in metrics["rows"]],
            "corpus": Path(metrics["corpus"]["name"]).name,
            "corpus_sha256": metrics["corpus"]["sha256"],
            **{f"trained_{name}": environment.get(name) for name in ("commit", "dirty", "device", "threads", "torch")},
        }

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
