"""What the tests of the sequential form share: its backends, its layers, and states to start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from bench.close import TOLERANCE, assert_close
from lmn_kernels import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory, LogarithmicMixing, MemoryState
from lmn_kernels.backend.choice import why_not
from tests.support.variants import VARIANTS, Variant

PARTS = ("position", "token", "nodes", "q", "v")


class Layer(Variant):
    """One whose biases are not zero, and whose norms weigh every feature differently."""

    def layer(self, dtype: torch.dtype = torch.float64, **more) -> LogarithmicMixing:
        layer = self.made(dtype, **more)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) / 4)
        return layer

    def made(self, dtype: torch.dtype, **more) -> LogarithmicMixing:
        return super().layer(dtype, **more)


class Block(Layer):
    def made(self, dtype: torch.dtype, **more) -> LogarithmicMixing:
        kind = ExpanderSummarizerLogarithmicMemory if "expand" in self.options else LogarithmicMemory
        options = {"init": "variance_preserving", **self.options, **more}
        return kind(self.embedding, self.heads, self.bank, dtype=dtype, **options)


CALLABLE = ("module", "function", "expander_module")  # summarizers that only the reference can call
LAYERS = [
    *(Layer(v.name, v.embedding, v.heads, v.bank, v.options) for v in VARIANTS if v.name not in CALLABLE),
    # Wide enough for whole vector registers, several rows and columns of them, and what is left over of each.
    Layer("wide_72_conv_mixed", 72, 3, 2, {"summarizer": "conv_mixed"}),
    Layer("wide_102", 102, 6, 3),
    Layer("wide_136_separable_expander", 136, 2, 2, {"summarizer": "depthwise_separable", "expand": 1}),
    Layer("wide_300", 300, 5, 2),
    Layer("wide_299_expander_k2", 299, 13, 1, {"expand": 2}),
    Block("block", 12, 3, 2),
    Block("block_expander", 8, 2, 2, {"expand": 1, "feedforward_mult": 1, "summarizer": "conv"}),
    Block("block_without_feedforward", 8, 4, 1, {"feedforward_mult": 0}),
    Block("block_of_2112_features", 64, 4, 1, {"feedforward_mult": 33}),
]
BY_NAME = {variant.name: variant for variant in LAYERS}

_absent = why_not("cpp", "step", torch.device("cpu"), torch.float32)
CPP = pytest.param("cpp", marks=[pytest.mark.ext, pytest.mark.skipif(_absent is not None, reason=str(_absent))])
every_backend = pytest.mark.parametrize("backend", ["reference", CPP])
extension = pytest.mark.parametrize("backend", [CPP])
every_layer = pytest.mark.parametrize("variant", LAYERS, ids=str)


def layers(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", [BY_NAME[name] for name in names], ids=str)


few = layers("linear", "conv_mixed", "depthwise_separable", "expander_k1", "block")


def exact(variant: Variant, layer: LogarithmicMixing) -> LogarithmicMixing:
    """The layer in float64, with the same rounded parameters."""
    twin = variant.layer(step_backend="reference")
    twin.load_state_dict(layer.state_dict())
    return twin


def started(
    layer: LogarithmicMixing, positions: Sequence[int], tokens: int, dtype: torch.dtype = torch.float32
) -> MemoryState:
    """Random memories at these positions, with room for so many tokens more; zero where there is no node."""
    last = max(positions, default=0)
    state = layer.init_state(len(positions), max_position=last + tokens, dtype=dtype)
    state = state.replace(position=torch.tensor(positions, dtype=torch.int64), max_position=last)
    empty, no_node = (state.position == 0)[:, None], ~state.valid()[..., None, None]
    filled = {"token": torch.randn(state.token.shape).masked_fill(empty, 0).to(dtype)}
    for name in ("nodes", "q", "v"):
        filled[name] = torch.randn(state.nodes.shape).masked_fill(no_node, 0).to(dtype)
    return state.replace(**filled)


def one_by_one(layer: LogarithmicMixing, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """``layer.step`` over the tokens of ``x [B, T, E]``."""
    ys = []
    for token in x.split(1, 1):
        y, state = layer.step(token, state)
        ys.append(y)
    return torch.cat(ys, 1), state


def exact_steps(
    variant: Variant, layer: LogarithmicMixing, x: Tensor, state: MemoryState
) -> tuple[Tensor, MemoryState]:
    """What float64 gives for the tokens behind a state, on the same rounded parameters, tokens and memory."""
    with torch.no_grad():
        return one_by_one(exact(variant, layer), x.double(), state.to(dtype=torch.float64))


def parts(state: MemoryState) -> Iterator[tuple[str, Tensor]]:
    return ((name, getattr(state, name)) for name in PARTS)


def rows_of(state: MemoryState, *rows: int) -> MemoryState:
    return state.reorder(torch.tensor(rows, dtype=torch.int64))


def tolerance(*dtypes: torch.dtype) -> float:
    """That of the coarsest dtype."""
    return max(TOLERANCE[dtype][0] for dtype in dtypes)


def assert_same(name: str, got: Tensor, expected: Tensor) -> None:
    """To the bit; both finite."""
    assert torch.isfinite(got).all(), f"{name}: not finite"
    assert got.dtype == expected.dtype and got.shape == expected.shape, f"{name}: of another dtype or shape"
    assert torch.equal(got, expected), f"{name}: differs by up to {(got - expected).abs().max():.3g}"


def assert_same_state(got: MemoryState, expected: MemoryState) -> None:
    """To the bit, NaN included."""
    for name, tensor in parts(got):
        wanted = getattr(expected, name)
        assert tensor.dtype == wanted.dtype and tensor.shape == wanted.shape, name
        bits = [part.contiguous().view(torch.uint8) for part in (tensor, wanted)]
        assert torch.equal(*bits), name


def assert_state_close(got: MemoryState, expected: MemoryState, allowed: float) -> None:
    """However much room either has; what holds no node is exactly zero."""
    assert torch.equal(got.position, expected.position)
    for name, tensor in parts(got):
        if name == "position":
            continue
        wanted = getattr(expected, name)
        if name != "token":
            assert not tensor[~got.valid()].any(), f"{name}: not zero without a node"
            rows = min(tensor.shape[1], wanted.shape[1])
            tensor, wanted = tensor[:, :rows], wanted[:, :rows]
        assert_close(name, tensor, wanted, allowed)


def agree(backend: str, name: str, got: Tensor, expected: Tensor) -> None:
    """Rows do not know of each other in the extension, to the bit; the reference's products are torch's."""
    if backend == "cpp":
        assert_same(name, got, expected)
    else:
        assert_close(name, got, expected, tolerance(got.dtype))


def agree_on_state(backend: str, got: MemoryState, expected: MemoryState) -> None:
    if backend == "cpp":
        assert_same_state(got, expected)
    else:
        assert_state_close(got, expected, tolerance(got.nodes.dtype))
