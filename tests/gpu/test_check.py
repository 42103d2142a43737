"""The GPU check without a GPU: its stages' isolation, its gate and budget, what it runs, and a rehearsal."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.contenders.providers import REGISTRY
from bench.gpu import check, programs
from bench.gpu.stage import Settings, Skipped, Stage, run_stage
from bench.measure.contender import Form
from bench.measure.journal import read
from bench.measure.runner import Context
from bench.runs import crossover, decode, kernels, lamemo, scaling
from lmn_kernels.backend.choice import why_not

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation.*:UserWarning")


REASON = why_not("cpp", "step", torch.device("cpu"), torch.float32)


def settings(out: Path, **more) -> Settings:
    return Settings("cpu", True, out, **more)


# Stages: functions of this module, because they run in other processes


def good(settings, report):
    report({"case": "good", "value": float("nan")})


def faulty(settings, report):
    report({"case": "first", "seen": 1, "fault": "AssertionError: a wrong value"})
    print("said in the log")
    report({"case": "second"})


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
    report({"case": "layer/C", "rows": 1})


def looking(settings, report):
    """What is on disk while the next stage runs."""
    record = json.loads((settings.out / "cpu_check.json").read_text())
    report({"case": "stages", "names": [stage["name"] for stage in record["stages"]]})


def stage(run, kind="check", limit=20.0) -> Stage:
    return Stage(run.__name__, "", kind, limit, run)


def checked(tmp_path, *stages, only=None, budget=60.0) -> check.Check:
    (tmp_path / "log.txt").write_text("")
    made = check.Check(settings(tmp_path), list(stages), only, budget)
    made.run()
    return made


def strict(path: Path) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_stage_that_fails_spoils_no_other(tmp_path):
    stages = [stage(run) for run in (faulty, raising, dying, good, skipping)]
    made = checked(tmp_path, *stages, stage(measuring, "timing"))
    record = strict(made.path)
    found = {part["name"]: (part["status"], part["message"]) for part in record["stages"]}
    assert found["faulty"] == ("failed", "first: AssertionError: a wrong value")
    assert found["raising"] == ("failed", "ValueError: no good")
    assert found["dying"] == ("failed", "the process died with exit status 3")
    assert found["good"] == ("ok", "") and found["skipping"] == ("skipped", "nothing to do")
    rows = {part["name"]: part["rows"] for part in record["stages"]}
    assert [row["case"] for row in rows["faulty"]] == ["first", "second"] and rows["faulty"][0]["seen"] == 1
    assert rows["dying"] == [{"case": "before"}] and rows["good"][0]["value"] == "nan"
    assert record["gate"] == "red" and made.status == 1
    # What is timed is checked by itself: a fault elsewhere does not stop it.
    assert found["measuring"] == ("ok", "") and rows["measuring"] == [{"case": "layer/C", "rows": 1}]
    assert "said in the log" in (tmp_path / "log.txt").read_text()


def test_a_stage_past_its_time_is_killed_with_what_it_started(tmp_path):
    begin = time.monotonic()
    made = checked(tmp_path, stage(hanging, limit=1.0), stage(good), stage(measuring, "timing"))
    assert time.monotonic() - begin < 30
    hung, later, timed = made.outcomes
    assert (hung.status, later.status, timed.status) == ("out of time", "ok", "ok")
    assert made.record()["gate"] == "red"
    for row in hung.rows:
        state = Path(f"/proc/{row['pid']}/stat")
        # Gone, or a zombie that nobody has collected.
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_nothing_starts_past_the_budget(tmp_path):
    made = checked(tmp_path, stage(good), stage(measuring, "timing"), budget=0.0)
    assert [outcome.status for outcome in made.outcomes] == ["not run"] * 2
    assert made.record()["gate"] == "incomplete" and "budget" in made.outcomes[0].message


def test_the_record_is_written_after_every_stage(tmp_path):
    made = checked(tmp_path, stage(good), stage(looking), stage(measuring, "timing"))
    assert made.outcomes[1].rows == [{"case": "stages", "names": ["good"]}]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".txt"] == ["cpu_check.json"]
    record = strict(made.path)
    assert record["gate"] == "green" and made.status == 0
    assert [part["name"] for part in record["stages"]] == ["good", "looking", "measuring"]


def test_only_some_stages_leave_the_gate_incomplete(tmp_path):
    made = checked(tmp_path, stage(good), stage(skipping), stage(measuring, "timing"), only=["measuring"])
    assert [outcome.name for outcome in made.outcomes] == ["measuring"]
    assert made.record()["gate"] == "incomplete"


def test_a_stage_in_shares_collects_all_of_them(tmp_path):
    (tmp_path / "log.txt").write_text("")
    # Shares are a matter of GPUs; this stage touches none.
    told = Settings("cuda", True, tmp_path)
    outcome = run_stage(Stage("shares", "", "check", 30, sharing, shards=3), told, 30)
    assert outcome.status == "ok" and sorted(row["number"] for row in outcome.rows) == list(range(7))


def sharing(settings, report):
    for number in range(settings.shard, 7, settings.shards):
        report({"number": number})


# What the stages run


def test_verdicts_of_a_junit_report(tmp_path):
    report = tmp_path / "tests.xml"
    error = '<properties><property name="error" value="1.5e-3"/></properties>'
    report.write_text(
        "<testsuites><testsuite>"
        f'<testcase classname="tests.test_a" name="one">{error}</testcase>'
        '<testcase classname="tests.room.test_a.TestB" name="two"><failure message="no"/></testcase>'
        '<testcase classname="" name="tests.test_c"><skipped message="needs a GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert list(programs.verdicts(report)) == [
        ("tests/test_a.py", "one", "passed", 1.5e-3),
        ("tests/room/test_a.py", "two", "failed", None),
        ("tests/test_c.py", "tests.test_c", "skipped", None),
    ]
    assert not report.exists()


def test_a_test_file_that_is_missing_is_a_fault(tmp_path):
    rows: list = []
    programs.tests(["tests/test_nowhere.py"], [], settings(tmp_path), rows.append)
    assert rows == [{"case": "tests/test_nowhere.py", "fault": "there is no such file"}]


MADE_UP = """
import pytest

