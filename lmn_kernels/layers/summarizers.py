"""Summarizers: how two nodes become one (docs/definition.md, sections 1, 5 and 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from python_ref.checks import check_float, check_shape
from python_ref.step import Linear
from python_ref.tree import LinearMerge, expand_stack, merge_stacks

from .parameters import drawn_by, is_plain, known_by_weights, parameter, weight_and_bias

INITS = ("original", "variance_preserving")


def preserve_variance(parameters: dict[str, Tensor | None]) -> None:
    """Draw a convolution so that what it sums varies as one summand does: both children, or 1+k taps of an expander.

    Entries at the ends of a stack sum fewer taps.
    """
    weight, bias = (parameters.get(name) for name in ("weight", "bias"))  # of a parametrised one there are none here
    if weight is not None:
        nn.init.normal_(weight, std=math.prod(weight.shape[1:]) ** -0.5)
    if bias is not None:
        nn.init.zeros_(bias)


@known_by_weights
class LinearMapSummarizer(nn.Module):
    """A summarizer that is a linear map of both nodes: kernels can take it, and an expander fold with it."""

    def step_form(self) -> tuple[str, Linear, Tensor | None]:
        """The map as the step takes it: how it lies (`python_ref.step.merge_of`), weight and bias, and a scale.

        What a subclass does not give from its parameters as they lie is copied for every step.
        """
        weight, bias, scale = self.merge()
        return "linear" if scale is None else "separable", Linear(weight[:, 0], bias), scale

    def merge(self) -> LinearMerge:
        """The map as the operations take it."""
        raise NotImplementedError(f"{type(self).__name__} must define merge()")

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """``left, right [..., m, E]`` → node ``[..., m, E]``; or what the original calls it with (`of_pairs`)."""
        if right is None:
            return self.of_pairs(left)
        flat = [part.reshape(-1, 1, *part.shape[-2:]) for part in (left, right)]
        return merge_stacks(self.merge(), *flat).reshape(left.shape)

    def of_pairs(self, pairs: Tensor) -> Tensor:
        """P pairs, left and right side by side, ``[..., m, P, 2E]`` → their nodes ``[..., m, P, E]``."""
        bank, *_, size = self.merge().weight.shape
        check_float("pairs", pairs)
        check_shape(
            "pairs", pairs, (*[None] * (pairs.dim() - 3), bank, None, 2 * size), "[..., bank, pairs, 2·embedding]"
        )
        left, right = pairs.transpose(-2, -3).chunk(2, -1)
        return self.forward(left, right).transpose(-2, -3)


class Summarizer(LinearMapSummarizer):
    """``S_b(left, right) = [left ; right] · W_b + c_b`` (section 1).

    Attributes:
        weight: ``[m, 2E, E]``. bias: ``[m, 1, E]``.
    """

    def __init__(
        self,
        embedding: int,
        bank: int,
        init: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        # The original draws them twice: so a seed leaves the generator where it does there.
        make: Any = torch.randn if init == "original" else torch.empty
        self.weight = nn.Parameter(make(bank, 2 * embedding, embedding, device=device, dtype=dtype))
        self.bias = nn.Parameter(make(bank, 1, embedding, device=device, dtype=dtype))
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "original":
            nn.init.xavier_normal_(self.weight, gain=0.1)
            nn.init.xavier_normal_(self.bias, gain=0.1)
        else:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
            nn.init.zeros_(self.bias)

    def merge(self) -> LinearMerge:
        return LinearMerge(self.weight[:, None], self.bias[:, 0], None)

    def step_form(self) -> tuple[str, Linear, Tensor | None]:
        if type(self).merge is not Summarizer.merge:
            return super().step_form()  # a subclass knows better
        return "linear", weight_and_bias(self), None


@known_by_weights
class ConvSummarizer(LinearMapSummarizer):
    """``Conv1d(m·E, m·E, kernel 2, stride 2, groups)`` over the pair (section 6).

    ``groups = m`` keeps the banks apart; ``groups = 1`` mixes them.
    """

    def __init__(
        self,
        embedding: int,
        bank: int,
        groups: int,
        init: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        size = bank * embedding
        self.conv = nn.Conv1d(size, size, kernel_size=2, stride=2, groups=groups, device=device, dtype=dtype)
        if init == "variance_preserving":
            drawn_by(preserve_variance, self.conv)

    def of_pairs(self, pairs: Tensor) -> Tensor:
        """Pairs of neighbours among S nodes, ``[..., m, S, E]`` → ``[..., m, S // 2, E]``, as the original has them."""
        check_float("pairs", pairs)
        size = self.conv.in_channels
        if pairs.dim() < 3 or pairs.shape[-3] * pairs.shape[-1] != size:
            raise ValueError(
                f"pairs: expected shape [..., bank, nodes, embedding] with bank · embedding = {size}, "
                f"got {list(pairs.shape)}"
            )
        left, right = pairs[..., : pairs.shape[-2] // 2 * 2, :].transpose(-2, -3).unflatten(-3, (-1, 2)).unbind(-3)
        return self.forward(left, right).transpose(-2, -3)

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        if right is None:
            return self.of_pairs(left)
        conv: Any = self._modules["conv"]
        if is_plain(conv, nn.Conv1d):
            return super().forward(left, right)
        pair = torch.stack([left.flatten(-2), right.flatten(-2)], -1)
        node: Tensor = conv(pair.reshape(-1, *pair.shape[-2:])).reshape(left.shape)
        return node

    def merge(self) -> LinearMerge:
        groups = self.conv.groups
        weight, bias = weight_and_bias(self.conv)
        # [G·C_out, C_in, 2] → [G, 2·C_in, C_out]: the left node's features first.
        weight = weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2)
        return LinearMerge(weight[:, None], bias.view(groups, -1), None)

    def step_form(self) -> tuple[str, Linear, Tensor | None]:
        if type(self).merge is not ConvSummarizer.merge:
            return super().step_form()  # a subclass knows better
        return "pair", weight_and_bias(self._modules["conv"]), None


class DepthwiseSeparableSummarizer(LinearMapSummarizer):
    """``(a ⊙ left + b ⊙ right) · P + c`` per bank: half the arithmetic of the linear one (section 6).

    Attributes:
        scale: ``[2, m, E]``, a and b. weight: P ``[m, E, E]``. bias: c ``[m, E]``.
    """

    def __init__(
        self,
        embedding: int,
        bank: int,
        init: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(2, bank, embedding, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(bank, embedding, embedding, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(bank, embedding, device=device, dtype=dtype))
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The original has no code for this variant: its init is PyTorch's for such a pair of convolutions."""
        bound = math.sqrt(0.5 if self.init == "original" else 1.5)
        nn.init.uniform_(self.scale, -bound, bound)
        if self.init == "original":
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)
        else:
            # a² + b² is 1 on average over features, so that two independent children mix to their own variance.
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
            nn.init.zeros_(self.bias)

    def merge(self) -> LinearMerge:
        return LinearMerge(self.weight[:, None], self.bias, self.scale)

    def step_form(self) -> tuple[str, Linear, Tensor | None]:
        if type(self).merge is not DepthwiseSeparableSummarizer.merge:
            return super().step_form()  # a subclass knows better
        return "separable", weight_and_bias(self), parameter(self, "scale")


@known_by_weights
class Expander(nn.Module):
    """One ``ConvTranspose1d(E, E, 1+k)`` along the stack of a node, before it merges (section 6)."""

    def __init__(
        self,
        embedding: int,
        expand: int,
        init: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.expand = expand
        self.conv_transpose = nn.ConvTranspose1d(
            embedding, embedding, kernel_size=1 + expand, device=device, dtype=dtype
        )
        if init == "variance_preserving":
            drawn_by(preserve_variance, self.conv_transpose)

    def forward(self, stack: Tensor) -> Tensor:
        """``[P, h, m, E]`` → ``[P, h+k, m, E]``."""
        conv: Any = self._modules["conv_transpose"]
        if not is_plain(conv, nn.ConvTranspose1d):
            places, _, bank, _ = stack.shape
            wider: Tensor = conv(stack.permute(0, 2, 3, 1).flatten(0, 1)).unflatten(0, (places, bank))
            return wider.permute(0, 3, 1, 2)
        return expand_stack(stack, *self.step_tensors())

    def step_tensors(self) -> Linear:
        """Weight and bias of the convolution."""
        return weight_and_bias(self._modules["conv_transpose"])

    def fold(self, merge: LinearMerge) -> LinearMerge:
        """This expander followed by a linear summarizer, as one linear map of two stacks."""
        weight, bias, scale = merge
        kernel, offset = self.step_tensors()
        if scale is not None:
            weight = torch.cat([part[:, None, :, None] * weight for part in scale], 2)
        # Input features of a group: side (left, right), bank, embedding.
        size = kernel.shape[1]
        split = weight[:, 0].unflatten(1, (2, -1, size))
        folded = torch.einsum("iot,gsboc->gtsbic", kernel, split).flatten(2, 4)
        return LinearMerge(folded, bias + torch.einsum("o,gsboc->gc", offset, split), None)


def make_summarizer(
    kind: str | Callable[[Tensor, Tensor], Tensor],
    embedding: int,
    bank: int,
    init: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The summarizer of a name of section 6, or the callable itself.

    Raises:
        ValueError: no summarizer or init of that name.
        TypeError: neither a name nor a callable.
    """
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    if not isinstance(kind, str):
        if not callable(kind):
            raise TypeError(f"summarizer: expected a name or a callable (left, right) → node, got {kind!r}")
        return kind
    if kind == "linear":
        return Summarizer(embedding, bank, init, **factory)
    if kind == "conv":
        return ConvSummarizer(embedding, bank, bank, init, **factory)
    if kind == "conv_mixed":
        return ConvSummarizer(embedding, bank, 1, init, **factory)
    if kind == "depthwise_separable":
        return DepthwiseSeparableSummarizer(embedding, bank, init, **factory)
    raise ValueError(f"summarizer: expected linear, conv, conv_mixed, depthwise_separable or a callable, got {kind!r}")
