"""What constructors and sizes take: integers of any kind, kept as plain ones, and the backends that there are."""

from __future__ import annotations

import enum
import json

import pytest
import torch

import lmn_kernels
from lmn_kernels import (
    ExpanderSummarizerLogarithmicMemory,
    FeedForward,
    LogarithmicMemory,
    LogarithmicMixing,
    LookAheadLanguageModel,
    LookAheadMemory,
    LookAheadMemoryAttention,
    LookAheadMemoryLayer,
    MemoryState,
    attend,
    look_ahead_attend,
)
from lmn_kernels.layers.look_ahead_model import ATTENTION_TYPES
from python_ref.checks import plain_int
from python_ref.sequences import Sequences

numpy = pytest.importorskip("numpy", reason="needs numpy: pip install lmn-kernels[test]")


class Size(enum.IntEnum):
    FOUR = 4


# Of each public constructor its integers, with values that fit.
CONSTRUCTORS = {
    LogarithmicMixing: {"embedding": 8, "heads": 2, "bank": 3, "expand": 1},
    LogarithmicMemory: {"embedding": 8, "heads": 2, "bank": 3},
    ExpanderSummarizerLogarithmicMemory: {"embedding": 8, "heads": 2, "bank": 3, "expand": 1},
    FeedForward: {"embedding": 8, "width": 12},
    LookAheadMemoryAttention: {"embedding": 8, "heads": 2, "head_size": 3},
    LookAheadMemoryLayer: {"embedding": 8, "heads": 2, "head_size": 3, "feedforward": 12},
    LookAheadMemory: {
        "embedding": 8, "layers": 2, "heads": 2, "head_size": 3, "feedforward": 12, "memory_length": 5,
        "attn_type": 32, "clamp_length": 4,
    },
    LookAheadLanguageModel: {"symbols": 7, "embedding": 8, "layers": 2, "heads": 2, "memory_length": 5},
}  # fmt: skip
# Those of which None means that there is none.
OPTIONAL = {"head_size", "clamp_length"}


def kept(module: torch.nn.Module) -> dict[str, object]:
    """What a module and those below it keep in place of tensors."""
    return {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, (int, float, numpy.generic))
    }


@pytest.mark.parametrize("kind", CONSTRUCTORS)
@pytest.mark.parametrize("make", [numpy.int64, numpy.int32, numpy.uint8, numpy.array], ids=lambda make: make.__name__)
def test_numpys_integers_make_the_same_module(kind, make):
    plain = kind(**CONSTRUCTORS[kind])
    module = kind(**{name: make(value) for name, value in CONSTRUCTORS[kind].items()})
    assert kept(module) == kept(plain) and repr(module) == repr(plain)
    assert not any(isinstance(value, numpy.generic) for value in kept(module).values())
    assert [p.shape for p in module.parameters()] == [p.shape for p in plain.parameters()]


CASES = [(kind, name) for kind, integers in CONSTRUCTORS.items() for name in integers]


@pytest.mark.parametrize("kind, name", CASES, ids=lambda part: getattr(part, "__name__", part))
def test_what_is_no_integer_is_refused_by_name(kind, name):
    least = 0 if name in ("expand", "memory_length") else 1
    expected = f"{name}: expected an integer of at least {least}, got "
    if name == "attn_type":
        expected = f"{name}: expected one of {', '.join(map(str, ATTENTION_TYPES))}, got "
    optional = name in OPTIONAL or (kind is LogarithmicMixing and name == "expand")
    optional |= kind is LookAheadMemory and name == "feedforward"
    none = [] if optional or kind is ExpanderSummarizerLogarithmicMemory else [None]
    for wrong in (True, 4.0, "4", numpy.float64(4), numpy.bool_(True), torch.tensor(4), numpy.int64(-1), *none):
        with pytest.raises(ValueError) as raised:
            kind(**{**CONSTRUCTORS[kind], name: wrong})
        assert str(raised.value) == f"{expected}{wrong!r}"


