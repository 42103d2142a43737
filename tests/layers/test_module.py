"""The drop-in face: constructor, names, checkpoints, inits, errors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
import torch

import lmn_kernels
from bench.close import assert_close
from lmn_kernels import ExpanderSummarizerLogarithmicMemory, LogarithmicMemory, LogarithmicMixing

GOLDEN = Path(__file__).parents[1] / "golden"


def test_constructors_take_the_original_arguments():
    layer = LogarithmicMemory(8, 2, 3, False)
    assert (layer.bank, layer.parallelize) == (3, False)
    layer.parallelize = True
    assert layer(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    wide = ExpanderSummarizerLogarithmicMemory(8, 2, 1, 2, True)
    assert (wide.bank, wide.expand, wide.parallelize) == (1, 2, True)


def test_parameter_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in ExpanderSummarizerLogarithmicMemory(8, 2, 3, 2).named_parameters()}
    linear: dict[str, tuple[int, ...]] = {f"sva.{name}.weight": (8, 8) for name in ("q", "k", "v", "out_proj")}
    linear |= {f"sva.{name}.bias": (8,) for name in ("q", "k", "v", "out_proj")}
    assert shapes == linear | {
        "norm1.weight": (8,),
        "norm2.weight": (8,),
        "summarizer.weight": (3, 16, 8),
        "summarizer.bias": (3, 1, 8),
        "expander.conv_transpose.weight": (8, 8, 3),
        "expander.conv_transpose.bias": (8,),
        "feedforward.fc1.weight": (32, 8),
        "feedforward.fc1.bias": (32,),
        "feedforward.fc2.weight": (8, 32),
        "feedforward.fc2.bias": (8,),
    }
    conv = dict(LogarithmicMemory(8, 2, 3, summarizer="conv").named_parameters())
    assert conv["summarizer.conv.weight"].shape == (24, 8, 2) and conv["summarizer.conv.bias"].shape == (24,)
    mixed = dict(LogarithmicMemory(8, 2, 3, summarizer="conv_mixed").named_parameters())
    assert mixed["summarizer.conv.weight"].shape == (24, 24, 2)


def test_packed_notebook_checkpoint_loads_strictly_inside_a_model():
    layer = LogarithmicMemory(8, 2, 3)
    own = layer.state_dict()
    packed = {name: value for name, value in own.items() if not name.startswith(("sva", "feedforward"))}
    for part in ("weight", "bias"):
        packed[f"qkv.{part}"] = torch.cat([own[f"sva.{name}.{part}"] for name in "qkv"])
        packed[f"out_proj.{part}"] = own[f"sva.out_proj.{part}"]
        packed[f"feedforward.0.{part}"] = own[f"feedforward.fc1.{part}"]
        packed[f"feedforward.2.{part}"] = own[f"feedforward.fc2.{part}"]
    packed["summarizer.bias"] = own["summarizer.bias"][None]
    model = torch.nn.Sequential(torch.nn.Identity(), LogarithmicMemory(8, 2, 3))
    renamed = {f"1.{name}": value for name, value in packed.items()}
    before = set(renamed)
    model.load_state_dict(renamed, strict=True)
    assert set(renamed) == before, "the caller's dict is not ours to change"
    x = torch.randn(2, 11, 8)
    assert torch.equal(model(x), layer(x))


def test_a_wrong_checkpoint_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        LogarithmicMemory(8, 2, 2).load_state_dict(LogarithmicMemory(8, 2, 3).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        LogarithmicMemory(8).load_state_dict({})


@pytest.mark.parametrize(("mult", "width"), [(4, 32), (1, 8), (0.5, 4)])
def test_feedforward_of_any_width(mult, width):
    layer = LogarithmicMemory(8, feedforward_mult=mult)
    assert layer.feedforward.fc1.weight.shape == (width, 8)


def test_without_a_feedforward_nothing_is_left_unused():
    layer = LogarithmicMemory(8, feedforward_mult=0)
    layer(torch.randn(2, 9, 8)).sum().backward()
    assert layer.feedforward is None and layer.norm2 is None
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_original_init_is_xavier_by_pytorchs_rule_times_a_tenth():
    torch.manual_seed(0)
    layer = LogarithmicMemory(64, bank=4)
    size, bank = 64, 4
    # Fans of a 3-D tensor [m, 2E, E]: fan_in = 2E·E, fan_out = m·E; of [m, 1, E]: E and m·E.
    weight = 0.1 * (2 / (2 * size * size + bank * size)) ** 0.5
    bias = 0.1 * (2 / (size + bank * size)) ** 0.5
    assert layer.summarizer.weight.std().item() == pytest.approx(weight, rel=0.05)
    assert layer.summarizer.bias.std().item() == pytest.approx(bias, rel=0.2)


@pytest.mark.parametrize("summarizer", ["linear", "conv", "conv_mixed", "depthwise_separable"])
def test_variance_preserving_init_keeps_nodes_as_large_as_their_children(summarizer):
    torch.manual_seed(0)
    layer = LogarithmicMixing(64, bank=2, summarizer=summarizer, init="variance_preserving")
    slots = layer.parallel(torch.randn(4, 1024, 64))[:, -1].detach()
    deepest = slots[:, -2:].var().item()
    assert 0.4 < deepest < 2.5
    shrunk = LogarithmicMixing(64, bank=2, init="original").parallel(torch.randn(4, 1024, 64))[:, -1]
    assert shrunk[:, -2:].var().item() < 0.1


def test_variance_preserving_expander_neither_explodes_nor_vanishes():
    torch.manual_seed(0)
    layer = LogarithmicMixing(64, expand=1, init="variance_preserving")
    slots = layer.parallel(torch.randn(2, 256, 64))[:, -1].detach()
    assert 0.01 < slots[:, -9:].var().item() < 4


def test_mixing_alone_serves_in_a_strangers_block():
    mixing = LogarithmicMixing(16, 4, 2)
    assert {name.split(".")[0] for name, _ in mixing.named_parameters()} == {"summarizer", "sva"}
    block = LogarithmicMemory(16, 4, 2, feedforward_mult=0)
    block.load_state_dict(mixing.state_dict(), strict=False)
    x = torch.randn(2, 21, 16)
    assert_close("block", block(x).detach(), (x + mixing(block.norm1(x))).detach(), 1e-6)


def test_a_function_and_a_module_may_summarize():
    plain = LogarithmicMixing(8, summarizer=lambda left, right: 0.5 * (left + right))
    assert not any(name.startswith("summarizer") for name, _ in plain.named_parameters())
    slots = plain.parallel(torch.arange(8.0)[None, :, None].expand(1, 8, 8))
    assert_close("mean of eight tokens", slots[0, 7, 3], torch.full((8,), 3.5), 1e-6)


def test_a_summarizer_of_the_wrong_shape_is_named():
    layer = LogarithmicMixing(8, summarizer=lambda left, right: left[..., :4])
    with pytest.raises(ValueError, match=r"summarizer: expected a node of shape .* got"):
        layer(torch.randn(1, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding": 0}, "embedding: expected an integer of at least 1, got 0"),
        ({"embedding": 10, "heads": 3}, "heads: expected a divisor of embedding=10, got 3"),
        ({"bank": 0}, "bank: expected an integer of at least 1, got 0"),
        ({"heads": True}, "heads: expected an integer of at least 1, got True"),
        ({"summarizer": "quadratic"}, "summarizer: expected .* got 'quadratic'"),
        ({"init": "zeros"}, "init: expected one of original, variance_preserving, got 'zeros'"),
        ({"backend": "cudnn"}, "backend: expected one of .* got 'cudnn'"),
        ({"feedforward_mult": -1}, "feedforward_mult: expected a number of at least 0, got -1"),
    ],
)
def test_constructor_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogarithmicMemory(**{"embedding": 8} | arguments)


def test_expand_and_summarizer_of_wrong_kinds():
    with pytest.raises(ValueError, match="expand: expected an integer of at least 0, got -1"):
        ExpanderSummarizerLogarithmicMemory(8, expand=-1)
    with pytest.raises(TypeError, match="summarizer: expected a name or a callable"):
        LogarithmicMemory(8, summarizer=3)


def test_what_the_package_promises_is_there():
    for name in lmn_kernels.__all__:
        assert getattr(lmn_kernels, name) is not None
        assert lmn_kernels.__dict__[name].__doc__ or name == "__version__"


def test_attention_of_a_memory_with_an_odd_number_of_slots_is_refused():
    layer = LogarithmicMixing(8, bank=2)
    with pytest.raises(ValueError, match="memory: expected whole levels of 2 banks, got 4 slots"):
        layer.attention(torch.randn(1, 3, 4, 8))


def test_what_is_printed_tells_settings_and_no_tensors():
    layer = LogarithmicMemory(8, 2, 2, step_backend="reference", lean=True)
    assert "step_backend='reference', lean=True" in repr(layer) and "expand=0" in repr(layer)
    _, state = layer.prefill(torch.randn(3, 5, 8))
    assert repr(state) == (
        "MemoryState(batch_size=3, embedding=8, bank=2, expand=0, levels=2, max_position=5, torch.float32, cpu)"
    )
    assert "tensor(" not in repr(layer.step_weights()) and "heads=2" in repr(layer.step_weights())


@pytest.mark.parametrize("before", [None, 1])
def test_an_expander_of_another_height_says_how_high(before):
    """What a layer was made with is no matter where the part in its place says it itself."""
    other = LogarithmicMixing(8, 2, 2, expand=2)
    layer = LogarithmicMixing(8, 2, 2, expand=before)
    layer.expander = copy.deepcopy(other.expander)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 11, 8)
    assert layer.expand == 2 and torch.equal(layer(x), other(x))
    (_, state), (_, expected) = layer.prefill(x), other.prefill(x)
    assert torch.equal(layer.step(x[:, :1], state)[0], other.step(x[:, :1], expected)[0])


@pytest.mark.parametrize("name", ["lengths", "cu_seqlens", "attention_mask"])
def test_what_describes_a_batch_is_on_its_device(name):
    given = {"lengths": [3], "cu_seqlens": [0, 3], "attention_mask": [[1, 1, 1]]}[name]
    with pytest.raises(ValueError, match=f"{name}: expected device cpu, got meta"):
        LogarithmicMixing(8)(torch.zeros(1, 3, 8), **{name: torch.tensor(given, device="meta")})


@pytest.mark.parametrize("length", [1, 3])
def test_a_state_on_another_device_is_refused(length):
    layer = LogarithmicMixing(8)
    with pytest.raises(ValueError, match="state: expected device cpu, got meta"):
        layer(torch.zeros(1, length, 8), state=layer.init_state(1, device="meta"))


class Original(torch.nn.Module):
    """The original's parameters alone: their names, in the order that it registers and draws them."""

    def __init__(self, size: int, bank: int, expand: int | None = None):
        super().__init__()
        nn = torch.nn
        self.norm1, self.norm2 = nn.RMSNorm(size), nn.RMSNorm(size)
        self.summarizer = nn.Module()
        for name, shape in (("weight", (bank, 2 * size, size)), ("bias", (bank, 1, size))):
            self.summarizer.register_parameter(name, nn.Parameter(torch.randn(shape)))
        for parameter in self.summarizer.parameters():
            nn.init.xavier_normal_(parameter)
            parameter.data = parameter.data * 0.1
        self.sva = nn.ModuleDict({name: nn.Linear(size, size) for name in ("q", "k", "v", "out_proj")})
        self.feedforward = nn.ModuleDict({"fc1": nn.Linear(size, 4 * size), "fc2": nn.Linear(4 * size, size)})
        if expand is not None:
            self.expander = nn.ModuleDict({"conv_transpose": nn.ConvTranspose1d(size, size, 1 + expand)})


