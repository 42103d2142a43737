"""The block of the original, fast: a drop-in for its modules (docs/definition.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from python_ref.around import Around
from python_ref.checks import check_positive

from .mixing import LogarithmicMixing
from .parameters import drops_nothing, is_plain, is_plain_linear, parameter, weight_and_bias
from .parts import make_dropout
from .tensor_parallel import check_local


class FeedForward(nn.Module):
    """``Linear(E, F) → SiLU → Linear(F, E)``, then dropout."""

    def __init__(
        self,
        embedding: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        embedding, width = check_positive("embedding", embedding), check_positive("width", width)
        self.fc1 = nn.Linear(embedding, width, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(width, embedding, bias=bias, device=device, dtype=dtype)
        self.activation = nn.SiLU()
        self.drop = make_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        if type(y) is not Tensor:
            check_local("feedforward.fc2", y)
        drop = self._modules.get("drop")
        return y if drop is None else drop(y)


class LogarithmicMemory(LogarithmicMixing):
    """``x + mixing(RMSNorm(x))``, then ``x + FF(RMSNorm(x))``: the original's module, same call, same weights.

    Loads the original's checkpoints strictly, the packed ones of its notebooks included.

    Args:
        feedforward_mult: width of the feed-forward in units of E (4 in the original, 1 in TinyLogMem);
            0 for none.

    The other arguments are those of `LogarithmicMixing`.
    """

    def __init__(
        self,
        embedding: int,
        heads: int = 1,
        bank: int = 1,
        parallelize: bool = True,
        *,
        summarizer: str | Callable[[Tensor, Tensor], Tensor] = "linear",
        feedforward_mult: float = 4,
        init: str = "original",
        backend: str = "auto",
        step_backend: str | None = None,
        lean: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _expand: int | None = None,
    ):
        super().__init__(
            embedding,
            heads,
            bank,
            parallelize,
            summarizer=summarizer,
            init=init,
            backend=backend,
            step_backend=step_backend,
            lean=lean,
            dropout=dropout,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        embedding = self.embedding
        if not feedforward_mult >= 0:
            raise ValueError(f"feedforward_mult: expected a number of at least 0, got {feedforward_mult!r}")
        self.norm1 = nn.RMSNorm(embedding, device=device, dtype=dtype)
        self.norm2: nn.Module | None = None
        self.feedforward: nn.Module | None = None
        if feedforward_mult:
            width = check_positive("feedforward_mult · embedding", round(feedforward_mult * embedding))
            self.norm2 = nn.RMSNorm(embedding, device=device, dtype=dtype)
            self.feedforward = FeedForward(embedding, width, device, dtype, bias=bias, dropout=dropout)
        # The order of parameters, and of drawing them, is the original's: states of optimizers go by it.
        for name in [name for name in ("summarizer", "sva", "feedforward") if name in self._modules]:
            self._modules[name] = self._modules.pop(name)
        if _expand is not None:
            self._widen(_expand, init, device, dtype)
        self.register_load_state_dict_pre_hook(_unpack_notebook_checkpoint)  # type: ignore[no-untyped-call]

    def around(self) -> Around:
        return Around(*map(self._modules.get, ("norm1", "norm2", "feedforward", "drop")))

    def around_tensors(self) -> tuple[tuple[Tensor, ...], tuple[float, ...]] | None:
        modules: dict[str, Any] = self._modules
        norm1, norm2, feedforward = (modules.get(name) for name in ("norm1", "norm2", "feedforward"))
        if not (_is_plain_norm(norm1) and drops_nothing(modules.get("drop"))):
            return None
        if feedforward is None or norm2 is None:
            return (parameter(norm1, "weight"),), (_eps(norm1),)
        if not (_is_plain_norm(norm2) and is_plain(feedforward, FeedForward)):
            return None
        up, down, activation = (feedforward._modules[name] for name in ("fc1", "fc2", "activation"))
        if not (is_plain_linear(up) and is_plain_linear(down) and is_plain(activation, nn.SiLU)):
            return None
        if not drops_nothing(feedforward._modules.get("drop")):
            return None
        norms = parameter(norm1, "weight"), parameter(norm2, "weight")
        return (*norms, *weight_and_bias(up), *weight_and_bias(down)), (_eps(norm1), _eps(norm2))


def _is_plain_norm(module: Any) -> bool:
    return is_plain(module, nn.RMSNorm) and module.elementwise_affine


def _eps(norm: Any) -> float:
    """That of `torch.nn.RMSNorm`, which by default is the resolution of the type it computes in."""
    if norm.eps is not None:
        return float(norm.eps)
    return _FLOAT64_EPS if parameter(norm, "weight").dtype == torch.float64 else _FLOAT32_EPS


_FLOAT32_EPS, _FLOAT64_EPS = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


class ExpanderSummarizerLogarithmicMemory(LogarithmicMemory):
    """The block whose nodes widen as they rise (docs/definition.md, section 6; paper section 3.6).

    Args:
        expand: k ≥ 0; a node of level i is a stack of 1 + i·k vectors.

    The other arguments are those of `LogarithmicMemory`.
    """

    def __init__(
        self,
        embedding: int,
        heads: int = 1,
        bank: int = 1,
        expand: int = 1,
        parallelize: bool = True,
        **options: Any,
    ):
        super().__init__(embedding, heads, bank, parallelize, _expand=expand, **options)


def _unpack_notebook_checkpoint(
    module: LogarithmicMemory, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Rename, in place, what the original's notebooks call differently (section 5).

    ``qkv.*`` holds the rows of q, k and v; ``out_proj.*``, ``feedforward.0.*`` and ``feedforward.2.*``
    have other names; ``summarizer.bias`` is ``[1, m, 1, E]``.
    """
    for part in ("weight", "bias"):
        packed = state_dict.pop(f"{prefix}qkv.{part}", None)
        if packed is not None:
            for name, rows in zip("qkv", packed.chunk(3), strict=True):
                state_dict[f"{prefix}sva.{name}.{part}"] = rows
        for old, new in (
            ("out_proj", "sva.out_proj"),
            ("feedforward.0", "feedforward.fc1"),
            ("feedforward.2", "feedforward.fc2"),
        ):
            if hasattr(module.feedforward, "fc1") or old == "out_proj":
                value = state_dict.pop(f"{prefix}{old}.{part}", None)
                if value is not None:
                    state_dict[f"{prefix}{new}.{part}"] = value
    bias = state_dict.get(f"{prefix}summarizer.bias")
    if bias is not None and bias.dim() == 4:
        state_dict[f"{prefix}summarizer.bias"] = bias.squeeze(0)
