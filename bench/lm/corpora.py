"""Character corpora: the standard library of this Python, a text file, or Tiny Shakespeare."""

from __future__ import annotations

import hashlib
import sysconfig
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.errors import InputError, RunError
from bench.files import write_file

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_SHARE = 0.9


@dataclass(frozen=True)
class Corpus:
    """A text as symbol numbers, split into training and validation.

    Attributes:
        name: what the user asked for.
        digest: sha256 of the UTF-8 bytes.
        vocabulary: every character of the text, in code point order; its index is the symbol.
        train, validation: ``[N]`` int64, the first 90 % of the text and the rest.
    """

    name: str
    digest: str
    vocabulary: str
    train: Tensor
    validation: Tensor

    @classmethod
    def from_text(cls, name: str, text: str) -> Corpus:
        data = text.encode("utf-8")
        if text:
            points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
        else:
            points = torch.empty(0, dtype=torch.int32)
        symbols, ids = torch.unique(points, return_inverse=True)
        cut = int(TRAIN_SHARE * len(ids))
        vocabulary = "".join(map(chr, symbols.tolist()))
        return cls(name, hashlib.sha256(data).hexdigest(), vocabulary, ids[:cut], ids[cut:])

    def check_length(self, block: int) -> None:
        """Whether windows of ``block`` characters and their targets can be drawn from both splits.

        Raises:
            InputError: a split has fewer than ``block + 2`` characters.
        """
        for name, split in (("training", self.train), ("validation", self.validation)):
            if len(split) < block + 2:
                raise InputError(
                    f"data: expected at least block + 2 = {block + 2} characters in the {name} split of "
                    f"{self.name}, got {len(split)}"
                )

    def check_streams(self, rows: int, block: int) -> None:
        """Whether ``rows`` streams can be cut from both splits: of a segment and its targets, of a character and its.

        Raises:
            InputError: a split is too short.
        """
        for name, split, least in (("training", self.train, block + 1), ("validation", self.validation, 2)):
            if len(split) < rows * least:
                raise InputError(
                    f"data: expected at least batch · {least} = {rows * least} characters in the {name} split of "
                    f"{self.name}, got {len(split)}"
                )

    def unigram_entropy(self) -> float:
        """Nats per character of the validation split under the character frequencies of the training split.

        The loss of the best model that looks at no context. One is added to every count: a character
        may be missing from the training split.
        """
        size = len(self.vocabulary)
        counts = torch.bincount(self.train, minlength=size).double() + 1
        share = torch.bincount(self.validation, minlength=size).double() / max(1, len(self.validation))
        return float(-(share * (counts / counts.sum()).log()).sum())


def load(data: str) -> Corpus:
    """The corpus ``stdlib``, ``tinyshakespeare``, or the text file at a path.

    Raises:
        InputError: it cannot be read, or is no UTF-8 text.
    """
    if data == "stdlib":
        return Corpus.from_text(data, _stdlib_text())
    if data == "tinyshakespeare":
        return Corpus.from_text(data, _tinyshakespeare().decode("utf-8"))
    try:
        content = Path(data).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(
            f"data: expected stdlib, tinyshakespeare or a readable text file, got {data!r} ({_reason(error)})"
        ) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data: expected UTF-8 text in {data}, got byte {error.start} that is none") from error
    return Corpus.from_text(data, text)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error)


def _stdlib_text() -> str:
    """The top-level modules of the standard library, in the order of their names.

    Another Python version gives another text. Modules with characters outside printable ASCII are left
    out, which keeps the vocabulary below 100 symbols; so is `_sysconfigdata`, which holds paths of the
    machine it was built on.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    allowed = {chr(point) for point in range(32, 127)} | {"\n", "\t"}
    modules = []
    for path in sorted(folder.glob("*.py"), key=lambda path: path.name):
        if path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_bytes().decode("ascii").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):
            continue
        if allowed.issuperset(text):
            modules.append(text)
    if not modules:
        raise InputError(f"data: expected Python sources in {folder}, got none; give --data the path of a text file")
    return "\n".join(modules)


def _tinyshakespeare() -> bytes:
    cached = Path.home() / ".cache" / "lmn_kernels" / "tinyshakespeare.txt"
    try:
        content = cached.read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() == TINYSHAKESPEARE_SHA256:
        return content
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=30) as answer:
            content = answer.read()
    except (OSError, ValueError) as error:
        raise InputError(
            f"data: tinyshakespeare cannot be downloaded ({_reason(error)}); give --data the path of a text file"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != TINYSHAKESPEARE_SHA256:
        raise InputError(
            f"data: expected sha256 {TINYSHAKESPEARE_SHA256} of {TINYSHAKESPEARE_URL}, got {digest}; "
            "give --data the path of a text file"
        )
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_file(cached, content)
    except (OSError, RunError):
        pass  # a home that cannot be written costs a download each time, not the run
    return content


def windows(ids: Tensor, starts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[B, block]`` (int64) of the windows of ``ids [N]`` that begin at ``starts [B]``."""
    rows = ids[starts[:, None] + torch.arange(block + 1, device=starts.device)]
    return rows[:, :-1], rows[:, 1:]


def window_starts(seed: int, purpose: str, index: int, rows: int, length: int, block: int) -> Tensor:
    """Where the windows of batch ``index`` begin: ``[rows]`` int64, a pure function of the arguments."""
    return _draw(f"{seed} {purpose} {index}", rows, length - block)


def streams(ids: Tensor, rows: int) -> Tensor:
    """``ids [N]`` as ``rows`` streams that follow one another, ``[rows, N // rows]``; the rest is left out."""
    length = len(ids) // rows
    return ids[: rows * length].view(rows, length)


def stream_starts(seed: int, epoch: int, rows: int, length: int) -> Tensor:
    """Where an epoch begins in each stream: ``[rows]`` int64, 0 … length-1, a pure function of the arguments."""
    return _draw(f"{seed} stream {epoch}", rows, length)


def segments(text: Tensor, starts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[B, block]`` of the segments that begin at ``starts [B]`` in the streams ``text [B, N]``.

    After the last character of a stream comes its first.
    """
    places = (starts[:, None] + torch.arange(block + 1, device=starts.device)) % text.shape[1]
    rows = text.gather(1, places)
    return rows[:, :-1], rows[:, 1:]


def _draw(key: str, rows: int, below: int) -> Tensor:
    mixed = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") % (1 << 63))
    return torch.randint(below, (rows,), generator=generator)
