"""The one door: ``python -m bench``."""

from __future__ import annotations

import pytest
import torch

from bench.contenders.providers import REGISTRY
from bench.contenders.shapes import Shape
from bench.errors import InputError
from bench.measure.journal import read
from bench.runs import command as bench
from bench.runs import kernels, memory, scaling
from lmn_kernels import why_not

CHEAP = ("ours", "materialised", "sdpa-flash", "LSTM")


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernels, "QUICK_SHAPES", [Shape("quick", 1, 64, 16, 2, 1)])
    for operation, found in REGISTRY.items():
        monkeypatch.setitem(REGISTRY, operation, {name: one for name, one in found.items() if name in CHEAP})
    for module in (scaling, memory):
        monkeypatch.setattr(module, "PROVIDERS", CHEAP)
    return tmp_path


@pytest.mark.parametrize("run, count", [("kernels", 18), ("scaling", 24), ("memory", 16)])
def test_a_quick_run_and_its_rows(small, capsys, run, count):
    longest = [] if run == "kernels" else ["--longest", "256"]
    assert bench.main([run, "--quick", "--threads", "1", "--results", "rows", *longest]) == 0
    (found,) = read(small / "rows" / f"{run}.jsonl")
    assert found.finished and found.start["options"]["quick"] and found.start["options"]["threads"] == 1
    assert found.start["environment"]["threads"] == 1 and len(found.rows) == count
    assert not [row for row in found.rows if "gap" in row]
    assert "materialised" in capsys.readouterr().out
    # A second time is another invocation: this one was finished.
    assert bench.main([run, "--quick", "--threads", "1", "--results", "rows", *longest]) == 0
    assert len(read(small / "rows" / f"{run}.jsonl")) == 2


def test_ctrl_c_and_on(small, monkeypatch, capsys):
    from bench.measure.comparison import Comparison

    whole, calls = Comparison.time, []

    def time(self):
        calls.append(self.operation)
        if calls == ["tree", "projections"]:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Comparison, "time", time)
    assert bench.main(["kernels", "--quick", "--threads", "1", "--results", "rows"]) == 130
    assert "goes on from there" in capsys.readouterr().err
    (kept,) = read(small / "rows" / "kernels.jsonl")
    assert list(kept.cases) == ["tree/quick"] and not kept.finished
    calls.clear()
    calls.append("again")
    assert bench.main(["kernels", "--quick", "--threads", "1", "--results", "rows"]) == 0
    assert calls == ["again", "projections", "attention", "output", "layer"]
    assert len(read(small / "rows" / "kernels.jsonl")) == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["kernels", "--device", "nowhere"], "device: expected one of this machine's, got 'nowhere'"),
        (["kernels", "--device", "meta"], "device: expected cpu or cuda, got 'meta'"),
        (["kernels", "--threads", "0"], "threads: expected at least 1, got 0"),
        (["report", "--results", "nowhere"], "results: expected a folder, got nowhere"),
    ],
)
def test_bad_input_is_named(small, capsys, argv, message):
    assert bench.main(argv) == 2
    assert message in capsys.readouterr().err


def test_help_tells_of_every_run(capsys):
    with pytest.raises(SystemExit) as left:
        bench.main(["--help"])
    told = capsys.readouterr().out
    assert left.value.code == 0 and all(name in told for name in (*bench.RUNS, "report", "list"))
    for name in bench.RUNS:
        assert bench.first_line(bench.load(name).__doc__).endswith(".")


def test_who_can_run_here(capsys):
    assert bench.main(["list", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(map(len, REGISTRY.values()))
    said = {(line[:12].strip(), line[12:38].strip()): line[38:].strip() for line in lines}
    assert said["layer", "ours"] == "here" and "backward" in said["layer", "FlexAttention"]
    assert said["layer", "sdpa-cudnn"] == "cuDNN serves NVIDIA GPUs alone"


def test_quick_rows_stay_apart(small):
    given = bench.parser().parse_args(["kernels", "--quick"])
    assert bench.context(given).results == bench.QUICK_RESULTS != bench.RESULTS
    assert bench.context(bench.parser().parse_args(["kernels"])).results == bench.RESULTS


def test_ours_is_what_serves_a_user_and_is_named():
    """On a CPU the extension where it is built: a reference that is timed in its place would be a slower library."""

    def backend(*line: str) -> str:
        return bench.context(bench.parser().parse_args([*line, "--device", "cpu"])).backend

    built = why_not("cpp", "attend", "cpu", torch.float32) is None
    assert backend("kernels") == backend("scaling", "--dtype", "bfloat16") == ("cpp" if built else "reference")
    assert backend("kernels", "--dtype", "float16") == backend("lamemo") == "reference"
    assert backend("kernels", "--backend", "reference") == "reference"
    with pytest.raises(InputError, match="^backend: expected one of auto, reference, triton, got 'cpp'$"):
        backend("lamemo", "--backend", "cpp")
