"""What a block puts around its mixing (definition, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

Part = Callable[[Tensor], Tensor]


class Around(NamedTuple):
    """``x + mixing(norm1(x))``, then ``x + feedforward(norm2(x))``; the mixing alone without norms.

    Attributes:
        norm1: before the mixing, behind which x is added; None where nothing surrounds it.
        norm2, feedforward: of the second half, or None.
        drop: what the mixing's result goes through first, or None.
    """

    norm1: Part | None = None
    norm2: Part | None = None
    feedforward: Part | None = None
    drop: Part | None = None

    def before(self, x: Tensor) -> Tensor:
        """What the mixing sees."""
        return x if self.norm1 is None else self.norm1(x)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's output for x and what the mixing made of `before`."""
        if self.drop is not None:
            mixed = self.drop(mixed)
        if self.norm1 is None:
            return mixed
        x = x + mixed
        return x if self.feedforward is None or self.norm2 is None else x + self.feedforward(self.norm2(x))

    @classmethod
    def of_tensors(cls, block: Sequence[Tensor], eps: Sequence[float]) -> Around:
        """From what a step's operations take.

        Args:
            block: nothing; the weight ``[E]`` of the mixing's RMSNorm; or also that of the feed-forward's, and
                weight and bias of its two layers, ``[F, E] [F] [E, F] [E]``, SiLU in between.
            eps: of each norm.
        """
        norm1, norm2 = (partial(_rms_norm, weight=block[i], eps=eps[i]) if i < len(block) else None for i in range(2))
        return cls(norm1, norm2, partial(_feedforward, parts=block[2:]) if norm2 else None)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _feedforward(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    up, up_bias, down, down_bias = parts
    return F.linear(F.silu(F.linear(x, up, up_bias)), down, down_bias)
