"""The main job: exact resume, whole files, several processes, plain errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench.errors import InputError, RunError
from bench.files import write_file
from bench.lm import generate as generate_module
from bench.lm import train_lm
from bench.lm.checkpoint import Checkpoint
from bench.lm.settings import resolve
from bench.lm.training import Trainer, learning_rate
from lmn_kernels import BackendError

ROOT = Path(__file__).resolve().parents[2]
TINY = "--embedding 8 --heads 2 --layers 2 --block 12 --batch 4 --eval-every 2 --eval-batches 2 --save-every 2".split()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat\nand the dog sat on the cat\n" * 40)
    return path


def _run(text: Path, out: Path, *flags: str) -> int:
    return train_lm.main([*TINY, "--sample-tokens", "5", "--data", str(text), "--out", str(out), *flags])


def _load(out: Path) -> Checkpoint:
    return Checkpoint.load(out / "checkpoint.pt")


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Settings


def test_flags_beat_the_preset_and_the_preset_beats_the_checkpoint() -> None:
    saved = resolve({"embedding": 16, "lr": 0.5, "seed": 3}, None).to_save()
    assert resolve({}, saved).seed == 3
    mixed = resolve({"preset": "paper-32", "lr": 0.25}, saved)
    assert (mixed.embedding, mixed.lr, mixed.seed, mixed.bank) == (32, 0.25, 1337, 2)
    assert resolve({"preset": "paper-32", "model": "tinylogmem", "feedforward": "wide"}, None).feedforward == "wide"


def test_machine_flags_are_not_saved() -> None:
    saved = resolve({"threads": 7, "device": "cuda:3", "out": "elsewhere"}, None).to_save()
    assert not {"threads", "device", "out", "backend", "compile"} & saved.keys()


def test_learning_rate() -> None:
    settings = resolve({"lr": 1.0, "warmup": 4, "steps": 104, "schedule": "cosine"}, None)
    assert [learning_rate(settings, step) for step in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert learning_rate(settings, 4) == pytest.approx(1.0)
    assert learning_rate(settings, 54) == pytest.approx(0.55)
    assert learning_rate(settings, 104) == pytest.approx(0.1)
    constant = resolve({"lr": 1.0, "warmup": 0, "schedule": "constant"}, None)
    assert {learning_rate(constant, step) for step in (0, 100, 10**6)} == {1.0}


# Files


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "file"
    write_file(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(RunError, match="cannot be written: File too large; the file that was there is unchanged"):
            write_file(path, bytes(1 << 21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_ends_the_run_with_one_line(text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert _run(text, out, "--steps", "2") == 0
    before = (out / "checkpoint.pt").read_bytes()
    (out / f"checkpoint.pt.{os.getpid()}.{threading.get_ident()}.tmp").symlink_to("/dev/full")
    capsys.readouterr()
    assert _run(text, out, "--steps", "4", "--resume") == 1
    assert _complaint(capsys) == (
        f"train_lm: {out}/checkpoint.pt: cannot be written: No space left on device; "
        "the file that was there is unchanged"
    )
    assert (out / "checkpoint.pt").read_bytes() == before


def _complaint(capsys: Any) -> str:
    """What was said on stderr besides the progress bar: one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "step/s" not in line and "s/step" not in line]
    lines = [line for line in lines if line.strip()]
    assert len(lines) == 1, lines
    return lines[0].strip()


