"""Look-ahead attention on the tensor cores: memory rows and segment rows in one launch.

A program has BT rows of one head and of one kind, and goes over the keys in its reach as any attention with an online
softmax does; the memory's rows begin with what earlier segments left. The term of the distances is computed in the
tile (`look_ahead_kernels` says how), so nothing of the size of the scores is ever in memory. The rows of the result
are those of the new cache.

Backward computes the scores again, in three launches: by rows for q and the biases, by keys for k and v, by distances
for the table. Each sums in a fixed order, and no sum is atomic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .common import CompileCase, Products, on_device, pointer, products_of, products_on
from .launch import LAUNCHES, Launch, launch_for
from .look_ahead_kernels import (
    SIZES,
    look_ahead_bwd_kernel_dkv,
    look_ahead_bwd_kernel_dq,
    look_ahead_bwd_kernel_dtable,
    look_ahead_fwd_kernel,
)

# Programs over distances that are wanted at least; where there are fewer, the streams are split among more.
TABLE_PROGRAMS = 256


def _constants(launch: Launch, head_size: int, products: Products, start: Tensor | None) -> dict[str, Any]:
    return {
        "D": head_size,
        "BD": max(16, triton.next_power_of_2(head_size)),
        **products.constants,
        "HAS_START": start is not None,
        **launch.blocks,
    }


def _sizes(q: Tensor, kv: Tensor, tokens: int, window: int, future_row: int) -> tuple[int, ...]:
    """The integers of the kernels, as `look_ahead_kernels.SIZES` names them."""
    rows, keys = q.shape[1], kv.shape[1]
    low = max(1, rows - tokens - window + 1)
    return q.shape[0], keys, rows, tokens, low, future_row


def _row_blocks(rows: int, tokens: int, width: int) -> int:
    blocks: int = triton.cdiv(rows - tokens, width) + triton.cdiv(tokens, width)
    return blocks


def attend(
    q: Tensor,
    kv: Tensor,
    bias: Tensor,
    table: Tensor,
    output: Tensor | None,
    lse: Tensor | None,
    start: Tensor | None,
    tokens: int,
    window: int,
    future_row: int,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """`python_ref.look_ahead.attend` in one launch; heads of up to 128 features, 64 in float32."""
    batch, rows, heads, head_size = q.shape
    products = products_of(q)
    launch = launch or launch_for("look_ahead_fwd", head_size, products.dtype, q.device)
    q, kv, bias, table = (tensor.contiguous() for tensor in (q, kv, bias, table))
    start = None if start is None else start.contiguous()
    out = torch.empty_like(q)
    total = torch.empty(batch, rows, heads, dtype=torch.float32, device=q.device)
    blocks = _row_blocks(rows, tokens, launch.blocks["BT"])
    seeds = (q, total) if output is None or lse is None else (output.contiguous(), lse.contiguous())
    if batch:
        with on_device(q):
            look_ahead_fwd_kernel[(blocks * batch * heads,)](
                q, kv, bias, table, *seeds, q if start is None else start, out, total,
                *_sizes(q, kv, tokens, window, future_row), heads,
                **_constants(launch, head_size, products, start), **launch.options, IS_SEEDED=output is not None,
            )  # fmt: skip
    return out, total


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    kv: Tensor,
    bias: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    tokens: int,
    window: int,
    future_row: int,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`python_ref.look_ahead.attend_backward` in three launches, bitwise reproducible."""
    batch, rows, heads, head_size = q.shape
    keys, products = kv.shape[1], products_of(q)
    rowwise, keywise, distancewise = (
        launch or launch_for(kernel, head_size, products.dtype, q.device)
        for kernel in ("look_ahead_bwd_dq", "look_ahead_bwd_dkv", "look_ahead_bwd_dtable")
    )
    q, kv, bias, table, out, lse = (tensor.contiguous() for tensor in (q, kv, bias, table, out, lse))
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    start = None if start is None else start.contiguous()
    d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
    if not batch:
        return d_q, d_kv, torch.zeros_like(bias), torch.zeros_like(table)
    blocks = _row_blocks(rows, tokens, rowwise.blocks["BT"])
    ahead_blocks = triton.cdiv(rows - tokens, rowwise.blocks["BT"])
    mean = torch.empty_like(lse)
    d_bias = torch.empty(blocks, batch, 2, heads, head_size, dtype=torch.float32, device=q.device)
    # Blocks of distances: behind, and, where they have rows of their own, ahead.
    distances = triton.cdiv(keys, distancewise.blocks["BT"])
    if future_row:
        distances += triton.cdiv(rows - tokens + 1, distancewise.blocks["BT"])
    splits = min(batch, triton.cdiv(TABLE_PROGRAMS, distances * heads))
    # Rows of no distance stay zero.
    d_table = torch.zeros(splits, *table.shape, dtype=torch.float32, device=q.device)
    sizes = _sizes(q, kv, tokens, window, future_row)
    first = q if start is None else start
    by_row, by_key, by_distance = (
        _constants(one, head_size, products, start) | dict(one.options) for one in (rowwise, keywise, distancewise)
    )
    with on_device(q):
        look_ahead_bwd_kernel_dq[(blocks * batch * heads,)](
            q, kv, bias, table, first, out, lse, grad_out, grad_lse, mean, d_q, d_bias, *sizes, heads, **by_row
        )
        look_ahead_bwd_kernel_dkv[(triton.cdiv(keys, keywise.blocks["BT"]) * batch * heads,)](
            q, kv, bias, table, first, lse, grad_out, mean, d_kv, *sizes, heads, **by_key
        )
        look_ahead_bwd_kernel_dtable[(distances * heads * splits,)](
            q, kv, bias, table, first, lse, grad_out, mean, d_table,
            *sizes, table.shape[0], splits, heads, **by_distance,
        )  # fmt: skip
    by_kind = torch.stack([d_bias[ahead_blocks:].sum((0, 1)), d_bias[:ahead_blocks].sum((0, 1))])
    return d_q, d_kv, by_kind.flatten(0, 1).to(bias.dtype), d_table.sum(0).to(table.dtype)


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every kernel, configuration and dtype of this file, as a GPU of compute capability ``arch`` gets them."""
    wide = pointer(torch.float32)
    sizes = dict.fromkeys([*SIZES, "R", "splits", "H"], "i32")
    sums = dict.fromkeys(("seed", "lse", "d_lse", "mean", "d_bias", "d_table"), wide)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        names = ("q", "kv", "bias", "table", "output", "out", "d_out", "dq", "dkv")
        signature = dict.fromkeys(names, pointer(dtype)) | sums | sizes | {"start": "*i64"}
        products = products_on(arch, dtype)
        for name, kernel in (
            ("look_ahead_fwd", look_ahead_fwd_kernel),
            ("look_ahead_bwd_dq", look_ahead_bwd_kernel_dq),
            ("look_ahead_bwd_dkv", look_ahead_bwd_kernel_dkv),
            ("look_ahead_bwd_dtable", look_ahead_bwd_kernel_dtable),
        ):
            for head_size in LAUNCHES.widths(name, products.dtype):
                launch = LAUNCHES.look_up(name, head_size, products.dtype, arch)
                constants = _constants(launch, head_size, products, None)
                if kernel is look_ahead_fwd_kernel:
                    constants["IS_SEEDED"] = True
                yield CompileCase(f"{name} D={head_size}", kernel, signature, constants, launch.options, dtype, True)
