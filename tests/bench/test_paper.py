"""The run ``paper-table1`` of ``python -m bench``."""

from __future__ import annotations

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
from bench.lm.corpora import TINYSHAKESPEARE_SHA256
from bench.lm.train_lm import Run as TrainingRun
from bench.lm.training import Trainer
from bench.measure.journal import read
from bench.runs import paper_table1
from tests.support.paper import TINY, context_of, rows_of, train


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
    (row,) = rows_of("paper-table1", context_of("paper-table1", tmp_path, "--models", model))
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
        rows_of("paper-table1", context_of("paper-table1", tmp_path, "--models", "gpt2", "logmem"))
    assert said in str(error.value) and str(error.value).startswith(f"{path.parent}: ")
    # Refused before the first was measured.
    assert read(tmp_path / "results" / "paper-table1.jsonl")[0].cases == {}


def test_a_training_on_another_text_is_refused(text: Path, tmp_path: Path, tiny: None) -> None:
    train(tmp_path, text, "--models", "gpt2")
    text.write_text(text.read_text()[::-1])
    with pytest.raises(InputError, match="gpt2-32-1337: expected a training with the corpus .*, got one with one of"):
        train(tmp_path, text, "--models", "gpt2")


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}'])
def test_metrics_that_are_none(content: str, tmp_path: Path, no_training: None) -> None:
    path = _put_metrics(tmp_path, "gpt2")
    path.write_text(content)
    with pytest.raises(InputError, match="expected the metrics of train_lm, got something else"):
        rows_of("paper-table1", context_of("paper-table1", tmp_path, "--models", "gpt2"))


def test_cases(tmp_path: Path) -> None:
    def names(*flags: str) -> list[str]:
        return [case.name for case in paper_table1.cases(context_of("paper-table1", tmp_path, *flags))]

    assert names() == ["gpt2-32-1337", "logmem-32-1337", "tinylogmem-32-1337", "expsum-32-1337"]
    assert names("--embedding", "all", "--models", "expsum", "--seeds", "1", "2", "1") == [
        "expsum-32-1", "expsum-32-2", "expsum-128-1", "expsum-128-2",
    ]  # fmt: skip
    with pytest.raises(InputError, match="data: expected stdlib, tinyshakespeare or a readable text file"):
        names("--data", str(tmp_path / "missing"))


def test_what_is_trained_is_what_the_paper_trained(tmp_path: Path) -> None:
    for embedding, model in paper_table1.PAPER:
        context = context_of("paper-table1", tmp_path, "--embedding", str(embedding), "--models", model)
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
    whole = train(tmp_path / "whole", text, "--models", "gpt2", "logmem")
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        _interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            train(broken, text, "--models", "gpt2", "logmem")
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
    found = train(broken, text, "--models", "gpt2", "logmem")
    assert updates == [3, 0, 1, 2, 3]
    for ours, theirs in zip(found, whole, strict=True):
        assert ours["case"] == theirs["case"] and ours["steps"] == 4
        assert ours["curve"] == theirs["curve"] and [point[0] for point in ours["curve"]] == [0, 2, 4]
        assert ours["trained_torch"] == torch.__version__ and ours["trained_threads"] == 1


def test_a_checkpoint_with_other_settings_is_refused(
    text: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, text, "--models", "gpt2")
    folder = tmp_path / "runs" / "paper-table1" / "gpt2-32-1337"
    (folder / "metrics.json").unlink()
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setitem(settings._PRESETS, "paper-32", {**TINY, "lr": 0.25})
    with pytest.raises(InputError, match=r"gpt2-32-1337: expected a training with lr 0.25, got one with lr 0.001;"):
        train(tmp_path, text, "--models", "logmem", "gpt2")
    assert not folder.with_name("logmem-32-1337").exists()  # refused before the first was trained
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_training_without_its_last_checkpoint_is_not_finished(text: Path, tmp_path: Path, tiny: None) -> None:
    (expected,) = train(tmp_path, text, "--models", "gpt2")
    folder = tmp_path / "runs" / "paper-table1" / "gpt2-32-1337"
    # As they are between the last evaluation and the last checkpoint.
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["sample"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "checkpoint.pt").unlink()
    (found,) = train(tmp_path, text, "--models", "gpt2")
    assert Checkpoint.load(folder / "checkpoint.pt").step == 4
    assert found["curve"] == expected["curve"]


def test_rehearsal_of_the_table(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("steps", 2), ("block", 8), ("batch", 1), ("layers", 1), ("eval_batches", 1)):
        monkeypatch.setitem(paper_table1.QUICK, name, value)
    context = context_of("paper-table1", tmp_path, "--data", str(text), quick=True)
    rows = rows_of("paper-table1", context)
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
    assert [row["curve"] for row in rows_of("paper-table1", context)] == [rows[0]["curve"]]


# agreement
