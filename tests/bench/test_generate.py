"""The language models of the main job, and how they speak: parameter counts, streaming, sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.lm import generate as generate_module
from bench.lm import train_lm
from bench.lm.models import GPT2, MODELS, RECURRENT, LanguageModel, Recurrent, build
from bench.lm.settings import resolve


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "corpus.txt").write_text("the cat sat on the mat\nand the dog sat on the cat\n" * 40)
    flags = "--embedding 8 --heads 2 --layers 2 --block 12 --batch 4 --steps 2 --eval-batches 1 --sample-tokens 1"
    given = ["--data", str(folder / "corpus.txt"), "--out", str(folder), "--device", "cpu"]
    assert train_lm.main([*flags.split(), *given]) == 0
    return folder


@pytest.mark.parametrize(
    "preset, model, count",
    [
        ("paper-32", "gpt2", 71_105),
        ("paper-32", "logmem", 71_489),
        ("paper-32", "tinylogmem", 42_305),
        ("paper-32", "expsum", 71_489),
        ("paper-128", "gpt2", 841_281),
        ("paper-128", "logmem", 1_072_193),
        ("paper-128", "tinylogmem", 677_441),
        ("paper-128", "expsum", 1_072_193),
    ],
)
def test_parameter_counts_of_the_paper(preset: str, model: str, count: int) -> None:
    config = resolve({"preset": preset, "model": model}, None).model_config(65)
    assert build(config).parameter_count() == count


@pytest.mark.parametrize("model, count", [("lamemo", 71_461), ("transformer-xl", 71_429)])
def test_width_at_which_the_parameters_are_those_of_logmem(model: str, count: int) -> None:
    """LogMem has 71,489; a unit of the feed-forward more or less is 260."""
    config = resolve({"preset": "paper-32", "model": model, "inner": 185}, None).model_config(65)
    assert build(config).parameter_count() == count


def _model(name: str, **flags: Any) -> LanguageModel:
    torch.manual_seed(0)
    given = {"model": name, "embedding": 8, "heads": 2, "layers": 2, "block": 12, **flags}
    return build(resolve(given, None).model_config(11)).double()


# What LaMemo says depends on where the text is cut: its memory has looked ahead to the newest segment.
@pytest.mark.parametrize("name", [*(name for name in MODELS if name != "lamemo"), "single"])
@pytest.mark.parametrize("prompt", [1, 7])
def test_streaming_equals_forward(name: str, prompt: int) -> None:
    model = _model("tinylogmem", feedforward="single") if name == "single" else _model(name)
    ids = torch.randint(11, (3, 12))
    expected = model(ids)[0] if isinstance(model, Recurrent) else model(ids)
    logits, state = model.prefill(ids[:, :prompt])
    torch.testing.assert_close(logits, expected[:, prompt - 1], rtol=0, atol=1e-10)
    for t in range(prompt, 12):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, expected[:, t], rtol=0, atol=1e-10)


@pytest.mark.parametrize("prompt", [1, 12, 29])
def test_a_prompt_is_read_in_segments(prompt: int) -> None:
    model = _model("lamemo", layers=3, memory=20)
    ids = torch.randint(11, (3, 32))
    memory = None
    for begin in range(0, prompt, 12):
        expected, memory = model(ids[:, begin : min(begin + 12, prompt)], memory)
    logits, state = model.prefill(ids[:, :prompt])
    for t in range(prompt, 32):
        torch.testing.assert_close(logits, expected[:, -1], rtol=0, atol=1e-12)
        expected, memory = model(ids[:, t : t + 1], memory)
        logits, state = model.step(ids[:, t], state)
    assert state.length == 20


def test_gpt2_sees_its_window() -> None:
    model = _model("gpt2")
    ids = torch.randint(11, (1, 30))
    logits, state = model.prefill(ids[:, :20])
    for t in range(20, 30):
        logits, state = model.step(ids[:, t], state)
    torch.testing.assert_close(logits, model(ids[:, -12:])[:, -1], rtol=0, atol=1e-10)
    assert model.state_bytes(state) == 12 * 8


def test_gpt2_block_is_the_notebooks() -> None:
    model = _model("gpt2")
    assert isinstance(model, GPT2)
    block: Any = model.blocks[0]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    normed = F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias)
    heads = []
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (normed @ part[rows].T for part in block.qkv.weight.chunk(3))
        scores = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(5, 5).tril() == 0, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    y = x + block.out_proj(torch.cat(heads, -1))
    y = y + block.feedforward(block.norm2(y))
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-12)
    assert isinstance(block.feedforward[1], torch.nn.ReLU) and block.qkv.bias is None


def _say(path: Path, capsys: Any, *flags: str) -> tuple[str, str]:
    capsys.readouterr()
    assert generate_module.main(["--checkpoint", str(path / "checkpoint.pt"), "--device", "cpu", *flags]) == 0
    said = capsys.readouterr().out
    body, _, last = said.removesuffix("\n").rpartition("\n")
    return body, last


def test_generate_prints_text_and_one_line(trained: Path, capsys: Any) -> None:
    flags = ["--prompt", "the ", "--tokens", "60", "--top-k", "5"]
    body, last = _say(trained, capsys, *flags, "--seed", "1")
    assert body.startswith("the ") and len(body) == 64
    assert "tokens/s" in last and "bytes" in last
    assert _say(trained, capsys, *flags, "--seed", "1")[0] == body
    assert _say(trained, capsys, *flags, "--seed", "2")[0] != body


def test_greedy_is_the_argmax_of_forward(trained: Path, capsys: Any) -> None:
    body, _ = _say(trained, capsys, "--prompt", "on", "--tokens", "20", "--temperature", "0")
    model, vocabulary = generate_module.load_model(trained / "checkpoint.pt")
    text = "on"
    with torch.no_grad():
        for _ in range(20):
            ids = torch.tensor([[vocabulary.index(character) for character in text]])
            text += vocabulary[int(model(ids)[0, -1].argmax())]
    assert body == text


def test_state_does_not_grow_with_the_text(trained: Path) -> None:
    model, vocabulary = generate_module.load_model(trained / "checkpoint.pt")

    def size(tokens: int) -> int:
        silent: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "seed": 0, "emit": lambda text: None}
        return generate_module.generate(model, vocabulary, "t", tokens=tokens, **silent).state_bytes

    # Positions 33 and 62 have the same levels, 65 one more.
    assert size(32) == size(61) < size(64) < 1.5 * size(32)


@pytest.mark.parametrize("name", RECURRENT)
def test_state_is_constant_once_the_memory_is_full(name: str) -> None:
    model = _model(name, memory=16)

    def size(tokens: int) -> int:
        silent: dict[str, Any] = {"temperature": 0.5, "top_k": 0, "seed": 0, "emit": lambda text: None}
        return generate_module.generate(model, "abcdefghijk", "abcdefg", tokens=tokens, **silent).state_bytes

    assert size(4) < size(9) == size(10) == size(30)


def test_empty_prompt_starts_from_a_newline() -> None:
    assert generate_module.encode("", "ab\nc") == [2]
    assert generate_module.encode("", "abc") == [0]
    assert generate_module.encode("cab", "abc") == [2, 0, 1]


def test_prompt_outside_the_vocabulary(trained: Path, capsys: Any) -> None:
    assert generate_module.main(["--checkpoint", str(trained / "checkpoint.pt"), "--prompt", "Ω t"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("generate: prompt: expected characters of the corpus") and said.count("\n") == 1


def test_top_k_and_temperature() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature: float, top_k: int) -> set[int]:
        return {generate_module.choose(logits, temperature, top_k, generator) for _ in range(500)}

    assert drawn(0.0, 0) == {1}
    assert drawn(1.0, 2) == {1, 2}
    assert drawn(1.0, 0) == {0, 1, 2, 3}
    assert drawn(1e-300, 0) == {1}
