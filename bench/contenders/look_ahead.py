"""LaMemo in comparisons: its sizes with their FLOPs and bytes, its inputs, and who can do its operations.

These are attention, of a segment over memory and itself and of the memory over what came after it, and the post-norm
layer around it. Sections are those of docs/lamemo-definition.md.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.measure.contender import OURS, BaseProblem, Form, Provider, Size
from lmn_kernels import LookAheadMemoryLayer, look_ahead_attend
from lmn_kernels.layers.look_ahead import Reach
from python_ref import look_ahead_definition as definition
from python_ref.precision import compute_dtype

from . import look_ahead_literal as literal
from .compiled import compile_whole
from .provider import compile_mode, no_compiler, ours_missing, own

ATTENTION, LAYER = "look-ahead attention", "look-ahead layer"
OPERATIONS = (ATTENTION, LAYER)
_STAGES = {ATTENTION: ("attend",), LAYER: ("project", "attend", "out", "feedforward")}


@dataclass(frozen=True)
class LookAheadShape(Size):
    """A segment, its memory and a layer: (B, T, M, E, H, D, F); T is ``length``, F the feed-forward's width."""

    memory: int
    embedding: int
    heads: int
    head_size: int
    feedforward: int

    @property
    def elements(self) -> int:
        return self.batch * self.keys * self.embedding

    @property
    def keys(self) -> int:
        """K = M + T."""
        return self.memory + self.length

    @property
    def inner(self) -> int:
        """A = H·D."""
        return self.heads * self.head_size

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, in each row of the batch and each head (sections 2 and 9)."""
        tokens, memory = self.length, self.memory
        behind = tokens * memory + tokens * (tokens + 1) // 2
        window = min(tokens, memory)
        return behind + (memory - window) * window + window * (window + 1) // 2

    def row(self) -> dict[str, Any]:
        head = {"name": self.name, "batch": self.batch, "tokens": self.length, "memory": self.memory}
        names = ("embedding", "heads", "head_size", "feedforward")
        return head | {name: getattr(self, name) for name in names}

    def flops(self, stage: str, direction: str = "forward") -> int:
        """Floating-point operations that a stage needs (section 9): a product's backward are two like it."""
        rows, wide = self.batch * self.keys, self.embedding * self.inner
        forward = {
            "project": 6 * rows * wide + 2 * self.keys * wide,
            "attend": 6 * self.batch * self.inner * self.pairs,
            "out": 2 * rows * wide,
            "feedforward": 4 * rows * self.embedding * self.feedforward,
        }[stage]
        return 2 * forward if direction == "backward" else forward

    def moved_bytes(self, stage: str, direction: str, itemsize: int) -> int:
        """Fewest bytes of a stage: what is read and what is made once, in the backward pass with their gradients."""
        rows, size, keys = self.batch * self.keys, self.embedding, self.keys
        x, heads = rows * size, rows * self.inner
        given, made, weights = {
            "project": (x + keys * size, 3 * heads + keys * self.inner, 4 * size * self.inner),
            "attend": (3 * heads + keys * self.inner + 4 * self.inner, heads, 0),
            "out": (x + heads, x, size * self.inner + 2 * size),
            "feedforward": (x, x, 2 * size * self.feedforward + self.feedforward + 3 * size),
        }[stage]
        elements = given + made + weights if direction == "forward" else 2 * given + made + 2 * weights
        normalisers = 0
        if stage == "attend":
            before = self.batch * self.memory * self.heads
            if direction == "forward":
                elements += before * self.head_size
                normalisers = before + rows * self.heads
            else:
                # The gradient needs no seeds, but what was made.
                elements += made
                normalisers = rows * self.heads
        return itemsize * elements + max(4, itemsize) * normalisers

    def least_ms(self, operation: str, ways: Sequence[str], rate: float, bandwidth: float, itemsize: int) -> float:
        return sum(
            1e3 * max(self.flops(stage, way) / rate, self.moved_bytes(stage, way, itemsize) / bandwidth)
            for stage in _STAGES[operation]
            for way in ways
        )


