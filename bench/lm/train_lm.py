"""The main job: train a small character language model, evaluate it, save it, and let it speak.

    python -m bench.lm.train_lm --preset demo
    python -m bench.lm.train_lm --preset paper-32 --data tinyshakespeare --model logmem
    python -m bench.lm.train_lm --preset paper-32 --data tinyshakespeare --model lamemo --block 128 --memory 256
    torchrun --nproc-per-node 2 -m bench.lm.train_lm --preset paper-128 --data corpus.txt

A run can be ended with Ctrl-C and taken up again with ``--resume``; its losses are then those of a run
that was never ended.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch

import lmn_kernels
from bench.errors import InputError, RunError
from bench.extras import need, tqdm
from bench.files import write_file
from bench.measure.environment import describe

from . import curve
from .checkpoint import Checkpoint
from .corpora import Corpus, load
from .generate import Sample, emit_to_stdout, encode, generate
from .models import RECURRENT, LanguageModel, ModelConfig, build
from .ranks import Ranks
from .settings import Settings, default_out, parser, resolve
from .training import Interrupted, RecurrentTrainer, StopRequest, Trainer

CHECKPOINT = "checkpoint.pt"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 (the run failed), 2 (bad input), 130 (Ctrl-C)."""
    given = vars(parser().parse_args(argv))
    ranks: Ranks | None = None
    try:
        need("matplotlib", "tqdm")
        saved = Checkpoint.load(Path(default_out(given)) / CHECKPOINT) if given.get("resume") else None
        settings = resolve(given, saved.settings if saved else None)
        ranks = Ranks.start(settings.device)
        return Run(settings, ranks, saved).train()
    except (InputError, lmn_kernels.BackendError) as error:
        _complain(str(error), ranks)
        return 2
    except RunError as error:
        _complain(str(error), ranks)
        return 1
    except KeyboardInterrupt:
        _complain("interrupted at once; the last checkpoint is as it was", ranks)
        return 130
    finally:
        Ranks.finish()


def _complain(message: str, ranks: Ranks | None) -> None:
    if ranks is None or ranks.first:
        print(f"train_lm: {message}", file=sys.stderr)


