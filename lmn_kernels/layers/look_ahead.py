"""LaMemo's layer: attention over a memory that also looks ahead, and what stands around it.

Names of parameters are the original's, so that its checkpoints load. Batch first: ``[B, T, E]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from python_ref.checks import check_positive, check_shape
from python_ref.look_ahead import merge
from python_ref.precision import compute_dtype

from ..backend import choice
from ..ops.look_ahead import look_ahead_attend
from .tensor_parallel import check_local, check_takes, mesh_of, own_heads, part_of, ranks_of, whole


class Reach(NamedTuple):
    """What the layers of a stack share in one segment.

    Attributes:
        tokens: T.
        distances: ``[R, E]`` sinusoids of the distances, row a for a.
        future_row: where those of the memory's rows begin.
        bias: ``[4, H, D]``: u and v of the segment's rows, u and v of the memory's.
        start: ``[B]`` or None, as `lmn_kernels.look_ahead_attend` takes it.
        window: W.
    """

    tokens: int
    distances: Tensor
    future_row: int
    bias: Tensor
    start: Tensor | None
    window: int


class LookAheadMemoryAttention(nn.Module):
    """Relative attention of a segment over memory and itself, and of the memory over what came after it.

    With the projections, the residual and the norm (docs/lamemo-definition.md, sections 2 to 5). What the memory's rows
    found in earlier segments is merged with what they find in this one by their log-sum-exps.

    Args:
        embedding: E.
        heads: H.
        head_size: D; E / H where None.
        pre_norm: the norm before the projections in place of behind the residual.
        dropout: of the output projection's result.
        merge_eps: added to the denominator of the merge: 0 is exact and fused, 1e-6 gives the original's numbers.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.
    """

    def __init__(
        self,
        embedding: int,
        heads: int,
        head_size: int | None = None,
        *,
        pre_norm: bool = False,
        dropout: float = 0.0,
        merge_eps: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        embedding, heads = check_positive("embedding", embedding), check_positive("heads", heads)
        if head_size is None:
            if embedding % heads:
                raise ValueError(f"heads: expected a divisor of embedding={embedding} (or a head_size), got {heads}")
            head_size = embedding // heads
        head_size = check_positive("head_size", head_size)
        if not merge_eps >= 0:
            raise ValueError(f"merge_eps: expected a number of at least 0, got {merge_eps!r}")
        choice.check_name(backend, "backend", "look_ahead_attend")
        self.embedding, self.heads, self.head_size = embedding, heads, head_size
        self.pre_norm, self.merge_eps, self.backend = pre_norm, merge_eps, backend
        inner = heads * head_size
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.q_net = nn.Linear(embedding, inner, **options)
        self.kv_net = nn.Linear(embedding, 2 * inner, **options)
        self.r_net = nn.Linear(embedding, inner, **options)
        self.o_net = nn.Linear(inner, embedding, **options)
        self.drop = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(embedding, device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(_unpack_checkpoint)  # type: ignore[no-untyped-call]

    def forward(
        self, x: Tensor, reach: Reach, *, looks_ahead: bool, output: Tensor | None = None, lse: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One segment.

        Args:
            x: ``[B, K, E]``: the memory's rows, oldest first, then those of the segment.
            reach: see `Reach`.
            looks_ahead: whether the memory's rows attend, too.
            output: ``[B, M, H, D]``, ``lse [B, M, H]``: what they found so far; None before the first segment.

        Returns:
            ``y [B, rows, E]``, ``out [B, rows, H, D]`` as attention left it, and its log-sum-exp ``[B, rows, H]``,
            rows = K, or T where the memory does not attend.
        """
        tokens = reach.tokens
        rows = x if looks_ahead else x[:, -tokens:]
        normed = self.layer_norm(x) if self.pre_norm else x
        q = self.q_net(normed if looks_ahead else normed[:, -tokens:])
        q, kv, table, bias = self._own(q, self.kv_net(normed), self.r_net(reach.distances), reach.bias)
        memory = q.shape[1] - tokens
        if not memory or output is None or lse is None:
            output = lse = None
        else:
            output, lse = output.to(q.dtype), lse.to(compute_dtype(q.dtype))
            check_shape("output", output, (len(q), memory, *q.shape[2:]), "[batch, memory, heads, head size]")
        literal = self.merge_eps > 0
        out, total = look_ahead_attend(
            q, kv, bias.to(q.dtype), table, tokens=tokens,
            output=None if literal else output, lse=None if literal else lse, start=reach.start, window=reach.window,
            future_row=reach.future_row, backend=self.backend,
        )  # fmt: skip
        if literal and output is not None and lse is not None:
            merged, merged_total = merge(output, lse, out[:, :memory], total[:, :memory], self.merge_eps)
            out, total = torch.cat([merged, out[:, memory:]], 1), torch.cat([merged_total, total[:, memory:]], 1)
        if out.shape[2] != self.heads:
            check_takes("o_net", self.o_net, out.shape[2] * out.shape[3])
        y = self.o_net(out.flatten(2))
        check_local("o_net", y)
        y = rows + self.drop(y)
        return y if self.pre_norm else self.layer_norm(y), out, total

    def own_heads(self) -> int:
        """How many heads are this rank's, as far as that can be said before ``q_net`` is called."""
        return self.heads // ranks_of("q_net", self.q_net, self.heads)

    def _own(self, q: Tensor, kv: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the projections returned, and u and v ``[4, H, D]``, by heads: all, or those of which q is."""
        for name, part in (("q_net", q), ("kv_net", kv), ("r_net", table)):
            check_local(name, part)
        size = self.head_size
        heads = own_heads("q_net", self.q_net, q.shape[-1], self.heads, size)
        inner = self.heads * size
        if heads != self.heads:
            mesh = mesh_of(self.q_net)
            if mesh is None:
                raise ValueError(f"q_net: expected {inner} features (or weights of ColwiseParallel), got {q.shape[-1]}")
            bias = part_of(bias, 1, mesh)
            if table.shape[-1] == inner:
                table = part_of(table, 1, mesh)
            # The first half of its features are the keys of all heads, so no rank has both of its own.
            if kv.shape[-1] != 2 * inner and mesh_of(self.kv_net) is not None:
                kv = whole(kv, mesh)
            if kv.shape[-1] == 2 * inner:
                kv = part_of(kv.unflatten(-1, (2, self.heads, size)), 3, mesh).flatten(2)
        for name, part, width in (("kv_net", kv, 2 * heads * size), ("r_net", table, heads * size)):
            if part.shape[-1] != width:
                raise ValueError(f"{name}: expected {width} features for {heads} heads of q_net, got {part.shape[-1]}")
        by_heads = (part.unflatten(-1, shape) for part, shape in ((q, (heads, size)), (kv, (2, heads, size))))
        return *by_heads, table.unflatten(-1, (heads, size)), bias


class _FeedForward(nn.Module):
    def __init__(
        self,
        embedding: int,
        inner: int,
        dropout: float,
        pre_norm: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.CoreNet = nn.Sequential(
            nn.Linear(embedding, inner, device=device, dtype=dtype), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(inner, embedding, device=device, dtype=dtype), nn.Dropout(dropout),
        )  # fmt: skip
        self.layer_norm = nn.LayerNorm(embedding, device=device, dtype=dtype)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.CoreNet(self.layer_norm(x) if self.pre_norm else x)
        check_local("CoreNet", y)
        return x + y if self.pre_norm else self.layer_norm(x + y)


class LookAheadMemoryLayer(nn.Module):
    """A layer: `LookAheadMemoryAttention`, then a feed-forward of two layers with its own residual and norm.

    Args:
        feedforward: width between the two layers.

    The other arguments are those of `LookAheadMemoryAttention`, as are the call's and its results.
    """

    def __init__(
        self,
        embedding: int,
        heads: int,
        head_size: int | None = None,
        *,
        feedforward: int,
        pre_norm: bool = False,
        dropout: float = 0.0,
        merge_eps: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        feedforward = check_positive("feedforward", feedforward)
        self.dec_attn = LookAheadMemoryAttention(
            embedding, heads, head_size, pre_norm=pre_norm, dropout=dropout, merge_eps=merge_eps, backend=backend,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.pos_ff = _FeedForward(self.dec_attn.embedding, feedforward, dropout, pre_norm, device, dtype)

    def forward(
        self, x: Tensor, reach: Reach, *, looks_ahead: bool, output: Tensor | None = None, lse: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One segment; see `LookAheadMemoryAttention.forward`."""
        y, out, total = self.dec_attn(x, reach, looks_ahead=looks_ahead, output=output, lse=lse)
        return self.pos_ff(y), out, total


def _unpack_checkpoint(module: LookAheadMemoryAttention, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Split, in place, the packed projection of the original's ``attn_type`` 0, and drop constants of its others."""
    packed = state_dict.pop(f"{prefix}qkv_net.weight", None)
    if packed is not None:
        inner = module.heads * module.head_size
        state_dict[f"{prefix}q_net.weight"] = packed[:inner]
        state_dict[f"{prefix}kv_net.weight"] = packed[inner:]
    for name in ("train_logits_constant", "eval_logits_constant"):
        state_dict.pop(f"{prefix}{name}", None)
