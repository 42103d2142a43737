"""The training loop: batches, steps, evaluations; its course is a function of settings and corpus alone."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.errors import InputError, RunError
from bench.extras import tqdm
from lmn_kernels import LookAheadState

from .corpora import Corpus, segments, stream_starts, streams, window_starts, windows
from .models import LanguageModel
from .ranks import Ranks
from .settings import Settings

# Reading the loss makes a GPU wait for its queue, and asking the other processes makes all wait for one.
REPORT_EVERY = 10
AGREE_EVERY = 8


class Interrupted(Exception):
    """The user asked to stop; the model is as it was after the last completed step."""


class StopRequest:
    """Ctrl-C as a flag: a step that has begun is completed. A second Ctrl-C ends a single process at once."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._asked = False

    def __call__(self, *unused: Any) -> None:
        # torchrun passes a Ctrl-C on to processes that the terminal told already: there, twice is once.
        if self._asked and self._ranks.world == 1:
            raise KeyboardInterrupt
        self._asked = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        previous = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def now(self) -> bool:
        """Whether to stop, where the processes need not agree."""
        return self._asked and self._ranks.world == 1

    def after(self, step: int) -> bool:
        """Whether to stop after ``step``: the same answer in every process."""
        if self._ranks.world == 1:
            return self._asked
        if step % AGREE_EVERY:
            return False
        return bool(self._ranks.sum(torch.tensor([float(self._asked)], device=self._ranks.device)) > 0)


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of the update after ``step`` updates."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


class Trainer:
    """A model in training, on windows from anywhere in the text.

    Attributes:
        step: updates done.
        rows: evaluations so far: ``{"step", "train", "validation"}``, nats per character.
        seconds: time spent in training, evaluations not counted.
    """

    def __init__(self, model: LanguageModel, corpus: Corpus, settings: Settings, ranks: Ranks):
        self._settings = settings
        self._ranks = ranks
        self._share = ranks.share(settings.batch)
        self._splits = {"train": corpus.train.to(ranks.device), "validation": corpus.validation.to(ranks.device)}
        dtype = getattr(torch, settings.dtype)
        self.model = model.to(ranks.device, torch.float64 if dtype == torch.float64 else torch.float32)
        runner: nn.Module = self.model
        if ranks.world > 1:
            runner = DistributedDataParallel(self.model)
        self._runner = cast(nn.Module, torch.compile(runner)) if settings.compile else runner
        self._autocast = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr)
        self._scaler = torch.amp.GradScaler(
            ranks.device.type, enabled=dtype == torch.float16 and ranks.device.type == "cuda"
        )
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0

    def state(self) -> dict[str, Any]:
        """The fields of `bench.lm.checkpoint.Checkpoint` that training changes; to be called by every process."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "rows": self.rows,
            "seconds": self.seconds,
            "order": self._order(),
        }

    def _order(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            InputError: the optimizer's state goes by another order of parameters.
        """
        if state["order"] != self._order():
            # An optimizer's state has no names: moments of equal shape would change places without a word.
            raise InputError("resume: expected an optimizer's state in this version's order of parameters, got another")
        self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    @property
    def tokens_per_second(self) -> float:
        tokens = self.step * self._settings.batch * self._settings.block
        return tokens / self.seconds if self.seconds else 0.0

    def run(self, evaluated: Callable[[], None], save: Callable[[], None], bar: tqdm, stop: StopRequest) -> None:
        """Train to the last step of the settings.

        Args:
            evaluated: called after each evaluation.
            save: called when a checkpoint is due.
            bar: its total is the number of steps.
            stop: asked after every step.

        Raises:
            Interrupted: stopped between two steps.
            RunError: the loss is not finite.
        """
        settings, saved, begin = self._settings, self.step, time.perf_counter()
        loss: Tensor | None = None
        while True:
            last = self.step == settings.steps
            to_evaluate = last or self.step % settings.eval_every == 0
            to_save = saved != self.step and (last or self.step % settings.save_every == 0)
            stopping = stop.after(self.step) and not last
            if to_evaluate or to_save or stopping or self.step % REPORT_EVERY == 0:
                if loss is not None:
                    mean = float(self._ranks.sum(loss)) / self._ranks.world
                    self._check_finite(mean)
                    self.seconds += time.perf_counter() - begin
                    bar.set_postfix_str(f"loss {mean:.3f}, {self.tokens_per_second:,.0f} tokens/s", False)
                if to_evaluate and not (self.rows and self.rows[-1]["step"] == self.step):
                    self.rows.append({"step": self.step, **self.evaluate(stop)})
                    evaluated()
                if to_save:
                    save()
                    saved = self.step
                begin = time.perf_counter()
            if last:
                return
            if stopping:
                raise Interrupted
            loss = self._update()
            self.step += 1
            bar.update()

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise RunError(f"loss: expected a finite number, got {loss} at step {self.step}; nothing was saved of it")

    def _loss(self, split: str, purpose: str, index: int) -> Tensor:
        """Mean loss over this process's rows of a batch, which depends on seed, purpose and index alone."""
        ids, settings = self._splits[split], self._settings
        starts = window_starts(settings.seed, purpose, index, settings.batch, len(ids), settings.block)
        x, target = windows(ids, starts[self._share].to(ids.device), settings.block)
        with self._autocasting():
            logits = self._runner(x)
        return _cross_entropy(logits, target)

    def _autocasting(self) -> torch.autocast:
        return torch.autocast(self._ranks.device.type, self._autocast, enabled=self._autocast is not None)

    def _next_loss(self) -> Tensor:
        """Mean loss over this process's part of what the next update learns from."""
        return self._loss("train", "train", self.step)

    def _update(self) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, self.step)
        loss = self._next_loss()
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._settings.grad_clip:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.grad_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, stop: StopRequest) -> dict[str, float]:
        """Mean loss over the same text each time: ``{"train", "validation"}``.

        Raises:
            Interrupted: stopped between two batches.
            RunError: a loss is not finite.
        """
        result = {}
        for split in self._splits:
            total, count = torch.zeros(1, dtype=torch.float64, device=self._ranks.device), 0
            for loss, weight in self._evaluation(split, stop):
                total += loss.double() * weight
                count += weight
            mean = float(self._ranks.sum(total)) / (count * self._ranks.world)
            self._check_finite(mean)
            result[split] = mean
        return result

    def _evaluation(self, split: str, stop: StopRequest) -> Iterator[tuple[Tensor, int]]:
        """Mean losses over this process's rows of each batch of an evaluation, and how much each counts."""
        for index in range(self._settings.eval_batches):
            if stop.now():
                raise Interrupted
            yield self._loss(split, f"evaluate {split}", index), 1


