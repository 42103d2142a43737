"""LaMemo as a model: a stack of layers over a stream with one memory, and a language model of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_ref.checks import check_device, check_float, check_ids, check_positive, check_shape, check_tensor, plain_int
from python_ref.precision import compute_dtype, no_autocast

from ..backend.transforms import autocasts
from ..states.look_ahead import LookAheadState
from .look_ahead import LookAheadMemoryAttention, LookAheadMemoryLayer, Reach
from .parameters import drawn_by, parameter, says_its_weight
from .tensor_parallel import check_local

# The original's numbers: no look-ahead (Transformer-XL), and three ways to tell ahead from behind.
ATTENTION_TYPES = (0, 3, 31, 32)
_BIASES = {3: ("r_r_bias_future",), 32: ("r_r_bias_future", "r_w_bias_future")}


class LookAheadMemory(nn.Module):
    """A stack of layers over a stream that comes in segments, with one memory (LaMemo; or Transformer-XL).

    The memory keeps what the first layer read, and for every layer but the last what attention gave each row so far
    and the log-sum-exp of its scores. Each segment computes the memory's rows of the other layers anew, with
    gradients, and lets them see the segment's first token. No gradient flows between segments.

    Args:
        embedding: E.
        layers: of them.
        heads: H.
        head_size: D; E / H where None.
        feedforward: width of the feed-forward; 4·E where None.
        memory_length: rows that are kept at most; 0 for plain causal attention.
        attn_type: 3 (the memory's rows have their own position bias), 32 (their own content bias as well), 31 (negative
            distances in place of biases), or 0: Transformer-XL, which looks back only.
        clamp_length: distances beyond it count as it; None for all as they are.
        pre_norm, dropout, merge_eps, backend: those of `LookAheadMemoryAttention`; dropout applies to the input and
            the table of distances as well.
        window: how far the memory's rows look ahead: ``"segment"``, as many keys as the segment has tokens, as the
            original does; ``"previous"``, as many as the segment before had, so that with segments of unequal lengths
            each pair is seen once.
        keep_last: compute the last layer's memory, too, as the original does, though no result depends on it.
    """

    r_w_bias: nn.Parameter
    r_r_bias: nn.Parameter

    def __init__(
        self,
        embedding: int,
        layers: int,
        heads: int,
        head_size: int | None = None,
        *,
        feedforward: int | None = None,
        memory_length: int,
        attn_type: int = 3,
        clamp_length: int | None = None,
        pre_norm: bool = False,
        dropout: float = 0.0,
        merge_eps: float = 0.0,
        window: str = "segment",
        keep_last: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        embedding, layers = check_positive("embedding", embedding), check_positive("layers", layers)
        memory_length = check_positive("memory_length", memory_length, 0)
        if embedding % 2:
            raise ValueError(f"embedding: expected an even number (half sines, half cosines), got {embedding}")
        kind = plain_int(attn_type)
        if kind is None or kind not in ATTENTION_TYPES:
            raise ValueError(f"attn_type: expected one of {', '.join(map(str, ATTENTION_TYPES))}, got {attn_type!r}")
        if clamp_length is not None:
            clamp_length = check_positive("clamp_length", clamp_length)
        if window not in ("segment", "previous"):
            raise ValueError(f"window: expected segment or previous, got {window!r}")
        self.embedding, self.memory_length, self.attn_type = embedding, memory_length, kind
        self.clamp_length, self.window, self.keep_last = clamp_length, window, keep_last
        self.layers = nn.ModuleList(
            LookAheadMemoryLayer(
                embedding, heads, head_size, feedforward=4 * embedding if feedforward is None else feedforward,
                pre_norm=pre_norm, dropout=dropout, merge_eps=merge_eps, backend=backend, device=device, dtype=dtype,
            )
            for _ in range(layers)
        )  # fmt: skip
        attention: Any = self.layers[0].dec_attn
        self.heads, self.head_size = attention.heads, attention.head_size
        self.drop = nn.Dropout(dropout)
        for name in ("r_w_bias", "r_r_bias", *_BIASES.get(kind, ())):
            shape = self.heads, self.head_size
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                drawn_by(_draw_norm if isinstance(module, nn.LayerNorm) else _draw, module)
        self._draw_biases()

    def reset_parameters(self) -> None:
        """Draw the parameters as the original does (section 4: the biases of the memory's rows are drawn wider)."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        self._draw_biases()

    def _draw_biases(self) -> None:
        for name, bias in self.named_parameters(recurse=False):
            if name.endswith("_future"):
                nn.init.xavier_uniform_(bias)
            else:
                nn.init.normal_(bias, 0.0, 0.02)

    @property
    def looks_ahead(self) -> bool:
        return self.attn_type != 0

    def extra_repr(self) -> str:
        return f"attn_type={self.attn_type}, memory_length={self.memory_length}, window={self.window!r}"

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LookAheadState:
        """The state before the first segment, in the parameters' dtype and on their device unless told otherwise."""
        batch_size = check_positive("batch_size", batch_size, 0)
        if device is None and not self.r_w_bias.is_meta:  # where a wrapper that fetches weights may have left it
            device = self.r_w_bias.device
        like = torch.empty(0, dtype=dtype or self.r_w_bias.dtype, device=device)
        inputs = tuple(like.new_empty(batch_size, 0, self.embedding) for _ in range(self._memories))
        outputs = tuple(like.new_empty(batch_size, 0, own, self.head_size) for own in self._own_heads())
        lse = tuple(part.new_empty(part.shape[:3], dtype=compute_dtype(part.dtype)) for part in outputs)
        return LookAheadState(
            inputs, outputs, lse, torch.zeros(batch_size, dtype=torch.int64, device=like.device), 0, True
        )

    @property
    def _memories(self) -> int:
        """Layers whose input is kept."""
        return 1 if self.looks_ahead else len(self.layers)

    @property
    def _outputs(self) -> int:
        """Layers whose attention goes on."""
        return len(self.layers) - (not self.keep_last) if self.looks_ahead else 0

    def _own_heads(self) -> list[int]:
        """Heads of each layer's outputs on this rank; a layer may lie inside a wrapper, or be of another kind."""
        found = []
        for layer in list(self.layers)[: self._outputs]:
            own = (part.own_heads() for part in layer.modules() if isinstance(part, LookAheadMemoryAttention))
            found.append(next(own, self.heads))
        return found

    def forward(self, x: Tensor, state: LookAheadState | None = None) -> tuple[Tensor, LookAheadState]:
        """One segment of B streams.

        Args:
            x: ``[B, T, E]``, T ≥ 1.
            state: of the segments before; None before the first.

        Returns:
            ``y [B, T, E]`` and the new state.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape or a device is wrong, or the state is another model's or batch's.
        """
        state = self._fit(x, state)
        x = self.drop(x)
        reach = self._reach(x.shape[1], state)
        if self.looks_ahead:
            y, inputs, outputs, lse = self._look_ahead(x, state, reach)
        else:
            y, inputs = self._look_back(x, state, reach)
            outputs, lse = [], []
        return self.drop(y), self._next(inputs, outputs, lse, state, reach)

    def _look_ahead(
        self, x: Tensor, state: LookAheadState, reach: Reach
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        rows = torch.cat([state.inputs[0].to(x.dtype), x], 1)
        inputs, outputs, totals = [rows], [], []
        for number in range(len(self.layers)):
            kept = number < self._outputs
            before = (state.outputs[number], state.lse[number]) if kept else (None, None)
            rows, out, total = self.layers[number](rows, reach, looks_ahead=kept, output=before[0], lse=before[1])
            if kept:
                outputs.append(out)
                totals.append(total)
        return rows[:, -reach.tokens :], inputs, outputs, totals

    def _look_back(self, x: Tensor, state: LookAheadState, reach: Reach) -> tuple[Tensor, list[Tensor]]:
        inputs = []
        for number in range(len(self.layers)):
            rows = torch.cat([state.inputs[number].to(x.dtype), x], 1)
            inputs.append(rows)
            x, _, _ = self.layers[number](rows, reach, looks_ahead=False)
        return x, inputs

    def _next(
        self, inputs: list[Tensor], outputs: list[Tensor], lse: list[Tensor], state: LookAheadState, reach: Reach
    ) -> LookAheadState:
        grown = LookAheadState(
            tuple(t.detach() for t in inputs), tuple(t.detach() for t in outputs), tuple(t.detach() for t in lse),
            state.start, reach.tokens, state.is_even,
        )  # fmt: skip
        kept = grown.last(self.memory_length)
        if state.is_even or kept.length > reach.tokens:
            return kept
        # Nothing that was there before the segment is left, so nothing is missing.
        return kept.replace(is_even=True)

    def _fit(self, x: Tensor, state: LookAheadState | None) -> LookAheadState:
        check_local("x", x, "give the model x.to_local(), the same on every rank of a tensor-parallel group")
        check_float("x", x)
        check_shape("x", x, (None, None, self.embedding), "[batch, tokens, embedding]")
        if x.shape[1] < 1:
            raise ValueError("x: expected at least one token, got 0")
        weight = self.r_w_bias
        check_device("x", x, weight.device)
        if x.dtype != weight.dtype and not autocasts(x.device.type):
            raise TypeError(f"x: expected dtype {weight.dtype} of the parameters (or torch.autocast), got {x.dtype}")
        if state is None:
            return self.init_state(x.shape[0], device=x.device)
        if not isinstance(state, LookAheadState):
            raise TypeError(f"state: expected a LookAheadState, got {type(state).__name__}")
        # Of layers that have their own heads on each rank, attention itself checks the number.
        heads = [own if own == self.heads else None for own in self._own_heads()]
        state.check_for(x.shape[0], self.embedding, self._memories, heads, self.head_size)
        check_device("state", state.start, x.device)
        return state.last(self.memory_length)

    def _reach(self, tokens: int, state: LookAheadState) -> Reach:
        memory = state.length
        window = state.tokens if self.window == "previous" and state.tokens else tokens
        distances, future_row = self._distances(tokens + memory, memory if self.looks_ahead else 0)
        u, v = self.r_w_bias, self.r_r_bias
        ahead: list[Tensor] = [getattr(self, f"{name}_future", own) for name, own in (("r_w_bias", u), ("r_r_bias", v))]
        start = None if state.is_even else state.start
        return Reach(tokens, distances, future_row, torch.stack([u, v, *ahead]), start, window)

    def _distances(self, keys: int, memory: int) -> tuple[Tensor, int]:
        """Sinusoids of the distances 0 … keys-1 and, where they differ, of those ahead: 0 … memory from a later row."""
        weight = self.r_w_bias
        wide = compute_dtype(weight.dtype)
        behind = torch.arange(keys, device=weight.device, dtype=wide)
        # What stands in the place of a dropout may draw, too.
        draws = self.training and getattr(self.drop, "p", 1) > 0
        parts, own = [behind], self.attn_type == 31 or draws
        if memory and own:
            ahead = torch.arange(memory + 1, device=weight.device, dtype=wide)
            parts.append(-ahead if self.attn_type == 31 else ahead)
        distance = torch.cat(parts)
        if self.clamp_length is not None:
            distance = distance.clamp(max=self.clamp_length)
        with no_autocast(weight.device):
            # The original's frequencies are numbers of float32, also where all else is float64.
            even = torch.arange(0, self.embedding, 2, device=weight.device, dtype=torch.float32)
            angle = distance[:, None] * (1 / 10000 ** (even / self.embedding))
            table = torch.cat([angle.sin(), angle.cos()], -1).to(weight.dtype)
        return self.drop(table), keys if len(parts) == 2 else 0


class LookAheadLanguageModel(LookAheadMemory):
    """A language model: embedding scaled by √E, `LookAheadMemory`, and an output layer with the embedding's weights.

    The original's checkpoints load strictly, those of its ``attn_type`` 0 included, where it was trained without
    ``div_val`` and cut-offs.

    Args:
        symbols: size of the vocabulary.

    The other arguments are those of `LookAheadMemory`.
    """

    def __init__(
        self,
        symbols: int,
        embedding: int,
        layers: int,
        heads: int,
        head_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(embedding, layers, heads, head_size, **place, **options)
        embedding, symbols = self.embedding, check_positive("symbols", symbols)
        # Under the original's names.
        self.word_emb = nn.ModuleDict({"emb_layers": nn.ModuleList([nn.Embedding(symbols, embedding, **place)])})
        self.crit = nn.ModuleDict({"out_layers": nn.ModuleList([_TiedOutput(symbols, **place)])})
        self.symbols = symbols
        drawn_by(_draw, self._table())
        self.register_load_state_dict_pre_hook(_untie_checkpoint)  # type: ignore[no-untyped-call]

    def forward(self, ids: Tensor, state: LookAheadState | None = None) -> tuple[Tensor, LookAheadState]:
        """``ids [B, T]``, int64 → logits ``[B, T, symbols]`` of the symbol after each, and the new state."""
        check_tensor("ids", ids)
        check_shape("ids", ids, (None, None), "[batch, tokens]")
        check_ids("ids", ids, ids.shape, 0, self.symbols - 1)
        y, state = super().forward(self._table()(ids) * self.embedding**0.5, state)
        return self.crit["out_layers"][0](y, self._symbols(y.device)), state  # type: ignore[index]

    def _table(self) -> nn.Embedding:
        table: nn.Embedding = self.word_emb["emb_layers"][0]  # type: ignore[index]
        return table

    def _symbols(self, device: torch.device) -> Tensor:
        """The embedding of every symbol: its weights, or, where they are not at hand or not all, what it returns."""
        table = self._table()
        if says_its_weight(table, nn.Embedding):
            return parameter(table, "weight")
        rows: Tensor = table(torch.arange(self.symbols, device=device))
        return rows


class _TiedOutput(nn.Module):
    """The output layer but for its weight, which is the embedding's: one parameter cannot come apart."""

    def __init__(self, symbols: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(symbols, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


def _draw(parameters: dict[str, Tensor | None], mean: float = 0.0) -> None:
    weight, bias = (parameters.get(name) for name in ("weight", "bias"))
    if weight is not None:
        nn.init.normal_(weight, mean, 0.02)
    if bias is not None:
        nn.init.zeros_(bias)


def _draw_norm(parameters: dict[str, Tensor | None]) -> None:
    _draw(parameters, 1.0)


def _same(copy: Tensor, table: Tensor) -> bool:
    """Whether two copies agree, where they have values at all."""
    if copy.is_meta or table.is_meta:
        return copy.shape == table.shape
    return copy.shape == table.shape and torch.allclose(copy.to(table), table, rtol=0, atol=0, equal_nan=True)


def _untie_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Drop, in place, the second copy of the tied weight, and the original's table of frequencies.

    Raises:
        ValueError: the copies differ.
    """
    name = f"{prefix}crit.out_layers.0.weight"
    copy, table = state_dict.pop(name, None), state_dict.get(f"{prefix}word_emb.emb_layers.0.weight")
    if copy is not None and table is not None and not _same(copy, table):
        raise ValueError(f"{name}: expected the weights of word_emb.emb_layers.0, to which it is tied, got others")
    state_dict.pop(f"{prefix}pos_emb.inv_freq", None)
