"""The runs ``lamemo`` and ``lamemo-training`` of ``python -m bench``, and what the report says of them."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.contenders.look_ahead import OPERATIONS, LookAheadShape
from bench.lm import settings
from bench.lm.checkpoint import Checkpoint
from bench.lm.corpora import TINYSHAKESPEARE_SHA256, load, streams
from bench.lm.generate import load_model
from bench.lm.models import LogMem, ModelConfig, build
from bench.lm.settings import resolve
from bench.lm.train_lm import Run as TrainingRun
from bench.measure import timing
from bench.measure.journal import Row, read
from bench.measure.runner import Ceilings, Context, execute
from bench.report import chapters as report_chapters
from bench.runs import command as bench
from bench.runs import lamemo, lamemo_training
from tests.bench.rows import rows as _rows

PROVIDERS = ["ours", "literal", "looks back alone"]


# lamemo


def test_a_rehearsal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lamemo, "QUICK_SHAPES", [LookAheadShape("256", 1, 6, 9, 8, 2, 4, 16)])
    monkeypatch.setattr(Ceilings, "measure", lambda *_: Ceilings(1e10, 1e10))
    monkeypatch.setattr(timing, "release", lambda device: None)
    assert bench.main(["lamemo", "--quick", "--threads", "1", "--results", "rows"]) == 0
    (found,) = read(tmp_path / "rows" / "lamemo.jsonl")
    assert found.finished and list(found.cases) == [f"{operation}/256" for operation in OPERATIONS]
    assert [row["provider"] for row in found.rows] == PROVIDERS * 4
    for row in found.rows:
        assert row["unit"] == "ms" and row["median"] > 0 and row["peak_bytes"] > 0
        assert row["error"] <= row["tolerance"] and ("saved_bytes" in row) == (row["direction"] == "training")
    shown = capsys.readouterr().out
    assert "(B; T; M; E; heads; D)" in shown and "look-ahead layer (1, 6, 9, 8, 2, 4) training" in shown
    assert len(re.findall(r"^look-ahead .*: time .*x; the bar is (?:met|missed)$", shown, re.M)) == 4
    # A part of it.
    one = ["--operations", "look-ahead layer"]
    assert bench.main(["lamemo", "--quick", "--threads", "1", "--results", "rows", *one]) == 0
    assert list(read(tmp_path / "rows" / "lamemo.jsonl")[1].cases) == ["look-ahead layer/256"]


def _context(folder: Path, run: Any, *flags: str, quick: bool = False) -> Context:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser.add_argument)
    options = vars(parser.parse_args(list(flags)))
    scratch = folder / "runs" / "lamemo-training"
    return Context(torch.device("cpu"), torch.float32, "reference", quick, folder / "results", scratch, options)


def test_shapes_by_device(tmp_path: Path) -> None:
    def names(device: str) -> list[str]:
        context = replace(_context(tmp_path, lamemo), device=torch.device(device))
        return [case.name for case in lamemo.cases(context)]

    assert names("cpu") == [f"{one}/{name}" for name in ("256", "E=32", "long memory") for one in OPERATIONS]
    assert names("cuda") == [f"{one}/{name}" for name in ("enwik8", "wt103", "long memory") for one in OPERATIONS]


def _changed(provider: str, direction: str, **fields: Any) -> list[Row]:
    """The made-up rows, one of them different."""
    chosen = ("look-ahead layer", "256", provider, direction)
    return [
        {**row, **fields}
        if (row["operation"], row["shape"]["name"], row["provider"], row["direction"]) == chosen
        else row
        for row in _rows("lamemo")
    ]


def test_the_bar_is_time_and_what_is_kept() -> None:
    name = "look-ahead layer (4, 256, 256, 512, 8, 64) training: "

    def said(rows: list[Row]) -> str:
        return next(line.removeprefix(name) for line in lamemo.ratios(rows) if line.startswith(name))

    assert said(_rows("lamemo")) == "time 2.5x, peak 4x, kept 16x; the bar is met"
    assert said(_changed("literal", "training", ratio=0.99)) == "time 0.99x, peak 4x, kept 16x; the bar is missed"
    assert said(_changed("ours", "training", saved_bytes=1 << 30)).endswith("the bar is missed")
    # A larger peak is told, and no matter of the bar; other shapes have none.
    assert said(_changed("ours", "training", peak_bytes=1 << 30)).endswith("the bar is met")
    assert sum("the bar" in line for line in lamemo.ratios(_rows("lamemo"))) == 4
    assert len(list(lamemo.ratios(_changed("ours", "training", gap="gate: wrong")))) == 7
    assert "The literal form over ours:" in lamemo.show(_rows("lamemo"))


def test_who_can_run_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["list", "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("look-ahead")]
    assert [line[:45].split(maxsplit=2)[2].strip() for line in lines] == [
        "ours", "literal", "literal, compiled", "looks back alone",
    ] * 2  # fmt: skip
    assert all(line.endswith(" here") for line in lines if "compiled" not in line)


# lamemo-training


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat\nand the dog sat on the cat\n" * 16)
    return path


def _train(folder: Path, text: Path, *flags: str, quick: bool = True) -> list[Row]:
    context = _context(folder, lamemo_training, "--data", str(text), "--seeds", "1", *flags, quick=quick)
    journal = execute("lamemo-training", lamemo_training, context, fresh=False)
    return [row for rows in journal.cases.values() for row in rows]


def _settings(folder: Path, *flags: str) -> dict[str, settings.Settings]:
    cases = lamemo_training.cases(_context(folder, lamemo_training, *flags))
    return {case.name: case.measure.__self__.settings for case in cases}  # type: ignore[union-attr]


@pytest.mark.parametrize("model", lamemo_training.INNER)
def test_parameters_are_as_equal_as_a_width_makes_them(model: str, tmp_path: Path) -> None:
    def count(one: settings.Settings) -> int:
        return build(one.model_config(65)).parameter_count()

    one, logmem = _settings(tmp_path, "--models", model, "logmem", "--seeds", "1").values()
    wanted = count(logmem)
    assert wanted == 71_489
    away = {width: abs(count(replace(one, inner=width)) - wanted) for width in range(170, 191)}
    assert min(away, key=lambda width: away[width]) == lamemo_training.INNER[model] == one.inner
    assert away[one.inner] <= 130


def test_what_is_trained(tmp_path: Path) -> None:
    found, steps = _settings(tmp_path), lamemo_training.STEPS
    models = ("lamemo", "transformer-xl", "gpt2", "logmem")
    assert list(found) == [f"{model}-{steps}-{seed}" for model in models for seed in (1337, 1338, 1339)]
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"inner": 177, "eval_batches": 55},
        "logmem": {"eval_batches": 55, "backend": "reference"},
        **dict.fromkeys(("lamemo", "transformer-xl"), {"memory": 128, "inner": 185, "backend": "reference"}),
    }
    for name, one in found.items():
        given = {
            "preset": "paper-32", "model": one.model, "seed": one.seed, "data": "tinyshakespeare", "block": 128,
            "steps": steps, "eval_every": steps // 5, "save_every": steps // 5, "device": "cpu", "sample_tokens": 100,
            "out": str(tmp_path / "runs" / "lamemo-training" / name), **own[one.model],
        }  # fmt: skip
        assert one == resolve(given, None)
        assert (one.lr, one.schedule, one.batch, one.layers, one.heads) == (1e-3, "constant", 16, 4, 4)
    assert {one.steps: one.eval_every for one in _settings(tmp_path, "--steps", "4").values()} == {4: 1}
    assert list(_settings(tmp_path, "--models", "gpt2", "--seeds", "3", "3", "--steps", "50")) == ["gpt2-50-3"]


def test_rehearsal_of_the_trainings(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("layers", 1), ("block", 8), ("batch", 2)):
        monkeypatch.setitem(lamemo_training.QUICK, name, value)
    rows = {row["model"]: row for row in _train(tmp_path, text, "--steps", "2")}
    assert list(rows) == ["lamemo", "transformer-xl", "gpt2", "logmem"]
    for model, row in rows.items():
        assert row["steps"] == 2 and [at[0] for at in row["curve"]] == [0, 1, 2] and row["train"] > 0
        assert row["seed"] == 1 and row["trained_torch"] == torch.__version__
        whole = model in ("lamemo", "transformer-xl")
        assert row["validation_read"] == (lamemo_training.CARRIED if whole else "windows of 8 characters")
        assert ("validation_carried" in row) == (model == "logmem")
    # Of the model that was trained, along the streams that the recurrent models are asked about.
    model, _ = load_model(tmp_path / "runs" / "lamemo-training" / "logmem-2-1" / "checkpoint.pt")
    ids = streams(load(str(text)).validation, 2)
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert rows["logmem"]["validation_carried"] == pytest.approx(expected, rel=1e-6)
    shown = lamemo_training.show([*rows.values()][::-1]).splitlines()
    assert [line.split()[0] for line in shown[2:6]] == ["LaMemo", "Transformer-XL", "GPT-2", "LogMem"]
    assert f"{rows['logmem']['validation_carried']:.4f}" in shown[5]


@pytest.mark.parametrize("block", [1, 5, 16, 200])
def test_a_state_is_carried_through_the_whole_text(block: int) -> None:
    """The parallel form over a stream is another way to the same loss, whatever the segments are."""
    torch.manual_seed(0)
    config = ModelConfig("logmem", 7, 0, 16, 2, 2, 2, 0, "linear", "variance_preserving", "wide")
    model = build(config, "reference").double()
    assert isinstance(model, LogMem)
    ids = torch.randint(7, (3, 52))
    logits = model(ids[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert lamemo_training.carried_loss(model, ids, block) == pytest.approx(expected, rel=1e-12)
    alone = [model(part) for part in ids[:, :-1].split(16, 1)]
    assert abs(F.cross_entropy(torch.cat(alone, 1).flatten(0, 1), ids[:, 1:].flatten()).item() - expected) > 1e-6


def test_a_finished_training_is_collected(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {**settings._PRESETS["paper-32"], "layers": 1, "batch": 2, "eval_batches": 1}
    monkeypatch.setitem(settings._PRESETS, "paper-32", tiny)
    monkeypatch.setattr(lamemo_training, "BLOCK", 8)
    flags = ("--models", "lamemo", "logmem", "--steps", "2")
    first = _train(tmp_path, text, *flags, quick=False)
    folder = tmp_path / "runs" / "lamemo-training" / "logmem-2-1"
    assert Checkpoint.load(folder / "checkpoint.pt").step == 2

    def refuse(*_: Any) -> Any:
        raise AssertionError("no training is needed")

    monkeypatch.setattr(TrainingRun, "__init__", refuse)
    again = _train(tmp_path, text, *flags, quick=False)
    names = ("model", "curve", "validation", "validation_read", "validation_carried", "trained_commit")
    assert [[row.get(name) for name in names] for row in again] == [[row.get(name) for name in names] for row in first]
    # Losses alone may have come from elsewhere.
    (folder / "checkpoint.pt").unlink()
    assert "validation_carried" not in _train(tmp_path, text, *flags, quick=False)[1]


def test_the_default_text_is_that_of_the_paper(tmp_path: Path) -> None:
    cases = lamemo_training.cases(_context(tmp_path, lamemo_training, "--models", "gpt2"))
    assert {case.measure.__self__.digest for case in cases} == {TINYSHAKESPEARE_SHA256}  # type: ignore[union-attr]


# The report


def test_the_chapter_of_time_and_memory() -> None:
    found = report_chapters.lamemo(_rows("lamemo"))
    assert found.index("### Time") < found.index("### Memory")
    assert re.search(r"\| \(B; T; M; E; heads; D\) +\| direction ", found)
    layer = r"\| \(4; 256; 256; 512; 8; 64\) +\| forward +\| +20 \(18–22\) \| +40 % \| +50 \(45–55\), 2.5× \|"
    assert re.search(layer, found)
    assert "M = 128, B = 16: literal is faster (0.8 of our time)" in found
    assert "looks back alone is smaller (0.25 of our saved bytes)" in found
    assert "- [1] literal, compiled: torch.compile needs a C++ compiler" in found
    assert re.search(r"\| +1 \(0.5 saved\) \| +4 \(8 saved\), 4× \|", found)
    # Shares are of time.
    assert "share of floor" not in found[found.index("### Memory") :]


def test_the_chapter_of_trainings() -> None:
    found = report_chapters.lamemo_training(_rows("lamemo-training"))
    # 1.90 and 1.94: mean 1.92, standard deviation 0.04/√2.
    row = r"\| lamemo +\| the whole split, memory carried along \| +2 \| +2,000 \| +71,461 "
    assert re.search(row + r"\| 1.8200 ± 0.0283 \| 1.9200 ± 0.0283 \| +– \|", found)
    assert re.search(r"\| logmem +\| windows of 128 characters .* 2.5100 ± 0.0141 \|", found)
