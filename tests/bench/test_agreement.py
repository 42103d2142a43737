"""The run ``agreement`` of ``python -m bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.errors import InputError
from bench.lm.checkpoint import Checkpoint
from bench.lm.corpora import Corpus
from bench.lm.models import LogMem
from bench.measure.journal import Row
from bench.report.tables import number
from bench.runs import agreement
from lmn_kernels import LogarithmicMemory
from tests.support.paper import context_of, rows_of, train


def _agree(folder: Path, text: Path, *flags: str, quick: bool = True) -> list[Row]:
    return rows_of("agreement", context_of("agreement", folder, "--data", str(text), *flags, quick=quick))


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
        elif row["comparison"] != "parallel and sequential":  # which agree to the bit on the reference
            assert row["max_difference"] > 1e-4  # it was bfloat16
    shown = agreement.show(rows)
    assert "freshly initialised" in shown and number(rows[0]["max_difference"]) in shown


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
    train(tmp_path, text, "--models", "logmem")
    rows = _agree(tmp_path, text, "--tokens", "70", quick=False)  # the split has 50 characters
    assert {row["tokens"] for row in rows} == {70}
    assert rows[0]["max_difference"] < 1e-4 and rows[0]["model"] == "logmem"
    assert rows[0]["trained_steps"] == 4 and "label" not in rows[0]
    assert "Model: logmem, 4 steps." in agreement.show(rows)
    saved = Checkpoint.load(path)
    subject = agreement._subject(context_of("agreement", tmp_path, "--data", str(text), quick=False))
    assert torch.equal(subject.model.state_dict()["head.weight"], saved.model["head.weight"])


def test_agreement_refuses(text: Path, tmp_path: Path, tiny: None) -> None:
    train(tmp_path, text, "--models", "gpt2", "logmem")
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