class Run:
    """One run: a trainer and the files it leaves.

    Raises:
        InputError: settings, corpus and checkpoint do not fit each other.
        RunError: a file cannot be written, or the loss is not finite.
    """

    def __init__(self, settings: Settings, ranks: Ranks, saved: Checkpoint | None):
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._settings, self._ranks = settings, ranks
        self._out = Path(settings.out)
        self._corpus = _load_corpus(settings.data, ranks)
        recurrent = settings.model in RECURRENT
        if recurrent:
            self._corpus.check_streams(settings.batch, settings.block)
        else:
            self._corpus.check_length(settings.block)
        encode(settings.prompt, self._corpus.vocabulary)
        self._config = settings.model_config(len(self._corpus.vocabulary))
        if saved:
            _check_same(saved, self._config, self._corpus, settings)
        kind = RecurrentTrainer if recurrent else Trainer
        self._trainer = kind(self._build(), self._corpus, settings, ranks)
        if saved:
            self._trainer.load(vars(saved))
        self._entropy = self._corpus.unigram_entropy()
        self._make_folder()

    def _build(self) -> LanguageModel:
        torch.manual_seed(self._settings.seed)
        try:
            return build(self._config, self._settings.backend)
        except ValueError as error:
            raise InputError(str(error)) from error

    def _make_folder(self) -> None:
        if not self._ranks.first:
            return
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self._out}: cannot be made a folder: {error.strerror}") from error

    def train(self) -> int:
        """Train, save, sample, and print the summary; returns the exit status."""
        trainer, settings, stop = self._trainer, self._settings, StopRequest(self._ranks)
        corpus = self._corpus
        self._print(
            f"{settings.model}: {trainer.model.parameter_count():,} parameters, on {self._ranks.device}; "
            f"{corpus.name}: {len(corpus.train) + len(corpus.validation):,} characters, "
            f"{len(corpus.vocabulary)} symbols; step {trainer.step} to {settings.steps}"
        )
        bar = tqdm(
            total=settings.steps,
            initial=trainer.step,
            unit="step",
            disable=not self._ranks.first,
            # A log file is no terminal: a line a quarter of a minute is enough there.
            mininterval=0.2 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )
        with stop.installed(), bar:
            try:
                trainer.run(self._evaluated, self._save, bar, stop)
            except Interrupted:
                self._save()
                # torchrun ends all processes once the first has gone.
                self._ranks.wait()
                bar.close()
                _complain(f"interrupted after step {trainer.step}; go on with: {self._resume_command()}", self._ranks)
                return 130
        if self._ranks.first:
            sample = self._sample()
            self._write_metrics(sample)
            print(self._summary(), flush=True)
        return 0

    def _resume_command(self) -> str:
        settings, world = self._settings, self._ranks.world
        words = ["python", "-m"] if world == 1 else ["torchrun", "--nproc-per-node", str(world), "-m"]
        words += ["bench.lm.train_lm", "--resume", "--out", settings.out]
        # The rest is in the checkpoint.
        for name, unset in (("device", "auto"), ("backend", "auto"), ("threads", 0)):
            if getattr(settings, name) != unset:
                words += [f"--{name}", str(getattr(settings, name))]
        return shlex.join([*words, *(["--compile"] if settings.compile else [])])

    def _print(self, line: str) -> None:
        if self._ranks.first:
            tqdm.write(line)
            sys.stdout.flush()

    def _evaluated(self) -> None:
        row = self._trainer.rows[-1]
        self._print(f"step {row['step']}: train loss {row['train']:.4f}, validation loss {row['validation']:.4f}")
        if self._ranks.first:
            self._write_metrics()

    def _save(self) -> None:
        # Every process has a part of it.
        state = self._trainer.state()
        if self._ranks.first:
            Checkpoint(
                model_config=asdict(self._config),
                settings=self._settings.to_save(),
                vocabulary=self._corpus.vocabulary,
                digest=self._corpus.digest,
                **state,
            ).save(self._out / CHECKPOINT)

    def _write_metrics(self, sample: Sample | None = None) -> None:
        """metrics.json, curve.csv and curve.svg of the evaluations so far."""
        trainer, corpus = self._trainer, self._corpus
        metrics: dict[str, Any] = {
            "model": asdict(self._config),
            "settings": asdict(self._settings),
            "parameters": trainer.model.parameter_count(),
            "corpus": {
                "name": corpus.name,
                "sha256": corpus.digest,
                "train_characters": len(corpus.train),
                "validation_characters": len(corpus.validation),
                "symbols": len(corpus.vocabulary),
            },
            "unigram_entropy": self._entropy,
            "rows": trainer.rows,
            "step": trainer.step,
            "seconds": trainer.seconds,
            "tokens_per_second": trainer.tokens_per_second,
            "processes": self._ranks.world,
            "environment": describe(self._ranks.device) | {"lmn_kernels": lmn_kernels.__version__},
        }
        if sample:
            metrics["sample"] = {"tokens_per_second": sample.tokens_per_second, "state_bytes": sample.state_bytes}
        write_file(self._out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
        write_file(self._out / "curve.csv", curve.to_csv(trainer.rows).encode())
        title = f"{self._settings.model}, {metrics['parameters']:,} parameters, {corpus.name}"
        write_file(self._out / "curve.svg", curve.to_svg(trainer.rows, title, self._entropy))

    def _sample(self) -> Sample:
        settings = self._settings
        sample = generate(
            self._trainer.model,
            self._corpus.vocabulary,
            settings.prompt,
            tokens=settings.sample_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=settings.seed,
            emit=emit_to_stdout,
        )
        emit_to_stdout(f"\n{sample.summary()}\n")
        write_file(self._out / "sample.txt", f"{sample.text}\n".encode())
        return sample

    def _summary(self) -> str:
        trainer, row = self._trainer, self._trainer.rows[-1]
        return (
            f"{self._settings.model}: {trainer.model.parameter_count():,} parameters, {trainer.step} steps in "
            f"{trainer.seconds:.0f} s, {trainer.tokens_per_second:,.0f} tokens/s\n"
            f"nats per character: train {row['train']:.4f}, validation {row['validation']:.4f}, "
            f"unigram entropy {self._entropy:.4f}\n"
            f"files: {self._out}/ ({CHECKPOINT}, metrics.json, curve.csv, curve.svg, sample.txt)"
        )


def _load_corpus(data: str, ranks: Ranks) -> Corpus:
    # One process downloads, the others find the file in the cache.
    if not ranks.first:
        ranks.wait()
    corpus = load(data)
    if ranks.first:
        ranks.wait()
    return corpus


def _check_same(saved: Checkpoint, config: ModelConfig, corpus: Corpus, settings: Settings) -> None:
    """Whether a checkpoint can be taken up by this model, on this corpus."""
    absent = {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING}
    before, wanted = absent | saved.model_config, asdict(config)
    if config.model in RECURRENT:
        # The memory is of these streams.
        names = ("batch", "seed", "dtype")
        before |= {name: saved.settings.get(name) for name in names}
        wanted |= {name: getattr(settings, name) for name in names}
    for name, value in wanted.items():
        if name != "symbols" and before.get(name) != value:
            raise InputError(f"resume: expected the checkpoint's {name} {before.get(name)!r}, got {value!r}")
    if saved.digest != corpus.digest or saved.vocabulary != corpus.vocabulary:
        raise InputError(
            f"resume: expected the corpus of the checkpoint (sha256 {saved.digest[:12]}…), "
            f"got {corpus.name} (sha256 {corpus.digest[:12]}…)"
        )
    if saved.step > settings.steps:
        raise InputError(f"steps: expected at least the checkpoint's {saved.step}, got {settings.steps}")


if __name__ == "__main__":
    sys.exit(main())
