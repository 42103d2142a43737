"""The runs ``paper-table1`` and ``agreement`` of ``python -m bench``."""

from __future__ import annotations

import argparse
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.errors import InputError
from bench.lm import corpora, settings
from bench.lm.checkpoint import Checkpoint
from bench.lm.corpora import TINYSHAKESPEARE_SHA256, Corpus
from bench.lm.models import LogMem
from bench.lm.train_lm import Run as TrainingRun
from bench.lm.training import Trainer
from bench.measure.journal import Row, read
from bench.measure.runner import Context, Run, execute
from bench.runs import agreement, paper_table1
from lmn_kernels import LogarithmicMemory

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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat\nand the dog sat on the cat\n" * 10)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's settings, so small that a training takes a moment."""
    monkeypatch.setitem(settings._PRESETS, "paper-32", TINY)


def _context(run: str, folder: Path, *flags: str, quick: bool = False) -> Context:
    parser = argparse.ArgumentParser()
    RUNS[run].add_arguments(parser.add_argument)
    options = vars(parser.parse_args(list(flags)))
    return Context(
        torch.device("cpu"), torch.float32, "reference", quick, folder / "results", folder / "runs" / run, options
    )


def _rows(run: str, context: Context) -> list[Row]:
    cases = execute(run, RUNS[run], context, fresh=False).cases
    return [row for rows in cases.values() for row in rows]


def _train(folder: Path, text: Path, *flags: str) -> list[Row]:
    return _rows("paper-table1", _context("paper-table1", folder, "--data", str(text), *flags))


def _put_metrics(folder: Path, model: str, **changes: Any) -> Path:
    """A finished training of the real preset, as another machine may have left it; changed in some settings."""
    given = {"preset": "paper-32", "model": model, "data": "some/where.txt", "sample_tokens": 7, "threads": 3}
    metrics = {
        "settings": asdict(settings.resolve(given, None)) | {"device": "cuda:1", "compile": True} | changes,
        "parameters": 123,
        "corpus": {"name": "some/where.txt", "sha256": TINYSHAKESPEARE_SHA256},
        "rows": [{"step": 0, "train": 4.5, "validation": 4.25}, {"step": 5000, "train": 1.5, "validation": 1.75}],
        "step": 5000,
        "tokens_per_second": 1000.0,
        "environment": {"commit": "abc", "dirty": False, "threads": 3, "torch": "2.0"},
        "sample": {"tokens_per_second": 1.0, "state_bytes": 1},
    }
    path = folder / "runs" / "paper-table1" / f"{model}-32-1337" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(metrics))
    return path


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("neither a training nor a text is needed")

    monkeypatch.setattr(TrainingRun, "__init__", refuse)
    monkeypatch.setattr(corpora, "_tinyshakespeare", refuse)


# paper-table1


@pytest.mark.parametrize("model, paper", [("logmem", (71489, 1.5733, 1.7742)), ("gpt2", (71105, 1.8438, 1.9704))])
def test_a_finished_training_is_collected(
    model: str, paper: tuple[Any, ...], tmp_path: Path, no_training: None
) -> None:
    path = _put_metrics(tmp_path, model)
    before = path.read_bytes()
    (row,) = _rows("paper-table1", _context("paper-table1", tmp_path, "--models", model))
    expected = {
        "case": f"{model}-32-1337",
        "embedding": 32,
        "model": model,
        "seed": 1337,
        "parameters": 123,
        "train": 1.5,
        "validation": 1.75,
        "steps": 5000,
        "paper_parameters": paper[0],
        "paper_train": paper[1],
        "paper_validation": paper[2],
        "curve": [[0, 4.5, 4.25], [5000, 1.5, 1.75]],
        "corpus": "where.txt",
        "corpus_sha256": TINYSHAKESPEARE_SHA256,
        "trained_commit": "abc",
        "trained_dirty": False,
        "trained_threads": 3,
        "trained_torch": "2.0",
    }
    assert {name: row.get(name) for name in expected} == expected
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lr": 0.5}, "expected a training with lr 0.001, got one with lr 0.5;"),
        ({"steps": 20, "block": 64}, "with block 512, steps 5000, got one with block 64, steps 20;"),
        ({"prompt": "the "}, "with prompt '', got one with prompt 'the ';"),
        ({"feedforward": "square"}, "with feedforward 'wide', got one with feedforward 'square';"),
    ],
)
def test_a_training_with_other_settings_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, no_training: None
) -> None:
    _put_metrics(tmp_path, "gpt2")
    path = _put_metrics(tmp_path, "logmem", **changes)
    with pytest.raises(InputError) as error:
        _rows("paper-table1", _context("paper-table1", tmp_path, "--models", "gpt2", "logmem"))
    assert said in str(error.value) and str(error.value).startswith(f"{path.parent}: ")
    # Refused before the first was measured.
    assert read(tmp_path / "results" / "paper-table1.jsonl")[0].cases == {}


