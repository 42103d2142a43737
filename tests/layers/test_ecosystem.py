"""Other libraries' adapters, quantisers, offloading and trainers, on both networks' layers in every form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.close import TOLERANCE, assert_close
from lmn_kernels import (
    ExpanderSummarizerLogarithmicMemory,
    LogarithmicMemory,
    LookAheadLanguageModel,
    LookAheadMemory,
)

F64 = torch.float64
VALUE = TOLERANCE[F64][0]
MIXING = ["q", "k", "v", "out_proj", "fc1", "fc2"]
LOOKING = ["q_net", "kv_net", "r_net", "o_net", "CoreNet.0", "CoreNet.3"]


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed (the extra ecosystem has it)")


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed (the extra ecosystem has it)", exc_type=ImportError
    )


@pytest.fixture
def accelerate() -> Any:
    return pytest.importorskip("accelerate", reason="accelerate is not installed (the extra ecosystem has it)")


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning", reason="lightning is not installed (the extra ecosystem has it)")


def block(**options: Any) -> LogarithmicMemory:
    return LogarithmicMemory(16, 4, 2, init="variance_preserving", dtype=F64, **options)


def looking(**options: Any) -> LookAheadMemory:
    return LookAheadMemory(16, 2, 4, memory_length=7, feedforward=16, dtype=F64, **options)


def speaking(**options: Any) -> LookAheadLanguageModel:
    return LookAheadLanguageModel(12, 16, 2, 4, memory_length=7, feedforward=16, **options)


def forms(layer: LogarithmicMemory, x: Tensor) -> dict[str, Tensor]:
    """The layer over ``x [2, L, E]`` whole, by prefill and steps, and into a pool."""
    y, state = layer.prefill(x[:, :5])
    tail = [y]
    for t in range(5, x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], state)
        tail.append(y)
    with torch.no_grad():
        pooled = layer.step_(x, layer.init_state(2, max_position=x.shape[1]))
    return {"forward": layer(x), "prefill and step": torch.cat(tail, 1), "step_": pooled}


def segments(model: nn.Module, x: Tensor) -> Tensor:
    """A look-ahead model over ``x [2, L, …]`` in segments of 4."""
    state, found = None, []
    for segment in x.split(4, 1):
        y, state = model(segment.contiguous(), state)
        found.append(y)
    return torch.cat(found, 1)


def adapters(peft: Any, kind: str, targets: list[str], inner: list[str]) -> Any:
    return {
        "LoRA": partial(peft.LoraConfig, r=2, init_lora_weights=False),
        "DoRA": partial(peft.LoraConfig, r=2, init_lora_weights=False, use_dora=True),
        "IA3": partial(peft.IA3Config, init_ia3_weights=False, feedforward_modules=inner),
        "LoKr": partial(peft.LoKrConfig, r=2, init_weights=False),
        "OFT": partial(peft.OFTConfig, r=0, oft_block_size=4, init_weights=False),
    }[kind](target_modules=targets)


def learns(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained, "nothing is trained"
    assert not [name for name, grad in trained.items() if grad is None or not grad.any()]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "LoKr", "OFT"])
def test_adapters_of_a_mixing_layer_learn_serve_and_are_merged(peft, kind):
    layer, x = block(), torch.randn(2, 11, 16, dtype=F64)
    before = layer(x)
    model = peft.get_peft_model(nn.Sequential(layer), adapters(peft, kind, MIXING, ["fc2"])).double()
    learns(model, lambda: model(x).square().sum())
    adapted = forms(layer, x)
    merged = forms(model.merge_and_unload()[0], x)
    assert (merged["forward"] - before).abs().max() > 1e-3, "the adapter has no effect"
    for name, y in adapted.items():
        assert_close(name, y, merged["forward"], VALUE)
        assert_close(f"merged {name}", merged[name], merged["forward"], VALUE)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "LoKr", "OFT"])
def test_adapters_of_a_look_ahead_memory_learn_serve_and_are_merged(peft, kind):
    model, x = looking(), torch.randn(2, 11, 16, dtype=F64)
    before = segments(model, x)
    adapted = peft.get_peft_model(model, adapters(peft, kind, LOOKING, ["CoreNet.3"])).double()
    learns(adapted, lambda: segments(adapted, x).square().sum())
    y, merged = segments(adapted, x), segments(adapted.merge_and_unload(), x)
    assert (y - before).abs().max() > 1e-3, "the adapter has no effect"
    assert_close("y", y, merged, VALUE)


def test_an_adapter_of_a_weight_of_the_summarizer_and_copies_of_norms(peft):
    """peft's `target_parameters` parametrizes, and `modules_to_save` wraps."""
    layer, x = block(), torch.randn(2, 11, 16, dtype=F64)
    model = nn.Sequential(layer)
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, target_modules=["q"], target_parameters=["summarizer.weight"],
        modules_to_save=["norm1", "out_proj"],
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).double()
    learns(adapted, lambda: adapted(x).square().sum())
    with torch.no_grad():
        layer.norm1.modules_to_save["default"].weight.mul_(1.5)
    found, merged = forms(layer, x), adapted.merge_and_unload()[0]
    for name, y in found.items():
        assert_close(name, y, merged(x), VALUE)


