"""The main job with a memory along the text: segments in order, exact resume, evaluation over whole streams."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.lm import generate as generate_module
from bench.lm import train_lm
from bench.lm.checkpoint import Checkpoint
from bench.lm.corpora import stream_starts
from bench.lm.models import RECURRENT
from bench.lm.ranks import Ranks
from bench.lm.settings import resolve
from bench.lm.training import RecurrentTrainer, StopRequest, Trainer

ROOT = Path(__file__).resolve().parents[2]
TINY = "--embedding 8 --heads 2 --layers 2 --block 12 --batch 4 --eval-every 3 --save-every 2".split()
# Of 4 streams of 67 characters: 5 segments of 12, and a validation split of 4 times 7 characters.
SEGMENTS = 5


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat\nand the dog sat on the cat\n" * 6)
    return path


@pytest.fixture
def long_text(tmp_path: Path) -> Path:
    path = tmp_path / "long.txt"
    path.write_text("the cat sat on the mat\nand the dog sat on the cat\n" * 40)
    return path


def _run(text: Path, out: Path, *flags: str) -> int:
    return train_lm.main([*TINY, "--sample-tokens", "3", "--data", str(text), "--out", str(out), *flags])


def _load(out: Path) -> Checkpoint:
    return Checkpoint.load(out / "checkpoint.pt")


def _trainer(text: Path, model: str = "lamemo", **given: Any) -> RecurrentTrainer:
    sizes = {"embedding": 8, "heads": 2, "layers": 2, "block": 12, "batch": 4, "dtype": "float64", "warmup": 0}
    settings = resolve({"model": model, "data": str(text), "out": str(text.parent / "out"), **sizes, **given}, None)
    trainer = train_lm.Run(settings, Ranks.start("cpu"), None)._trainer
    assert isinstance(trainer, RecurrentTrainer)
    return trainer


def _go(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer._update()
        trainer.step += 1


def _evaluate(trainer: Trainer) -> dict[str, float]:
    return trainer.evaluate(StopRequest(Ranks.start("cpu")))


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _complaint(capsys: Any) -> str:
    """What was said on stderr besides the progress bar: one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "step/s" not in line and "s/step" not in line]
    lines = [line for line in lines if line.strip()]
    assert len(lines) == 1, lines
    return lines[0].strip()


# Segments