class LookAheadProblem(BaseProblem):
    """A segment behind a memory that is full, one of `OPERATIONS`.

    Attributes:
        layer: whose weights every contender shares.
        x: ``[B, K, E]`` rows of memory and segment.
        bias: ``[4, H, D]``; q ``[B, K, H, D]``, kv ``[B, K, 2, H, D]``, table ``[K, H, D]`` and segment_q
            ``[B, T, H, D]`` for `ATTENTION`; leaves like x.
        output: ``[B, M, H, D]``, lse ``[B, M, H]``: what the memory's rows begin with.
        distances: ``[K, E]`` sinusoids.
    """

    example = LookAheadShape("", 1, 16, 16, 128, 2, 64, 512)
    shape: LookAheadShape

    def __init__(
        self, operation: str, shape: LookAheadShape, dtype: torch.dtype, device: torch.device, backend: str = "auto"
    ):
        super().__init__(operation, shape, dtype, device, backend)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.layer = LookAheadMemoryLayer(
            shape.embedding, shape.heads, shape.head_size, feedforward=shape.feedforward, backend=backend, **options
        )
        for module in self.layer.modules():
            if isinstance(module, nn.Linear):
                # Scores of about one: softmaxes that are neither flat nor a single key's.
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        with torch.no_grad():
            # A ReLU's gradient jumps at 0. Nothing is so near that rounding would decide it.
            self.weights["pos_ff.CoreNet.0.bias"].fill_(4)[::2].neg_()
        rows, heads = (shape.batch, shape.keys), (shape.heads, shape.head_size)
        self.x = self._leaf(torch.randn(*rows, shape.embedding, **options))
        self.bias = self._leaf(torch.randn(4, *heads, **options))
        self.output = torch.randn(shape.batch, shape.memory, *heads, **options)
        # As if of T keys, so that the old and the new count alike.
        normaliser = torch.randn(*self.output.shape[:3], dtype=compute_dtype(dtype), device=device)
        self.lse = normaliser + math.log(shape.length)
        self.distances = _sinusoids(shape.keys, shape.embedding).to(**options)
        self.q = self.kv = self.table = self.segment_q = self.x
        if operation == ATTENTION:
            with torch.no_grad():
                q, kv, table = _projected(self, self.x)
            self.q, self.kv, self.table = (self._leaf(tensor) for tensor in (q, kv, table))
            self.segment_q = self._leaf(q[:, shape.memory :].contiguous())

    @property
    def reach(self) -> Reach:
        tokens = self.shape.length
        return Reach(tokens, self.distances, 0, self.bias, None, tokens)

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.layer.named_parameters())

    def leaves(self) -> dict[str, Tensor]:
        return {
            ATTENTION: {"q": self.q, "kv": self.kv, "bias": self.bias, "table": self.table},
            LAYER: {"x": self.x, "bias": self.bias, **self.weights},
        }[self.operation]

    def result_dtype(self, index: int) -> torch.dtype:
        """The log-sum-exp, which comes last, is in float32 at least."""
        last = {ATTENTION: 1, LAYER: 2}[self.operation]
        return compute_dtype(self.dtype) if index == last else self.dtype

    def exact(self, dtype: torch.dtype = torch.float64) -> LookAheadProblem:
        twin = super().exact(dtype)
        twin.layer = copy.deepcopy(self.layer).to(dtype)
        twin.layer.dec_attn.backend = "reference"
        twin.output, twin.lse, twin.distances = (part.to(dtype) for part in (self.output, self.lse, self.distances))
        twin.x, twin.bias, twin.q, twin.kv, twin.table, twin.segment_q = (
            self._leaf(tensor.to(dtype)) for tensor in (self.x, self.bias, self.q, self.kv, self.table, self.segment_q)
        )
        return twin


def _sinusoids(count: int, size: int) -> Tensor:
    """``[count, size]``: of every distance sines, then cosines (section 4)."""
    angle = torch.arange(count)[:, None] * 10000 ** (-torch.arange(0, size, 2) / size)
    return torch.cat([angle.sin(), angle.cos()], 1)


