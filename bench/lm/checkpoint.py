"""Checkpoints of trainings."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.errors import InputError
from bench.files import write_file

FORMAT = "lmn_kernels.train_lm"
VERSION = 1


@dataclass
class Checkpoint:
    """Everything that a run needs to go on, or a model needs to speak.

    Attributes:
        step: updates done.
        model_config: fields of `bench.lm.models.ModelConfig`.
        settings: fields of `bench.lm.settings.Settings`.
        vocabulary, digest: those of the corpus.
        model, optimizer, scaler: state dicts.
        rows: the evaluations so far.
        seconds: training time so far, evaluations not counted.
        memory: of a recurrent model what the next segment reads: ``tensors``, ``tokens`` and ``is_even`` of
            `lmn_kernels.LookAheadState`, of all streams; None for the others, and before the first segment.
        order: names of the parameters in the order that the optimizer's state goes by; None where the file is of a
            version that did not say.
    """

    step: int
    model_config: dict[str, Any]
    settings: dict[str, Any]
    vocabulary: str
    digest: str
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    rows: list[dict[str, Any]]
    seconds: float
    memory: dict[str, Any] | None = None
    order: list[str] | None = None

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all.

        Raises:
            RunError: it cannot be written; the previous checkpoint is as it was.
        """
        # Not asdict: it would copy every tensor.
        content = {"format": FORMAT, "version": VERSION, **vars(self)}
        # Through memory: torch.save into a file reports a full disk as an internal error of its own.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_file(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint onto the CPU.

        Raises:
            InputError: there is none, or the file is something else.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"checkpoint: expected a file at {path}, got {error.strerror}") from error
        try:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises a different type for every way of being no archive
            raise InputError(f"checkpoint: expected a checkpoint of train_lm, got something else in {path}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise InputError(f"checkpoint: expected a checkpoint of train_lm, got something else in {path}")
        version = content.pop("version", None)
        if version != VERSION:
            raise InputError(f"checkpoint: expected version {VERSION}, got {version} in {path}")
        try:
            return cls(**content)
        except TypeError as error:
            raise InputError(f"checkpoint: expected the fields of version {VERSION}, got others in {path}") from error
