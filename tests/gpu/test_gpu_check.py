"""The GPU check without a GPU: its formulas, its stages' isolation, its gate, and a rehearsal of everything."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.contenders.problems import Form
from bench.contenders.providers import REGISTRY
from bench.contenders.shapes import (
    GOALS,
    SHAPES,
    Shape,
    floor_ms,
    flops,
    log_slope,
    moved_bytes,
    naive_peak_bytes,
    our_peak_bytes,
    staged_floor_ms,
)
from bench.gpu import (
    check as gpu_check,
)
from bench.gpu import (
    correctness as gpu_correctness,
)
from bench.gpu import (
    programs as gpu_programs,
)
from bench.gpu import (
    timings as gpu_timings,
)
from bench.gpu.stage import Settings, Skipped, Stage, case, run_stage
from bench.measure import timing

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation.*:UserWarning")

# Section 3 of the performance notes: GFLOP and MB of tree, projections, attention, output projection.
TABLE = {
    ("A", "forward"): ((17, 43, 0.3, 8.6), (51, 119, 101, 34)),
    ("A", "backward"): ((34, 86, 0.8, 17), (137, 238, 201, 69)),
    ("C", "forward"): ((137, 344, 1.9, 69), (206, 476, 403, 136)),
    ("C", "backward"): ((275, 687, 4.7, 137), (550, 952, 805, 275)),
    ("D", "forward"): ((1100, 1924, 17, 275), (1351, 2691, 2147, 539)),
    ("D", "backward"): ((2199, 3848, 42, 550), (3515, 5381, 4295, 1080)),
    ("M", "forward"): ((1100, 2749, 41, 550), (3222, 7518, 6442, 2148)),
    ("M", "backward"): ((2199, 5498, 102, 1100), (8593, 15036, 12885, 4297)),
    ("P", "forward"): ((0.07, 0.12, 0.016, 0.02), (2.6, 5.2, 4.2, 1.1)),
    ("P", "backward"): ((0.14, 0.24, 0.04, 0.04), (6.8, 10.5, 8.4, 2.1)),
}
PEAKS = (790e12, 3.0e12)


def printed(value: float, like: float) -> bool:
    """Whether ``value`` could be printed as ``like``: off by at most one of its last digit."""
    digits = 0 if like >= 10 and like == int(like) else len(str(like).split(".")[-1])
    return abs(value - like) <= max(10.0**-digits, 0.005 * like)


@pytest.mark.parametrize(("name", "direction"), TABLE, ids="-".join)
def test_counts_are_those_of_the_table(name, direction):
    shape = SHAPES[name]
    for stage, giga, mega in zip(("tree", "project", "attend", "out"), *TABLE[name, direction], strict=True):
        assert printed(flops(shape, stage, direction) / 1e9, giga), (stage, flops(shape, stage, direction))
        assert printed(moved_bytes(shape, stage, direction) / 1e6, mega), (stage, moved_bytes(shape, stage, direction))


@pytest.mark.parametrize(("name", "milliseconds"), [("A", 0.366), ("C", 2.49), ("D", 14.7), ("M", 23.3), ("P", 0.014)])
def test_staged_floors_are_those_of_the_table(name, milliseconds):
    assert staged_floor_ms(SHAPES[name], *PEAKS) == pytest.approx(milliseconds, rel=0.05)
    assert staged_floor_ms(SHAPES["C"], *PEAKS) == pytest.approx(2.49, abs=0.005)


def test_stage_floors_take_the_slower_of_the_two():
    c = SHAPES["C"]
    expected = {"tree": 0.174, "project": 0.435, "attend": 0.134, "out": 0.087}
    for stage, milliseconds in expected.items():
        assert floor_ms(c, stage, "forward", *PEAKS) == pytest.approx(milliseconds, abs=0.0006)


@pytest.mark.parametrize(("name", "naive", "ours"), [("C", 6.4, 1.0), ("D", 54, 5.4), ("M", 132, 16)])
def test_peaks_are_those_of_the_table(name, naive, ours):
    assert naive_peak_bytes(SHAPES[name]) / 1e9 == pytest.approx(naive, rel=0.03)
    assert our_peak_bytes(SHAPES[name]) / 1e9 == pytest.approx(ours, rel=0.03)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 1000, 1024])
def test_mean_slots_is_the_mean(length):
    shape = Shape("", 1, length, 8, 1, 3)
    assert shape.mean_slots == pytest.approx(1 + 3 * sum(n.bit_length() - 1 for n in range(1, length + 1)) / length)
    assert shape.slots == 1 + 3 * int(math.log2(length))


def test_slope_of_a_power_is_its_exponent():
    assert log_slope([(n, 3e-5 * n**1.9) for n in (8192, 16384, 65536)]) == pytest.approx(1.9)


# Goals


def settings(out: Path, **more) -> Settings:
    return Settings("cpu", True, out, **more)


def values() -> dict[str, float]:
    """Measurements at exactly the limits of section 3."""
    found = {"copy": PEAKS[1], "product": PEAKS[0]}
    for shape in SHAPES.values():
        found[f"training/ours/{shape.name}"] = staged_floor_ms(shape, *PEAKS)
        for direction in ("forward", "backward"):
            for stage in ("tree", "project", "attend", "out"):
                found[f"kernel/{stage} {direction}/{shape.name}"] = floor_ms(shape, stage, direction, *PEAKS)
        found[f"kernel/product/{shape.name}"] = 1e3 * flops(shape, "tree") / PEAKS[0]
    found |= {f"scaling/ours/{1 << k}": 1e-4 * (1 << k) for k in range(13, 21)}
    found |= {f"crossover/{who}/{n}": t for n in (1024, 2048, 4096) for who, t in (("ours", 4), ("flash", n / 600))}
    return found


def test_goals_at_the_limits(tmp_path):
    real = Settings("cuda", False, tmp_path)
    rows = {(row["goal"], row["what"]): row for row in gpu_check.goal_rows(values(), real)}
    for row in rows.values():
        assert (row["met"] is None) == (row["measured"] is None)
    for number in (5, 9):
        assert all(row["met"] for (goal, _), row in rows.items() if goal == number)
    assert rows[9, "staged floor / ours, training at C"]["measured"] == pytest.approx(1)
    assert rows[5, "attend forward at D, share of copy"]["measured"] == pytest.approx(1)
    assert rows[6, "one product / tree forward at C"]["measured"] == pytest.approx(1)
    assert rows[3, "crossover with attention, L at 32k tokens"]["measured"] == 4096
    assert {goal.number for goal in GOALS} == set(range(1, 11))
    shares = gpu_check.floor_shares(values(), SHAPES)
    assert len(shares) == 5 * 8 and all(row["floor_share"] == pytest.approx(1) for row in shares)


def test_a_missed_goal_is_missed_and_a_rehearsal_meets_none(tmp_path):
    slow = {key: 2 * value if key.startswith(("kernel", "training")) else value for key, value in values().items()}
    slow |= {f"crossover/ours/{n}": 1e3 for n in (1024, 2048, 4096)}
    rows = gpu_check.goal_rows(slow, Settings("cuda", False, tmp_path))
    assert all(row["met"] is False for row in rows if row["goal"] in (3, 5) and row["measured"] is not None)
    assert next(row["measured"] for row in rows if "crossover" in row["what"]) == "inf"
    for rehearsal in (Settings("cuda", True, tmp_path), Settings("cpu", False, tmp_path)):
        assert all(row["met"] is None for row in gpu_check.goal_rows(values(), rehearsal))


# Clocks


def test_contenders_take_turns():
    calls: list[str] = []
    clock = timing.Clock(torch.device("cpu"))
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    taken = timing.take_turns(works, clock, budget=0.0)
    assert [len(seconds) for seconds in taken.values()] == [timing.LEAST] * 2
    assert calls == ["a", "b"] * (timing.LEAST + timing.WARM_UP)
    assert len(timing.take_turns(works, clock, budget=1e3)["a"]) == timing.MOST


def test_spread_and_ratio():
    found = timing.spread([0.001 * n for n in range(1, 101)])
    assert (found.median, found.repeats) == (50.5, 100)
    assert found.p20 == pytest.approx(20, abs=1) and found.p80 == pytest.approx(80, abs=1)
    # Both slow down together: the ratio of pairs does not move, that of the medians would.
    assert timing.pair_ratio([2, 4, 40], [1, 2, 20]) == 2


# Stages: functions of this module, because they run in other processes


def good(settings, report):
    report({"case": "good", "value": float("nan")})


def faulty(settings, report):
    with case(report, "first") as row:
        row["seen"] = 1
        raise AssertionError("a wrong value")
    with case(report, "second"):
        pass


def raising(settings, report):
    raise ValueError("no good")


def dying(settings, report):
    report({"case": "before"})
    os._exit(3)


def hanging(settings, report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report({"case": "child", "pid": child.pid})
    time.sleep(600)


def skipping(settings, report):
    raise Skipped("nothing to do")


def measuring(settings, report):
    report({"key": "training/ours/C", "value": 1.0, "unit": "ms"})


def looking(settings, report):
    """What is on disk while the next stage runs."""
    record = json.loads((settings.out / "cpu_check.json").read_text())
    report({"case": "stages", "names": [stage["name"] for stage in record["stages"]]})


def stage(run, kind="check", limit=20.0) -> Stage:
    return Stage(run.__name__, "", kind, limit, run)


def checked(tmp_path, *stages, only=None, budget=60.0) -> gpu_check.Check:
    (tmp_path / "log.txt").write_text("")
    check = gpu_check.Check(settings(tmp_path), list(stages), only, budget)
    check.run()
    return check


def strict(path: Path) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_stage_that_fails_spoils_no_other(tmp_path):
    stages = [stage(run) for run in (faulty, raising, dying, good, skipping)]
    check = checked(tmp_path, *stages, stage(measuring, "timing"))
    record = strict(check.path)
    found = {part["name"]: (part["status"], part["message"]) for part in record["stages"]}
    assert found["faulty"] == ("failed", "first: AssertionError: a wrong value")
    assert found["raising"] == ("failed", "ValueError: no good")
    assert found["dying"] == ("failed", "the process died with exit status 3")
    assert found["good"] == ("ok", "") and found["skipping"] == ("skipped", "nothing to do")
    rows = {part["name"]: part["rows"] for part in record["stages"]}
    assert [row["case"] for row in rows["faulty"]] == ["first", "second"] and rows["faulty"][0]["seen"] == 1
    assert rows["dying"] == [{"case": "before"}] and rows["good"][0]["value"] == "nan"
    # A red gate yields no number.
    assert record["gate"] == "red" and check.status == 1
    assert found["measuring"][0] == "not run" and "faulty, raising, dying" in found["measuring"][1]
    assert rows["measuring"] == [] and all(row["measured"] is None for row in record["goals"])
    assert "a wrong value" in (tmp_path / "log.txt").read_text()


def test_a_stage_past_its_time_is_killed_with_what_it_started(tmp_path):
    begin = time.monotonic()
    check = checked(tmp_path, stage(hanging, limit=3.0), stage(good), stage(measuring, "timing"))
    assert time.monotonic() - begin < 30
    hung, later, timed = check.outcomes
    assert (hung.status, later.status, timed.status) == ("out of time", "ok", "not run")
    assert check.record()["gate"] == "red"
    for row in hung.rows:
        state = Path(f"/proc/{row['pid']}/stat")
        # Gone, or a zombie that nobody has collected.
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_nothing_starts_past_the_budget(tmp_path):
    check = checked(tmp_path, stage(good), stage(measuring, "timing"), budget=0.0)
    assert [outcome.status for outcome in check.outcomes] == ["not run"] * 2
    assert check.record()["gate"] == "incomplete" and "budget" in check.outcomes[0].message


def test_the_record_is_written_after_every_stage_and_a_green_gate_lets_timings_run(tmp_path):
    check = checked(tmp_path, stage(good), stage(looking), stage(measuring, "timing"))
    assert check.outcomes[1].rows == [{"case": "stages", "names": ["good"]}]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".txt"] == ["cpu_check.json"]
    record = strict(check.path)
    assert record["gate"] == "green" and check.status == 0
    assert [part["name"] for part in record["stages"]] == ["good", "looking", "measuring"]


def test_only_some_stages_leave_the_gate_incomplete(tmp_path):
    check = checked(tmp_path, stage(good), stage(skipping), stage(measuring, "timing"), only=["measuring"])
    assert [outcome.name for outcome in check.outcomes] == ["measuring"]
    assert check.record()["gate"] == "incomplete"


def test_a_stage_in_shares_collects_all_of_them(tmp_path):
    (tmp_path / "log.txt").write_text("")
    # Shares are a matter of GPUs; this stage touches none.
    told = Settings("cuda", True, tmp_path)
    outcome = run_stage(Stage("shares", "", "check", 30, sharing, shards=3), told, 30)
    assert outcome.status == "ok" and sorted(row["number"] for row in outcome.rows) == list(range(7))


def sharing(settings, report):
    for number in settings.mine(list(range(7))):
        report({"number": number})


# The checks can fail


def test_the_judge_sees_a_wrong_layer(tmp_path):
    trial = gpu_correctness.Trial("linear", 16, torch.float32, settings(tmp_path))
    gpu_correctness._judge(trial, "padded", torch.float32)
    with torch.no_grad():
        trial.layer.sva.v.weight[0, 0] += 1e-2
    with pytest.raises(AssertionError, match="y: error .* is over"):
        gpu_correctness._judge(trial, "padded", torch.float32)


def test_the_poison_check_sees_uninitialised_memory(tmp_path, monkeypatch):
    run, rows = gpu_correctness.Trial.run, []

    def careless(self, layer, form):
        y, *rest = run(self, layer, form)
        # Its memory is what the next tensor gets: not that of an older, poisoned one.
        torch.zeros(1)
        return [y + torch.empty_like(y).nan_to_num(1.0) * 0 + torch.isnan(torch.empty(1)), *rest]

    monkeypatch.setattr(gpu_correctness.Trial, "run", careless)
    gpu_correctness.poison(settings(tmp_path), rows.append)
    assert rows and all("y: changes under poison" in row["fault"] for row in rows)


def test_the_determinism_check_sees_noise(tmp_path, monkeypatch):
    rows: list = []
    forward = gpu_correctness.LogarithmicMixing.forward
    noisy = lambda self, x: forward(self, x) + 1e-3 * torch.rand(())  # noqa: E731
    monkeypatch.setattr(gpu_correctness.LogarithmicMixing, "forward", noisy)
    gpu_correctness.determinism(settings(tmp_path), rows.append)
    assert rows and all("run 2 differs from the first" in row["fault"] for row in rows)


def test_a_wrong_layer_is_not_timed(tmp_path, monkeypatch):
    rows: list = []
    wrong = replace(REGISTRY["layer"]["ours"], build=lambda problem: Form(lambda: 1.1 * problem.layer(problem.x), {}))
    monkeypatch.setitem(REGISTRY["layer"], "ours", wrong)
    for timed in (gpu_timings.kernels, gpu_timings.layers, gpu_timings.scaling):
        timed(settings(tmp_path), rows.append)
    assert not [row for row in rows if "key" in row]
    assert any("no time is reported" in row.get("fault", "") for row in rows)


def test_verdicts_of_a_junit_report(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.test_a" name="one"/>'
        '<testcase classname="tests.room.test_a.TestB" name="two"><failure message="no"/></testcase>'
        '<testcase classname="" name="tests.test_c"><skipped message="needs a GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    expected = [("tests/test_a.py", "passed"), ("tests/room/test_a.py", "failed"), ("tests/test_c.py", "skipped")]
    assert list(gpu_programs._verdicts(report)) == expected and not report.exists()


def test_a_test_file_that_is_missing_is_a_fault(tmp_path, monkeypatch):
    rows: list = []
    monkeypatch.setattr(gpu_programs, "QUICK_TESTS", ["tests/test_nowhere.py"])
    gpu_programs.tests(settings(tmp_path), rows.append)
    assert rows == [{"case": "tests/test_nowhere.py", "fault": "there is no such file"}]


# The command


def test_without_a_device_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "no CUDA device" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_the_interpreter_is_no_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_help_lists_every_stage(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(part.name in text and part.what in text for part in gpu_check.ALL)


def test_a_rehearsal_runs_every_stage(tmp_path, capsys):
    status = gpu_check.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert status == 0, (tmp_path / "log.txt").read_text()
    record = strict(tmp_path / "cpu_check.json")
    assert [part["name"] for part in record["stages"]] == [part.name for part in gpu_check.ALL]
    assert {part["status"] for part in record["stages"]} <= {"ok", "skipped"}
    assert record["gate"] == "green" and record["device"] == "cpu" and "REHEARSAL" in record["note"]
    assert not (tmp_path / "gpu_check.json").exists()
    facts = record["facts"]
    assert "not a GPU" in facts["device"] and facts["torch"] == torch.__version__
    measured = {row["key"]: row for part in record["stages"] for row in part["rows"] if "key" in row}
    for key in ("copy", "product", "ratio/training/naive/D", "ratio/graph/naive/P", "ratio/training/compiled/C"):
        assert measured[key]["value"] > 0, key
    assert all(row["p20"] <= row["value"] <= row["p80"] for row in measured.values() if "p20" in row)
    assert len(record["floor_shares"]) == 5 * 8
    assert all(row["met"] is None for row in record["goals"])
    missing = [row["what"] for row in record["goals"] if row["measured"] is None]
    assert all(
        any(word in what for word in ("flash", "cuDNN", "memory", "a token", "layer / ours")) for what in missing
    ), missing
    printed_text = capsys.readouterr().out
    assert len(printed_text) < 12000 and "REHEARSAL" in printed_text and "goal" in printed_text