@pytest.mark.parametrize("number", range(7))
def test_number(number, record_property):
    record_property("error", number / 10)
    assert number != 3

def test_elsewhere():
    pytest.skip("not here")
"""
IN_SHARES = """
import json, pathlib, sys
from bench.gpu import programs
from bench.gpu.stage import Settings

programs.ROOT, rows = pathlib.Path(sys.argv[1]), []
for shard in range(3):
    told = Settings("cuda", False, programs.ROOT, shard=shard, shards=3)
    programs.tests(["test_made_up.py"], ["-k", sys.argv[2]], told, rows.append)
print(json.dumps(rows))
"""


def in_shares(folder: Path, chosen: str) -> list[dict]:
    """In a process of its own, whose tests are not these."""
    (folder / "test_made_up.py").write_text(MADE_UP)
    command = [sys.executable, "-c", IN_SHARES, str(folder), chosen]
    root = str(programs.ROOT)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_shares_of_tests_are_all_of_them_and_a_failed_one_is_a_fault(tmp_path):
    rows = in_shares(tmp_path, "test")
    assert {row["case"] for row in rows} == {"test_made_up.py"} and len(rows) == 3
    assert [sum(row[verdict] for row in rows) for verdict in ("passed", "failed", "skipped")] == [6, 1, 1]
    assert [row["fault"] for row in rows if "fault" in row] == ["1 failed, test_number[3] for one"]
    assert max((row["error"], row["worst"]) for row in rows) == (0.6, "test_number[6]")
    assert not list(tmp_path.glob("*.xml"))


def test_a_share_without_a_test_that_passed_is_a_fault(tmp_path):
    (row,) = in_shares(tmp_path, "elsewhere")
    assert row["fault"] == "no test passed, 1 were skipped"


def test_cases_of_a_run_go_on_in_one_journal(tmp_path):
    rows: list = []
    for only in (["tree/P/main", "layer/P/attention/graph"], ["output/C/main"]):
        programs.runs("kernels", only, settings(tmp_path), rows.append)
    assert [row["case"] for row in rows] == [
        "kernels tree/P/main/eager", "kernels tree/P/main/graph", "kernels layer/P/attention/graph",
        "kernels output/C/main",
    ]  # fmt: skip
    (whole,) = read(tmp_path / "results" / "kernels.jsonl")
    assert not whole.finished and len(whole.cases) == 4
    ways = {(row["operation"], row["direction"], row.get("mode")) for row in whole.rows}
    assert {("tree", "training", "graph"), ("output", "backward", None)} <= ways
    assert not any("fault" in row or "skipped" in row for row in rows)


def test_a_wrong_layer_is_not_timed(tmp_path, monkeypatch):
    rows: list = []
    wrong = replace(
        REGISTRY["layer"]["ours"], build=lambda problem: Form(lambda: 1.1 * problem.layer(problem.x), problem.leaves())
    )
    monkeypatch.setitem(REGISTRY["layer"], "ours", wrong)
    programs.runs("kernels", ["layer/C/main", "layer/P/main"], settings(tmp_path), rows.append)
    programs.runs("scaling", ["ours/"], settings(tmp_path), rows.append)
    assert len(rows) >= 6 and all(row["fault"].startswith("gate: error") for row in rows)
    timed = [row for run in ("kernels", "scaling") for row in read(tmp_path / "results" / f"{run}.jsonl")[0].rows]
    assert not [row for row in timed if row["provider"] == "ours" and "median" in row]


def test_without_the_extension_a_rehearsal_skips_and_a_gpu_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.runs.decode_gpu.why_not", lambda *given: "the extension is not built")
    rows: list = []
    programs.runs("decode", ["E=512/B=1"], settings(tmp_path), rows.append)
    monkeypatch.setattr(Settings, "real", True)
    monkeypatch.setattr(programs, "bench", lambda argv: 0)
    programs.runs("decode", ["E=512/B=1"], settings(tmp_path), rows.append)
    assert [row.get("skipped", row.get("fault")) for row in rows] == ["the extension is not built"] * 2
    assert "skipped" in rows[0] and "fault" in rows[1]


def test_a_run_that_fails_is_a_failed_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "bench", lambda argv: 2)
    with pytest.raises(RuntimeError, match="python -m bench kernels ended with exit status 2"):
        programs.runs("kernels", ["tree/C"], settings(tmp_path), print)


def test_the_sanitizer_watches_every_kernel_of_ours(monkeypatch):
    commands: list = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "12 passed in 3.21s\n= ERROR SUMMARY: 0 errors\n")

    monkeypatch.setattr(programs.subprocess, "run", run)
    rows: list = []
    assert programs._sanitize("compute-sanitizer", "memcheck", 30, rows.append) is None
    assert {f"kns={name}" for name in ("attend_", "look_ahead_", "tree_", "step_kernel")} <= set(commands[0])
    assert programs.SMALL in commands[0] and (programs.ROOT / programs.SMALL).exists() and "fault" not in rows[0]


# The stages


def test_the_limits_fit_the_budget():
    seconds = {part: sum(stage.limit for stage in check.ALL if stage.part == part) for part in check.PARTS}
    assert all(0 < found <= 300 for found in seconds.values()), seconds
    assert sum(seconds.values()) <= check.BUDGET <= 15 * 60
    assert len({stage.name for stage in check.ALL}) == len(check.ALL)


def test_every_stage_names_tests_and_cases_that_there_are(tmp_path):
    modules = {"kernels": kernels, "decode": decode, "scaling": scaling, "crossover": crossover, "lamemo": lamemo}
    files: set[str] = set()
    for stage in check.ALL:
        function, given = getattr(stage.run, "func", stage.run), getattr(stage.run, "args", ())
        if function is programs.tests:
            files |= set(given[0])
        elif function is programs.runs:
            parser = argparse.ArgumentParser()
            modules[given[0]].add_arguments(parser.add_argument)
            options = vars(parser.parse_args([]))
            context = Context(torch.device("cuda"), torch.bfloat16, "triton", False, tmp_path, tmp_path, options)
            names = [case.name for case in modules[given[0]].cases(context)]
            assert all(any(part in name for name in names) for part in given[1]), stage.name
    assert all((programs.ROOT / name).exists() for name in files)
    of_a_gpu = {f"tests/gpu/{path.name}" for path in (programs.ROOT / "tests/gpu").glob("test_*.py")}
    assert of_a_gpu - files == {"tests/gpu/test_check.py", programs.SMALL}


# The command


def test_without_a_device_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "no CUDA device" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_the_interpreter_is_no_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert check.main(["--out", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_help_lists_every_stage(capsys):
    with pytest.raises(SystemExit) as ended:
        check.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(part.name in text and part.what in text for part in check.ALL)


def test_a_rehearsal_runs_every_stage(tmp_path, capsys):
    status = check.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert status == 0, (tmp_path / "log.txt").read_text()
    record = strict(tmp_path / "cpu_check.json")
    assert [part["name"] for part in record["stages"]] == [part.name for part in check.ALL]
    assert {part["status"] for part in record["stages"]} <= {"ok", "skipped"}
    assert record["gate"] == "green" and record["device"] == "cpu" and "REHEARSAL" in record["note"]
    assert not (tmp_path / "gpu_check.json").exists()
    assert "not a GPU" in record["facts"]["device"] and record["facts"]["torch"] == torch.__version__
    found = check.measured(tmp_path)
    assert set(found) == {"kernels", "decode", "scaling", "crossover", "lamemo"}
    ratios = {(row["operation"], row["provider"], row["shape"]["name"], row.get("mode")) for row in found["kernels"]}
    assert {("layer", "materialised", "D", None), ("layer", "materialised", "P", "graph")} <= ratios
    assert all(row["p20"] <= row["median"] <= row["p80"] for rows in found.values() for row in rows if "p20" in row)
    assert all(row["met"] is None for row in record["goals"])
    missing = [row["what"] for row in record["goals"] if row["measured"] is None]
    absent = ("cuDNN", "compiled", "GLA", "GDN", "log-linear", *["a token"] * (REASON is not None))
    assert all(any(word in what for word in absent) for what in missing), missing
    text = capsys.readouterr().out
    assert len(text) < 12000 and "REHEARSAL" in text and "goal" in text
    assert REASON or "decode B=1 E=1024, against a KV cache: 1k " in text
