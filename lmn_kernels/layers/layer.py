"""What every form of the layer shares: its parts, its sizes, and how two nodes become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from python_ref.checks import check_device, check_float, check_positive, check_shape
from python_ref.layout import Layout
from python_ref.sequences import Sequences
from python_ref.tree import LinearMerge, build_tree_with

from ..backend import choice
from ..backend.transforms import autocasts, under_autocast
from ..ops.tree import build_tree
from ..states.memory import MemoryState
from .projections import SingleVectorAttention
from .summarizers import Expander, LinearMapSummarizer, make_summarizer

Mix = Callable[[Tensor], tuple[Tensor, MemoryState | None]]


class LayerBase(nn.Module):
    """The parts of a mixing layer; see `lmn_kernels.LogarithmicMixing` for the arguments."""

    sva: SingleVectorAttention
    expander: Expander | None
    summarizer: Callable[[Tensor, Tensor], Tensor]
    _stream: MemoryState | None

    def __init__(
        self,
        embedding: int,
        heads: int = 1,
        bank: int = 1,
        parallelize: bool = True,
        *,
        summarizer: str | Callable[[Tensor, Tensor], Tensor] = "linear",
        expand: int | None = None,
        init: str = "original",
        backend: str = "auto",
        step_backend: str | None = None,
        lean: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("embedding", embedding), ("heads", heads), ("bank", bank)):
            check_positive(name, value)
        choice.check_name(backend)
        self.embedding = embedding
        self.heads = heads
        self.bank = bank
        self.parallelize = parallelize
        self.backend = backend
        if step_backend is None:
            step_backend = "reference" if backend == "reference" else "auto"
        self.step_backend = step_backend
        choice.check_name(self.step_backend, "step_backend")
        self.lean = lean
        self.summarizer = make_summarizer(summarizer, embedding, bank, init, device, dtype)
        self.sva = SingleVectorAttention(embedding, heads, device=device, dtype=dtype)
        self.expander = None
        if expand is not None:
            check_positive("expand", expand, 0)
            self.expander = Expander(embedding, expand, init, device=device, dtype=dtype)
        self._stream = None

    @property
    def expand(self) -> int:
        """k of the expander; 0 without one."""
        return self.expander.expand if self.expander is not None else 0

    def extra_repr(self) -> str:
        return f"embedding={self.embedding}, heads={self.heads}, bank={self.bank}, backend={self.backend!r}"

    def _check_input(self, x: Tensor) -> None:
        check_float("x", x)
        check_shape("x", x, (None, None, self.embedding), "[batch, length, embedding]")
        weight = self.sva.q.weight
        check_device("x", x, weight.device)
        if x.dtype != weight.dtype and not autocasts(x.device.type):
            raise TypeError(f"x: expected dtype {weight.dtype} of the layer (or torch.autocast), got {x.dtype}")

    def _layer(self, x: Tensor, mix: Mix) -> tuple[Tensor, MemoryState | None]:
        """What surrounds the mixing: nothing here, norms and residuals in a block."""
        return mix(x)

    def _fit(self, state: MemoryState, batch: int, tokens: int, device: torch.device) -> MemoryState:
        if not isinstance(state, MemoryState):
            raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
        state.check_for(batch, self.embedding, self.bank, self.expand, device)
        return state.with_room(state.max_position + tokens)

    def _nodes(self, flat: Tensor, sequences: Sequences, token: Tensor | None, carried: Tensor | None) -> Tensor:
        summarizer, asked = self.summarizer, choice.wanted(self.backend, "build_tree")
        named = asked not in ("auto", "reference")
        if isinstance(summarizer, LinearMapSummarizer):
            # Folding multiplies 1+k matrices of E×E into W; it pays once there are more nodes than that.
            # Kernels take the folded form alone.
            if self.expander is None or named or flat.shape[0] > self.embedding:
                merge = summarizer.merge()
                if self.expander is not None:
                    merge = self.expander.fold(merge)
                scale = None if merge.scale is None else under_autocast(merge.scale)
                merge = LinearMerge(under_autocast(merge.weight), under_autocast(merge.bias), scale)
                return build_tree(flat, merge, sequences, token=token, carried=carried, backend=self.backend)
        elif named:
            raise choice.BackendError(
                f"backend={asked!r} cannot serve build_tree: a callable summarizer runs on the reference alone"
            )
        layout = self._layout(sequences, flat.device)
        return build_tree_with(self._merge, flat, self.bank, token, carried, layout)

    def _layout(self, sequences: Sequences, device: torch.device) -> Layout:
        return Layout(sequences, self.expand, device)

    def _merge(self, left: Tensor, right: Tensor) -> Tensor:
        """Stacks ``[P, h, m, E]`` of two nodes → the stack ``[P, h+k, m, E]`` of their summary."""
        if self.expander is not None:
            left, right = self.expander(left), self.expander(right)
        return self.summarizer(left, right)
