"""What summarising loses: exact recall of key-value pairs over distances 2^0 to 2^14, against a GPT-2 of equal size.

A variant is trained on streams of `bench.lm.recall_task` whose distances are even in log2, then asked on fixed streams.
Rows of a variant:

- ``by`` ``"distance"``: ``distance``, ``pairs`` (how many the streams held), ``accuracy``, ``queries``, ``chance``
  (of any value), ``unbound`` (accuracy of who knows which values came and not with which key), ``levels`` (how many
  queries have which lowest level whose slot holds the pair; level 0: the pair is split over two slots) and ``level``,
  their mean without level 0;
- ``by`` ``"level"``: ``level``, ``pairs``, ``accuracy``, ``queries``, ``chance``, ``unbound``: the same queries by
  that level.

Each also has ``variant``, ``model``, ``parameters`` (without a position table, whose own are ``position_parameters``),
``steps``, ``seconds`` (training and test) and ``seed``. Everything is in float32, whatever ``--dtype`` says. Streams
are a function of seed and step, so an interrupted variant goes on where its last checkpoint was, to the same figures.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.errors import InputError, RunError
from bench.extras import numpy as np
from bench.extras import tabulate, tqdm
from bench.files import write_file
from bench.lm import arguments
from bench.lm.models import GPT2, LanguageModel, ModelConfig, build
from bench.lm.recall_task import SPLIT, Task, length_for, lowest_level, test_streams, training_streams
from bench.measure.environment import describe
from bench.measure.journal import Row
from bench.measure.runner import Case, Context

SAVE_EVERY = 30.0  # seconds
# Of the test streams, the same for every variant and seed.
TEST_SEED = 20250114
# Tokens that a model reads at once in a test.
TEST_TOKENS = 16384


@dataclass(frozen=True)
class Variant:
    """What is trained, in the words of `bench.lm.models.ModelConfig`; ``reach`` is log2 of its longest distance."""

    model: str = "logmem"
    bank: int = 1
    expand: int = 1
    summarizer: str = "linear"
    init: str = "variance_preserving"
    reach: int = 14


VARIANTS = {
    "logmem-1-original": Variant(init="original"),
    "logmem-1": Variant(),
    "logmem-2": Variant(bank=2),
    "logmem-4": Variant(bank=4),
    "expsum-1": Variant("expsum"),
    "conv-mixed-2": Variant(bank=2, summarizer="conv_mixed"),
    "separable-1": Variant(summarizer="depthwise_separable"),
    # Its cost is quadratic, and its position table grows with the length; the rows of longer distances are gaps.
    "gpt2": Variant("gpt2", reach=10),
}


@dataclass(frozen=True)
class Plan:
    """How a variant is trained and tested; beside it the variants differ in their `Variant.reach` alone.

    Attributes:
        steps: updates.
        tokens: of an update, at least one stream.
        queries: of a training stream, at most.
        shortest, longest: log2 of the distances that a training stream is long enough for, drawn evenly.
        grow: share of the updates over which the longest distance grows from the shortest.
        loads: how many pairs a stream holds; drawn evenly in training, each tested.
        tests: queries of each distance in the test, for each load.
    """

    steps: int
    tokens: int = 1024
    queries: int = 32
    shortest: int = 3
    longest: int = 14
    grow: float = 0.6
    loads: tuple[int, ...] = (1, 2)
    tests: tuple[int, ...] = (128, 256)
    embedding: int = 32
    layers: int = 2
    heads: int = 2
    lr: float = 4e-3
    warmup: int = 50
    task: Task = field(default_factory=Task)

    def top(self, step: int) -> int:
        """log2 of the longest distance after ``step`` updates."""
        grown = step / max(1.0, self.grow * self.steps)
        return min(self.longest, self.shortest + int((self.longest - self.shortest + 1) * grown))

    def tests_of(self, load: int) -> int:
        return self.tests[self.loads.index(load)]

    def rate(self, step: int) -> float:
        """The learning rate of the update after ``step`` updates: a warm-up, then a cosine down to a tenth."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / self.steps))


FULL = Plan(steps=1500)
# A few steps, and short streams: a rehearsal, whose figures say nothing.
QUICK = Plan(steps=20, shortest=2, longest=6, tests=(16, 16))


