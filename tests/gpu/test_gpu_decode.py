"""The decode part of the GPU check without a GPU: its counts, that its checks can fail, and a rehearsal."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.contenders.shapes import GOALS, cache_bytes, decode_bytes, decode_name
from bench.gpu import (
    check as gpu_check,
)
from bench.gpu import (
    decode as gpu_decode,
)
from bench.gpu import (
    decode_timings as gpu_decode_timings,
)
from bench.gpu import (
    programs as gpu_programs,
)
from bench.gpu.decode import Given, Trial, made_up, renewed, replayed
from bench.gpu.decode_timings import LENGTHS, ORDER, Attention, Ours, Sizes, attention_weights, layers_for, turn_tokens
from bench.gpu.stage import Settings, Skipped
from bench.measure.timing import Clock
from lmn_kernels import MemoryState, decode_
from lmn_kernels.backend.choice import why_not
from tests.gpu.test_gpu_check import printed, strict

REASON = why_not("cpp", "step", torch.device("cpu"), torch.float32)
GIVEN = Given("linear", 24, 2, 2)
F32 = torch.float32


def built(test: Callable[..., None]) -> Callable[..., None]:
    """A test of stages that need the extension."""
    return pytest.mark.ext(pytest.mark.skipif(REASON is not None, reason=str(REASON))(test))


def settings(out: Path = Path(), **more) -> Settings:
    return Settings("cpu", True, out, **more)


# Counts


# Section 4 of the performance notes: MB of weights and of the state at 131k, microseconds of attention at 3.0 TB/s.
TABLE = {
    (512, 1): (3.1, 0.04, (23, 90, 717)),
    (512, 32): (3.1, 1.3, (717, 2864, 22907)),
    (512, 256): (3.1, 10.8, (5727, 22907)),
    (1024, 1): (12.6, 0.08, (48, 182, 1434)),
    (1024, 32): (12.6, 2.7, (1434, 5729)),
    (1024, 256): (12.6, 21.5, (11456,)),
    (4096, 1): (201, 0.3, (224, 761, 5771)),
    (4096, 32): (201, 10.8, (5771, 22951)),
    (4096, 256): (201, 86, ()),
}


@pytest.mark.parametrize("sizes", TABLE, ids=str)
def test_bytes_are_those_of_the_table(sizes):
    (embedding, batch), (weights, state, attention) = sizes, TABLE[sizes]
    found = decode_bytes(0, embedding, 1)
    assert printed(found / 1e6, weights)
    assert printed((decode_bytes(batch, embedding, 1 << 17) - found) / 1e6, state)
    for n, microseconds in zip((1 << 15, 1 << 17, 1 << 20), attention, strict=False):
        total = 8 * embedding**2 + cache_bytes(batch, embedding, n)
        assert total / 3.0e6 == pytest.approx(microseconds, abs=1.01, rel=1e-3)


def test_every_size_of_the_grid_is_timed():
    assert set(ORDER) == set(TABLE) and set(LENGTHS) == {1 << 10, 1 << 15, 1 << 17, 1 << 20}
    for quick, (embedding, batch) in [(quick, pair) for quick in (True, False) for pair in ORDER]:
        sizes = Sizes(embedding, batch, quick)
        assert sizes.width % sizes.heads == 0 and sizes.name(1 << 10) == decode_name(batch, embedding, 1024)
        assert (sizes.width, sizes.rows, sizes.length(1024)) == (embedding, batch, 1024) or quick


def test_layers_take_turns_past_the_cache():
    megabytes = 1 << 20
    assert layers_for(200 * megabytes, 50 * megabytes) == 8 == layers_for(100, 0)
    assert layers_for(3 * megabytes, 50 * megabytes) * 3 >= 200


@pytest.mark.parametrize(("once", "tokens"), [(1e-4, 64), (3e-3, 64), (1e-2, 16), (0.2, 4), (9.0, 4)])
def test_runs_of_tokens_get_short_where_a_token_is_long(once, tokens):
    assert turn_tokens(once) == tokens


def test_goals_of_decoding(tmp_path):
    real = Settings("cuda", False, tmp_path)
    limits = {(1, 32): 4.7, (1, 128): 16, (1, 1024): 118, (32, 32): 111, (32, 128): 438}
    measured = {f"ratio/decode/{decode_name(batch, 1024, k << 10)}": x for (batch, k), x in limits.items()}
    measured |= {"ratio/decode/far/B=1 E=1024 n=1048576": 1.0, "ratio/decode/p99/B=1 E=1024 n=131072": 3.0}

    def met(values: dict[str, float]) -> list[bool | None]:
        return [row["met"] for row in gpu_check.goal_rows(values, real) if row["goal"] == 8]

    assert met(measured) == [True] * 7 and met({}) == [None] * 7
    assert met({key: value / 2 for key, value in measured.items()}) == [False] * 5 + [True] * 2
    assert met({key: value * 2 for key, value in measured.items()}) == [True] * 5 + [False] * 2
    assert [goal.bar for goal in GOALS if goal.number == 8] == ["≥ 4", "≥ 12", "≥ 80", "≥ 80", "≥ 300", "≤ 1.2", "≤ 3"]


def test_the_table_has_a_line_for_every_layer_and_batch():
    name = decode_name(1, 1024, 1 << 15)
    values = {f"decode/ours/{name}": 12.34, f"ratio/decode/{name}": 4.56, "decode/ours/B=32 E=512 n=1024": 9.0}
    expected = ["decode B=1 E=1024, against a KV cache: 32k 12.34 us 4.56x"]
    assert gpu_decode_timings.summary(values) == [*expected, "decode B=32 E=512, against a KV cache: 1k 9 us"]


@torch.no_grad()
def test_levels_are_renewed_by_the_bitmask_rule():
    layer = Given("linear", 8, 1, 1, expand=1).layer(F32, settings())
    before = made_up(layer, torch.tensor([0, 1, 6, 7, (1 << 20) - 1, (1 << 31) - 1]), F32, 1 << 31)
    after = made_up(layer, before.position + 1, F32, 1 << 31)
    for row, n in zip(renewed(before, after), after.position.tolist(), strict=True):
        expected = [bool(((n - 1) ^ n) >> level & 1) for level in range(1, 32) for _ in range(1 + level)]
        assert row.tolist() == expected


def test_every_kind_and_dtype_is_checked():
    found = gpu_decode.cases(Settings("cuda", False, Path()))
    kinds = {(given.kind, given.expand) for given, _, _ in found}
    assert kinds >= {(kind, k) for kind in ("linear", "conv", "conv_mixed", "depthwise_separable") for k in (None, 1)}
    half = [torch.bfloat16, torch.float16]
    pairs = {(F32, F32), *((d, d) for d in half), *((d, F32) for d in half)}
    assert {(dtype, kept) for _, dtype, kept in found} == pairs and len(found) == len(gpu_decode.GIVEN) * len(pairs)
    assert {given.feedforward for given, _, _ in found} > {None, 0}
    assert set(gpu_decode.cases(settings())) < set(gpu_decode.cases(Settings("cpu", False, Path())))


# The checks can fail


def wrong_output(y, state, x, slots):
    y[slots >= 0] *= 1.001


def wrong_idle_row(y, state, x, slots):
    y[slots < 0] = 1e-30


def wrong_position(y, state, x, slots):
    state.position[-1] += 1


def wrong_slot(y, state, x, slots):
    state.nodes[-1, 0] += 1e-3


def wrong_level(y, state, x, slots):
    state.v[4, -1] += 1e-3  # of position 1000: of no level that three tokens touch


def wrong_node(y, state, x, slots):
    state.nodes[3, 2] += 0.01  # of position 6: level 3, which the second token completes


def wrong_token(y, state, x, slots):
    state.token[0] += 1e-3


def wrong_run(y, state, x, slots):
    if x.shape[1] == 1:
        y[slots >= 0] += 1e-6


def wrong_by_chance(y, state, x, slots):
    y[slots >= 0] *= 1 + 1e-6 * torch.rand(())


def wrong_memory(y, state, x, slots):
    y[slots >= 0] += torch.isnan(torch.empty(())).float() * 1e-7


WRONG: dict[Callable[..., None], str] = {
    wrong_output: "y: error",
    wrong_idle_row: "not exactly 0",
    wrong_position: "position differs",
    wrong_slot: "nodes: changes where",
    wrong_level: "v: changes where",
    wrong_node: "nodes: error",
    wrong_token: "token: error",
    wrong_run: "one token a call: the output differs",
    wrong_by_chance: "run 2: the output differs",
    wrong_memory: "run 2: the output differs",
}


@built
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@torch.no_grad()
def test_the_check_sees_what_is_wrong(wrong, monkeypatch):
    def decoded(x, state, weights, *, slots=None, backend):
        y = decode_(x, state, weights, slots=slots, backend=backend)
        if backend == "cpp" and slots is not None:
            wrong(y, state, x, slots)
        return y

    trial = Trial(GIVEN, F32, F32, settings())
    trial.check(3)
    monkeypatch.setattr(gpu_decode, "decode_", decoded)
    with pytest.raises(AssertionError, match=WRONG[wrong]):
        trial.check(3)


@built
@torch.no_grad()
def test_the_check_sees_a_row_that_is_not_refused(monkeypatch):
    trial = Trial(GIVEN, F32, F32, settings())
    monkeypatch.setattr(gpu_decode, "decode_", lambda x, *rest, **named: x)
    with pytest.raises(AssertionError, match="was not refused"):
        trial.without_room()


@built
@torch.no_grad()
def test_the_check_asks_a_device_for_nan_in_the_row_without_room(monkeypatch):
    def decoded(x, state, weights, *, backend, first=float("nan")):
        """As on CUDA: only slot 1 takes part."""
        y = decode_(x, state, weights, slots=torch.tensor([-1, 1]), backend=backend)
        return y.index_fill(0, torch.tensor([0]), first)

    trial = Trial(GIVEN, F32, F32, settings())
    trial.refuses = False
    monkeypatch.setattr(gpu_decode, "decode_", decoded)
    trial.without_room()
    monkeypatch.setattr(gpu_decode, "decode_", lambda *given, **named: decoded(*given, **named, first=0.0))
    with pytest.raises(AssertionError, match="NaN is not what"):
        trial.without_room()


@built
def test_the_replay_sees_a_warm_up_that_counts(monkeypatch):
    monkeypatch.setattr(MemoryState, "restore", lambda self, snapshot: self)
    with pytest.raises(AssertionError, match="put back into: position differs"):
        replayed(GIVEN, F32, F32, settings())


@built
def test_the_replay_sees_what_a_host_remembers(monkeypatch):
    step, calls = gpu_decode.LogarithmicMixing.step_, []

    def counting(self, x, state, slots):
        calls.append(1)
        return step(self, x, state, slots) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(gpu_decode.LogarithmicMixing, "step_", counting)
    with pytest.raises(AssertionError, match="replays and calls: the output differs"):
        replayed(GIVEN, F32, F32, settings())


@built
def test_a_wrong_step_is_not_timed(monkeypatch):
    rows: list = []
    twisted = lambda *given, **named: decode_(*given, **named) * (1.1 if named["backend"] == "cpp" else 1)  # noqa: E731
    monkeypatch.setattr(gpu_decode_timings, "decode_", twisted)
    gpu_decode_timings.time_decode(settings(), rows.append)
    assert not [row for row in rows if "key" in row]
    assert len([row for row in rows if "no time is reported" in row.get("fault", "")]) == len(ORDER)


@built
def test_without_the_extension_a_cpu_skips_and_a_gpu_fails(monkeypatch):
    monkeypatch.setattr(gpu_decode, "why_not", lambda *given: "the extension is not built")
    for stage in (gpu_decode.decode, gpu_decode.replay, gpu_decode_timings.time_decode):
        with pytest.raises(Skipped, match="not built"):
            stage(settings(), print)
        with pytest.raises(RuntimeError, match="not built"):
            stage(Settings("cuda", True, Path()), print)


# Timings


@torch.no_grad()
def test_an_attention_that_is_wrong_is_no_contender(monkeypatch):
    sizes, memory = Sizes(1024, 32, True), torch.randn(1 << 20).to(torch.bfloat16)
    weights = attention_weights(sizes, torch.device("cpu"))
    right = Attention(sizes, 1024, memory, weights, settings())
    assert right.tried["backend"] == "math" and right.tried["math"] > 0 and len(right.caches) == right.count == 8
    sdpa = gpu_decode_timings.F.scaled_dot_product_attention
    monkeypatch.setattr(
        gpu_decode_timings.F, "scaled_dot_product_attention", lambda *given, **named: 1.1 * sdpa(*given, **named)
    )
    with pytest.raises(RuntimeError, match="no backend of SDPA serves.*wrong by"):
        Attention(sizes, 1024, memory, weights, settings())


@torch.no_grad()
def test_an_attention_layer_is_that_of_its_cache():
    sizes, memory = Sizes(1024, 32, True), torch.randn(1 << 15).to(torch.bfloat16)
    weights = attention_weights(sizes, torch.device("cpu"))
    kv = Attention(sizes, 1 << 10, memory, weights, settings())
    y = kv.layer(1, kv.backend).float()
    keys, values = kv.caches[1].float()
    q, k, v = (part.unflatten(1, (2, -1)) for part in (kv.x.float() @ weights[1][0].float().T).chunk(3, 1))
    assert torch.allclose(keys[:, :, -1], k, atol=0.05) and torch.allclose(values[:, :, -1], v, atol=0.05)
    weight = torch.softmax(torch.einsum("bhd,bhnd->bhn", q, keys) * q.shape[2] ** -0.5, -1)
    mixed = torch.einsum("bhn,bhnd->bhd", weight, values).flatten(1)
    assert torch.allclose(y, mixed @ weights[1][1].float().T, atol=0.05)


@built
@torch.no_grad()
def test_what_does_not_fit_is_skipped_with_a_reason():
    rows: list = []
    sizes, end = Sizes(1024, 1, True), time.monotonic() + 60
    gpu_decode_timings.one_size(sizes, torch.empty(0, dtype=torch.bfloat16), end, settings(), rows.append)
    skipped = [row for row in rows if "skipped" in row]
    assert len(skipped) == len(LENGTHS) and all("does not fit" in row["skipped"] for row in skipped)
    assert {row["key"] for row in rows if "key" in row} >= {f"decode/ours/{sizes.name(n)}" for n in LENGTHS}


@built
@torch.no_grad()
def test_past_its_time_nothing_is_begun():
    rows: list = []
    gpu_decode_timings.time_decode(settings(seconds=4.0), rows.append)
    assert [row["skipped"] for row in rows] == ["no time left"] * len(ORDER)
    works = {"first": lambda: time.sleep(0.05), "second": lambda: time.sleep(0.05), "third": lambda: None}
    clock, end = Clock(torch.device("cpu")), time.monotonic() + 0.6
    assert list(gpu_decode_timings.affordable(works, clock, end, rows.append)) == ["first"]
    assert [row["case"] for row in rows[-2:]] == ["second", "third"]


@built
@torch.no_grad()
def test_a_run_begins_where_it_is_told():
    ours = Ours(Sizes(1024, 32, True), settings())
    for apart in (False, True):
        ours.turn(ours.token, ours.where(1 << 17, apart), 5)
        expected = [8 * 18 + 5 + apart * row for row in range(3)]
        assert all(state.position.tolist() == expected for state in ours.states)
    assert len({id(weights.tensors[0]) for weights in ours.weights}) == ours.count == 8


# The other stages


def test_the_sanitizer_watches_every_kernel_of_ours(tmp_path, monkeypatch):
    commands: list = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "small runs done\n= ERROR SUMMARY: 0 errors\n")

    monkeypatch.setattr(gpu_programs.subprocess, "run", run)
    rows: list = []
    assert gpu_programs._sanitize("compute-sanitizer", "memcheck", 30, rows.append) is None
    assert {f"kns={name}" for name in ("attend_", "tree_", "step_kernel")} <= set(commands[0])
    assert "fault" not in rows[0]


@built
def test_small_steps_run():
    gpu_decode.small_steps(settings())


def test_the_tests_of_the_step_are_among_the_tests_of_a_gpu():
    assert {"tests/ops/test_step.py", "tests/ops/test_step_precision.py"} <= set(gpu_programs.TESTS)
    assert all((gpu_programs.ROOT / name).exists() for name in gpu_programs.TESTS)


@built
def test_a_rehearsal(tmp_path, capsys):
    names = ["decode", "replay", "time_decode"]
    status = gpu_check.main(["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", *names])
    assert status == 0, (tmp_path / "log.txt").read_text()
    record = strict(tmp_path / "cpu_check.json")
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(names, "ok")
    assert len(stages["decode"]["rows"]) == len(gpu_decode.cases(settings()))
    *replays, capture = stages["replay"]["rows"]
    assert "need a CUDA device" in capture["skipped"]
    assert [row["moved by warming up"] for row in replays] == [3] * 3
    assert all(row["powers of two passed"] > 8 for row in replays)
    rows = {row["key"]: row for row in stages["time_decode"]["rows"] if "key" in row}
    for embedding, batch in ORDER:
        for n in LENGTHS:
            name = decode_name(batch, embedding, n)
            assert all(rows[f"decode/{who}/{name}"]["value"] > 0 for who in ("ours", "kv"))
            assert rows[f"ratio/decode/{name}"]["value"] > 0
    spreads = [row for row in rows.values() if "p20" in row]
    assert all(row["p20"] <= row["value"] <= row["p80"] and row["unit"] == "us" for row in spreads)
    assert not [row for row in stages["time_decode"]["rows"] if "skipped" in row]
    goals = [row for row in record["goals"] if row["goal"] == 8]
    assert len(goals) == 7 and all(row["measured"] is not None and row["met"] is None for row in goals)
    text = capsys.readouterr().out
    assert "decode B=1 E=1024, against a KV cache: 1k" in text and json.dumps(record)
