"""Files of states: what stands where they are written stays what it was."""

from __future__ import annotations

import os
import stat
import sys

import pytest
import torch
from safetensors.torch import save_file

from lmn_kernels import LookAheadMemory, LookAheadState, load_states, save_states
from tests.support.variants import VARIANTS

posix = pytest.mark.skipif(os.name != "posix", reason="modes and links are those of POSIX")


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@posix
def test_modes_are_those_of_the_umask_or_of_the_file_that_was_there(tmp_path):
    state, path = VARIANTS[0].layer().init_state(2), tmp_path / "states"
    before = os.umask(0o027)
    try:
        save_states(path, [state])
        assert mode(path) == 0o640
        path.chmod(0o664)
        save_states(path, [state])
        assert mode(path) == 0o664
    finally:
        os.umask(before)


@posix
def test_a_link_stays_one_and_its_target_is_written(tmp_path):
    layer, link = VARIANTS[0].layer(), tmp_path / "latest"
    save_states(tmp_path / "one", [layer.init_state(2)])
    link.symlink_to("one")
    save_states(link, [layer.init_state(5)])
    assert link.is_symlink() and load_states(tmp_path / "one")[0].batch_size == 5
    assert sorted(os.listdir(tmp_path)) == ["latest", "one"]


def test_a_file_of_another_kind_is_called_by_its_name(tmp_path):
    layers, stream, other = (tmp_path / name for name in ("layers", "stream", "other"))
    save_states(layers, [VARIANTS[0].layer().init_state(2)])
    LookAheadMemory(8, 2, 2, memory_length=4).init_state(1).save(stream)
    save_file({"weight": torch.zeros(2)}, other)
    own, streams = "a file of the states of a model's layers", "a file of a LookAheadState"
    for read, path, said in (
        (load_states, stream, f"stream: expected {own}, got one of a LookAheadState, which LookAheadState.load reads"),
        (LookAheadState.load, layers, f"layers: expected {streams}, got one of the states .* which load_states reads"),
        (load_states, other, f"other: expected {own}, got a safetensors file of something else"),
        (LookAheadState.load, other, f"other: expected {streams}, got a safetensors file of something else"),
    ):
        with pytest.raises(ValueError, match=said):
            read(path)


@pytest.mark.parametrize("missing", ["safetensors", "numpy"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch, missing):
    state, path = VARIANTS[0].layer().init_state(2), tmp_path / "states"
    stream = LookAheadMemory(8, 2, 2, memory_length=4).init_state(1)
    save_states(path, [state])
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"{missing}.torch", raising=False)
    said = rf"files of states need {missing}.*, which is not installed: pip install lmn-kernels\[state\]"
    calls = [lambda: save_states(tmp_path / "new", [state]), lambda: stream.save(tmp_path / "new")]
    if missing == "numpy":
        assert load_states(path)[0].batch_size == 2
    else:
        calls += [lambda: load_states(path), lambda: LookAheadState.load(path)]
    for call in calls:
        with pytest.raises(ImportError, match=said):
            call()
    assert os.listdir(tmp_path) == ["states"]