class Contestant:
    """One variant on its way: trained so far, and tested so far.

    Args:
        name: one of `VARIANTS`.
        plan: how.
        seed: of parameters and training streams; the test streams are the same for every seed.
        device: where.
        path: the checkpoint.
        origin: what must be equal for a checkpoint to be gone on from.
        backend: of our own path.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        seed: int,
        device: torch.device,
        path: Path,
        origin: Row,
        backend: str = "reference",
    ):
        self.name, self.seed, self.device, self.path = name, seed, device, path
        self.variant = VARIANTS[name]
        self.plan = dataclasses.replace(plan, longest=min(plan.longest, self.variant.reach))
        self.asked_for = range(plan.longest + 1)
        self.step, self.seconds = 0, 0.0
        # Per load and log2 of the distance: [right, level] of each query.
        self.answers: dict[tuple[int, int], Tensor] = {}
        self._origin = json.dumps([name, seed, dataclasses.asdict(self.plan), origin], sort_keys=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: LanguageModel = build(self._config(), backend).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0)

    def _config(self) -> ModelConfig:
        plan, variant = self.plan, self.variant
        return ModelConfig(
            model=variant.model,
            symbols=plan.task.symbols,
            positions=length_for(1 << plan.longest) if variant.model == "gpt2" else 0,
            embedding=plan.embedding,
            layers=plan.layers,
            heads=plan.heads,
            bank=variant.bank,
            expand=variant.expand,
            summarizer=variant.summarizer,
            init=variant.init,
            feedforward="wide",
        )

    def load(self) -> None:
        """Go on from the checkpoint, where one of the same code, machine, plan and seed is there."""
        try:
            content = torch.load(io.BytesIO(self.path.read_bytes()), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return
        except Exception as error:  # torch.load raises a different type for every way of being no archive
            raise InputError(f"scratch: expected a checkpoint of recall, got something else in {self.path}") from error
        if not isinstance(content, dict) or content.get("origin") != self._origin:
            return
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds, self.answers = content["step"], content["seconds"], content["answers"]

    def save(self) -> None:
        content = {
            "origin": self._origin,
            "step": self.step,
            "seconds": self.seconds,
            "answers": self.answers,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path.parent}: cannot be made: {error.strerror or error}") from error
        write_file(self.path, buffer.getvalue())

    def update(self) -> float:
        """One update; returns the loss.

        Raises:
            RunError: the loss is not finite.
        """
        plan, step = self.plan, self.step
        generator = np.random.default_rng((self.seed, 0, step))
        length = length_for(1 << int(generator.integers(plan.shortest, plan.top(step) + 1)))
        task = dataclasses.replace(plan.task, pairs=int(generator.choice(plan.loads)))
        streams = training_streams(task, generator, max(1, plan.tokens // length), length, plan.queries)
        asked = streams.targets >= 0
        logits = self.model(streams.ids.to(self.device))[asked.to(self.device)]
        loss = F.cross_entropy(logits, streams.targets[asked].to(self.device))
        if not math.isfinite(loss.item()):
            raise RunError(f"{self.name}: the loss is {loss.item()} at step {step}; a lower learning rate may help")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(step)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def finish(self) -> list[Row]:
        """Train, test, and say what came out."""
        plan = self.plan
        tests = [(load, log) for load in plan.loads for log in range(plan.longest + 1)]
        begun = saved = time.monotonic()

        def keep(least: float) -> None:
            nonlocal begun, saved
            now = time.monotonic()
            self.seconds, begun = self.seconds + now - begun, now
            if now - saved >= least:
                self.save()
                saved = now

        with tqdm(total=plan.steps + len(tests), desc=self.name, leave=False, dynamic_ncols=True) as bar:
            bar.update(self.step + len(self.answers))
            while self.step < plan.steps:
                loss = self.update()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                keep(SAVE_EVERY)
            for load, log in tests:
                if (load, log) not in self.answers:
                    task = dataclasses.replace(plan.task, pairs=load)
                    self.answers[load, log] = answers(self.model, task, log, plan.tests_of(load), self.device)
                    bar.update()
                    keep(SAVE_EVERY)
        keep(math.inf)
        return self.rows()

    def rows(self) -> list[Row]:
        positions = self.model.positions.weight.numel() if isinstance(self.model, GPT2) else 0
        common = {
            "variant": self.name,
            "model": self.variant.model,
            "parameters": self.model.parameter_count() - positions,
            "position_parameters": positions,
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
        }
        rows = []
        for load in self.plan.loads:
            task = dataclasses.replace(self.plan.task, pairs=load)
            here = {**common, "pairs": load, "chance": task.chance, "unbound": task.unbound}
            found = [self.answers[load, log] for log in range(self.plan.longest + 1)]
            rows += [{**here, "by": "distance", "distance": 1 << log, **tally(each)} for log, each in enumerate(found)]
            for log in self.asked_for[len(found) :]:
                rows.append({**here, "by": "distance", "distance": 1 << log, "gap": self._reason(log)})
            together = torch.cat(found)
            for level in sorted(set(together[:, 1].tolist())):
                mine = together[together[:, 1] == level]
                rows.append({**here, "by": "level", "level": level, "accuracy": _accuracy(mine), "queries": len(mine)})
        return rows

    def _reason(self, log: int) -> str:
        cost = f"its cost is quadratic: with distances up to {1 << log}, about {self.predict(log) / 60:.0f} minutes"
        return f"{cost} for training and test; it had up to {1 << self.plan.longest}"

    def predict(self, log: int) -> float:
        """Seconds that the plan would take with a longest distance of 2^log, its steps evenly over the lengths.

        A pass of one stream is taken as a + b·length + c·length², from three lengths within its reach.
        """
        lengths = [length_for(1 << (self.plan.longest - back)) for back in (2, 1, 0)]
        times = [self._pass_seconds(length) for length in lengths]
        cost = np.polynomial.Polynomial.fit(lengths, times, 2)
        logs = range(self.plan.shortest, log + 1)
        training = self.plan.steps * sum(cost(length_for(1 << each)) for each in logs) / len(logs)
        # A test needs no backward pass, about two thirds of the time.
        streams = sum(self.plan.tests)
        return float(training + streams * sum(cost(length_for(1 << each)) for each in range(log + 1)) / 3)

    def _pass_seconds(self, length: int) -> float:
        ids = torch.zeros(1, length, dtype=torch.int64, device=self.device)
        best = math.inf
        for _ in range(3):
            begun = time.perf_counter()
            (total := self.model(ids).sum()).backward()
            total.item()  # waits for a GPU
            best = min(best, time.perf_counter() - begun)
        self.optimizer.zero_grad()
        return best


def answers(model: LanguageModel, task: Task, log: int, least: int, device: torch.device) -> Tensor:
    """Test a model at distance 2^log: ``[queries, 2]``, whether each answer was right, and the level of its pair."""
    generator = np.random.default_rng((TEST_SEED, task.pairs, log))
    group = max(1, TEST_TOKENS // length_for(1 << log))
    found = []
    for begin in range(0, least, group):
        streams = test_streams(task, generator, min(group, least - begin), 1 << log)
        row, at = torch.nonzero(streams.targets >= 0, as_tuple=True)
        with torch.no_grad():
            said = model(streams.ids.to(device))[row.to(device), at.to(device)].argmax(-1).cpu()
        right = (said == streams.targets[row, at]).long()
        found.append(torch.stack([right, lowest_level(at, streams.distances[row, at])], 1))
    return torch.cat(found)


def _accuracy(found: Tensor) -> float:
    return round(found[:, 0].double().mean().item(), 4)


def tally(found: Tensor) -> Row:
    """What a row says of one distance's answers ``[queries, 2]``."""
    whole = found[found[:, 1] != SPLIT][:, 1]
    return {
        "accuracy": _accuracy(found),
        "queries": len(found),
        "level": round(whole.double().mean().item(), 3) if len(whole) else None,
        "levels": {str(level): count for level, count in sorted(Counter(found[:, 1].tolist()).items())},
    }


