"""Command lines: seeds and backends that cannot be, and packages that are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import extras
from bench.errors import InputError
from bench.lm import generate, serve, train_lm
from bench.report import terminal
from bench.runs import command
from bench.runs.recall import Contestant

ROOT = Path(__file__).resolve().parents[2]
ANY_SEED, SEED_OF_NUMPY = "an integer in -2^63 … 2^64 - 1", "an integer in 0 … 2^64 - 1"
# What is run, up to its seed; and what seeds it takes.
SEEDS = {
    "python -m bench.lm.generate": (generate.main, ["--checkpoint", "none", "--seed"], ANY_SEED),
    "python -m bench.lm.train_lm": (train_lm.main, ["--seed"], ANY_SEED),
    "python -m bench.lm.serve": (serve.main, ["--seed"], ANY_SEED),
    "python -m bench recall": (command.main, ["recall", "--seed"], SEED_OF_NUMPY),
    "python -m bench paper-table1": (command.main, ["paper-table1", "--seeds", "1"], ANY_SEED),
    "python -m bench lamemo-training": (command.main, ["lamemo-training", "--seeds", "1"], ANY_SEED),
}


def refusal(main, argv, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


WRONG = [(program, seed) for program in SEEDS for seed in (str(1 << 64), str(-(1 << 63) - 1), "1.5", "x")]


@pytest.mark.parametrize("program, seed", [*WRONG, ("python -m bench recall", "-1")])
def test_a_seed_that_cannot_be(capsys, program, seed):
    main, argv, expected = SEEDS[program]
    option = next(word for word in argv if word.startswith("--seed"))
    said = refusal(main, [*argv, seed], capsys)
    assert said == f"{program}: error: argument {option}: expected {expected}, got {seed!r}"


@pytest.mark.parametrize("seed", [(1 << 64) - 1, -(1 << 63), -1])
def test_the_outermost_seeds_are_taken(seed):
    given = command.parser().parse_args(["lamemo-training", "--seeds", str(seed)])
    assert given.seeds == [seed]
    drawn = generate.torch.Generator().manual_seed(seed)
    assert drawn.initial_seed() == seed % (1 << 64)


def test_the_greatest_seed_of_recall_is_taken_by_numpy_and_torch(tmp_path):
    from bench.runs.recall import QUICK

    seed = command.parser().parse_args(["recall", "--seed", str((1 << 64) - 1)]).seed
    contestant = Contestant("logmem-1", QUICK, seed, generate.torch.device("cpu"), tmp_path / "c.pt", {})
    assert contestant.seed == (1 << 64) - 1


BACKENDS = {
    "python -m bench.lm.generate": (generate.main, ["--checkpoint", "none"]),
    "python -m bench.lm.train_lm": (train_lm.main, []),
}


@pytest.mark.parametrize("backend", ["xx", "jax", ""])
@pytest.mark.parametrize("program", BACKENDS)
def test_a_backend_that_there_is_not(capsys, program, backend):
    main, argv = BACKENDS[program]
    said = refusal(main, [*argv, "--backend", backend], capsys)
    assert (
        said == f"{program}: error: argument --backend: expected one of auto, reference, triton, cpp, got {backend!r}"
    )


WITHOUT = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # as good as not installed
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
EVERY = "matplotlib,numpy,safetensors,tabulate,tqdm"


def run_without(packages: str, *words: str) -> subprocess.CompletedProcess[str]:
    code = [sys.executable, "-W", "ignore", "-c", WITHOUT, packages, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(code, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_who_can_run_here_needs_no_extra(capsys):
    done = run_without(EVERY, "bench", "list", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert command.main(["list", "--device", "cpu"]) == 0
    assert done.stdout == capsys.readouterr().out


MISSING = {
    "bench report": ("matplotlib", "bench: matplotlib is not installed"),
    "bench kernels --quick": ("matplotlib,tqdm", "bench: tqdm is not installed"),
    "bench recall --quick": (EVERY, "bench: numpy, tabulate and tqdm are not installed"),
    "bench.lm.train_lm --preset demo": (EVERY, "train_lm: matplotlib and tqdm are not installed"),
    "bench.lm.serve": (EVERY, "python -m bench.lm.serve: error: tqdm is not installed"),
    "bench.gpu.compile_kernels": ("tqdm", "python -m bench.gpu.compile_kernels: error: tqdm is not installed"),
}


@pytest.mark.parametrize("words", MISSING)
def test_what_is_not_installed_is_said_at_once_with_its_extra(words):
    packages, sentence = MISSING[words]
    if "compile_kernels" in words:
        pytest.importorskip("triton", reason="needs triton: pip install lmn-kernels[triton]")
    done = run_without(packages, *words.split())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"{sentence} (pip install lmn-kernels[bench])"
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("package, use", [
    ("tabulate", lambda: terminal.table(["a"], [[1]])),
    ("numpy", lambda: extras.numpy.zeros(1)),
    ("tqdm", lambda: extras.tqdm.write("")),
])  # fmt: skip
def test_a_package_that_is_used_and_not_there(monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as raised:
        use()
    assert str(raised.value) == f"{package} is not installed (pip install lmn-kernels[bench])"