def test_sizes_of_states():
    layer, eight = LogarithmicMixing(8, 2, 2), numpy.int64(8)
    state = layer.init_state(numpy.int64(3), max_position=eight)
    assert (state.batch_size, state.levels) == (3, 3)
    empty = MemoryState.empty(numpy.int64(3), eight, numpy.int64(2), expand=numpy.int64(1), levels=numpy.int64(3))
    assert json.loads(json.dumps([empty.expand, empty.levels, empty.with_room(numpy.int64(40)).levels])) == [1, 3, 5]
    for name in ("embedding", "bank", "expand", "levels"):
        sizes = {"embedding": 8, "bank": 2, "expand": 0, "levels": 3, name: 1.5}
        with pytest.raises(ValueError) as raised:
            MemoryState.empty(3, **sizes)
        assert str(raised.value) == f"{name}: expected an integer of at least 0, got 1.5"
    memory = LookAheadMemory(8, 1, 2, memory_length=5)
    _, after = memory(torch.randn(2, 4, 8), memory.init_state(numpy.int64(2)))
    assert after.last(numpy.int64(3)).length == 3


def test_numbers_of_operations():
    two = numpy.int64(2)
    qkv, qv = torch.randn(4, 24), torch.randn(1, 5, 16)
    sequences = Sequences.equal(1, 4)
    expected, _ = attend(qkv, qv, heads=2, sequences=sequences)
    assert torch.equal(attend(qkv, qv, heads=two, sequences=sequences)[0], expected)
    q, kv, bias, table = (torch.randn(*shape) for shape in ((1, 5, 2, 4), (1, 5, 2, 2, 4), (4, 2, 4), (9, 2, 4)))
    expected, _ = look_ahead_attend(q, kv, bias, table, tokens=2, window=2, future_row=5)
    got, _ = look_ahead_attend(q, kv, bias, table, tokens=two, window=two, future_row=numpy.int64(5))
    assert torch.equal(got, expected)
    packed = torch.tensor([0, 2, 5])
    layer, x = LogarithmicMixing(8, 2), torch.randn(1, 5, 8)
    got = layer(x, cu_seqlens=packed, max_length=numpy.int64(3))
    assert torch.equal(got, layer(x, cu_seqlens=packed, max_length=3))


def test_an_integer_of_another_kind_is_a_plain_one():
    for value in (numpy.int16(4), Size.FOUR, numpy.array(4)):
        assert type(plain_int(value)) is int and plain_int(value) == 4
    assert LogarithmicMixing(Size.FOUR, 2).extra_repr().startswith("embedding=4, heads=2,")


def test_a_layer_of_numpys_sizes_compiles():
    layer = LogarithmicMixing(numpy.int64(8), numpy.int64(2), numpy.int64(2))
    x = torch.randn(2, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)


# Backends that nothing public serves, by what is constructed.
OURS = {"backend": "auto, reference, triton, cpp", "step_backend": "auto, reference, cpp"}
BACKENDS = {
    LogarithmicMixing: OURS,
    LogarithmicMemory: OURS,
    ExpanderSummarizerLogarithmicMemory: OURS,
    LookAheadMemoryAttention: {"backend": "auto, reference, triton"},
    LookAheadMemoryLayer: {"backend": "auto, reference, triton"},
    LookAheadMemory: {"backend": "auto, reference, triton"},
    LookAheadLanguageModel: {"backend": "auto, reference, triton"},
}


def test_every_constructor_of_the_package_is_listed():
    made = {thing for name in lmn_kernels.__all__ if isinstance(thing := getattr(lmn_kernels, name), type)}
    made = {kind for kind in made if issubclass(kind, torch.nn.Module)} - {lmn_kernels.LinearMapSummarizer}
    assert set(CONSTRUCTORS) == made == {*BACKENDS, FeedForward}


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_backend_that_serves_nothing_of_it_is_refused_by_the_constructor(kind):
    for name, served in BACKENDS[kind].items():
        for wrong in {"cpp", "triton", "xx"} - set(served.split(", ")):
            with pytest.raises(ValueError) as raised:
                kind(**CONSTRUCTORS[kind], **{name: wrong})
            assert str(raised.value) == f"{name}: expected one of {served}, got {wrong!r}"