def both(expand: int | None) -> tuple[Original, LogarithmicMemory]:
    """The original and ours, each from the same seed."""
    torch.manual_seed(3)
    original = Original(8, 2, expand)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    ours = LogarithmicMemory(8, 2, 2) if expand is None else ExpanderSummarizerLogarithmicMemory(8, 2, 2, expand)
    assert torch.equal(torch.get_rng_state(), after), "what is drawn next is drawn alike"
    return original, ours


@pytest.mark.parametrize("expand", [None, 0, 2])
def test_a_seed_gives_the_originals_parameters_in_its_order(expand):
    original, ours = both(expand)
    want, got = dict(original.named_parameters()), dict(ours.named_parameters())
    assert list(got) == list(want)
    for name, value in got.items():
        assert_close(name, value.detach(), want[name].detach(), 1e-6)


@pytest.mark.parametrize("case", ["06_linear_L37", "08_conv_L37", "10_expander_L37"])
def test_the_order_is_that_of_the_originals_files(case):
    names = [name[6:] for name in numpy.load(GOLDEN / f"{case}.npz").files if name.startswith("param.")]
    if "expander" in case:
        layer = ExpanderSummarizerLogarithmicMemory(8, 2, 1, 1)
    else:
        layer = LogarithmicMemory(8, 2, 2, summarizer="conv" if "conv" in case else "linear")
    assert [name for name, _ in layer.named_parameters()] == names


