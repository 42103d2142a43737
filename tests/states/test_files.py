"""Files of states: what stands where they are written stays what it was."""

from __future__ import annotations

import os
import stat

import pytest

from lmn_kernels import load_states, save_states
from tests.support.variants import VARIANTS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and links are those of POSIX")


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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


def test_a_link_stays_one_and_its_target_is_written(tmp_path):
    layer, link = VARIANTS[0].layer(), tmp_path / "latest"
    save_states(tmp_path / "one", [layer.init_state(2)])
    link.symlink_to("one")
    save_states(link, [layer.init_state(5)])
    assert link.is_symlink() and load_states(tmp_path / "one")[0].batch_size == 5
    assert sorted(os.listdir(tmp_path)) == ["latest", "one"]
