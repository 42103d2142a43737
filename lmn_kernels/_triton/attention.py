"""Single-vector attention as block-sparse attention on the tensor cores.

A tile is BT positions aligned on n. Per bank it reads BT-1 nodes that no other tile reads (BT/2^i of
each level i ≤ log2 BT) and one node of every higher level; which of them a position sees is a fixed
pattern (`python_ref.layout`). Scores, mask, online softmax and weighted sum are one kernel. Backward
recomputes the weights from the log-sum-exp, stores the gradients of a tile's own nodes, and leaves one
partial sum a tile for each shared node; a second kernel adds those up in the order of the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from python_ref.layout import Layout

from .attention_kernels import SIZES, attend_bwd_kernel, attend_bwd_reduce_kernel, attend_fwd_kernel
from .common import CompileCase, Products, on_device, pointer, products_of, products_on
from .launch import LAUNCHES, Launch, launch_for
from .tables import AttendTables, attend_tables


def _sizes(layout: Layout, tables: AttendTables, node_qv: Tensor, owned: bool) -> tuple[int, ...]:
    carried = -1 if layout.carried_levels is None else layout.carried_levels
    keys = (tables.keys, tables.owned_keys) if owned else (tables.keys,)
    banks, rows, _ = node_qv.shape
    ends = (tables.key.shape[1], layout.levels + 1, layout.carry_base, layout.carry_rows, carried)
    return (rows, banks, *keys, *ends)


def _constants(launch: Launch, head_size: int, expand: int, products: Products) -> dict[str, Any]:
    return {
        "D": head_size,
        "EXPAND": expand,
        "BD": max(16, triton.next_power_of_2(head_size)),
        "LOG_BT": launch.blocks["BT"].bit_length() - 1,
        **products.constants,
        **launch.blocks,
    }


def attend(
    token_qkv: Tensor, node_qv: Tensor, heads: int, layout: Layout, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """`python_ref.attention.attend` in one launch; heads of up to 256 features, 128 in float32."""
    tokens, size = token_qkv.shape[0], token_qkv.shape[1] // 3
    head_size, products = size // heads, products_of(token_qkv)
    with on_device(token_qkv):
        launch = launch or launch_for("attend_fwd", head_size, products.dtype, token_qkv.device)
        tables = attend_tables(layout, launch.blocks["BT"])
        token_qkv, node_qv = token_qkv.contiguous(), node_qv.contiguous()
        # Where spans are given, some rows may belong to no sequence; else every row is written.
        make = torch.empty if layout.spans is None else torch.zeros
        out = make(tokens, size, dtype=token_qkv.dtype, device=token_qkv.device)
        lse = make(tokens, heads, dtype=torch.float32, device=token_qkv.device)
        if tables.tile.shape[0]:
            attend_fwd_kernel[(tables.tile.shape[0] * heads,)](
                token_qkv, node_qv, out, lse, tables.spans, tables.level_row, tables.tile, tables.key,
                *_sizes(layout, tables, node_qv, False), heads,
                **_constants(launch, head_size, layout.expand, products), **launch.options,
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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """`python_ref.attention.attend_backward` in two launches, bitwise reproducible."""
    head_size, products = grad_out.shape[1] // heads, products_of(token_qkv)
    with on_device(token_qkv):
        launch = launch or launch_for("attend_bwd", head_size, products.dtype, token_qkv.device)
        tables = attend_tables(layout, launch.blocks["BT"])
        token_qkv, node_qv, grad_out = token_qkv.contiguous(), node_qv.contiguous(), grad_out.contiguous()
        d_token = torch.empty_like(token_qkv) if layout.spans is None else torch.zeros_like(token_qkv)
        # Rows that no tile reads (nodes complete at the very end, the null row) stay zero.
        d_node = torch.zeros_like(node_qv)
        tiles, banks, width = tables.tile.shape[0], node_qv.shape[0], node_qv.shape[2]
        shared_keys = tables.keys - tables.owned_keys
        if tiles == 0:
            return d_token, d_node
        d_shared = torch.empty(tiles, banks, shared_keys, width, dtype=torch.float32, device=token_qkv.device)
        attend_bwd_kernel[(tiles * heads,)](
            token_qkv, node_qv, out.contiguous(), lse.contiguous(), grad_out, d_token, d_node, d_shared,
            tables.spans, tables.level_row, tables.tile, tables.key,
            *_sizes(layout, tables, node_qv, True), heads,
            **_constants(launch, head_size, layout.expand, products), **launch.options,
        )  # fmt: skip
        if tables.shared.shape[0]:
            reduce = launch_for("attend_bwd_reduce", width, torch.float32, token_qkv.device)
            columns = triton.cdiv(width, reduce.blocks["BC"])
            attend_bwd_reduce_kernel[(tables.shared.shape[0] * banks * columns,)](
                d_shared, d_node, tables.shared, node_qv.shape[1], banks, shared_keys, width,
                **reduce.blocks, **reduce.options,
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
        products = products_on(arch, dtype)
        for name, kernel in (("attend_fwd", attend_fwd_kernel), ("attend_bwd", attend_bwd_kernel)):
            for head_size in LAUNCHES.widths(name, products.dtype):
                launch = LAUNCHES.look_up(name, head_size, products.dtype, arch)
                constants = _constants(launch, head_size, 0, products)
                yield CompileCase(f"{name} D={head_size}", kernel, signature, constants, launch.options, dtype, True)
        signature = {"d_shared": wide, "d_node": data, "shared": "*i64"}
        signature |= dict.fromkeys(("rows", "banks", "shared_keys", "width"), "i32")
        launch = LAUNCHES.look_up("attend_bwd_reduce", 16, torch.float32, arch)
        sizes_and_options = dict(launch.blocks), launch.options
        yield CompileCase("attend_bwd_reduce", attend_bwd_reduce_kernel, signature, *sizes_and_options, dtype, True)
