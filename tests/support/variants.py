"""Every kind of layer that a test should meet, and the definition that it must agree with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmn_kernels import LogarithmicMixing
from python_ref import definition


class Gated(torch.nn.Module):
    """A summarizer that no linear map can stand for."""

    def __init__(self, embedding: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.gate = torch.nn.Linear(2 * embedding, embedding, dtype=dtype)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(torch.cat([left, right], -1)))
        return torch.tanh(gate * left + (1 - gate) * right)


def difference(left: Tensor, right: Tensor) -> Tensor:
    return 0.75 * right - 0.5 * left


@dataclass(frozen=True)
class Variant:
    """A layer's sizes and options."""

    name: str
    embedding: int = 8
    heads: int = 2
    bank: int = 2
    options: dict = field(default_factory=dict)

    def layer(self, dtype: torch.dtype = torch.float64, **more) -> LogarithmicMixing:
        options = dict(self.options)
        if options.get("summarizer") == "gated":
            options["summarizer"] = Gated(self.embedding, dtype)
        options.setdefault("init", "variance_preserving")
        return LogarithmicMixing(self.embedding, self.heads, self.bank, dtype=dtype, **options, **more)

    def __str__(self) -> str:
        return self.name


VARIANTS = [
    Variant("linear_1bank_1head", 5, 1, 1),
    Variant("linear", 12, 3, 2),
    Variant("linear_original_init", 8, 2, 3, {"init": "original"}),
    Variant("conv", 6, 2, 2, {"summarizer": "conv"}),
    Variant("conv_mixed", 6, 1, 3, {"summarizer": "conv_mixed"}),
    Variant("depthwise_separable", 8, 4, 2, {"summarizer": "depthwise_separable"}),
    Variant("module", 6, 2, 2, {"summarizer": "gated"}),
    Variant("function", 6, 2, 1, {"summarizer": difference}),
    Variant("expander_k0", 6, 2, 1, {"expand": 0}),
    Variant("expander_k1", 6, 2, 2, {"expand": 1}),
    Variant("expander_k2", 4, 1, 1, {"expand": 2}),
    Variant("expander_conv_mixed", 4, 2, 2, {"expand": 1, "summarizer": "conv_mixed"}),
    Variant("expander_depthwise", 4, 2, 2, {"expand": 1, "summarizer": "depthwise_separable"}),
    Variant("expander_module", 4, 2, 2, {"expand": 1, "summarizer": "gated"}),
]


def definition_of(layer: LogarithmicMixing) -> tuple[definition.Merge, dict[str, Tensor]]:
    """The definition's merge and projections with the layer's own parameters."""
    parameters = dict(layer.named_parameters())
    kind = type(layer.summarizer).__name__
    merge: Callable[[Tensor, Tensor], Tensor]
    if kind == "Summarizer":
        merge = definition.linear_merge(parameters["summarizer.weight"], parameters["summarizer.bias"])
    elif kind == "ConvSummarizer":
        conv = layer.summarizer.conv
        merge = definition.conv_merge(conv.weight, conv.bias, layer.bank, conv.groups)
    elif kind == "DepthwiseSeparableSummarizer":
        scale = parameters["summarizer.scale"]
        merge = definition.depthwise_separable_merge(
            scale[0], scale[1], parameters["summarizer.weight"], parameters["summarizer.bias"]
        )
    else:
        merge = layer.summarizer
    if layer.expander is not None:
        conv = layer.expander.conv_transpose
        merge = definition.expander_merge(merge, conv.weight, conv.bias)
    return merge, {name[4:]: p for name, p in parameters.items() if name.startswith("sva.")}


def defined(layer: LogarithmicMixing, x: Tensor) -> Tensor:
    """What the definition gives for the layer."""
    merge, projections = definition_of(layer)
    return definition.mix(x, merge, layer.bank, projections, layer.heads)


def enlarged(model):
    """With parameters so large that everything has an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model
