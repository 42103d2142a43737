"""The table of launches: what it holds, which source serves a question, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from lmn_kernels._triton import launch
from lmn_kernels._triton.launch import KERNELS, LAUNCHES, Launch, Table, file_name
from lmn_kernels.backend import choice
from tests.support.launches import every_launch

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
ARCHS = (75, 80, 86, 89, 90, 100, 103, 120)
MODEL = "Made-up GPU 9/X"
ROW = {"BT": 32, "BK": 16, "num_warps": 2, "num_stages": 3}


def write(folder: Path, launches: object, device: object = MODEL, arch: object = 90, **more: object) -> Path:
    path = folder / file_name(MODEL)
    path.write_text(json.dumps({"device": device, "arch": arch, "launches": launches, **more}), encoding="utf-8")
    return path


def values(found: Launch) -> dict[str, int]:
    return {**found.blocks, **found.options}


# What the kernels were launched with before there was one table.
KNOWN = [
    ("attend_fwd", 16, HALF, {"BT": 64, "BK": 64, "num_warps": 4, "num_stages": 2}),
    ("attend_fwd", 80, BRAIN, {"BT": 64, "BK": 64, "num_warps": 8, "num_stages": 1}),
    ("attend_bwd", 64, HALF, {"BT": 64, "BK": 32, "num_warps": 4, "num_stages": 2}),
    ("attend_bwd", 256, HALF, {"BT": 32, "BK": 16, "num_warps": 8, "num_stages": 1}),
    ("attend_bwd", 128, SINGLE, {"BT": 32, "BK": 16, "num_warps": 8, "num_stages": 2}),
    ("attend_bwd_reduce", 4096, SINGLE, {"BR": 32, "BC": 128, "num_warps": 4, "num_stages": 3}),
    ("look_ahead_fwd", 1, HALF, {"BT": 64, "num_warps": 4, "num_stages": 2}),
    ("look_ahead_bwd_dkv", 128, BRAIN, {"BT": 32, "num_warps": 8, "num_stages": 2}),
    ("look_ahead_bwd_dq", 41, SINGLE, {"BT": 16, "num_warps": 8, "num_stages": 1}),
    ("tree_level_fwd", 64, SINGLE, {"BM": 32, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 224}),
    ("tree_level_bwd", 1500, HALF, {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}),
    (
        "tree_tail_fwd", 256, BRAIN,
        {"BM": 64, "BN": 64, "BK": 64, "FEW": 128, "FEW_BM": 16, "FEW_BN": 32, "FEW_BK": 128}
        | {"num_warps": 4, "num_stages": 4},
    ),
    (
        "tree_block_bwd", 128, HALF,
        {"BM": 64, "BN": 128, "BK": 64, "SPAN": 7, "LEVELS": 4, "num_warps": 8, "num_stages": 2},
    ),
    ("tree_bwd_weight", 64, HALF, {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 192}),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "width", "dtype", "expected"), KNOWN, ids=[f"{k}-{w}" for k, w, _, _ in KNOWN])
def test_the_launches_of_before(kernel, width, dtype, expected):
    for arch in ARCHS[dtype != SINGLE :]:
        assert values(LAUNCHES.look_up(kernel, width, dtype, arch)) == expected


def test_the_defaults_change_knowingly():
    """A digest of every launch of every architecture: whoever changes a default changes it here too."""
    lines = [
        f"{kernel} {width} {dtype} {arch} {sorted(values(LAUNCHES.look_up(kernel, width, dtype, arch)).items())}"
        for kernel in KERNELS
        for dtype in (HALF, BRAIN, SINGLE)
        if kernel != "attend_bwd_reduce" or dtype == SINGLE
        for width in LAUNCHES.widths(kernel, dtype)
        for arch in ARCHS[dtype != SINGLE :]
    ]
    assert len(lines) == 1258
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "05b8e8771138beae"


def test_what_is_wider_takes_the_next_launch_listed():
    assert LAUNCHES.widths("attend_fwd", HALF) == [16, 32, 64, 128, 256]
    for width, listed in ((1, 16), (16, 16), (17, 32), (65, 128), (256, 256)):
        assert LAUNCHES.look_up("attend_fwd", width, HALF, 90) == LAUNCHES.look_up("attend_fwd", listed, HALF, 90)
    assert LAUNCHES.look_up("tree_tail_fwd", 5000, HALF, 90) == LAUNCHES.look_up("tree_tail_fwd", 256, HALF, 90)
    assert LAUNCHES.look_up("tree_tail_fwd", 129, HALF, 90) != LAUNCHES.look_up("tree_tail_fwd", 128, HALF, 90)


def layered(folder: Path) -> Table:
    """Launches of sm_75, sm_86 and sm_90 that differ in their warps: 1, 2 and 4."""
    rows = {arch: {16: ROW | {"num_warps": warps}} for arch, warps in ((75, 1), (86, 2), (90, 4))}
    defaults = {arch: {"attend_fwd": {"float16": row}} for arch, row in rows.items()}
    defaults[75]["attend_fwd"]["float16"] |= {64: ROW | {"num_warps": 16}}
    return Table(folder, defaults)


@pytest.mark.parametrize(
    ("arch", "width", "warps", "source"),
    [(75, 16, 1, 75), (80, 16, 1, 75), (86, 16, 2, 86), (89, 16, 2, 86), (90, 16, 4, 90), (120, 16, 4, 90)]
    + [(90, 20, 16, 75)],
)  # fmt: skip
def test_the_nearest_lower_architecture_serves(tmp_path, arch, width, warps, source):
    found = layered(tmp_path).look_up("attend_fwd", width, HALF, arch, "some unknown device")
    assert (found.num_warps, found.source) == (warps, f"the defaults of sm_{source}")


def test_a_tuned_file_goes_first_for_its_own_device(tmp_path):
    write(tmp_path, {"attend_fwd": {"float16": {"16": ROW | {"num_warps": 32, "maxnreg": 168}}}})
    table = layered(tmp_path)
    tuned = table.look_up("attend_fwd", 9, HALF, 90, MODEL)
    assert values(tuned) == ROW | {"num_warps": 32, "maxnreg": 168}
    assert tuned.source == "tuned/Made-up_GPU_9_X.json"
    # What the file does not hold, and other devices, have the defaults.
    assert table.look_up("attend_fwd", 17, HALF, 90, MODEL).source == "the defaults of sm_75"
    for model in (None, "Made-up GPU 9"):
        assert table.look_up("attend_fwd", 9, HALF, 90, model).source == "the defaults of sm_90"


def test_no_launch_is_an_error(tmp_path):
    table = layered(tmp_path)
    with pytest.raises(ValueError, match=r"arch: expected at least 75 for attend_fwd in torch\.float16, got 70"):
        table.look_up("attend_fwd", 16, HALF, 70)
    with pytest.raises(ValueError, match=r"arch: expected at least 80 for attend_bwd in torch\.bfloat16, got 75"):
        LAUNCHES.look_up("attend_bwd", 16, BRAIN, 75)
    with pytest.raises(ValueError, match=r"heads: expected at most 128 features a head in torch\.float32, got 129"):
        LAUNCHES.look_up("attend_fwd", 129, SINGLE, 90)
    with pytest.raises(ValueError, match=r"groups: expected at most 128 features a group in torch\.float16, got 129"):
        LAUNCHES.look_up("tree_block_fwd", 129, HALF, 90)
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        LAUNCHES.look_up("attend_fwd", 0, HALF, 90)
    with pytest.raises(ValueError, match="kernel: expected one of attend_fwd, .*, got 'attend'"):
        LAUNCHES.look_up("attend", 16, HALF, 90)
    known = r"torch\.bfloat16, torch\.float16, torch\.float32 for attend_fwd"
    with pytest.raises(ValueError, match=rf"dtype: expected one of {known}, got torch\.float64"):
        LAUNCHES.look_up("attend_fwd", 16, torch.float64, 90)


def test_a_file_is_looked_for_once_and_an_answer_is_kept(tmp_path, monkeypatch):
    write(tmp_path, {"attend_fwd": {"float16": {"16": ROW}}})
    touched = []
    for name in ("is_file", "read_text"):
        real = getattr(Path, name)
        monkeypatch.setattr(
            Path, name, lambda path, *a, real=real, name=name, **k: (touched.append(name), real(path, *a, **k))[1]
        )
    table = layered(tmp_path)
    assert touched == []
    for model, expected in ((MODEL, ["is_file", "read_text"]), ("another", ["is_file"])):
        first = [table.look_up("attend_fwd", width, HALF, 90, model) for width in (1, 16, 64)]
        again = [table.look_up("attend_fwd", width, HALF, 90, model) for width in (1, 16, 64)]
        assert all(a is b for a, b in zip(first, again, strict=True))
        assert touched == expected
        touched.clear()


def entry(**changed: object) -> dict[str, object]:
    return {"attend_fwd": {"float16": {"16": ROW | changed}}}


BLOCK_ROW = {"BM": 32, "BN": 16, "BK": 16, "SPAN": 4, "LEVELS": 5, "num_warps": 2, "num_stages": 2}
MALFORMED = {
    "an unknown kernel": (
        {"attend_sideways": {}}, r"kernel: expected one of attend_fwd, .*, got 'attend_sideways'"
    ),
    "an unknown dtype": (
        {"attend_fwd": {"float64": {}}}, r"attend_fwd: dtype: expected one of float16, .*, got 'float64'"
    ),
    "a dtype without launches": (
        {"attend_bwd_reduce": {"float16": {"16": {"BR": 32, "BC": 32, "num_warps": 4, "num_stages": 1}}}},
        r"attend_bwd_reduce: float16: dtype: expected one of torch\.float32 for attend_bwd_reduce, got torch\.float16",
    ),
    "a width between": (
        {"attend_fwd": {"float16": {"48": ROW}}},
        r"attend_fwd: float16: expected widths among 16, 32, 64, 128, 256, got 48",
    ),
    "a width that is none": (
        {"attend_fwd": {"float16": {"wide": ROW}}}, r"attend_fwd: float16: wide: expected a width, .*, got 'wide'"
    ),
    "an unknown field": (entry(num_ctas=2), r"attend_fwd: float16: 16: expected the fields .*; unknown: num_ctas"),
    "a missing field": (
        {"attend_fwd": {"float16": {"16": {"BT": 32, "num_warps": 4, "num_stages": 1}}}},
        r"attend_fwd: float16: 16: expected the fields .*; missing: BK; unknown: none",
    ),
    "a size out of range": (entry(BK=128), r"16: BK: expected one of 16, 32, 64, got 128"),
    "a size that is no number": (entry(BT="32"), r"16: BT: expected one of 16, 32, 64, 128, 256, got '32'"),
    "warps that are a truth": (entry(num_warps=True), r"16: num_warps: expected one of 1, 2, 4, 8, 16, 32, got True"),
    "registers out of range": (entry(maxnreg=256), r"16: maxnreg: expected one of 16 … 255, got 256"),
    "more levels than nodes": (
        {"tree_block_fwd": {"float16": {"16": BLOCK_ROW}}}, r"16: LEVELS: expected at most SPAN=4, got 5"
    ),
    "a row that is a list": (
        {"attend_fwd": {"float16": {"16": [32, 16]}}}, r"16: expected names and their values, got \[32, 16\]"
    ),
    "no launches": (None, r"expected names and their values, got None"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_entry_is_refused_by_file_and_name(tmp_path, case):
    launches, message = MALFORMED[case]
    path = write(tmp_path, launches)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{message}"):
        Table(tmp_path).look_up("attend_bwd", 16, HALF, 90, MODEL)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "another GPU"}, r"device: expected the model that the file is named after, got 'another GPU'"),
        ({"device": 9}, r"device: expected the model that the file is named after, got 9"),
        ({"arch": 80}, r"arch: expected 90, got 80"),
        ({"arch": "90"}, r"arch: expected 90, got '90'"),
        ({"note": ""}, r"expected the fields arch, device, launches; missing: none; unknown: note"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, changed, message):
    path = write(tmp_path, **{"launches": {}, **changed})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: {message}"):
        Table(tmp_path).look_up("attend_fwd", 16, HALF, 90, MODEL)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"arch": 90, "arch": 90}'], ids=str)
def test_what_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / file_name(MODEL)
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: expected "):
        Table(tmp_path).look_up("attend_fwd", 16, HALF, 90, MODEL)


def test_defaults_are_checked_as_files_are(tmp_path):
    with pytest.raises(ValueError, match=r"the defaults of sm_90: attend_fwd: float16: 16: BT: .*, got 48"):
        Table(tmp_path, {90: {"attend_fwd": {"float16": {16: ROW | {"BT": 48}}}}})


def test_the_tuned_files_of_the_package_are_sound():
    files = [*launch.TUNED.glob("*")] if launch.TUNED.is_dir() else []
    for path in files:
        assert path.suffix == ".json" and LAUNCHES.read(path), path


def test_names_of_files():
    assert file_name("NVIDIA H200") == "NVIDIA_H200.json"
    assert file_name("NVIDIA A100-SXM4-80GB") == "NVIDIA_A100-SXM4-80GB.json"
    assert "/" not in file_name("../../x") and not file_name("../../x").startswith(".")


def test_a_launch_is_a_value():
    one = Launch(4, 2, {"BT": 64, "BK": 32})
    same = Launch(4, 2, {"BK": 32, "BT": 64}, source="elsewhere")
    assert one == same and hash(one) == hash(same) and one.source == "the caller"
    for other in (Launch(8, 2, one.blocks), Launch(4, 2, one.blocks, maxnreg=64), one.with_blocks(BT=32)):
        assert other != one
    assert one.with_blocks(BT=32).blocks["BT"] == 32 and one.blocks["BT"] == 64
    with pytest.raises(TypeError):
        one.blocks["BT"] = 16
    assert one.options == {"num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    ("operation", "kernels"),
    [
        ("attend", ("attend_fwd", "attend_bwd")),
        ("look_ahead_attend", ("look_ahead_fwd", "look_ahead_bwd_dq", "look_ahead_bwd_dkv", "look_ahead_bwd_dtable")),
    ],
)
def test_the_backend_takes_heads_as_wide_as_there_are_launches(operation, kernels):
    for dtypes, widest in zip(((HALF, BRAIN), (SINGLE,)), choice.OPERATIONS[operation].widest, strict=True):
        assert {LAUNCHES.widths(kernel, dtype)[-1] for kernel in kernels for dtype in dtypes} == {widest}


def test_only_kernels_of_heads_are_bounded_in_the_backend():
    bounded = {name.split("_")[0] for name, kernel in KERNELS.items() if kernel.bound == "heads"}
    assert bounded == {"attend", "look"}
    assert {name for name, own in choice.OPERATIONS.items() if own.widest} == {"attend", "look_ahead_attend"}


class TestWithTriton:
    """What the launchers make of the table."""

    @pytest.fixture(autouse=True)
    def _triton(self):
        pytest.importorskip("triton", reason="triton is not installed")

    def test_kernels_have_the_arguments_that_their_launches_set(self):
        from lmn_kernels._triton import attention_kernels, look_ahead_kernels, tree_kernels

        kernels = {
            "attend_fwd": attention_kernels.attend_fwd_kernel,
            "attend_bwd": attention_kernels.attend_bwd_kernel,
            "attend_bwd_reduce": attention_kernels.attend_bwd_reduce_kernel,
            "look_ahead_fwd": look_ahead_kernels.look_ahead_fwd_kernel,
            "look_ahead_bwd_dq": look_ahead_kernels.look_ahead_bwd_kernel_dq,
            "look_ahead_bwd_dkv": look_ahead_kernels.look_ahead_bwd_kernel_dkv,
            "look_ahead_bwd_dtable": look_ahead_kernels.look_ahead_bwd_kernel_dtable,
            "tree_level_fwd": tree_kernels.tree_fwd_kernel,
            "tree_level_bwd": tree_kernels.tree_bwd_kernel,
            "tree_tail_fwd": tree_kernels.tree_fwd_kernel,
            "tree_tail_bwd": tree_kernels.tree_bwd_kernel,
            "tree_block_fwd": tree_kernels.tree_block_fwd_kernel,
            "tree_block_bwd": tree_kernels.tree_block_bwd_kernel,
            "tree_bwd_weight": tree_kernels.tree_bwd_kernel_weight,
        }
        assert kernels.keys() == KERNELS.keys()
        for name, kernel in kernels.items():
            # How many levels a block has is for the launcher.
            assert set(KERNELS[name].blocks) - {"LEVELS"} <= set(kernel.arg_names), name

    def test_blocks_take_groups_as_wide_as_there_are_launches(self):
        from lmn_kernels._triton import tree

        for kernel in ("tree_block_fwd", "tree_block_bwd"):
            for dtype in (HALF, BRAIN, SINGLE):
                assert LAUNCHES.widths(kernel, dtype)[-1] == tree.BLOCK_FEATURES

    def test_a_block_has_no_more_levels_than_nodes(self):
        for found in every_launch("tree_block_fwd", "tree_block_bwd"):
            assert found.blocks["LEVELS"] <= found.blocks["SPAN"]

    def test_a_device_is_asked_once_and_its_file_serves_it(self, tmp_path, monkeypatch):
        write(tmp_path, entry(num_warps=16))
        asked = []
        monkeypatch.setattr(launch, "LAUNCHES", Table(tmp_path))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (asked.append(index), (9, 0))[1])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: MODEL if index == 1 else "another GPU")
        launch._gpu.cache_clear()
        try:
            found = [launch.launch_for("attend_fwd", 16, HALF, torch.device("cuda", i)) for i in (1, 0, 1, 0)]
        finally:
            launch._gpu.cache_clear()
        assert [one.source for one in found] == ["tuned/Made-up_GPU_9_X.json", "the defaults of sm_80"] * 2
        assert asked == [1, 0]

    def test_the_interpreter_has_the_defaults_of_the_first_architecture_with_products_in_16_bits(self):
        found = launch.launch_for("attend_fwd", 64, HALF, torch.device("cpu"))
        assert found == LAUNCHES.look_up("attend_fwd", 64, HALF, 80)
        assert found.source == "the defaults of sm_80"
