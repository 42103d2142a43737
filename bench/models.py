"""The language models that are compared: the LogMem family, and the GPT-2 of the original's notebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmn_kernels import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory, MemoryState

MODELS = ("logmem", "tinylogmem", "expsum", "gpt2")
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


class LanguageModel(nn.Module):
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


class LogMem(LanguageModel):
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


class GPT2(LanguageModel):
    """The baseline of the original's notebook. Its state is the window of symbols that it can see.

    Every step reads the whole window again, as the notebook does: with learned positions nothing that
    was computed for a window is valid once it has slid.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, [_GPT2Block(config.embedding, config.heads) for _ in range(config.layers)])
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
    def __init__(self, embedding: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(embedding)
        self.norm2 = nn.LayerNorm(embedding)
        # The notebook has a Linear(E, E/H) per head for each of q, k and v; packed, they are drawn alike.
        self.qkv = nn.Linear(embedding, 3 * embedding, bias=False)
        self.out_proj = nn.Linear(embedding, embedding)
        self.feedforward = nn.Sequential(
            nn.Linear(embedding, 4 * embedding), nn.ReLU(), nn.Linear(4 * embedding, embedding)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # The notebook scales by E, not by the size of a head.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=size**-0.5)
        x = x + self.out_proj(mixed.transpose(1, 2).reshape(batch, length, size))
        return x + self.feedforward(self.norm2(x))


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
    return GPT2(config) if config.model == "gpt2" else LogMem(config, backend)
