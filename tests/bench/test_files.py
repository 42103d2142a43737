"""Every file that bench writes: its mode, links in its place, and that it is the old one or the new one."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from bench.errors import RunError
from bench.files import write_file
from bench.lm.checkpoint import Checkpoint
from bench.lm.train_lm import main as train
from bench.measure.journal import Journal
from bench.measure.journal import read as read_journal

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="modes and links are those of POSIX")


def checkpoint(path: Path) -> None:
    Checkpoint(1, {}, {}, "ab", "digest", {}, {}, {}, [], 0.0).save(path)


def journal(path: Path) -> None:
    Journal(path, "run", {}, {}, fresh=True).finish()


WRITERS = {"result": lambda path: write_file(path, b"new"), "checkpoint": checkpoint, "journal": journal}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@posix
@pytest.mark.parametrize("kind", WRITERS)
def test_modes_are_those_of_the_umask_or_of_the_file_that_was_there(tmp_path, umask, kind):
    path = tmp_path / "file"
    WRITERS[kind](path)
    assert mode(path) == 0o666 & ~umask
    path.chmod(0o660)
    WRITERS[kind](path)
    assert mode(path) == 0o660
    assert os.listdir(tmp_path) == ["file"]


@posix
@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_link_stays_one_and_its_target_is_written(tmp_path, kind, is_there):
    folder, link = tmp_path / "folder", tmp_path / "latest"
    folder.mkdir()
    if is_there:
        WRITERS[kind](folder / "one")
        (folder / "one").chmod(0o604)
    link.symlink_to("folder/one")
    WRITERS[kind](link)
    assert link.is_symlink() and os.listdir(folder) == ["one"]
    assert not is_there or mode(folder / "one") == 0o604
    if kind == "result":
        assert (folder / "one").read_bytes() == b"new"
    elif kind == "checkpoint":
        assert Checkpoint.load(folder / "one").vocabulary == "ab"
    else:
        assert len(read_journal(folder / "one")) == 1 + is_there


@posix
def test_a_training_into_linked_and_shared_files(tmp_path, text, tiny, capsys):
    out, kept = tmp_path / "out", tmp_path / "kept"
    out.mkdir()
    kept.mkdir()
    names = ("checkpoint.pt", "metrics.json", "curve.csv", "curve.svg", "sample.txt")
    for name in names:
        (kept / name).touch(0o660)
        (kept / name).chmod(0o660)
        (out / name).symlink_to(kept / name)
    assert train(["--preset", "paper-32", "--data", str(text), "--out", str(out), "--threads", "1"]) == 0
    capsys.readouterr()
    for name in names:
        assert (out / name).is_symlink() and mode(kept / name) == 0o660 and (kept / name).stat().st_size


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(RunError) as raised:
        write_file(path, b"new")
    assert str(raised.value) == f"{path}: cannot be written: Is a directory; the file that was there is unchanged"
    assert os.listdir(tmp_path) == ["file"]


# An empty log is begun, and lines are added to two files; nothing else is written but by `write_file`.
LOGS = {("bench/gpu/check.py", ".write_text("), ("bench/gpu/stage.py", 'open(settings.out / "log.txt", "a"'),
        ("bench/measure/journal.py", "os.open(")}  # fmt: skip
WRITES = re.compile(
    r'\.write_(?:text|bytes)\(|os\.open\((?!os\.devnull)|\bopen\([^()]*"[wax][b+]*"'
    r"|torch\.save\((?!content, buffer)|\bsavefig\((?!buffer)|json\.dump\("
)


def test_nothing_else_writes_files():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "bench").rglob("*.py")}
    assert len(sources) > 40
    found = {
        (path.relative_to(ROOT).as_posix(), said) for path, text in sources.items() for said in WRITES.findall(text)
    }
    assert found == LOGS