@pytest.mark.parametrize("expand", [None, 1])
def test_states_of_the_originals_optimizers_load_onto_the_right_parameters(expand):
    original, ours = both(expand)
    theirs = torch.optim.AdamW(original.parameters())
    moments = {}
    for number, (name, parameter) in enumerate(original.named_parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
        moments[name] = 0.1 * (1.0 + number)
    theirs.step()
    optimizer = torch.optim.AdamW(ours.parameters())
    optimizer.load_state_dict(theirs.state_dict())
    for name, parameter in ours.named_parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        assert moment.shape == parameter.shape and moment.eq(moment.flatten()[0]).all(), name
        assert moment.flatten()[0].item() == pytest.approx(moments[name]), name


@pytest.mark.parametrize("kind", ["linear", "depthwise_separable"])
def test_a_summarizer_takes_pairs_side_by_side_as_the_originals_does(kind):
    summarizer = LogarithmicMixing(8, bank=3, summarizer=kind).summarizer
    for lead in ((2,), (2, 4), ()):
        pairs = torch.randn(*lead, 3, 5, 16)
        nodes = summarizer(pairs)
        left, right = pairs.transpose(-2, -3).chunk(2, -1)
        assert nodes.shape == (*lead, 3, 5, 8)
        assert_close("nodes", nodes.transpose(-2, -3).detach(), summarizer(left, right).detach(), 1e-6)
    if kind == "linear":
        literal = torch.einsum("...ijk,ikl->...ijl", pairs, summarizer.weight) + summarizer.bias
        assert_close("nodes", nodes.detach(), literal.detach(), 1e-6)
    for wrong in ((3, 5, 8), (2, 5, 16), (16,)):
        with pytest.raises(ValueError, match="pairs: expected shape .* got"):
            summarizer(torch.randn(wrong))


@pytest.mark.parametrize("kind", ["conv", "conv_mixed"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_convolutional_summarizer_takes_neighbours_as_the_originals_does(kind, plain):
    summarizer = LogarithmicMixing(8, bank=3, summarizer=kind).summarizer
    if not plain:
        summarizer.conv.register_forward_hook(lambda *_: None)
    for count in (6, 7, 1):
        nodes = torch.randn(2, 3, count, 8)
        literal = summarizer.conv(nodes.transpose(-1, -2).reshape(2, 24, count)) if count > 1 else torch.zeros(2, 24, 0)
        got = summarizer(nodes)
        assert got.shape == (2, 3, count // 2, 8)
        assert_close("nodes", got.detach(), literal.unflatten(1, (3, 8)).transpose(-1, -2).detach(), 1e-6)
    with pytest.raises(ValueError, match=r"pairs: expected shape .* bank · embedding = 24, got \[2, 3, 4, 7\]"):
        summarizer(torch.randn(2, 3, 4, 7))


def test_the_attention_says_how_wide_a_head_is_and_by_what_scores_are_divided():
    sva = LogarithmicMemory(12, 3).sva
    assert (sva.head_dim, sva.scale) == (4, 2.0)