def test_a_training_on_another_text_is_refused(text: Path, tmp_path: Path, tiny: None) -> None:
    _train(tmp_path, text, "--models", "gpt2")
    text.write_text(text.read_text()[::-1])
    with pytest.raises(InputError, match="gpt2-32-1337: expected a training with the corpus .*, got one with one of"):
        _train(tmp_path, text, "--models", "gpt2")


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}'])
def test_metrics_that_are_none(content: str, tmp_path: Path, no_training: None) -> None:
    path = _put_metrics(tmp_path, "gpt2")
    path.write_text(content)
    with pytest.raises(InputError, match="expected the metrics of train_lm, got something else"):
        _rows("paper-table1", _context("paper-table1", tmp_path, "--models", "gpt2"))


def test_cases(tmp_path: Path) -> None:
    def names(*flags: str) -> list[str]:
        return [case.name for case in paper_table1.cases(_context("paper-table1", tmp_path, *flags))]

    assert names() == ["gpt2-32-1337", "logmem-32-1337", "tinylogmem-32-1337", "expsum-32-1337"]
    assert names("--embedding", "all", "--models", "expsum", "--seeds", "1", "2", "1") == [
        "expsum-32-1", "expsum-32-2", "expsum-128-1", "expsum-128-2",
    ]  # fmt: skip
    with pytest.raises(InputError, match="data: expected stdlib, tinyshakespeare or a readable text file"):
        names("--data", str(tmp_path / "missing"))


def test_what_is_trained_is_what_the_paper_trained(tmp_path: Path) -> None:
    for embedding, model in paper_table1.PAPER:
        context = _context("paper-table1", tmp_path, "--embedding", str(embedding), "--models", model)
        (case,) = paper_table1.cases(context)
        backend = {} if model == "gpt2" else {"backend": "reference"}
        found = case.measure.__self__.settings  # type: ignore[union-attr]
        assert found == settings.resolve(
            {
                "preset": f"paper-{embedding}", "model": model, "data": "tinyshakespeare", "device": "cpu",
                "out": str(context.scratch / f"{model}-{embedding}-1337"), "sample_tokens": 100, **backend,
            },
            None,
        )  # fmt: skip