def test_epochs_read_every_stream_round_from_its_start(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(text, seed=5)
    ids, seen, empty = train_lm.load(str(text)).train, [], []
    read = RecurrentTrainer._read

    def noted(self: RecurrentTrainer, x: Tensor, target: Tensor, memory: Any) -> Any:
        seen.append((x, target))
        empty.append(memory is None)
        return read(self, x, target, memory)

    monkeypatch.setattr(RecurrentTrainer, "_read", noted)
    _go(trainer, 2 * SEGMENTS)
    assert empty == 2 * [True, *[False] * (SEGMENTS - 1)]
    for epoch in range(2):
        starts = stream_starts(5, epoch, 4, 67).tolist()
        for row in range(4):
            stream = ids[67 * row : 67 * row + 67].roll(-starts[row])
            for number, (x, target) in enumerate(seen[epoch * SEGMENTS : (epoch + 1) * SEGMENTS]):
                assert torch.equal(x[row], stream[12 * number : 12 * number + 12])
                assert torch.equal(target[row], stream[12 * number + 1 : 12 * number + 13])
    assert stream_starts(5, 0, 4, 67).tolist() != stream_starts(5, 1, 4, 67).tolist()


def test_memory_of_a_step_is_that_of_the_segments_before(text: Path) -> None:
    trainer = _trainer(text, lr=0.0)  # the model stays, so the segments can be read again
    _go(trainer, 3)
    stream_length, starts = 67, stream_starts(1337, 0, 4, 67)
    rows = [train_lm.load(str(text)).train[67 * row :][:stream_length].roll(-int(starts[row])) for row in range(4)]
    memory = None
    for number in range(3):
        _, memory = trainer.model(torch.stack(rows)[:, 12 * number : 12 * number + 12], memory)
    assert memory is not None and trainer._memory is not None
    assert _same(trainer._memory.tensors(), memory.tensors())


def test_seed_moves_the_start_of_the_epochs(text: Path) -> None:
    memories = []
    for seed in (1, 2):
        trainer = _trainer(text, seed=seed)
        torch.manual_seed(0)
        trainer.model.network.reset_parameters()  # type: ignore[union-attr,operator]
        _go(trainer, 1)
        assert trainer._memory is not None
        memories.append(trainer._memory.inputs[0])
    assert not torch.equal(*memories)


@pytest.mark.parametrize("model", RECURRENT)
def test_it_learns(model: str, long_text: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--steps", "120", "--lr", "1e-2", "--embedding", "16", "--eval-every", "120"]
    assert _run(long_text, tmp_path / "out", *flags, "--warmup", "5", "--save-every", "120") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["rows"][0]["validation"] > metrics["unigram_entropy"]
    for split in ("train", "validation"):
        assert metrics["rows"][-1][split] < 0.5 * metrics["unigram_entropy"]


# Evaluation


@pytest.mark.parametrize("model", RECURRENT)
def test_evaluation_carries_the_memory_through_the_streams(model: str, long_text: Path) -> None:
    trainer = _trainer(long_text, model, lr=1e-2)
    _go(trainer, 20)
    found, corpus = _evaluate(trainer), train_lm.load(str(long_text))
    for name, ids in (("train", corpus.train), ("validation", corpus.validation)):
        # 200 characters of validation are 4 streams of 50: 4 segments and one of a single character.
        rows = ids.view(4, -1)[:, :50]
        carried, forgotten, memory = [], [], None
        with torch.no_grad():
            for begin in range(0, 49, 12):
                x, target = rows[:, begin : min(begin + 12, 49)], rows[:, begin + 1 : begin + 13]
                logits, memory = trainer.model(x, memory)
                carried.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none"))
                cold, _ = trainer.model(x)
                forgotten.append(F.cross_entropy(cold.flatten(0, 1), target.flatten(), reduction="none"))
        assert torch.cat(carried).shape == (4 * 49,)
        assert found[name] == pytest.approx(float(torch.cat(carried).mean()), rel=1e-12)
        assert found[name] != pytest.approx(float(torch.cat(forgotten).mean()), abs=1e-4)


def test_evaluation_leaves_the_memory_alone(text: Path, tmp_path: Path) -> None:
    trainer = _trainer(text)
    _go(trainer, 3)
    memory = trainer._memory
    assert memory is not None
    before = memory.clone()
    _evaluate(trainer)
    assert trainer._memory is memory
    assert _same(memory.tensors(), before.tensors())
    often, never = tmp_path / "often", tmp_path / "never"
    assert _run(text, often, "--model", "lamemo", "--steps", "7", "--eval-every", "1") == 0
    assert _run(text, never, "--model", "lamemo", "--steps", "7", "--eval-every", "100") == 0
    assert _same(_load(often).model, _load(never).model)


# Resume


def _interrupt(method: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a Ctrl-C in the middle of what the trainer does after ``step`` updates."""
    whole: Callable[..., Any] = getattr(Trainer, method)

    def interrupted(self: Trainer, *args: Any) -> Any:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, *args)

    monkeypatch.setattr(Trainer, method, interrupted)


@pytest.mark.parametrize(
    "model, dtype, method, step, saved",
    [
        ("lamemo", "float32", "_update", 2, 3),
        ("lamemo", "float32", "_update", SEGMENTS - 1, SEGMENTS),
        ("lamemo", "bfloat16", "_update", 7, 8),
        ("lamemo", "float32", "evaluate", 6, 6),
        ("lamemo", "float32", "evaluate", 0, 0),
        ("transformer-xl", "float32", "_update", 7, 8),
        ("transformer-xl", "bfloat16", "evaluate", 6, 6),
    ],
)
def test_interrupt_and_resume_is_exact(
    model: str, dtype: str, method: str, step: int, saved: int, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = ["--model", model, "--steps", "12", "--warmup", "2", "--lr", "1e-2", "--memory", "30", "--dtype", dtype]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _run(text, whole, *flags) == 0
    with monkeypatch.context() as patch:
        _interrupt(method, step, patch)
        assert _run(text, broken, *flags) == 130
    assert _load(broken).step == saved
    assert (_load(broken).memory is None) == (saved == 0)
    assert train_lm.main(["--resume", "--out", str(broken)]) == 0
    expected, found = _load(whole), _load(broken)
    assert [row["step"] for row in found.rows] == [0, 3, 6, 9, 12]
    assert found.rows == expected.rows
    assert _same(found.model, expected.model)
    assert expected.memory is not None and found.memory is not None
    assert _same(found.memory["tensors"], expected.memory["tensors"])
    assert found.memory["tensors"]["inputs.0"].shape == (4, 24, 8)  # the second segment of the third epoch
    for key, state in expected.optimizer["state"].items():
        assert _same(found.optimizer["state"][key], state)


def _change(out: Path, **fields: Any) -> None:
    checkpoint = _load(out)
    vars(checkpoint).update(fields)
    checkpoint.save(out / "checkpoint.pt")


@pytest.mark.parametrize("steps, goes_on", [(3, False), (SEGMENTS, True)])
def test_checkpoint_without_its_memory(steps: int, goes_on: bool, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert _run(text, out, "--model", "lamemo", "--steps", str(steps)) == 0
    _change(out, memory=None)
    capsys.readouterr()
    status = train_lm.main(["--resume", "--out", str(out), "--steps", "7"])
    if goes_on:
        assert status == 0
    else:
        assert status == 2
        assert _complaint(capsys) == (
            "train_lm: resume: expected a memory in a checkpoint within an epoch (step 3), got none"
        )


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--batch", "2"], "batch 4, got 2"),
        (["--seed", "2"], "seed 1337, got 2"),
        (["--dtype", "float64"], "dtype 'float32', got 'float64'"),
        (["--block", "6"], "block 12, got 6"),
        (["--memory", "6"], "memory 12, got 6"),
        (["--inner", "6"], "inner 32, got 6"),
        (["--model", "transformer-xl"], "model 'lamemo', got 'transformer-xl'"),
    ],
)
def test_resume_with_another_memory(flags: list[str], said: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert _run(text, out, "--model", "lamemo", "--steps", "3") == 0
    capsys.readouterr()
    assert train_lm.main(["--resume", "--out", str(out), "--steps", "7", *flags]) == 2
    assert _complaint(capsys) == f"train_lm: resume: expected the checkpoint's {said}"


@pytest.mark.parametrize("model", ["logmem", "gpt2"])
def test_checkpoints_that_knew_of_no_memory_go_on(model: str, long_text: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--eval-batches", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _run(long_text, whole, *flags, "--steps", "4", "--eval-every", "2", "--schedule", "constant") == 0
    assert _run(long_text, out, *flags, "--steps", "2", "--eval-every", "2", "--schedule", "constant") == 0
    saved = _load(out)
    for name in ("memory", "inner"):
        assert saved.settings.pop(name) is None
    for name in ("memory", "inner", "block"):
        assert saved.model_config.pop(name) == 0
    fields = {"format": "lmn_kernels.train_lm", "version": 1, **vars(saved)}
    assert fields.pop("memory") is None
    torch.save(fields, out / "checkpoint.pt")
    generate_module.load_model(out / "checkpoint.pt")
    assert train_lm.main(["--resume", "--out", str(out), "--steps", "4"]) == 0
    assert _load(out).rows == _load(whole).rows
    assert _same(_load(out).model, _load(whole).model)


# Speech


def test_generate_from_the_command_line(text: Path, tmp_path: Path, capsys: Any) -> None:
    assert _run(text, tmp_path, "--model", "lamemo", "--steps", "2", "--prompt", "on the mat, no: the") == 2
    assert "expected characters of the corpus" in _complaint(capsys)
    assert _run(text, tmp_path, "--model", "lamemo", "--steps", "2", "--prompt", "on the mat\nand the dog") == 0
    assert len((tmp_path / "sample.txt").read_text()) == len("on the mat\nand the dog") + 3 + 1
    capsys.readouterr()
    flags = ["--prompt", "the dog sat on the cat", "--tokens", "20", "--device", "cpu"]
    assert generate_module.main(["--checkpoint", str(tmp_path / "checkpoint.pt"), *flags]) == 0
    assert capsys.readouterr().out.startswith("the dog sat on the cat")


# Settings


def test_sizes_that_are_not_given() -> None:
    settings = resolve({"model": "lamemo", "preset": "paper-32"}, None)
    assert (settings.memory, settings.inner, settings.schedule) == (512, 128, "constant")
    given = resolve({"model": "transformer-xl", "memory": 0, "inner": 5, "block": 7, "embedding": 8}, None)
    assert (given.memory, given.inner, given.model_config(9).block) == (0, 5, 7)
    assert resolve({}, given.to_save()).inner == 5
    # A preset does not take over what another run had.
    anew = resolve({"preset": "paper-32"}, given.to_save())
    assert (anew.model, anew.memory, anew.inner) == ("transformer-xl", 512, 128)
    other = resolve({"model": "gpt2"}, None)
    assert (other.memory, other.inner) == (None, None)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model", "lamemo", "--bank", "2"], "bank: expected no value with model lamemo, got 2"),
        (["--model", "transformer-xl", "--feedforward", "wide"], "feedforward: expected no value with model"),
        (["--model", "lamemo", "--eval-batches", "2"], "eval_batches: expected no value with model lamemo, got 2"),
        (["--model", "gpt2", "--memory", "2"], "memory: expected no value with model gpt2, got 2"),
        (["--model", "expsum", "--inner", "2"], "inner: expected no value with model expsum, got 2"),
        (["--model", "lamemo", "--memory", "-1"], "memory: expected at least 0, got -1"),
        (["--model", "lamemo", "--inner", "0"], "inner: expected at least 1, got 0"),
        (["--model", "lamemo", "--embedding", "7", "--heads", "1"], "embedding: expected an even number"),
        (["--model", "lamemo", "--block", "67"], "expected at least batch · 68 = 272 characters in the training split"),
        (["--model", "lamemo", "--batch", "16"], "expected at least batch · 2 = 32 characters in the validation split"),
    ],
)
def test_bad_flags(flags: list[str], said: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    assert _run(text, tmp_path / "out", "--steps", "1", *flags) == 2
    assert said in _complaint(capsys)


# Dtypes, compilation and processes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype: str, text: Path, tmp_path: Path) -> None:
    exact = _trainer(text, dtype="float32")
    trainer = _trainer(text, dtype=dtype)
    for each in (exact, trainer):
        _go(each, 3)
    loss, reference = _evaluate(trainer)["validation"], _evaluate(exact)["validation"]
    assert loss != reference  # the flag had an effect
    assert loss == pytest.approx(reference, rel=2e-2)


@pytest.mark.parametrize("model", RECURRENT)
def test_a_memory_of_no_rows_is_no_memory(model: str, text: Path) -> None:
    trainer = _trainer(text, model, memory=0)
    _go(trainer, SEGMENTS + 2)
    assert trainer._memory is not None and trainer._memory.length == 0


def test_compiled_is_the_same(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _trainer(text)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = _trainer(text, compile=True)
    for trainer in (plain, compiled):
        _go(trainer, 4)
    assert _evaluate(compiled) == pytest.approx(_evaluate(plain), rel=1e-12)


def test_two_processes_equal_one(text: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--model", "lamemo", "--data", str(text), "--dtype", "float64", "--schedule", "constant"]
    flags += ["--threads", "1", "--device", "cpu", "--warmup", "0", "--sample-tokens", "2"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train_lm.main([*flags, "--steps", "9", "--out", str(alone)]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "bench.lm.train_lm", *flags, "--steps", "7", "--out", str(together)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # The memory of both processes' streams goes on in one.
    assert train_lm.main(["--resume", "--steps", "9", "--out", str(together), "--device", "cpu"]) == 0
    expected, found = _load(alone), _load(together)
    assert expected.memory is not None and found.memory is not None
    for name, value in [*expected.model.items(), *expected.memory["tensors"].items()]:
        ours = (found.model | found.memory["tensors"])[name]
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-9)
    at = {row["step"]: row for row in found.rows}
    for row in expected.rows:
        assert at[row["step"]] == pytest.approx(row, rel=1e-9)
