"""The flags of `bench.lm.train_lm`, and what they mean together: defaults, presets, a checkpoint to go on from."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

from bench.errors import InputError

from . import arguments
from .models import FEEDFORWARDS, MODELS, RECURRENT, ModelConfig

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Settings:
    """One run. The flags of the command line have the same names; ``--help`` says what they do.

    ``memory`` and ``inner`` are None where the model has none, as in the files of runs that knew of neither.
    """

    model: str
    data: str
    out: str
    embedding: int
    layers: int
    heads: int
    bank: int
    expand: int
    summarizer: str
    init: str
    feedforward: str
    memory: int | None
    inner: int | None
    block: int
    batch: int
    steps: int
    lr: float
    schedule: str
    warmup: int
    grad_clip: float
    seed: int
    dtype: str
    eval_every: int
    eval_batches: int
    save_every: int
    prompt: str
    sample_tokens: int
    temperature: float
    top_k: int
    device: str
    backend: str
    compile: bool
    threads: int

    def model_config(self, symbols: int) -> ModelConfig:
        return ModelConfig(
            model=self.model,
            symbols=symbols,
            positions=self.block if self.model == "gpt2" else 0,
            embedding=self.embedding,
            layers=self.layers,
            heads=self.heads,
            bank=self.bank,
            expand=self.expand,
            summarizer=self.summarizer,
            init=self.init,
            feedforward=self.feedforward,
            memory=self.memory or 0,
            inner=self.inner or 0,
            block=self.block if self.model in RECURRENT else 0,
        )

    def to_save(self) -> dict[str, Any]:
        """What a checkpoint keeps: all but what belongs to the machine."""
        return {name: value for name, value in asdict(self).items() if name not in _MACHINE}


# A run may go on in another folder, or on another device.
_MACHINE = ("out", "device", "backend", "compile", "threads")

_DEFAULTS: dict[str, Any] = {
    "data": "stdlib",
    "embedding": 64,
    "layers": 4,
    "heads": 4,
    "bank": 1,
    "expand": 0,
    "summarizer": "linear",
    "init": "original",
    "feedforward": "wide",
    "memory": None,
    "inner": None,
    "block": 256,
    "batch": 16,
    "steps": 2000,
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup": 100,
    "grad_clip": 1.0,
    "seed": 1337,
    "dtype": "float32",
    "eval_every": 250,
    "eval_batches": 20,
    "save_every": 250,
    "prompt": "",
    "sample_tokens": 400,
    "temperature": 0.8,
    "top_k": 0,
    "device": "auto",
    "backend": "auto",
    "compile": False,
    "threads": 0,
}

_MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "logmem": {"bank": 2},
    "tinylogmem": {"bank": 2, "feedforward": "square"},
    "expsum": {"bank": 1, "expand": 1},
    "gpt2": {},
    # None: what `resolve` makes of block and embedding.
    **dict.fromkeys(RECURRENT, {"memory": None, "inner": None}),
}

# The original's experiments (docs/definition.md, section 7).
_PAPER: dict[str, Any] = {
    "layers": 4,
    "heads": 4,
    "batch": 16,
    "block": 512,
    "lr": 1e-3,
    "schedule": "constant",
    "warmup": 0,
    "grad_clip": 0.0,
    "steps": 5000,
    "eval_every": 500,
    "eval_batches": 200,
    "save_every": 500,
    "seed": 1337,
    "dtype": "float32",
    "summarizer": "linear",
    "init": "original",
}

_PRESETS: dict[str, dict[str, Any]] = {
    "paper-32": {**_PAPER, "embedding": 32},
    "paper-128": {**_PAPER, "embedding": 128},
    # Under three minutes on one core of a small machine. One thread: a second gains 1.4× on an idle machine, but
    # on a busy one threads that wait for each other after every small operation lose far more.
    "demo": {
        "embedding": 96,
        "layers": 2,
        "heads": 4,
        "block": 128,
        "batch": 8,
        "lr": 3e-3,
        "schedule": "cosine",
        "warmup": 50,
        "grad_clip": 1.0,
        "steps": 1500,
        "eval_every": 300,
        "eval_batches": 20,
        "save_every": 300,
        "prompt": "def ",
        "top_k": 20,
        "threads": 1,
    },
}

# The paper's table is not consistent with itself: TinyLogMem has one E→E layer in place of the feed-forward
# at E = 32 (42,305 parameters) and two at E = 128 (677,441), and GPT-2 has 512 positions at E = 32 (71,105)
# but 256 at E = 128 (841,281), although the text says a block of 512 throughout.
_PRESET_MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("paper-32", "tinylogmem"): {"feedforward": "single"},
    ("paper-128", "tinylogmem"): {"feedforward": "square"},
    ("paper-128", "gpt2"): {"block": 256},
}

_UNUSED: dict[str, tuple[str, ...]] = {
    "logmem": ("expand", "memory", "inner"),
    "tinylogmem": ("expand", "memory", "inner"),
    "expsum": ("memory", "inner"),
    "gpt2": ("bank", "expand", "summarizer", "init", "feedforward", "memory", "backend"),
    **dict.fromkeys(RECURRENT, ("bank", "expand", "summarizer", "init", "feedforward", "eval_batches")),
}


def parser() -> argparse.ArgumentParser:
    """The command line. Flags that are not given are absent from the namespace."""
    result = argparse.ArgumentParser(
        prog="python -m bench.lm.train_lm",
        description="Train a character language model, evaluate it, and let it speak.",
        argument_default=argparse.SUPPRESS,
        epilog="A flag beats the preset, a preset beats the checkpoint that --resume goes on from.",
    )
    add = result.add_argument
    add("--preset", choices=sorted(_PRESETS), help="settings of the paper's experiments, or of a run of minutes")
    add("--model", choices=MODELS, help="default: logmem; lamemo and transformer-xl carry a memory along the text")
    add("--data", help="stdlib (default), tinyshakespeare, or the path of a UTF-8 text file")
    add("--out", help="folder of the results (default: runs/MODEL); files of an earlier run in it are replaced")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    model = result.add_argument_group("model").add_argument
    for name, meaning in (
        ("embedding", "width E"),
        ("layers", "blocks"),
        ("heads", "attention heads, a divisor of E"),
        ("bank", "trees side by side"),
        ("expand", "k of the expander (expsum)"),
    ):
        model(f"--{name}", type=int, help=meaning)
    model("--summarizer", help="linear, conv, conv_mixed or depthwise_separable")
    model("--init", help="original or variance_preserving")
    model("--feedforward", choices=FEEDFORWARDS, help="layers E-4E-E, E-E-E, or one E-E")
    model("--memory", type=int, help="rows of memory (lamemo, transformer-xl; default: --block)")
    model("--inner", type=int, help="width of the feed-forward (gpt2, lamemo, transformer-xl; default: 4E)")
    train = result.add_argument_group("training").add_argument
    train("--block", type=int, help="characters in a window, or in a segment (lamemo, transformer-xl)")
    train(
        "--batch",
        type=int,
        help="windows in a step, over all processes; lamemo and transformer-xl: streams that the text is cut into, "
        "each read from end to end in segments, from another place in every epoch",
    )
    train("--steps", type=int)
    train("--lr", type=float, help="learning rate of AdamW")
    train("--schedule", choices=("cosine", "constant"), help="cosine falls to a tenth of --lr")
    train("--warmup", type=int, help="steps in which the learning rate rises")
    train("--grad-clip", type=float, help="largest norm of the gradient; 0 for any")
    train("--seed", type=arguments.seed)
    train("--dtype", choices=DTYPES, help="bfloat16 and float16: autocast over float32 parameters")
    train("--eval-every", type=int, help="steps between evaluations")
    train(
        "--eval-batches",
        type=int,
        help="batches of each split in an evaluation; lamemo and transformer-xl instead read the whole validation "
        "split, and as much of the training split, with a memory of their own",
    )
    train("--save-every", type=int, help="steps between checkpoints")
    sample = result.add_argument_group("sample at the end").add_argument
    sample("--prompt", help="text to go on from (default: a newline)")
    sample("--sample-tokens", type=int)
    sample("--temperature", type=float, help="0: always the likeliest character")
    sample("--top-k", type=int, help="draw among the k likeliest; 0: among all")
    machine = result.add_argument_group("machine").add_argument
    machine("--device", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    machine("--backend", type=arguments.backend, help="auto (default), reference, triton or cpp")
    machine("--compile", action="store_true", help="torch.compile the model")
    machine("--threads", type=int, help="CPU threads of each process; 0 leaves torch's choice")
    return result


def resolve(given: dict[str, Any], saved: dict[str, Any] | None) -> Settings:
    """The settings of a run.

    Args:
        given: flags of the command line, by name.
        saved: the settings of the checkpoint to go on from, or None.

    Raises:
        InputError: a value is out of range, or means nothing to the model.
    """
    given = {name: value for name, value in given.items() if name != "resume"}
    preset = given.pop("preset", None)
    saved = saved or {}
    model = given.get("model") or saved.get("model") or "logmem"
    values = {"model": model, "out": default_out(given), **_DEFAULTS, **_MODEL_DEFAULTS[model], **saved}
    if preset:
        # What the preset leaves open is the model's default, not what an older run had.
        values |= _MODEL_DEFAULTS[model] | _PRESETS[preset] | _PRESET_MODELS.get((preset, model), {})
    for name in _UNUSED[model]:
        if name in given:
            raise InputError(f"{name}: expected no value with model {model}, got {given[name]!r}")
    values |= given
    if model in RECURRENT:
        if values["memory"] is None:
            values["memory"] = values["block"]
        if values["inner"] is None:
            values["inner"] = 4 * values["embedding"]
    known = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in values.items() if name in known})
    _check(settings)
    return settings


def default_out(given: dict[str, Any]) -> str:
    """The folder of a run's results, known before there is a checkpoint to read."""
    return given.get("out") or f"runs/{given.get('model') or 'logmem'}"


def _check(settings: Settings) -> None:
    least = {"embedding": 1, "layers": 1, "heads": 1, "bank": 1, "expand": 0, "block": 2, "batch": 1, "steps": 0}
    least |= {"warmup": 0, "grad_clip": 0, "eval_every": 1, "eval_batches": 1, "save_every": 1, "lr": 0}
    least |= {"sample_tokens": 0, "temperature": 0, "top_k": 0, "threads": 0, "memory": 0, "inner": 1}
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:
            raise InputError(f"{name}: expected at least {bound}, got {value}")
    if settings.embedding % settings.heads:
        raise InputError(f"heads: expected a divisor of embedding {settings.embedding}, got {settings.heads}")