def add_arguments(add: Callable[..., Any]) -> None:
    add("--steps", type=int, help=f"updates of each variant (default {FULL.steps}, with --quick {QUICK.steps})")
    add("--seed", type=arguments.seed_of_numpy, default=1337, help="of parameters and training streams (default 1337)")
    add("--variants", help=f"which, separated by commas (default all: {', '.join(VARIANTS)})")


def cases(context: Context) -> list[Case]:
    """A case for each variant.

    Raises:
        InputError: an option is not one.
    """
    plan = QUICK if context.quick else FULL
    given = context.options.get
    steps, seed, chosen = given("steps"), given("seed", 1337), given("variants")
    if steps is not None:
        if steps < 1:
            raise InputError(f"steps: expected 1 or more, got {steps}")
        plan = dataclasses.replace(plan, steps=steps)
    names = list(VARIANTS) if chosen is None else list(dict.fromkeys(name.strip() for name in chosen.split(",")))
    for name in names:
        if name not in VARIANTS:
            raise InputError(f"variants: expected some of {', '.join(VARIANTS)}, got {name!r}")
    return [Case(name, functools.partial(_measure, name, plan, seed, context)) for name in names]


def _measure(name: str, plan: Plan, seed: int, context: Context) -> list[Row]:
    path = context.scratch / f"{name}-{seed}.pt"
    origin = {**describe(context.device), "backend": context.backend}
    contestant = Contestant(name, plan, seed, context.device, path, origin, context.backend)
    contestant.load()
    rows = contestant.finish()
    # What is measured anew shall be trained anew.
    path.unlink(missing_ok=True)
    return rows


def show(rows: list[Row]) -> str:
    """Accuracy in percent, a line for each variant and load, a column for each log2 of the distance."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in (row for row in rows if row["by"] == "distance"):
        line = lines.setdefault((row["variant"], row["pairs"]), {"variant": row["variant"], "pairs": row["pairs"]})
        log = row["distance"].bit_length() - 1
        line[f"2^{log}"] = "-" if "gap" in row else f"{100 * row['accuracy']:.0f}"
        if "accuracy" in row:
            line["unbound"] = f"{100 * row['unbound']:.0f}"
    return tabulate(list(lines.values()), headers="keys", stralign="right", disable_numparse=True)
