"""Parallel and sequential form of a trained model over a long text, in float32 and bfloat16.

Both forms read the same text, the validation split, whatever they would have said themselves; the logits of every
position are compared. The parallel form runs on the backend of the command line. The sequential form steps from
position 0 and an empty state, in the extension where it can serve, and then over the first `REFERENCE_TOKENS` tokens on
the reference too.

Rows: ``comparison``, ``dtype``, ``model``, ``trained_steps`` (0, and a ``label``, where a rehearsal made the model
up), ``data``, ``tokens``, ``served`` and ``parallel_served`` (backends of the step and of the attention of the
parallel form), ``max_difference`` and ``mean_difference`` (absolute, of logits), ``first_disagreement`` (the first
position, from 0, where the likeliest symbols differ; null where there is none), ``disagreements`` (how many such
positions). Comparisons with float32 in the bfloat16 case say what the dtype itself costs.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bench.errors import InputError
from bench.extras import tqdm
from bench.lm.checkpoint import Checkpoint
from bench.lm.corpora import Corpus, load
from bench.lm.generate import load_model
from bench.lm.models import RECURRENT, LogMem, ModelConfig, build
from bench.lm.train_lm import CHECKPOINT
from bench.measure.journal import Row
from bench.measure.runner import Case, Context
from bench.report import chapters
from lmn_kernels import LogarithmicMemory
from lmn_kernels.backend.choice import why_not

TOKENS = 16_384
QUICK_TOKENS = 512
# The reference's step takes a few milliseconds a token.
REFERENCE_TOKENS = 1024
QUICK_MODEL: dict[str, Any] = {
    "model": "logmem",
    "positions": 0,
    "embedding": 16,
    "layers": 2,
    "heads": 2,
    "bank": 2,
    "expand": 0,
    "summarizer": "linear",
    "init": "original",
    "feedforward": "wide",
}
FORMS = "parallel and sequential"
DTYPE_PARALLEL = "bfloat16 and float32, both parallel"
DTYPE_SEQUENTIAL = "bfloat16 sequential and float32 parallel"


def add_arguments(add: Callable[..., Any]) -> None:
    add("--checkpoint", help="of bench.lm.train_lm (default: paper-table1's LogMem; --quick: a model without training)")
    add("--tokens", type=int, default=TOKENS, help=f"default: {TOKENS}; --quick takes {QUICK_TOKENS} at most")
    add("--data", help="tinyshakespeare (default; --quick: stdlib), stdlib, or the path of a UTF-8 text file")


def cases(context: Context) -> list[Case]:
    subject = _subject(context)
    # In the name, so that no invocation holds the rows of two models.
    digest = subject.about["model_sha256"][:8]
    return [
        Case(f"float32/{digest}", functools.partial(_measure_float32, subject)),
        Case(f"bfloat16/{digest}", functools.partial(_measure_bfloat16, subject)),
    ]


@dataclass(frozen=True)
class Subject:
    """A model in float32 and the text that it reads.

    Attributes:
        model: left as it is; see `taking`.
        ids: ``[T]`` int64.
        backend: of the parallel form.
        about: what every row says of both.
    """

    model: LogMem
    ids: Tensor
    backend: str
    about: Row

    def taking(self, dtype: torch.dtype) -> LogMem:
        """A copy whose parameters are of ``dtype``."""
        return copy.deepcopy(self.model).to(dtype)


def _subject(context: Context) -> Subject:
    options, quick = context.options, context.quick
    tokens = min(options["tokens"], QUICK_TOKENS) if quick else options["tokens"]
    if tokens < 1:
        raise InputError(f"tokens: expected at least 1, got {tokens}")
    data = options["data"] or ("stdlib" if quick else "tinyshakespeare")
    # Its name alone: a path says more of the machine than of the text.
    about: Row = {"data": Path(data).name, "tokens": tokens, "parallel_served": context.backend}
    if quick and not options["checkpoint"]:
        corpus = load(data)
        model = _untrained(len(corpus.vocabulary))
        about |= {"model": "logmem", "trained_steps": 0, "label": "freshly initialised, not trained"}
    else:
        path = _checkpoint(context)
        saved = Checkpoint.load(path)
        kind = saved.model_config.get("model")
        if kind == "gpt2" or kind in RECURRENT:
            raise InputError(f"checkpoint: expected a LogMem model, which has two forms, got {kind} in {path}")
        loaded, vocabulary = load_model(path)
        model = cast(LogMem, loaded)
        corpus = load(data)
        if corpus.vocabulary != vocabulary:
            raise InputError(f"data: expected the characters that {path} was trained on, got others in {data}")
        about |= {"model": kind, "trained_steps": saved.step}
    parameters = b"".join(value.detach().numpy().tobytes() for value in model.state_dict().values())
    about["model_sha256"] = hashlib.sha256(parameters).hexdigest()
    model = model.to(context.device, torch.float32).eval()
    return Subject(model, _text(corpus, tokens).to(context.device), context.backend, about)


def _checkpoint(context: Context) -> Path:
    if context.options["checkpoint"]:
        return Path(context.options["checkpoint"])
    path = context.scratch.parent / "paper-table1" / "logmem-32-1337" / CHECKPOINT
    if not path.exists():
        raise InputError(
            f"checkpoint: expected a file at {path}, got none; make it with "
            "`python -m bench paper-table1 --models logmem`, or name another with --checkpoint"
        )
    return path


def _untrained(symbols: int) -> LogMem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        return cast(LogMem, build(ModelConfig(symbols=symbols, **QUICK_MODEL)))


def _text(corpus: Corpus, tokens: int) -> Tensor:
    """The validation split, over again where it is shorter."""
    split = corpus.validation
    if not len(split):
        raise InputError(f"data: expected a validation split with characters in {corpus.name}, got an empty one")
    return split.repeat(-(-tokens // len(split)))[:tokens]


def _blocks(model: LogMem) -> list[LogarithmicMemory]:
    return cast(list[LogarithmicMemory], list(model.blocks))


def _step_backend(model: LogMem) -> str:
    """By name: ``"auto"`` leaves some that can serve alone."""
    weight = model.head.weight
    return "reference" if why_not("cpp", "step", weight.device, weight.dtype) else "cpp"


@torch.inference_mode()
def parallel(model: LogMem, ids: Tensor, backend: str) -> Tensor:
    """Logits ``[T, symbols]`` (float32) of ``ids [T]``, read at once."""
    for block in _blocks(model):
        block.backend = backend
    return model(ids[None])[0].float()


@torch.inference_mode()
def sequential(model: LogMem, ids: Tensor, backend: str) -> Tensor:
    """Logits ``[T, symbols]`` (float32) of ``ids [T]``, read one by one from an empty state."""
    for block in _blocks(model):
        block.step_backend = backend
    state = [block.init_state(1, max_position=len(ids)) for block in _blocks(model)]
    logits = []
    often = 0.1 if sys.stderr.isatty() else 15
    for token in tqdm(ids.split(1), desc=f"{backend} step", unit="token", leave=False, mininterval=often):
        found, state = model.step(token, state)
        logits.append(found[0])
    return torch.stack(logits).float()


def compare(left: Tensor, right: Tensor) -> Row:
    """What two tensors of logits ``[T, symbols]`` differ by; ``gap`` where one is not finite."""
    difference = (left.double() - right.double()).abs()
    unusable = (~difference.isfinite()).any(1).nonzero()
    if len(unusable):
        return {"gap": f"the logits are not finite at {len(unusable)} positions, first at {int(unusable[0])}"}
    differing = (left.argmax(1) != right.argmax(1)).nonzero()
    return {
        "max_difference": float(f"{float(difference.max()):.4g}"),
        "mean_difference": float(f"{float(difference.mean()):.4g}"),
        "first_disagreement": int(differing[0]) if len(differing) else None,
        "disagreements": len(differing),
    }


def _measure_float32(subject: Subject) -> list[Row]:
    model = subject.taking(torch.float32)
    at_once, about = _read_at_once(model, subject)
    return _compare_steps(model, subject, at_once, about)[1]


def _measure_bfloat16(subject: Subject) -> list[Row]:
    exact, _ = _read_at_once(subject.taking(torch.float32), subject)
    model = subject.taking(torch.bfloat16)
    at_once, about = _read_at_once(model, subject)
    by_steps, rows = _compare_steps(model, subject, at_once, about)
    return [
        *rows,
        {**about, "comparison": DTYPE_PARALLEL, "served": None, **compare(at_once, exact)},
        {**about, "comparison": DTYPE_SEQUENTIAL, "served": rows[0]["served"], **compare(by_steps, exact)},
    ]


def _read_at_once(model: LogMem, subject: Subject) -> tuple[Tensor, Row]:
    """Logits of the parallel form, and what every row of this dtype says."""
    dtype = str(model.head.weight.dtype).removeprefix("torch.")
    return parallel(model, subject.ids, subject.backend), {"dtype": dtype, **subject.about}


def _compare_steps(model: LogMem, subject: Subject, at_once: Tensor, about: Row) -> tuple[Tensor, list[Row]]:
    """Logits of the sequential form, and the rows of its comparison with the parallel one."""
    about = {**about, "comparison": FORMS}
    backend = _step_backend(model)
    by_steps = sequential(model, subject.ids, backend)
    rows = [{**about, "served": backend, **compare(at_once, by_steps)}]
    if backend != "reference":
        first = subject.ids[:REFERENCE_TOKENS]
        found = compare(at_once[: len(first)], sequential(model, first, "reference"))
        rows.append({**about, "tokens": len(first), "served": "reference", **found})
    return by_steps, rows


show = chapters.agreement