def test_results_of_a_run(text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert _run(text, out, "--steps", "5", "--prompt", "the ") == 0
    files = {"checkpoint.pt", "metrics.json", "curve.csv", "curve.svg", "sample.txt"}
    assert {path.name for path in out.iterdir()} == files
    metrics = json.loads((out / "metrics.json").read_text())
    assert [row["step"] for row in metrics["rows"]] == [0, 2, 4, 5]
    corpus = train_lm.load(str(text))
    assert metrics["corpus"]["sha256"] == corpus.digest
    assert metrics["unigram_entropy"] == corpus.unigram_entropy()
    assert metrics["parameters"] == sum(value.numel() for value in _load(out).model.values())
    assert metrics["tokens_per_second"] > 0 and metrics["environment"]["torch"] == torch.__version__
    assert (out / "curve.csv").read_text().count("\n") == 5
    drawing = ElementTree.parse(out / "curve.svg")
    lines = {part.get("id"): part.iter("{http://www.w3.org/2000/svg}path") for part in drawing.iter()}
    # A line, and a marker at each evaluation or one for all of them.
    assert all(next(lines[split]).get("d").count("L") == 3 for split in ("train", "validation"))
    sample = (out / "sample.txt").read_text()
    assert sample.startswith("the ") and len(sample) == len("the ") + 5 + 1
    said = capsys.readouterr().out
    assert sample.strip("\n") in said
    last = said.splitlines()[-3:]
    assert "5 steps" in last[0] and "tokens/s" in last[0]
    assert f"unigram entropy {corpus.unigram_entropy():.4f}" in last[1] and str(out) in last[2]


def test_it_learns(text: Path, tmp_path: Path) -> None:
    flags = ["--steps", "150", "--lr", "1e-2", "--embedding", "16", "--eval-every", "150", "--warmup", "5"]
    assert _run(text, tmp_path / "out", *flags) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # A text of one repeated phrase: the context decides nearly every character.
    assert metrics["rows"][-1]["validation"] < 0.5 * metrics["unigram_entropy"]


# Resume


def _interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a Ctrl-C in the middle of the update after ``step``."""
    update: Callable[[Trainer], torch.Tensor] = Trainer._update

    def interrupted(self: Trainer) -> torch.Tensor:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "_update", interrupted)


@pytest.mark.parametrize("model", ["logmem", "gpt2"])
@pytest.mark.parametrize("step", [2, 3])  # with and without an evaluation due
def test_interrupt_and_resume_is_exact(
    model: str, step: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags = ["--model", model, "--steps", "7", "--warmup", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _run(text, whole, *flags) == 0
    with monkeypatch.context() as patch:
        _interrupt_after(step, patch)
        capsys.readouterr()
        assert _run(text, broken, *flags) == 130
    said = _complaint(capsys)
    assert said.startswith(
        f"train_lm: interrupted after step {step + 1}; go on with: python -m bench.lm.train_lm --resume"
    )
    assert _load(broken).step == step + 1
    assert train_lm.main(["--resume", "--out", str(broken)]) == 0
    expected, found = _load(whole), _load(broken)
    assert found.step == 7
    assert [row["step"] for row in found.rows] == [0, 2, 4, 6, 7]
    assert found.rows == expected.rows
    assert _same(found.model, expected.model)
    for key, state in expected.optimizer["state"].items():
        assert _same(found.optimizer["state"][key], state)


def test_second_interrupt_ends_at_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def update(self: Trainer) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the update went on")

    monkeypatch.setattr(Trainer, "_update", update)
    # A job in the background of a shell ignores it from the start.
    before = signal.getsignal(signal.SIGINT)
    assert _run(text, tmp_path / "out", "--steps", "4") == 130
    assert _complaint(capsys).startswith("train_lm: interrupted at once")
    assert signal.getsignal(signal.SIGINT) is before


def test_evaluating_does_not_change_the_course(text: Path, tmp_path: Path) -> None:
    often, never = tmp_path / "often", tmp_path / "never"
    assert _run(text, often, "--steps", "4", "--eval-every", "1") == 0
    assert _run(text, never, "--steps", "4", "--eval-every", "100") == 0
    assert _same(_load(often).model, _load(never).model)


@pytest.fixture
def trained(text: Path, tmp_path: Path) -> Path:
    out = tmp_path / "trained"
    assert _run(text, out, "--steps", "2") == 0
    return out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--embedding", "16"], "resume: expected the checkpoint's embedding 8, got 16"),
        (["--model", "gpt2"], "resume: expected the checkpoint's model 'logmem', got 'gpt2'"),
        (["--summarizer", "conv"], "resume: expected the checkpoint's summarizer 'linear', got 'conv'"),
        (["--steps", "1"], "steps: expected at least the checkpoint's 2, got 1"),
    ],
)
def test_resume_with_another_model(flags: list[str], said: str, trained: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert train_lm.main(["--resume", "--out", str(trained), *flags]) == 2
    assert _complaint(capsys) == f"train_lm: {said}"


def test_resume_with_another_corpus(text: Path, trained: Path, capsys: Any) -> None:
    text.write_text(text.read_text()[::-1])  # the same characters
    capsys.readouterr()
    assert train_lm.main(["--resume", "--out", str(trained)]) == 2
    assert "resume: expected the corpus of the checkpoint" in _complaint(capsys)


@pytest.mark.parametrize("content", ["missing", "text", "half", "other"])
def test_resume_from_what_is_no_checkpoint(content: str, trained: Path, capsys: Any) -> None:
    path = trained / "checkpoint.pt"
    if content == "missing":
        path.unlink()
    elif content == "text":
        path.write_text("hello\n" * 100)
    elif content == "half":
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        torch.save({"weight": torch.zeros(3)}, path)
    capsys.readouterr()
    assert train_lm.main(["--resume", "--out", str(trained)]) == 2
    complaint = _complaint(capsys)
    assert complaint.startswith("train_lm: checkpoint: expected") and str(path) in complaint
    if content != "missing":
        assert generate_module.main(["--checkpoint", str(path)]) == 2
        assert _complaint(capsys).startswith("generate: checkpoint: expected")


# Errors


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--heads", "3"], "heads: expected a divisor of embedding 8, got 3"),
        (["--batch", "0"], "batch: expected at least 1, got 0"),
        (["--lr", "nan"], "lr: expected at least 0, got nan"),
        (["--model", "gpt2", "--bank", "2"], "bank: expected no value with model gpt2, got 2"),
        (["--summarizer", "magic"], "summarizer: expected"),
        (["--device", "abacus"], "device: expected one of this machine's, got 'abacus'"),
        (["--prompt", "the é"], "prompt: expected characters of the corpus that the model was trained on, got 'é'"),
        (["--block", "500"], "data: expected at least block + 2 = 502 characters in the validation split"),
        (["--data", "/nonexistent/file"], "data: expected stdlib, tinyshakespeare or a readable text file"),
    ],
)
def test_bad_flags(flags: list[str], said: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    assert _run(text, tmp_path / "out", "--steps", "1", *flags) == 2
    assert said in _complaint(capsys)


def test_loss_that_is_not_finite(text: Path, tmp_path: Path, capsys: Any) -> None:
    assert _run(text, tmp_path / "out", "--steps", "8", "--lr", "1e30", "--warmup", "0", "--grad-clip", "0") == 1
    assert "loss: expected a finite number" in _complaint(capsys)


def test_backend_that_cannot_serve(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def update(self: Trainer) -> torch.Tensor:
        raise BackendError("backend='magic' cannot serve step on cpu")

    monkeypatch.setattr(Trainer, "_update", update)
    assert _run(text, tmp_path / "out", "--steps", "1") == 2
    assert _complaint(capsys) == "train_lm: backend='magic' cannot serve step on cpu"


def test_command_line_says_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff" * 5000)
    command = [sys.executable, "-m", "bench.lm.train_lm", "--data", str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"train_lm: data: expected UTF-8 text in {path}, got byte 0 that is none\n"
    assert not (tmp_path / "out").exists()


# Dtypes and processes


@pytest.mark.parametrize(
    "dtype, parameters", [("bfloat16", torch.float32), ("float16", torch.float32), ("float64", torch.float64)]
)
def test_dtypes(dtype: str, parameters: torch.dtype, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _run(text, out, "--steps", "2", "--dtype", dtype) == 0
    assert {value.dtype for value in _load(out).model.values()} == {parameters}
    exact = tmp_path / "exact"
    assert _run(text, exact, "--steps", "2") == 0
    loss, reference = _load(out).rows[0]["validation"], _load(exact).rows[0]["validation"]
    assert loss != reference  # the flag had an effect
    assert loss == pytest.approx(reference, rel=2e-2)


def test_two_processes_equal_one(text: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data", str(text), "--steps", "3", "--dtype", "float64", "--sample-tokens", "2", "--threads", "1"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train_lm.main([*flags, "--out", str(alone)]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "bench.lm.train_lm", *flags, "--device", "cpu", "--out", str(together)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected, found = _load(alone), _load(together)
    for name, value in expected.model.items():
        torch.testing.assert_close(found.model[name], value, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert done.stdout.count("step 0: train loss") == 1  # one process speaks


def test_batch_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = train_lm.Ranks(1, 3, torch.device("cpu"))
    assert ranks.share(6) == slice(2, 4)
    with pytest.raises(InputError, match="batch: expected a multiple of the 3 processes, got 4"):
        ranks.share(4)


@pytest.mark.parametrize("order", ["another", "none"])
def test_an_optimizers_state_in_another_order_is_refused(
    order: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _run(text, out, "--model", "logmem", "--steps", "2", "--warmup", "1") == 0
    saved = _load(out)
    assert saved.order is not None and saved.order[1].endswith("norm1.weight")
    saved.order = None if order == "none" else saved.order[::-1]
    saved.save(out / "checkpoint.pt")
    capsys.readouterr()
    assert train_lm.main(["--resume", "--out", str(out), "--steps", "3"]) == 2
    assert "resume: expected an optimizer's state in this version's order" in _complaint(capsys)
