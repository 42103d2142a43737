"""Parameters are drawn through `torch.nn.init` alone, and drawn again as the layer draws them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lmn_kernels import (
    ExpanderSummarizerLogarithmicMemory,
    LogarithmicMemory,
    LogarithmicMixing,
    LookAheadLanguageModel,
    LookAheadMemory,
)

MODELS = {
    **{kind: lambda kind=kind, **o: LogarithmicMemory(64, 4, 2, summarizer=kind, **o)
       for kind in ("linear", "conv", "conv_mixed", "depthwise_separable")},
    "expander": lambda **o: ExpanderSummarizerLogarithmicMemory(64, 4, 2, 2, **o),
    "expander_conv": lambda **o: LogarithmicMixing(64, 4, 2, summarizer="conv", expand=1, **o),
}  # fmt: skip
LAMEMO = {
    "look_ahead": lambda **o: LookAheadMemory(64, 2, 4, memory_length=8, attn_type=32, **o),
    "language": lambda **o: LookAheadLanguageModel(61, 64, 2, 4, memory_length=8, pre_norm=True, **o),
}
INITS = ("original", "variance_preserving")


def redrawn(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def moments(model: nn.Module) -> dict[str, tuple[float, float]]:
    return {name: (p.mean().item(), p.std(correction=0).item()) for name, p in model.named_parameters()}


def assert_drawn_alike(model: nn.Module, like: nn.Module) -> None:
    """Mean and spread of every parameter, within five standard errors of a normal distribution's."""
    want = moments(like)
    for name, (mean, spread) in moments(model).items():
        (expected, scale), count = want[name], like.get_parameter(name).numel()
        assert abs(mean - expected) <= 5 * scale * math.sqrt(2 / count) + 1e-12, name
        assert abs(spread - scale) <= 5 * scale * math.sqrt(1 / count) + 1e-12, name


@pytest.fixture
def guarded(monkeypatch):
    """What a loader makes of `torch.nn.init`, which guards weights that it has loaded."""
    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", [*MODELS, *LAMEMO])
def test_a_guard_of_the_inits_guards_every_weight(name, init, guarded):
    model = LAMEMO[name]() if name in LAMEMO else MODELS[name](init=init)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    kept = copy.deepcopy(model.state_dict())
    redrawn(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[key]), key


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", [*MODELS, *LAMEMO])
def test_a_model_that_was_on_meta_is_drawn_as_the_layer_draws_it(name, init):
    make = LAMEMO[name] if name in LAMEMO else MODELS[name]
    options = {} if name in LAMEMO else {"init": init}
    torch.manual_seed(0)
    model = make(device="meta", **options).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert_drawn_alike(redrawn(model), make(**options))
    assert_drawn_alike(redrawn(copy.deepcopy(model)), make(**options))


@pytest.mark.parametrize("name", ["conv", "expander"])
def test_variance_preserving_is_what_it_says(name):
    """Against the numbers themselves: PyTorch's own init of these modules is about half as wide."""
    model = redrawn(MODELS[name](init="variance_preserving"))
    part = model.summarizer.conv if name == "conv" else model.expander.conv_transpose
    assert part.weight.std().item() == pytest.approx((part.weight[0].numel()) ** -0.5, rel=0.02)
    assert part.bias.eq(0).all()


@pytest.mark.parametrize("name", ["conv", "expander", "depthwise_separable", "language"])
def test_a_sharded_model_is_drawn_as_the_layer_draws_it(name):
    distributed = torch.distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        make = LAMEMO.get(name) or MODELS[name]
        options = {} if name in LAMEMO else {"init": "variance_preserving"}
        model = make(device="meta", **options)
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        redrawn(model)
        whole = make(**options)
        whole.load_state_dict({key: value.full_tensor() for key, value in model.state_dict().items()})
        assert_drawn_alike(whole, make(**options))
    finally:
        distributed.destroy_process_group()


def test_a_layer_of_which_parts_redraw_themselves_is_freed_at_once():
    import weakref

    layer = MODELS["expander_conv"](init="variance_preserving")
    seen = weakref.ref(layer.summarizer.conv)
    del layer
    assert seen() is None
