"""Single-vector attention as block-sparse attention on the tensor cores.

A tile is BT positions aligned on n. Per bank it reads BT-1 nodes that no other tile reads (BT/2^i of
each level i ≤ log2 BT) and one node of every higher level; which of them a position sees is a fixed
pattern (`python_ref.layout`). Scores, mask, online softmax and weighted sum are one kernel. Backward
recomputes the weights from the log-sum-exp, stores the gradients of a tile's own nodes, and leaves one
partial sum a tile for each shared node; a second kernel adds those up in the order of the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from python_ref.layout import Layout

from .attention_kernels import SIZES, attend_bwd_kernel, attend_bwd_reduce_kernel, attend_fwd_kernel
from .common import (
    CompileCase,
    dot_precision,
    for_heads,
    next_power_of_2,
    on_device,
    pointer,
    product_dtype,
    product_dtype_on,
    triton_dtype,
)
from .tables import AttendTables, attend_tables


class Config(NamedTuple):
    """BT positions a tile, BK keys a step."""

    BT: int
    BK: int
    num_warps: int
    num_stages: int


# By head size rounded up to a power of two. Chosen so that nothing spills on sm_80 and sm_90
# (`bench.gpu.compile_kernels`); not yet tuned on a GPU. Float32 products are not tensor-core products, hold
# their operands in registers, and want small tiles; wider heads than these go to the reference.
FORWARD = {
    16: Config(64, 64, 4, 2),
    32: Config(64, 32, 4, 2),
    64: Config(64, 32, 4, 2),
    128: Config(64, 64, 8, 1),
    256: Config(64, 32, 8, 1),
}
BACKWARD = {
    16: Config(64, 32, 4, 2),
    32: Config(64, 32, 8, 2),
    64: Config(64, 32, 8, 2),
    128: Config(64, 32, 8, 1),
    256: Config(32, 16, 8, 1),
}
FORWARD_FLOAT32 = {
    16: Config(64, 32, 8, 1),
    32: Config(32, 32, 4, 1),
    64: Config(64, 16, 8, 1),
    128: Config(16, 16, 8, 1),
}
BACKWARD_FLOAT32 = {
    16: Config(32, 16, 8, 1),
    32: Config(32, 32, 8, 1),
    64: Config(64, 16, 8, 1),
    128: Config(32, 16, 8, 2),
}
REDUCE_TILES, REDUCE_COLUMNS = 32, 128


def default_config(table: str, head_size: int, dtype: torch.dtype) -> Config:
    """The configuration that a call gets whose products are in ``dtype``.

    Raises:
        ValueError: no configuration serves heads this wide.
    """
    half, single = {"forward": (FORWARD, FORWARD_FLOAT32), "backward": (BACKWARD, BACKWARD_FLOAT32)}[table]
    return for_heads(single if dtype == torch.float32 else half, head_size, dtype)


def _sizes(layout: Layout, tables: AttendTables, node_qv: Tensor, owned: bool) -> tuple[int, ...]:
    carried = -1 if layout.carried_levels is None else layout.carried_levels
    keys = (tables.keys, tables.owned_keys) if owned else (tables.keys,)
    banks, rows, _ = node_qv.shape
    ends = (tables.key.shape[1], layout.levels + 1, layout.carry_base, layout.carry_rows, carried)
    return (rows, banks, *keys, *ends)


def _constants(config: Config, head_size: int, expand: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "D": head_size,
        "EXPAND": expand,
        "BT": config.BT,
        "BK": config.BK,
        "BD": max(16, next_power_of_2(head_size)),
        "LOG_BT": config.BT.bit_length() - 1,
        "DOT": triton_dtype(dtype),
        "PRECISION": dot_precision(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def attend(
    token_qkv: Tensor, node_qv: Tensor, heads: int, layout: Layout, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """`python_ref.attention.attend` in one launch; heads of up to 256 features, 128 in float32."""
    tokens, size = token_qkv.shape[0], token_qkv.shape[1] // 3
    head_size, products = size // heads, product_dtype(token_qkv)
    config = config or default_config("forward", head_size, products)
    token_qkv, node_qv = token_qkv.contiguous(), node_qv.contiguous()
    # Where spans are given, some rows may belong to no sequence; else every row is written.
    make = torch.empty if layout.spans is None else torch.zeros
    out = make(tokens, size, dtype=token_qkv.dtype, device=token_qkv.device)
    lse = make(tokens, heads, dtype=torch.float32, device=token_qkv.device)
    tables = attend_tables(layout, config.BT)
    if tables.tile.shape[0]:
        with on_device(token_qkv):
            attend_fwd_kernel[(tables.tile.shape[0] * heads,)](
                token_qkv, node_qv, out, lse, tables.spans, tables.level_row, tables.tile, tables.key,
                *_sizes(layout, tables, node_qv, False), heads,
                **_constants(config, head_size, layout.expand, products),
            )  # fmt: skip
    return out, lse


def attend_backward(
    grad_out: Tensor,
    token_qkv: Tensor,
    node_qv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    layout: Layout,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`python_ref.attention.attend_backward` in two launches, bitwise reproducible."""
    head_size, products = grad_out.shape[1] // heads, product_dtype(token_qkv)
    config = config or default_config("backward", head_size, products)
    token_qkv, node_qv, grad_out = token_qkv.contiguous(), node_qv.contiguous(), grad_out.contiguous()
    d_token = torch.empty_like(token_qkv) if layout.spans is None else torch.zeros_like(token_qkv)
    # Rows that no tile reads (nodes complete at the very end, the null row) stay zero.
    d_node = torch.zeros_like(node_qv)
    tables = attend_tables(layout, config.BT)
    tiles, banks, width = tables.tile.shape[0], node_qv.shape[0], node_qv.shape[2]
    shared_keys = tables.keys - tables.owned_keys
    if tiles == 0:
        return d_token, d_node
    d_shared = torch.empty(tiles, banks, shared_keys, width, dtype=torch.float32, device=token_qkv.device)
    with on_device(token_qkv):
        attend_bwd_kernel[(tiles * heads,)](
            token_qkv, node_qv, out.contiguous(), lse.contiguous(), grad_out, d_token, d_node, d_shared,
            tables.spans, tables.level_row, tables.tile, tables.key,
            *_sizes(layout, tables, node_qv, True), heads,
            **_constants(config, head_size, layout.expand, products),
        )  # fmt: skip
        if tables.shared.shape[0]:
            columns = triton.cdiv(width, REDUCE_COLUMNS)
            attend_bwd_reduce_kernel[(tables.shared.shape[0] * banks * columns,)](
                d_shared, d_node, tables.shared, node_qv.shape[1], banks, shared_keys, width,
                BR=REDUCE_TILES, BC=REDUCE_COLUMNS, num_warps=4,
            )  # fmt: skip
    return d_token, d_node


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every kernel, configuration and dtype of this file, as a GPU of compute capability ``arch`` gets them."""
    tables = {"spans": "*i64", "level_row": "*i64", "tile": "*i64", "key": "*i32"}
    sizes = dict.fromkeys([*SIZES, "owned", "H"], "i32")
    wide = pointer(torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        data = pointer(dtype)
        tensors = dict.fromkeys(("token_qkv", "node_qv", "out", "d_out", "d_token", "d_node"), data)
        signature = tensors | {"lse": wide, "d_shared": wide} | tables | sizes
        for head_size in FORWARD:
            for name, kernel, table in (
                ("attend_fwd", attend_fwd_kernel, "forward"),
                ("attend_bwd", attend_bwd_kernel, "backward"),
            ):
                products = product_dtype_on(arch, dtype)
                if products == torch.float32 and head_size not in FORWARD_FLOAT32:
                    continue
                config = default_config(table, head_size, products)
                constants = _constants(config, head_size, 0, products)
                options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
                yield CompileCase(f"{name} D={head_size}", kernel, signature, constants, options, dtype, True)
        signature = {"d_shared": wide, "d_node": data, "shared": "*i64"}
        signature |= dict.fromkeys(("rows", "banks", "shared_keys", "width"), "i32")
        constants = {"BR": REDUCE_TILES, "BC": REDUCE_COLUMNS}
        options = {"num_warps": 4, "num_stages": 2}
        yield CompileCase("attend_bwd_reduce", attend_bwd_reduce_kernel, signature, constants, options, dtype, True)
