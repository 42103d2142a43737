"""The language models that are compared: the LogMem family, the GPT-2 of its notebook, LaMemo and Transformer-XL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmn_kernels import (
    ExpanderSummarizerLogarithmicMemory,
    LogarithmicMemory,
    LookAheadLanguageModel,
    LookAheadState,
    MemoryState,
)

# Those that read a text in segments, with a memory of the segments before, and their ``attn_type``.
RECURRENT = {"lamemo": 3, "transformer-xl": 0}
MODELS = ("logmem", "tinylogmem", "expsum", "gpt2", *RECURRENT)
FEEDFORWARDS = ("wide", "square", "single")


@dataclass(frozen=True)
class ModelConfig:
    """What decides a model's parameters, and their names and shapes.

    Attributes:
        model: one of `MODELS`.
        symbols: size of the vocabulary.
        positions: rows of the position table of gpt2, the longest window it can see; 0 for the others.
        embedding, layers, heads: E, blocks, H.
        bank, expand, summarizer, init: those of `lmn_kernels.LogarithmicMemory`; ``expand`` for expsum only.
        feedforward: ``"wide"`` E→4E→E, ``"square"`` E→E→E, ``"single"`` one E→E layer and a SiLU. The
            paper calls both of the latter TinyLogMem: its parameter counts are those of ``"single"`` at
            E = 32 and of ``"square"`` at E = 128.
        memory, block: of the recurrent models the rows of memory and the characters of a segment; 0 for the others,
            and absent from their older checkpoints.
        inner: of these models and of gpt2 the width of the feed-forward, 0 for 4E; absent likewise.
    """

    model: str
    symbols: int
    positions: int
    embedding: int
    layers: int
    heads: int
    bank: int
    expand: int
    summarizer: str
    init: str
    feedforward: str
    memory: int = 0
    inner: int = 0
    block: int = 0


class LanguageModel(nn.Module):
    """What every model can do: read a prompt, then go on one symbol at a time."""

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Read a prompt ``ids [B, L]``, L ≥ 1: logits ``[B, symbols]`` of the next symbol, and the state."""
        raise NotImplementedError(f"{type(self).__name__} must define prefill()")

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read one symbol a row, ``ids [B]``: logits ``[B, symbols]`` of the next one, and the new state."""
        raise NotImplementedError(f"{type(self).__name__} must define step()")

    def state_bytes(self, state: Any) -> int:
        """Memory that a state takes."""
        raise NotImplementedError(f"{type(self).__name__} must define state_bytes()")

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class _Stack(LanguageModel):
    """Token embedding → blocks → LayerNorm → linear head."""

    def __init__(self, config: ModelConfig, blocks: list[nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(config.symbols, config.embedding)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.embedding)
        self.head = nn.Linear(config.embedding, config.symbols)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [B, L]`` → logits ``[B, L, symbols]`` of the symbol after each position."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)


class LogMem(_Stack):
    """A language model of LogMem blocks. Its state is one `MemoryState` per block."""

    def __init__(self, config: ModelConfig, backend: str = "auto"):
        super().__init__(config, [_logmem_block(config, backend) for _ in range(config.layers)])

    def prefill(self, ids: Tensor) -> tuple[Tensor, list[MemoryState]]:
        x, states = self.embed(ids), []
        for block in self._logmem_blocks():
            x, state = block.prefill(x)
            states.append(state)
        return self.head(self.norm(x[:, -1])), states

    def step(self, ids: Tensor, state: list[MemoryState]) -> tuple[Tensor, list[MemoryState]]:
        x, states = self.embed(ids[:, None]), []
        for block, old in zip(self._logmem_blocks(), state, strict=True):
            x, new = block.step(x, old)
            states.append(new)
        return self.head(self.norm(x[:, 0])), states

    def state_bytes(self, state: list[MemoryState]) -> int:
        return sum(part.nbytes for part in state)

    def _logmem_blocks(self) -> list[LogarithmicMemory]:
        return cast(list[LogarithmicMemory], list(self.blocks))


def _logmem_block(config: ModelConfig, backend: str) -> nn.Module:
    options: dict[str, Any] = {
        "summarizer": config.summarizer,
        "init": config.init,
        "backend": backend,
        "feedforward_mult": 1 if config.feedforward == "square" else 4,
    }
    block: LogarithmicMemory
    if config.model == "expsum":
        block = ExpanderSummarizerLogarithmicMemory(
            config.embedding, config.heads, config.bank, config.expand, **options
        )
    else:
        block = LogarithmicMemory(config.embedding, config.heads, config.bank, **options)
    if config.feedforward == "single":
        block.feedforward = nn.Sequential(nn.Linear(config.embedding, config.embedding), nn.SiLU())
    return block


class GPT2(_Stack):
    """The baseline of the original's notebook. Its state is the window of symbols that it can see.

    Every step reads the whole window again, as the notebook does: with learned positions nothing that
    was computed for a window is valid once it has slid.
    """

    def __init__(self, config: ModelConfig):
        inner = config.inner or 4 * config.embedding
        super().__init__(config, [_GPT2Block(config.embedding, config.heads, inner) for _ in range(config.layers)])
        self.positions = nn.Embedding(config.positions, config.embedding)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) + self.positions.weight[: ids.shape[1]]

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        window = ids[:, -self.positions.num_embeddings :]
        return self(window)[:, -1], window

    def step(self, ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.prefill(torch.cat([state, ids[:, None]], 1))

    def state_bytes(self, state: Tensor) -> int:
        return state.nbytes


class _GPT2Block(nn.Module):
    def __init__(self, embedding: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(embedding)
        self.norm2 = nn.LayerNorm(embedding)
        # The notebook has a Linear(E, E/H) per head for each of q, k and v; packed, they are drawn alike.
        self.qkv = nn.Linear(embedding, 3 * embedding, bias=False)
        self.out_proj = nn.Linear(embedding, embedding)
        self.feedforward = nn.Sequential(nn.Linear(embedding, inner), nn.ReLU(), nn.Linear(inner, embedding))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # The notebook scales by E, not by the size of a head.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=size**-0.5)
        x = x + self.out_proj(mixed.transpose(1, 2).reshape(batch, length, size))
        return x + self.feedforward(self.norm2(x))


class Recurrent(LanguageModel):
    """LaMemo or Transformer-XL. Its state is the memory that a segment leaves to the next."""

    def __init__(self, config: ModelConfig, backend: str = "auto"):
        super().__init__()
        self.block = config.block
        self.network = LookAheadLanguageModel(
            config.symbols,
            config.embedding,
            config.layers,
            config.heads,
            feedforward=config.inner,
            memory_length=config.memory,
            attn_type=RECURRENT[config.model],
            # For segments of one length it is the original's window. Where a shorter one follows, the last of a
            # text or a single symbol, the memory still sees all that came after it.
            window="previous",
            backend=backend,
        )

    def forward(self, ids: Tensor, state: LookAheadState | None = None) -> tuple[Tensor, LookAheadState]:
        """A segment ``ids [B, T]`` → logits ``[B, T, symbols]`` of the symbol after each position, and the new state.

        Args:
            state: of the segments before; None before the first.
        """
        return self.network(ids, state)

    def prefill(self, ids: Tensor) -> tuple[Tensor, LookAheadState]:
        # In segments as long as those of the training.
        first, *rest = ids.split(self.block, 1)
        logits, state = self(first)
        for segment in rest:
            logits, state = self(segment, state)
        return logits[:, -1], state

    def step(self, ids: Tensor, state: LookAheadState) -> tuple[Tensor, LookAheadState]:
        logits, state = self(ids[:, None], state)
        return logits[:, 0], state

    def state_bytes(self, state: LookAheadState) -> int:
        return state.nbytes


def build(config: ModelConfig, backend: str = "auto") -> LanguageModel:
    """The model of a configuration, its parameters drawn from torch's global generator.

    Raises:
        ValueError: a size does not fit; the message names it.
    """
    if config.embedding % config.heads:
        raise ValueError(f"heads: expected a divisor of embedding={config.embedding}, got {config.heads}")
    if config.feedforward not in FEEDFORWARDS:
        raise ValueError(f"feedforward: expected one of {', '.join(FEEDFORWARDS)}, got {config.feedforward!r}")
    if config.model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {config.model!r}")
    if config.model in RECURRENT:
        return Recurrent(config, backend)
    return GPT2(config) if config.model == "gpt2" else LogMem(config, backend)