def _projected(problem: LookAheadProblem, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q of the rows ``queries [B, rows, E]``, kv of all, and the table."""
    attention, heads = problem.layer.dec_attn, problem.shape.heads
    kv = attention.kv_net(problem.x).unflatten(-1, (2, heads, -1))
    table = attention.r_net(problem.distances).unflatten(-1, (heads, -1))
    return attention.q_net(queries).unflatten(-1, (heads, -1)), kv, table


# What goes on to a loss is the first result; the others are the cache, which no gradient enters.


def our_attention(problem: LookAheadProblem) -> tuple[Tensor, Tensor]:
    out, lse = look_ahead_attend(
        problem.q, problem.kv, problem.bias, problem.table, tokens=problem.shape.length,
        output=problem.output, lse=problem.lse, backend=problem.backend,
    )  # fmt: skip
    return out, lse.detach()


def our_layer(problem: LookAheadProblem) -> tuple[Tensor, Tensor, Tensor]:
    y, out, lse = problem.layer(problem.x, problem.reach, looks_ahead=True, output=problem.output, lse=problem.lse)
    return y, out.detach(), lse.detach()


def attention_back(problem: LookAheadProblem) -> tuple[Tensor, Tensor]:
    """Transformer-XL's: the segment alone."""
    tokens = problem.shape.length
    out, lse = look_ahead_attend(
        problem.segment_q, problem.kv, problem.bias, problem.table, tokens=tokens, backend=problem.backend
    )
    return out, lse.detach()


def layer_back(problem: LookAheadProblem) -> tuple[Tensor, Tensor, Tensor]:
    y, out, lse = problem.layer(problem.x, problem.reach, looks_ahead=False)
    return y, out.detach(), lse.detach()


def _attention_back_form(problem: LookAheadProblem) -> Form:
    return Form(lambda: attention_back(problem), {**problem.leaves(), "q": problem.segment_q})


def _define(problem: LookAheadProblem, q: Tensor, kv: Tensor, bias: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, head by head: its distances by pair are large. Backward makes those of a head again."""
    tokens, found = problem.shape.length, []
    for head in range(problem.shape.heads):
        one = slice(head, head + 1)
        seeds = (problem.output[:, :, one], problem.lse[:, :, one]) if q.shape[1] > tokens else (None, None)
        inputs = q[:, :, one], kv[:, :, :, one], bias[:, one], table[:, one], *seeds
        found.append(checkpoint(definition.attend, *inputs, None, tokens, tokens, 0, use_reentrant=False))
    out, lse = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return out, lse


def _defined_attention(q: Callable[[LookAheadProblem], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def expected(problem: LookAheadProblem, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = _define(problem, q(problem), problem.kv, problem.bias, problem.table)
        return out, lse.detach()

    return expected


def _defined_layer(looks_ahead: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The layer with the definition in the operation's place."""

    def expected(problem: LookAheadProblem, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows = problem.x if looks_ahead else problem.x[:, problem.shape.memory :]
        q, kv, table = _projected(problem, rows)
        out, lse = _define(problem, q, kv, problem.bias, table)
        attention = problem.layer.dec_attn
        y = attention.layer_norm(rows + attention.o_net(out.flatten(2)))
        return problem.layer.pos_ff(y), out.detach(), lse.detach()

    return expected


def literal_attention(problem: LookAheadProblem, attend: Callable[..., Any] = literal.attend) -> tuple[Tensor, Tensor]:
    q, k, v, output = (_by_head(x) for x in (problem.q, *problem.kv.unbind(2), problem.output))
    left = problem.table.transpose(0, 1)
    right = left[:, 1 : problem.shape.memory + 1]
    out, lse = attend(q, k, v, left, right, problem.bias, output, problem.lse.transpose(1, 2))
    return _by_head(out), lse.detach().transpose(1, 2)


def literal_layer(problem: LookAheadProblem, layer: Callable[..., Any] = literal.layer) -> tuple[Tensor, ...]:
    y, out, lse = layer(
        problem.x, problem.distances, problem.bias, problem.weights, problem.shape.heads,
        _by_head(problem.output), problem.lse.transpose(1, 2),
    )  # fmt: skip
    return y, _by_head(out.detach()), lse.detach().transpose(1, 2)


def _by_head(x: Tensor) -> Tensor:
    """``[B, K, H, D]`` ⇄ ``[B, H, K, D]``."""
    return x.transpose(1, 2)


@functools.lru_cache(maxsize=4)
def _compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    return compile_whole(function, mode=mode)


def _compiled_attention(problem: LookAheadProblem) -> tuple[Tensor, Tensor]:
    return literal_attention(problem, _compiled(literal.attend, compile_mode(problem)))


def _compiled_layer(problem: LookAheadProblem) -> tuple[Tensor, ...]:
    return literal_layer(problem, _compiled(literal.layer, compile_mode(problem)))


def _attention_in_reference(problem: LookAheadProblem, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    return our_attention(problem)


def _layer_in_reference(problem: LookAheadProblem, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return our_layer(problem)


PROBLEM = LookAheadProblem


def registry() -> dict[str, dict[str, Provider]]:
    """Providers by operation."""
    missing = ours_missing("look_ahead_attend", lambda problem: problem.shape.head_size)
    one = functools.partial(Provider, by_position=False)
    attention = [
        one(OURS, own(our_attention), _defined_attention(lambda problem: problem.q), missing),
        one("literal", own(literal_attention), _attention_in_reference),
        one("literal, compiled", own(_compiled_attention), _attention_in_reference, no_compiler),
        one(
            "looks back alone", _attention_back_form, _defined_attention(lambda problem: problem.segment_q), missing,
            ours=False,
        ),
    ]  # fmt: skip
    layer = [
        one(OURS, own(our_layer), _defined_layer(True), missing),
        one("literal", own(literal_layer), _layer_in_reference),
        one("literal, compiled", own(_compiled_layer), _layer_in_reference, no_compiler),
        one("looks back alone", own(layer_back), _defined_layer(False), missing, ours=False),
    ]
    every = {ATTENTION: attention, LAYER: layer}
    return {operation: {provider.name: provider for provider in found} for operation, found in every.items()}
