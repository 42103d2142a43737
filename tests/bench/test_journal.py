"""Rows that are only ever appended, and runs that go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.errors import InputError, RunError
from bench.measure import runner
from bench.measure.journal import Journal, read
from bench.measure.runner import Case, Context, execute

HERE = {"commit": "c0ffee", "dirty": False, "device": "cpu: made-up", "torch": "2"}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results" / "kernels.jsonl"


def journal(path: Path, **changes) -> Journal:
    given = {"environment": HERE, "options": {"quick": False}, **changes}
    return Journal(path, "kernels", **given)


def test_rows_come_back_with_their_origin(path):
    one = journal(path)
    one.write("a", [{"median": 1.5}, {"gap": "not installed"}])
    one.finish()
    (found,) = read(path)
    assert found.finished and [row["part"] for row in found.rows] == [[1, 2], [2, 2]]
    assert found.cases["a"][0]["median"] == 1.5 and found.cases["a"][1]["gap"] == "not installed"
    assert {name: found.rows[0][name] for name in ("commit", "dirty", "device", "run")} == {
        "commit": "c0ffee", "dirty": False, "device": "cpu: made-up", "run": "kernels",
    }  # fmt: skip
    assert found.start["environment"] == HERE


def test_a_file_is_only_ever_appended_to(path):
    journal(path).write("a", [{"x": 1}])
    before = path.read_bytes()
    journal(path).write("b", [{"x": 2}])
    journal(path, fresh=True).write("a", [{"x": 3}])
    assert path.read_bytes().startswith(before)
    assert [list(found.cases) for found in read(path)] == [["a", "b"], ["a"]]


def test_an_unfinished_invocation_goes_on_and_a_finished_one_does_not(path):
    journal(path).write("a", [{"x": 1}])
    again = journal(path)
    assert list(again.cases) == ["a"]
    again.finish()
    assert not journal(path).cases and len(read(path)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": {**HERE, "commit": "another"}},
        {"environment": {**HERE, "dirty": True}},
        {"environment": {**HERE, "torch": "3"}},
        {"options": {"quick": True}},
        {"fresh": True},
    ],
    ids=str,
)
def test_other_circumstances_begin_anew(path, changes):
    journal(path).write("a", [{"x": 1}])
    assert not journal(path, **changes).cases


def test_equal_options_go_on_although_json_has_no_tuples(path):
    journal(path, options={"seeds": (1, 2)}).write("a", [{"x": 1}])
    assert journal(path, options={"seeds": (1, 2)}).cases


@pytest.mark.parametrize("lost", [1, 7, 60])
def test_a_torn_last_line_is_a_case_not_done(path, lost):
    one = journal(path)
    one.write("a", [{"x": 1}])
    one.write("b", [{"x": 2}, {"x": 3}])
    path.write_bytes(path.read_bytes()[:-lost])
    kept = journal(path)
    # One byte is the line's end alone.
    assert list(kept.cases) == (["a", "b"] if lost == 1 else ["a"])
    kept.write("b", [{"x": 4}])
    (found,) = read(path)
    assert found.cases["b"][-1]["x"] == 4 and found.cases["a"][0]["x"] == 1


@pytest.mark.parametrize("line", ['{"kind": "row"}', '{"kind": "other", "invocation": "i"}', "[1]", "17"])
def test_a_file_of_something_else_is_refused(path, line):
    path.parent.mkdir()
    path.write_text(line + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"line 1: expected a line of a journal"):
        read(path)


def test_no_number_that_json_does_not_have(path):
    with pytest.raises(ValueError):
        journal(path).write("a", [{"median": float("nan")}])
    assert not read(path)[0].rows


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        journal(tmp_path / "file" / "kernels.jsonl")


class MadeUp:
    """A run of three cases, one of them derived."""

    def __init__(self, done: list[str], stop_at: str | None = None):
        self.done, self.stop_at = done, stop_at

    def cases(self, context: Context) -> list[Case]:
        def measure(name: str):
            def work():
                if name == self.stop_at:
                    raise KeyboardInterrupt
                self.done.append(name)
                return [{"value": len(name)}]

            return work

        def warm(name: str):
            return lambda: self.done.append(f"warm {name}")

        plain = [Case(name, measure(name), warm(name)) for name in ("one", "three")]
        return [*plain, Case("sum", derive=lambda rows: [{"value": sum(row["value"] for row in rows)}])]

    def show(self, rows):
        return ""

    def add_arguments(self, add):
        pass


@pytest.fixture
def context(tmp_path, monkeypatch) -> Context:
    monkeypatch.setattr(runner, "describe", lambda device, known: HERE)
    return Context(torch.device("cpu"), torch.float32, "reference", True, tmp_path, tmp_path / "scratch", {})


def test_everything_is_warm_before_anything_is_measured(context):
    done: list[str] = []
    found = execute("made-up", MadeUp(done), context, fresh=False)
    assert done == ["warm one", "warm three", "one", "three"]
    assert found.cases["sum"][0]["value"] == 8
    assert read(context.results / "made-up.jsonl")[0].finished


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(context):
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        execute("made-up", MadeUp(done, stop_at="three"), context, fresh=False)
    (kept,) = read(context.results / "made-up.jsonl")
    assert list(kept.cases) == ["one"] and not kept.finished
    done.clear()
    found = execute("made-up", MadeUp(done), context, fresh=False)
    assert done == ["warm three", "three"]
    assert found.cases["sum"][0]["value"] == 8
    assert len(read(context.results / "made-up.jsonl")) == 1


def test_only_some_cases(context):
    done: list[str] = []
    assert list(execute("made-up", MadeUp(done), context, fresh=False, only=["thr"]).cases) == ["three"]
    assert done == ["warm three", "three"] and not read(context.results / "made-up.jsonl")[0].finished
    # What follows from all of them waits for the rest.
    assert list(execute("made-up", MadeUp(done), context, fresh=False, only=["sum"]).cases) == ["three"]
    assert list(execute("made-up", MadeUp(done), context, fresh=False, only=["one"]).cases) == ["three", "one", "sum"]
    (whole,) = read(context.results / "made-up.jsonl")
    assert whole.finished and whole.cases["sum"][0]["value"] == 8


def test_a_row_is_a_line_of_json(path):
    journal(path).write("a", [{"x": 1}])
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["start", "row"]