def _interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a Ctrl-C in the middle of the update after ``step``."""
    update = Trainer._update

    def interrupted(self: Trainer) -> torch.Tensor:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "_update", interrupted)


def test_an_interrupted_training_goes_on(
    text: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train(tmp_path / "whole", text, "--models", "gpt2", "logmem")
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        _interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            _train(broken, text, "--models", "gpt2", "logmem")
    folder = broken / "runs" / "paper-table1"
    assert Checkpoint.load(folder / "gpt2-32-1337" / "checkpoint.pt").step == 3
    assert not (folder / "logmem-32-1337").exists()
    assert read(broken / "results" / "paper-table1.jsonl")[0].cases == {}
    updates: list[int] = []
    update = Trainer._update

    def counted(self: Trainer) -> torch.Tensor:
        updates.append(self.step)
        return update(self)

    monkeypatch.setattr(Trainer, "_update", counted)
    found = _train(broken, text, "--models", "gpt2", "logmem")
    assert updates == [3, 0, 1, 2, 3]
    for ours, theirs in zip(found, whole, strict=True):
        assert ours["case"] == theirs["case"] and ours["steps"] == 4
        assert ours["curve"] == theirs["curve"] and [point[0] for point in ours["curve"]] == [0, 2, 4]
        assert ours["trained_torch"] == torch.__version__ and ours["trained_threads"] == 1


def test_a_checkpoint_with_other_settings_is_refused(
    text: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train(tmp_path, text, "--models", "gpt2")
    folder = tmp_path / "runs" / "paper-table1" / "gpt2-32-1337"
    (folder / "metrics.json").unlink()
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setitem(settings._PRESETS, "paper-32", {**TINY, "lr": 0.25})
    with pytest.raises(InputError, match=r"gpt2-32-1337: expected a training with lr 0.25, got one with lr 0.001;"):
        _train(tmp_path, text, "--models", "logmem", "gpt2")
    assert not folder.with_name("logmem-32-1337").exists()  # refused before the first was trained
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_training_without_its_last_checkpoint_is_not_finished(text: Path, tmp_path: Path, tiny: None) -> None:
    (expected,) = _train(tmp_path, text, "--models", "gpt2")
    folder = tmp_path / "runs" / "paper-table1" / "gpt2-32-1337"
    # As they are between the last evaluation and the last checkpoint.
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["sample"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "checkpoint.pt").unlink()
    (found,) = _train(tmp_path, text, "--models", "gpt2")
    assert Checkpoint.load(folder / "checkpoint.pt").step == 4
    assert found["curve"] == expected["curve"]


def test_rehearsal_of_the_table(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("steps", 2), ("block", 8), ("batch", 1), ("layers", 1), ("eval_batches", 1)):
        monkeypatch.setitem(paper_table1.QUICK, name, value)
    context = _context("paper-table1", tmp_path, "--data", str(text), quick=True)
    rows = _rows("paper-table1", context)
    assert [row["model"] for row in rows] == ["gpt2", "logmem", "tinylogmem", "expsum"]
    assert all(row["steps"] == 2 and row["train"] > 0 for row in rows)
    shown = paper_table1.show(rows[::-1])
    lines = shown.splitlines()[2:6]
    assert [line.split()[1] for line in lines] == ["GPT-2", "LogMem", "TinyLogMem", "ExpSum"]
    words = lines[1].split()
    assert words[4] == "71,489" and words[5:9] == [
        f"{rows[1]['train']:.4f}", "1.5733", f"{rows[1]['validation']:.4f}", "1.7742",
    ]  # fmt: skip
    assert "Not comparable: 2 steps; the paper's 5,000." in shown
    # Another rehearsal trains again, whatever lies there.
    metrics = context.scratch / "gpt2-32-1337" / "metrics.json"
    metrics.write_text("{")
    context.options["models"] = ["gpt2"]
    assert [row["curve"] for row in _rows("paper-table1", context)] == [rows[0]["curve"]]


# agreement


def _agree(folder: Path, text: Path, *flags: str, quick: bool = True) -> list[Row]:
    return _rows("agreement", _context("agreement", folder, "--data", str(text), *flags, quick=quick))


def test_rehearsal_of_the_agreement(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "QUICK_TOKENS", 100)
    rows = _agree(tmp_path, text, "--tokens", "5000")
    compiled = not agreement.why_not("cpp", "step", torch.device("cpu"), torch.float32)
    served = ["cpp", "reference"] if compiled else ["reference"]
    assert [(row["case"].split("/")[0], row["dtype"], row["comparison"], row["served"]) for row in rows] == [
        *(("float32", "float32", "parallel and sequential", name) for name in served),
        *(("bfloat16", "bfloat16", "parallel and sequential", name) for name in served),
        ("bfloat16", "bfloat16", "bfloat16 and float32, both parallel", None),
        ("bfloat16", "bfloat16", "bfloat16 sequential and float32 parallel", served[0]),
    ]
    for row in rows:
        assert row["tokens"] == 100 and row["data"] == "corpus.txt" and row["parallel_served"] == "reference"
        assert row["model"] == "logmem" and row["trained_steps"] == 0
        assert row["label"] == "freshly initialised, not trained"
        assert 0 <= row["mean_difference"] <= row["max_difference"] < (1e-4 if row["dtype"] == "float32" else 0.2)
        assert (row["first_disagreement"] is None) == (row["disagreements"] == 0)
        if row["dtype"] == "float32":
            assert row["disagreements"] == 0
        else:
            assert row["max_difference"] > 1e-4  # it was bfloat16
    shown = agreement.show(rows)
    assert "freshly initialised" in shown and f"{rows[0]['max_difference']:.3g}" in shown


def test_a_step_that_errs_is_found(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LogMem.step

    def broken(self: LogMem, ids: torch.Tensor, state: Any) -> Any:
        position = int(state[0].position)
        logits, state = step(self, ids, state)
        return (-logits if position >= 17 else logits), state

    monkeypatch.setattr(LogMem, "step", broken)
    rows = [row for row in _agree(tmp_path, text, "--tokens", "30") if row["dtype"] == "float32"]
    assert rows
    for row in rows:
        assert row["first_disagreement"] == 17 and row["disagreements"] == 13
        assert row["max_difference"] > 0.1
    assert "17" in agreement.show(rows)


def test_memory_that_errs_is_found(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LogarithmicMemory.step

    def forgetful(self: LogarithmicMemory, x_t: torch.Tensor, state: Any) -> Any:
        y, after = step(self, x_t, state)
        return y, (self.init_state(1, max_position=40) if after.max_position == 8 else after)

    monkeypatch.setattr(LogarithmicMemory, "step", forgetful)
    model = agreement._untrained(20)
    ids = torch.arange(40) % 20
    at_once, by_steps = agreement.parallel(model, ids, "reference"), agreement.sequential(model, ids, "reference")
    difference = (at_once - by_steps).abs().amax(1)
    assert difference[:8].max() < 1e-5 and difference[8] > 1e-4


def test_compare() -> None:
    left = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [4.0, 0.0]])
    right = torch.tensor([[0.0, 1.5], [1.0, 2.0], [0.0, 3.0], [0.0, 4.0]])
    assert agreement.compare(left, right) == {
        "max_difference": 4.0,
        "mean_difference": float(f"{(0.5 + 1 + 1 + 4 + 4) / 8:.4g}"),
        "first_disagreement": 1,
        "disagreements": 2,
    }
    assert agreement.compare(left, left) == {
        "max_difference": 0.0, "mean_difference": 0.0, "first_disagreement": None, "disagreements": 0,
    }  # fmt: skip
    right[2, 1], right[3, 0] = torch.nan, torch.inf
    gap = agreement.compare(left, right)
    assert gap == {"gap": "the logits are not finite at 2 positions, first at 2"}
    row = {"comparison": "c", "dtype": "d", "tokens": 4, "served": None, "parallel_served": "reference"}
    row |= {"model": "logmem", "trained_steps": 5, "data": "text"}
    assert gap["gap"] in agreement.show([row | gap])


def test_the_form_that_is_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    step, forward = LogarithmicMemory.step, LogarithmicMemory.forward

    def spy_step(self: LogarithmicMemory, *arguments: Any) -> Any:
        asked.append(("step", self.step_backend))
        return step(self, *arguments)

    def spy_forward(self: LogarithmicMemory, *arguments: Any) -> Any:
        asked.append(("forward", self.backend))
        return forward(self, *arguments)

    monkeypatch.setattr(LogarithmicMemory, "step", spy_step)
    monkeypatch.setattr(LogarithmicMemory, "forward", spy_forward)
    monkeypatch.setattr(agreement, "why_not", lambda *_: "it is not built")
    model = agreement._untrained(5)
    subject = agreement.Subject(model, torch.tensor([0, 1, 2]), "reference", {"tokens": 3})
    (row,) = agreement._measure_float32(subject)
    assert row["served"] == "reference"
    assert asked == [("forward", "reference")] * 2 + [("step", "reference")] * 6
    assert len(agreement._measure_bfloat16(subject)) == 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_table_s_checkpoint_is_the_default(text: Path, tmp_path: Path, tiny: None) -> None:
    with pytest.raises(InputError) as error:
        _agree(tmp_path, text, quick=False)
    path = tmp_path / "runs" / "paper-table1" / "logmem-32-1337" / "checkpoint.pt"
    assert f"expected a file at {path}, got none" in str(error.value)
    assert "python -m bench paper-table1 --models logmem" in str(error.value)
    _train(tmp_path, text, "--models", "logmem")
    rows = _agree(tmp_path, text, "--tokens", "70", quick=False)  # the split has 50 characters
    assert {row["tokens"] for row in rows} == {70}
    assert rows[0]["max_difference"] < 1e-4 and rows[0]["model"] == "logmem"
    assert rows[0]["trained_steps"] == 4 and "label" not in rows[0]
    assert "trained for 4 steps" in agreement.show(rows)
    saved = Checkpoint.load(path)
    subject = agreement._subject(_context("agreement", tmp_path, "--data", str(text), quick=False))
    assert torch.equal(subject.model.state_dict()["head.weight"], saved.model["head.weight"])


def test_agreement_refuses(text: Path, tmp_path: Path, tiny: None) -> None:
    _train(tmp_path, text, "--models", "gpt2", "logmem")
    folder = tmp_path / "runs" / "paper-table1"
    other = tmp_path / "other.txt"
    other.write_text("other characters " * 30)
    for said, data, flags in (
        ("tokens: expected at least 1, got 0", text, ["--tokens", "0"]),
        ("checkpoint: expected a LogMem model", text, ["--checkpoint", str(folder / "gpt2-32-1337/checkpoint.pt")]),
        ("checkpoint: expected a file at", text, ["--checkpoint", str(folder / "nothing")]),
        ("data: expected the characters that", other, []),
    ):
        with pytest.raises(InputError, match=said):
            _agree(tmp_path, data, *flags, quick=False)


def test_text_is_the_validation_split_over_again() -> None:
    corpus = Corpus.from_text("text", "abcdefghijklmnopqr" + "st")
    assert agreement._text(corpus, 5).tolist() == [18, 19, 18, 19, 18]
    assert agreement._text(corpus, 1).tolist() == [18]
    with pytest.raises(InputError, match="data: expected a validation split"):
        agreement._text(Corpus.from_text("text", ""), 1)
