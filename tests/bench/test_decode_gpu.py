"""What the run ``decode`` does on a GPU, rehearsed: its sizes, that what is wrong is not timed, and its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.measure.runner import Context
from bench.report.chapters import decode as chapter
from bench.report.goals import goal_rows
from bench.runs import decode, decode_gpu
from bench.runs.decode_gpu import (
    APART,
    CACHE,
    LENGTHS,
    ORDER,
    Attention,
    Measurement,
    Ours,
    Sizes,
    attention_weights,
    layers_for,
    turn_tokens,
)
from lmn_kernels import decode_
from lmn_kernels.backend.choice import why_not

CPU = torch.device("cpu")
HERE = Context(CPU, torch.bfloat16, "reference", True, Path(), Path(), {}, rehearsed=True)
REASON = why_not("cpp", "step", CPU, torch.bfloat16)


def built(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.ext(pytest.mark.skipif(REASON is not None, reason=str(REASON))(test))


def test_sizes_of_a_rehearsal_are_tiny():
    for quick, (embedding, batch) in [(quick, pair) for quick in (True, False) for pair in ORDER]:
        sizes = Sizes(embedding, batch, quick)
        assert sizes.width % sizes.heads == 0 and sizes.width <= (64 if quick else embedding)
        assert (sizes.width, sizes.rows, sizes.length(1024)) == (embedding, batch, 1024) or quick


def test_layers_take_turns_past_the_cache():
    megabytes = 1 << 20
    assert layers_for(200 * megabytes, 50 * megabytes) == 8 == layers_for(100, 0)
    assert layers_for(3 * megabytes, 50 * megabytes) * 3 >= 200


@pytest.mark.parametrize(("once", "tokens"), [(1e-4, 64), (3e-3, 64), (1e-2, 16), (0.2, 4), (9.0, 4)])
def test_runs_of_tokens_get_short_where_a_token_is_long(once, tokens):
    assert turn_tokens(once) == tokens


@torch.no_grad()
def test_an_attention_that_is_wrong_is_no_contender(monkeypatch):
    sizes, memory = Sizes(1024, 32, True), torch.randn(1 << 20).to(torch.bfloat16)
    weights = attention_weights(sizes, HERE)
    right = Attention(sizes, 1024, memory, weights, HERE)
    assert right.tried["sdpa"] == "math" and right.tried["math_us"] > 0 and len(right.caches) == right.count == 8
    sdpa = decode_gpu.F.scaled_dot_product_attention
    monkeypatch.setattr(
        decode_gpu.F, "scaled_dot_product_attention", lambda *given, **named: 1.1 * sdpa(*given, **named)
    )
    with pytest.raises(RuntimeError, match="no backend of SDPA serves.*wrong by"):
        Attention(sizes, 1024, memory, weights, HERE)


@torch.no_grad()
def test_an_attention_layer_is_that_of_its_cache():
    sizes, memory = Sizes(1024, 32, True), torch.randn(1 << 15).to(torch.bfloat16)
    weights = attention_weights(sizes, HERE)
    kv = Attention(sizes, 1 << 10, memory, weights, HERE)
    y = kv.layer(1, kv.backend).float()
    keys, values = kv.caches[1].float()
    q, k, v = (part.unflatten(1, (2, -1)) for part in (kv.x.float() @ weights[1][0].float().T).chunk(3, 1))
    assert torch.allclose(keys[:, :, -1], k, atol=0.05) and torch.allclose(values[:, :, -1], v, atol=0.05)
    weight = torch.softmax(torch.einsum("bhd,bhnd->bhn", q, keys) * q.shape[2] ** -0.5, -1)
    mixed = torch.einsum("bhn,bhnd->bhd", weight, values).flatten(1)
    assert torch.allclose(y, mixed @ weights[1][1].float().T, atol=0.05)


@built
@torch.no_grad()
def test_a_run_begins_where_it_is_told():
    ours = Ours(Sizes(1024, 32, True), HERE)
    for apart in (False, True):
        ours.turn(ours.token, ours.where(1 << 17, apart), 5)
        expected = [8 * 18 + 5 + apart * row for row in range(3)]
        assert all(state.position.tolist() == expected for state in ours.states)
    assert len({id(weights.tensors[0]) for weights in ours.weights}) == ours.count == 8


@built
def test_a_wrong_step_is_not_timed(monkeypatch):
    twisted = lambda *given, **named: decode_(*given, **named) * (1.1 if named["backend"] == "cpp" else 1)  # noqa: E731
    monkeypatch.setattr(decode_gpu, "decode_", twisted)
    rows = Measurement(Sizes(1024, 32, True), HERE).rows()
    assert [row["position"] for row in rows] == list(LENGTHS)
    assert all(row["gap"].startswith("gate: error") and "median" not in row for row in rows)


def test_without_the_extension_there_is_a_gap(monkeypatch):
    monkeypatch.setattr(decode_gpu, "why_not", lambda *given: "the extension is not built")
    rows = Measurement(Sizes(512, 1, True), HERE).rows()
    assert {row["gap"] for row in rows} == {"the extension is not built"} and len(rows) == len(LENGTHS)


@built
def test_what_does_not_fit_is_a_gap(monkeypatch):
    monkeypatch.setattr(decode_gpu, "cache_memory", lambda *given: torch.empty(0, dtype=torch.bfloat16))
    rows = Measurement(Sizes(1024, 1, True), HERE).rows()
    gaps = [row for row in rows if "gap" in row]
    assert len(gaps) == len(LENGTHS) and all(row["provider"] == CACHE for row in gaps)
    assert all("does not fit" in row["gap"] for row in gaps)
    assert [row["position"] for row in rows if row["provider"] == "ours" and "median" in row] == list(LENGTHS)


@built
def test_rows_of_every_size():
    cases = decode.cases(HERE)
    assert [case.name for case in cases] == [f"E={embedding}/B={batch}" for embedding, batch in ORDER]
    rows = [row for case in cases for row in case.rows([])]
    timed = {(row["provider"], *row["shape"].values(), row["position"]): row for row in rows if "median" in row}
    assert len(timed) == len([row for row in rows if "median" in row])
    for embedding, batch in ORDER:
        here = {key[0]: set() for key in timed}
        for provider, b, e, _, _, n in timed:
            if (e, b) == (embedding, batch):
                here[provider].add(n)
        assert here["ours"] == here[CACHE] == set(LENGTHS) and here[APART] == ({1 << 17} if batch > 1 else set())
    for (provider, *_), row in timed.items():
        assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["unit"] == "us" and row["gbs"] > 0
        assert ("ratio" in row) == (provider != "ours") and ("sdpa" in row) == (provider == CACHE)
        assert ("error" in row) == (provider != CACHE) and row["layers"] == 8
    facts = [row["fact"] for row in rows if "fact" in row]
    assert facts == ["far_over_near", "worst_token", "p99_over_median"] * len(ORDER)
    goals = [row for row in goal_rows({"decode": rows}) if row["goal"] == 8]
    assert len(goals) == 7 and all(row["measured"] is not None for row in goals)
    assert "KV cache" in decode.show(rows) and "99th percentile over the median" in chapter(rows)


def test_the_cases_of_a_cpu_are_others():
    assert all("/B=" not in case.name for case in decode.cases(dataclasses.replace(HERE, rehearsed=False)))