def test_an_adapter_of_the_words_is_in_the_output_layer_too(peft):
    """The two are tied: what merging does to one it does to the other."""
    model, ids = speaking(dtype=F64), torch.randint(12, (2, 8))
    config = peft.LoraConfig(r=2, target_modules=["emb_layers.0"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).double()
    learns(adapted, lambda: segments(adapted, ids).square().sum())
    y = segments(adapted, ids)
    assert_close("y", y, segments(adapted.merge_and_unload(), ids), VALUE)


def dequantised(model: nn.Module) -> nn.Module:
    """The model with plain weights, of the numbers that a quantiser's have."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(weight.dequantize(), requires_grad=False)
    assert not any(type(p) not in (Tensor, nn.Parameter) for p in plain.parameters())
    return plain


def test_int8_weights_are_those_that_they_stand_for(torchao):
    layer, x = LogarithmicMemory(32, 4, 2).eval(), torch.randn(2, 11, 32)
    whole = layer(x)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    assert type(layer.sva.q.weight) is not nn.Parameter
    with torch.no_grad():
        expected = dequantised(layer)(x)
        for name, y in forms(layer, x).items():
            assert_close(name, y, expected, 1e-5)
    assert 1e-4 < (expected - whole).abs().max() / whole.abs().max() < 0.05


def test_training_with_int8_weights_in_mind(torchao):
    """Linears of another class, whose weights alone say too little."""
    qat = pytest.importorskip("torchao.quantization.qat")
    layer, x = LogarithmicMemory(32, 4, 2), torch.randn(2, 11, 32)
    whole = layer(x)
    torchao.quantize_(
        layer, qat.QATConfig(weight_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_channel"), step="prepare")
    )
    learns(layer, lambda: layer(x).square().sum())
    plain = copy.deepcopy(layer)
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            linear = nn.Linear(module.in_features, module.out_features)
            linear.weight = nn.Parameter(module(torch.eye(module.in_features)).T - module.bias[:, None])
            linear.bias = module.bias
            plain.set_submodule(name, linear)
    for name, y in forms(layer, x).items():
        assert_close(name, y, plain(x), 1e-5)
    assert 1e-4 < (plain(x) - whole).abs().max() / whole.abs().max() < 0.05


@pytest.mark.parametrize("words", [False, True])
def test_int8_weights_of_a_look_ahead_model(torchao, words):
    model, ids = speaking().eval(), torch.randint(12, (2, 11))
    if words:
        granularity = pytest.importorskip("torchao.quantization.granularity").PerAxis(0)
        config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=granularity)
        torchao.quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
        assert type(model.word_emb["emb_layers"][0].weight) is not nn.Parameter
    else:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        assert type(model.layers[0].dec_attn.q_net.weight) is not nn.Parameter
    with torch.no_grad():
        assert_close("y", segments(model, ids), segments(dequantised(model), ids), 1e-5)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_dynamic_quantisation_of_a_look_ahead_model(kind):
    model, ids = speaking().eval(), torch.randint(12, (2, 11))
    how = {kind: torch.ao.quantization.float_qparams_weight_only_qconfig} if kind is nn.Embedding else {kind}
    with torch.no_grad():
        expected = segments(model, ids)
        y = segments(torch.ao.quantization.quantize_dynamic(model, how), ids)
    assert 0 < (y - expected).abs().max() < 0.02 * expected.abs().max()


def offload(accelerate: Any, where: str, module: nn.Module, folder: Any, **options: Any) -> None:
    if where == "cpu":
        accelerate.cpu_offload(module, execution_device="cpu", **options)
    else:
        accelerate.disk_offload(module, str(folder), execution_device="cpu", **options)
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_layer_serves_every_form(accelerate, where, inside, tmp_path):
    layer, x = ExpanderSummarizerLogarithmicMemory(16, 4, 2, summarizer="conv", dtype=F64), torch.randn(2, 11, 16)
    x = x.double()
    expected = layer(x).detach()
    offload(accelerate, where, nn.Sequential(layer) if inside else layer, tmp_path)
    assert layer.init_state(2).token.device == x.device
    with torch.no_grad():
        for name, y in forms(layer, x).items():
            assert_close(name, y, expected, VALUE)


def test_a_layer_that_is_fetched_whole_is_called_whole(accelerate, tmp_path):
    """Only `forward` fetches its weights: it serves chunks and steps, other methods say so."""
    layer, x = block(), torch.randn(2, 11, 16, dtype=F64)
    expected = layer(x).detach()
    offload(accelerate, "cpu", layer, tmp_path, preload_module_classes=["LogarithmicMemory"])
    with torch.no_grad():
        y, state = layer(x[:, :5], return_state=True)
        assert_close("chunk", y, expected[:, :5], VALUE)
        for t in range(5, 11):
            y, state = layer(x[:, t : t + 1], state=state, return_state=True)
            assert_close("step", y, expected[:, t : t + 1], VALUE)
        for call in (
            lambda: layer.prefill(x),
            lambda: layer.step(x[:, :1], layer.init_state(2)),
            lambda: layer.step(x[:, :1].float(), layer.init_state(2, dtype=torch.float32)),
            lambda: layer.step_(x, layer.init_state(2, max_position=11)),
        ):
            assert layer.init_state(2).token.device == x.device
            with pytest.raises(RuntimeError, match=r"^norm1.weight: expected a weight at hand, got a meta one.*call"):
                call()


def test_parts_in_different_places(accelerate, tmp_path):
    layer, x = block(), torch.randn(2, 11, 16, dtype=F64)
    expected = layer(x).detach()
    places = {name: "disk" if name in ("summarizer", "sva", "norm2") else "cpu" for name, _ in layer.named_children()}
    accelerate.dispatch_model(layer, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert layer.sva.q.weight.is_meta and not layer.feedforward.fc1.weight.is_meta
    with torch.no_grad():
        for name, y in forms(layer, x).items():
            assert_close(name, y, expected, VALUE)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_look_ahead_model(accelerate, where, tmp_path):
    model, ids = speaking(dtype=F64), torch.randint(12, (2, 11))
    with torch.no_grad():
        expected = segments(model, ids)
        offload(accelerate, where, model, tmp_path)
        assert_close("y", segments(model, ids), expected, VALUE)
        assert_close("from a state", model(ids[:, :4], model.init_state(2))[0], expected[:, :4], VALUE)


@pytest.mark.parametrize("network", ["mixing", "look-ahead"])
def test_a_trainer_trains_as_a_loop_does(lightning, network, tmp_path):
    net = nn.Sequential(block(), block()) if network == "mixing" else looking()
    data = torch.randn(4, 11, 16, dtype=F64)
    by_hand, losses = copy.deepcopy(net), []
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1)
    for x in data.split(1):
        found = by_hand(x)
        loss = (found[0] if isinstance(found, tuple) else found).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.example_input_array, self.losses = net, data[:1], []

        def forward(self, x: Tensor) -> Tensor:
            found = self.net(x)
            return found[0] if isinstance(found, tuple) else found

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss = self(batch).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    trainer = lightning.Trainer(
        fast_dev_run=4, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, barebones=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=1))
    assert module.losses == losses and losses[-1] != losses[0]
    for (name, trained), own in zip(net.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(trained, own), name
    summary = lightning.pytorch.utilities.model_summary.ModelSummary(module, max_depth=-1)
    assert summary.total_parameters == sum(p.numel() for p in net.parameters())
    sizes = dict(zip(summary.layer_names, summary.out_sizes, strict=True))
    part = "net.0.sva.q" if network == "mixing" else "net.layers.0.dec_attn.q_net"
    assert sizes[part][-1] == 16, "its hooks saw the projection"
