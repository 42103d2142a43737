"""Let a checkpoint speak: the prompt is read at once, then one character at a time from constant memory.

python -m bench.lm.generate --checkpoint runs/demo/checkpoint.pt --prompt "def " --tokens 400
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.errors import InputError
from lmn_kernels import BackendError

from . import arguments
from .checkpoint import Checkpoint
from .models import LanguageModel, ModelConfig, build
from .ranks import Ranks


@dataclass(frozen=True)
class Sample:
    """What a model said.

    Attributes:
        text: the prompt and what follows it.
        tokens_per_second: of the streamed part.
        state_bytes: size of the state at the end.
    """

    text: str
    tokens_per_second: float
    state_bytes: int

    def summary(self) -> str:
        return f"[{self.tokens_per_second:,.0f} tokens/s, state of {self.state_bytes:,} bytes]"


def encode(prompt: str, vocabulary: str) -> list[int]:
    """The symbols of a prompt; of an empty one a newline, or the first symbol where there is none.

    Raises:
        InputError: the vocabulary lacks a character.
    """
    if not prompt:
        return [max(0, vocabulary.find("\n"))]
    index = {character: symbol for symbol, character in enumerate(vocabulary)}
    unknown = sorted(set(prompt) - set(index))
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise InputError(f"prompt: expected characters of the corpus that the model was trained on, got {listed}")
    return [index[character] for character in prompt]


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """The next symbol from ``logits [symbols]``: the likeliest at temperature 0, otherwise drawn."""
    # On the CPU: one seed gives one text on every device, up to the rounding of the logits.
    logits = logits.detach().to("cpu", torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    # Divided after the maximum is taken off: a tiny temperature must not overflow.
    weights = torch.softmax((logits - logits.max()) / temperature, 0)
    return int(torch.multinomial(weights, 1, generator=generator))


@torch.inference_mode()
def generate(
    model: LanguageModel,
    vocabulary: str,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    emit: Callable[[str], None],
) -> Sample:
    """Stream ``tokens`` characters after a prompt.

    Args:
        model: with ``prefill`` and ``step``.
        vocabulary: the character of every symbol.
        prompt: see `encode`.
        tokens: how many characters to add.
        temperature, top_k: see `choose`.
        seed: of the draws.
        emit: called with the prompt, then with each character as it comes.

    Raises:
        InputError: the vocabulary lacks a character of the prompt.
    """
    symbols = encode(prompt, vocabulary)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    emit(prompt)
    logits, state = model.prefill(torch.tensor([symbols], device=device))
    text, begin = [prompt], time.perf_counter()
    for _ in range(tokens):
        symbol = choose(logits[0], temperature, top_k, generator)
        text.append(vocabulary[symbol])
        emit(vocabulary[symbol])
        logits, state = model.step(torch.tensor([symbol], device=device), state)
    seconds = time.perf_counter() - begin
    return Sample("".join(text), tokens / seconds if tokens else 0.0, model.state_bytes(state))


def emit_to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def load_model(path: Path, backend: str = "auto") -> tuple[LanguageModel, str]:
    """The model of a checkpoint, on the CPU, and its vocabulary.

    Raises:
        InputError: there is no usable checkpoint at ``path``.
    """
    checkpoint = Checkpoint.load(path)
    try:
        model = build(ModelConfig(**checkpoint.model_config), backend)
        model.load_state_dict(checkpoint.model)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"checkpoint: {path} does not fit this version: {error}") from error
    # The parameters' dtype is the one they were trained in.
    return model.to(next(iter(checkpoint.model.values())).dtype), checkpoint.vocabulary


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.lm.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt", default="", help="text to go on from (default: a newline)")
    parser.add_argument("--tokens", type=int, default=400, help="characters to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest character")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0: among all")
    parser.add_argument("--seed", type=arguments.seed, default=1)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    parser.add_argument(
        "--backend", type=arguments.backend, default="auto", help="auto (default), reference, triton or cpp"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    flags = parser.parse_args(argv)
    try:
        for name in ("tokens", "temperature", "top_k", "threads"):
            if not getattr(flags, name) >= 0:
                raise InputError(f"{name}: expected at least 0, got {getattr(flags, name)}")
        if flags.threads:
            torch.set_num_threads(flags.threads)
        model, vocabulary = load_model(flags.checkpoint, flags.backend)
        model.to(Ranks.start(flags.device).device)
        sample = generate(
            model,
            vocabulary,
            flags.prompt,
            tokens=flags.tokens,
            temperature=flags.temperature,
            top_k=flags.top_k,
            seed=flags.seed,
            emit=emit_to_stdout,
        )
        emit_to_stdout(f"\n{sample.summary()}\n")
    except (InputError, BackendError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone (`| head`); without this the interpreter complains once more on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
