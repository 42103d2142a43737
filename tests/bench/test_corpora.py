"""The corpora of the main job: splits, digests, the download, and what is said about unusable ones."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch

from bench.errors import InputError
from bench.lm import corpora
from bench.lm.corpora import Corpus, load, segments, stream_starts, streams, window_starts, windows


def test_text_becomes_symbols_and_back() -> None:
    text = "häß\n" * 5 + "…😀"
    corpus = Corpus.from_text("name", text)
    assert corpus.vocabulary == "".join(sorted(set(text)))
    ids = torch.cat([corpus.train, corpus.validation])
    assert ids.dtype == torch.int64
    assert "".join(corpus.vocabulary[i] for i in ids.tolist()) == text
    assert len(corpus.train) == int(0.9 * len(text))
    assert corpus.digest == hashlib.sha256(text.encode()).hexdigest()


def test_unigram_entropy() -> None:
    corpus = Corpus.from_text("name", "a" * 6 + "b" * 3 + "b")
    # Train: 6 a, 3 b; validation: one b; one added to every count.
    assert corpus.unigram_entropy() == pytest.approx(-math.log(4 / 11), abs=1e-12)
    unseen = Corpus.from_text("name", "a" * 9 + "b")
    assert unseen.unigram_entropy() == pytest.approx(-math.log(1 / 11), abs=1e-12)


@pytest.mark.parametrize(
    "rows, block, said",
    [
        (5, 17, None),
        (5, 18, "expected at least batch · 19 = 95 characters in the training split of short, got 90"),
        (6, 5, "expected at least batch · 2 = 12 characters in the validation split of short, got 10"),
    ],
)
def test_shortest_streams(rows: int, block: int, said: str | None) -> None:
    corpus = Corpus.from_text("short", "ab" * 50)  # 90 and 10 characters
    if said is None:
        corpus.check_streams(rows, block)
    else:
        with pytest.raises(InputError, match=said):
            corpus.check_streams(rows, block)


@pytest.mark.parametrize("block, fits", [(8, True), (9, False)])
def test_shortest_corpus(block: int, fits: bool) -> None:
    corpus = Corpus.from_text("short", "ab" * 50)  # 90 and 10 characters
    if fits:
        corpus.check_length(block)
    else:
        with pytest.raises(InputError, match="expected at least block \\+ 2 = 11 characters in the validation split"):
            corpus.check_length(block)


def test_every_window_lies_in_the_split() -> None:
    ids = torch.arange(20)
    starts = window_starts(1, "train", 0, 2000, len(ids), 5)
    x, target = windows(ids, starts, 5)
    assert x.shape == target.shape == (2000, 5)
    assert torch.equal(x + 1, target)
    assert x.min() == 0 and target.max() == 19


def test_batches_are_a_function_of_their_number() -> None:
    def starts(*key: int | str) -> list[int]:
        return window_starts(key[0], key[1], key[2], 8, 10_000, 5).tolist()  # type: ignore[arg-type]

    torch.manual_seed(5)
    first = starts(1, "train", 3)
    torch.manual_seed(6)
    assert starts(1, "train", 3) == first
    others = [starts(2, "train", 3), starts(1, "evaluate train", 3), starts(1, "train", 4)]
    assert all(other != first for other in others)


def test_streams_are_the_text_in_pieces() -> None:
    ids = torch.arange(50, 73)
    text = streams(ids, 3)
    assert text.tolist() == [list(range(50 + 7 * row, 57 + 7 * row)) for row in range(3)]  # 71 and 72 are left out


def test_segments_are_slices_of_a_ring() -> None:
    text = streams(torch.arange(21), 3)
    x, target = segments(text, torch.tensor([0, 2, 5]), 4)
    assert x.tolist() == [[0, 1, 2, 3], [9, 10, 11, 12], [19, 20, 14, 15]]
    assert target.tolist() == [[1, 2, 3, 4], [10, 11, 12, 13], [20, 14, 15, 16]]
    assert torch.equal(segments(text, torch.tensor([7, 9, 12]), 4)[0], x)  # a round later


def test_starts_of_an_epoch_are_a_function_of_seed_and_epoch() -> None:
    first = stream_starts(1, 3, 200, 67)
    torch.manual_seed(5)
    assert torch.equal(stream_starts(1, 3, 200, 67), first)
    assert first.dtype == torch.int64 and first.min() == 0 and first.max() == 66
    assert not torch.equal(stream_starts(1, 4, 200, 67), first)
    assert not torch.equal(stream_starts(2, 3, 200, 67), first)


def test_a_path(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"eins\r\nzwei")
    corpus = load(str(path))
    assert corpus.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "\r" in corpus.vocabulary


@pytest.mark.parametrize("kind, said", [("missing", "No such file"), ("folder", "Is a directory"), ("bytes", "UTF-8")])
def test_unusable_paths(tmp_path: Path, kind: str, said: str) -> None:
    path = tmp_path / "data"
    if kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(b"abc\xff")
    with pytest.raises(InputError) as caught:
        load(str(path))
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_standard_library() -> None:
    corpus = load("stdlib")
    assert len(corpus.train) > 1_000_000
    assert set(corpus.vocabulary) <= {chr(point) for point in range(32, 127)} | {"\n", "\t"}
    assert corpus.digest == load("stdlib").digest


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that takes the place of Tiny Shakespeare on the net, and a home of its own."""
    content = b"To be, or not to be\n" * 100
    source = tmp_path / "served.txt"
    source.write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE_URL", source.as_uri())
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    return source


def _cache() -> Path:
    return Path.home() / ".cache" / "lmn_kernels" / "tinyshakespeare.txt"


def test_tinyshakespeare_is_the_known_one() -> None:
    assert corpora.TINYSHAKESPEARE_SHA256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_download_is_kept(server: Path) -> None:
    first = load("tinyshakespeare")
    assert [path.name for path in _cache().parent.iterdir()] == ["tinyshakespeare.txt"]
    server.unlink()
    assert load("tinyshakespeare").digest == first.digest


def test_damaged_cache_is_replaced(server: Path) -> None:
    load("tinyshakespeare")
    _cache().write_bytes(_cache().read_bytes()[:50])
    load("tinyshakespeare")
    assert _cache().read_bytes() == server.read_bytes()


def test_wrong_download_is_refused(server: Path) -> None:
    server.write_bytes(b"something else")
    with pytest.raises(InputError, match="expected sha256 .* got .* path of a text file"):
        load("tinyshakespeare")
    assert not _cache().exists()


def test_offline(server: Path) -> None:
    server.unlink()
    with pytest.raises(InputError, match="cannot be downloaded .* give --data the path of a text file") as caught:
        load("tinyshakespeare")
    assert "\n" not in str(caught.value)


def test_home_that_cannot_be_written(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(server))  # a file: no folder can be made in it
    assert len(load("tinyshakespeare").train) == 1800