class RecurrentTrainer(Trainer):
    """A model in training that reads the text in order, in segments, with a memory of those before.

    Each split is cut into as many streams as a batch has rows. An epoch reads every stream once, round from a place
    that seed and epoch decide; it begins with an empty memory, and leaves out what is shorter than a segment at the
    end. An evaluation reads the streams from their beginnings, with a memory of its own: those of the validation split
    whole, of the training split as much.
    """

    def __init__(self, model: LanguageModel, corpus: Corpus, settings: Settings, ranks: Ranks):
        super().__init__(model, corpus, settings, ranks)
        self._streams = {name: streams(ids, settings.batch)[self._share] for name, ids in self._splits.items()}
        # The last character of a stream is a target only.
        self._segments = (self._streams["train"].shape[1] - 1) // settings.block
        self._memory: LookAheadState | None = None

    def state(self) -> dict[str, Any]:
        return super().state() | {"memory": self._all_memory()}

    def _all_memory(self) -> dict[str, Any] | None:
        """The memory of the streams of all processes, in tensors of its own."""
        memory = self._memory
        if memory is None:
            return None
        tensors = {}
        for name, part in memory.tensors().items():
            whole = part.new_zeros(self._settings.batch, *part.shape[1:])
            whole[self._share] = part
            tensors[name] = self._ranks.sum(whole)
        return {"tensors": tensors, "tokens": memory.tokens, "is_even": memory.is_even}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            InputError: the memory is missing, and the next segment is not the first of an epoch.
        """
        super().load(state)
        saved = state["memory"]
        if saved is not None:
            tensors = {name: part[self._share].to(self._ranks.device) for name, part in saved["tensors"].items()}
            self._memory = LookAheadState.from_tensors(tensors, saved["tokens"], saved["is_even"])
        elif self.step % self._segments:
            raise InputError(f"resume: expected a memory in a checkpoint within an epoch (step {self.step}), got none")

    def _next_loss(self) -> Tensor:
        settings, text = self._settings, self._streams["train"]
        epoch, segment = divmod(self.step, self._segments)
        if segment == 0:
            self._memory = None
        starts = stream_starts(settings.seed, epoch, settings.batch, text.shape[1])[self._share].to(text.device)
        x, target = segments(text, starts + segment * settings.block, settings.block)
        loss, self._memory = self._read(x, target, self._memory)
        return loss

    def _read(self, x: Tensor, target: Tensor, memory: LookAheadState | None) -> tuple[Tensor, LookAheadState]:
        with self._autocasting():
            logits, memory = self._runner(x, memory)
        # A copy: a view would keep all that the segment computed, and torch.compile would begin anew for its strides.
        return _cross_entropy(logits, target), memory.clone()

    def _evaluation(self, split: str, stop: StopRequest) -> Iterator[tuple[Tensor, int]]:
        text, block = self._streams[split][:, : self._streams["validation"].shape[1]], self._settings.block
        memory: LookAheadState | None = None
        for x, target in zip(text[:, :-1].split(block, 1), text[:, 1:].split(block, 1), strict=True):
            if stop.now():
                raise Interrupted
            loss, memory = self._read(x, target, memory)
            yield loss, x.shape[1]


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())
