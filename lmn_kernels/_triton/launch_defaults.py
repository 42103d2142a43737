"""The launches that kernels get where no tuned file says otherwise: data alone, which `launch` reads and checks.

By kernel and width: the features of a head rounded up to a power of two for attention, the embedding size for the
tree. Chosen so that nothing spills on sm_80 and sm_90 (`bench.gpu.compile_kernels`); not yet tuned on a GPU. All fit
99 KB of shared memory, and 64 KB on sm_75, which does not pipeline.
"""

from __future__ import annotations

Row = dict[str, int]
Rows = dict[int, Row]

# Products in 16 bits, on the tensor cores.
_TREE_LEVEL_16_BITS: Rows = {
    16: dict(BM=128, BN=16, BK=16, num_warps=4, num_stages=2),
    32: dict(BM=128, BN=32, BK=32, num_warps=4, num_stages=2),
    64: dict(BM=128, BN=64, BK=64, num_warps=8, num_stages=2),
    128: dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3),
    256: dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3),
}
_TREE_TAIL_16_BITS: Rows = {
    16: dict(BM=64, BN=16, BK=16, FEW=64, FEW_BM=16, FEW_BN=16, FEW_BK=16, num_warps=4, num_stages=2),
    32: dict(BM=64, BN=32, BK=32, FEW=64, FEW_BM=16, FEW_BN=32, FEW_BK=32, num_warps=4, num_stages=2),
    64: dict(BM=64, BN=64, BK=64, FEW=128, FEW_BM=16, FEW_BN=32, FEW_BK=64, num_warps=4, num_stages=2, maxnreg=255),
    128: dict(BM=64, BN=64, BK=64, FEW=128, FEW_BM=16, FEW_BN=32, FEW_BK=128, num_warps=4, num_stages=3),
    256: dict(BM=64, BN=64, BK=64, FEW=128, FEW_BM=16, FEW_BN=32, FEW_BK=128, num_warps=4, num_stages=4),
}
_TREE_BLOCK_16_BITS: Rows = {
    16: dict(BM=32, BN=16, BK=16, SPAN=6, LEVELS=6, num_warps=2, num_stages=2),
    32: dict(BM=32, BN=32, BK=32, SPAN=6, LEVELS=6, num_warps=2, num_stages=2),
    64: dict(BM=32, BN=64, BK=64, SPAN=6, LEVELS=6, num_warps=4, num_stages=2, maxnreg=192),
    128: dict(BM=64, BN=128, BK=64, SPAN=7, LEVELS=4, num_warps=8, num_stages=2),
}
_16_BITS: dict[str, Rows] = {
    "attend_fwd": {
        16: dict(BT=64, BK=64, num_warps=4, num_stages=2),
        32: dict(BT=64, BK=32, num_warps=4, num_stages=2),
        64: dict(BT=64, BK=32, num_warps=4, num_stages=2),
        128: dict(BT=64, BK=64, num_warps=8, num_stages=1),
        256: dict(BT=64, BK=32, num_warps=8, num_stages=1),
    },
    "attend_bwd": {
        16: dict(BT=64, BK=32, num_warps=2, num_stages=2, maxnreg=255),
        32: dict(BT=64, BK=32, num_warps=2, num_stages=2),
        64: dict(BT=64, BK=32, num_warps=4, num_stages=2),
        128: dict(BT=64, BK=32, num_warps=8, num_stages=1),
        256: dict(BT=32, BK=16, num_warps=8, num_stages=1),
    },
    "look_ahead_fwd": {
        16: dict(BT=64, num_warps=4, num_stages=2),
        32: dict(BT=64, num_warps=8, num_stages=2),
        64: dict(BT=32, num_warps=4, num_stages=2),
        128: dict(BT=16, num_warps=4, num_stages=2),
    },
    "look_ahead_bwd_dq": {
        16: dict(BT=32, num_warps=2, num_stages=2),
        32: dict(BT=32, num_warps=4, num_stages=2),
        64: dict(BT=32, num_warps=4, num_stages=2),
        128: dict(BT=16, num_warps=4, num_stages=2),
    },
    "look_ahead_bwd_dkv": {
        16: dict(BT=32, num_warps=2, num_stages=2),
        32: dict(BT=32, num_warps=2, num_stages=2),
        64: dict(BT=32, num_warps=4, num_stages=2, maxnreg=255),
        128: dict(BT=32, num_warps=8, num_stages=2),
    },
    "look_ahead_bwd_dtable": {
        16: dict(BT=32, num_warps=2, num_stages=2),
        32: dict(BT=32, num_warps=2, num_stages=2),
        64: dict(BT=32, num_warps=4, num_stages=2),
        128: dict(BT=16, num_warps=2, num_stages=2),
    },
    "tree_level_fwd": _TREE_LEVEL_16_BITS,
    "tree_level_bwd": _TREE_LEVEL_16_BITS,
    "tree_tail_fwd": _TREE_TAIL_16_BITS,
    "tree_tail_bwd": _TREE_TAIL_16_BITS,
    "tree_block_fwd": _TREE_BLOCK_16_BITS,
    "tree_block_bwd": _TREE_BLOCK_16_BITS,
    "tree_bwd_weight": {
        16: dict(BM=16, BN=16, BK=128, num_warps=2, num_stages=2),
        32: dict(BM=32, BN=32, BK=128, num_warps=4, num_stages=2),
        64: dict(BM=64, BN=64, BK=64, num_warps=4, num_stages=3, maxnreg=192),
        128: dict(BM=128, BN=128, BK=32, num_warps=8, num_stages=3),
        256: dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3),
    },
}

# Products in float32: IEEE ones run outside the tensor cores, hold their operands in registers, and want small tiles.
_TREE_LEVEL_FLOAT32: Rows = {
    16: dict(BM=64, BN=16, BK=16, num_warps=4, num_stages=2),
    32: dict(BM=64, BN=32, BK=16, num_warps=4, num_stages=2),
    64: dict(BM=32, BN=64, BK=16, num_warps=4, num_stages=2, maxnreg=224),
    128: dict(BM=32, BN=64, BK=16, num_warps=4, num_stages=2),
    256: dict(BM=32, BN=64, BK=16, num_warps=4, num_stages=2),
}
_TREE_TAIL_FLOAT32: Rows = {
    16: dict(BM=32, BN=16, BK=16, FEW=64, FEW_BM=16, FEW_BN=16, FEW_BK=16, num_warps=4, num_stages=2),
    32: dict(BM=32, BN=32, BK=16, FEW=64, FEW_BM=16, FEW_BN=32, FEW_BK=16, num_warps=8, num_stages=2),
    64: dict(BM=32, BN=32, BK=16, FEW=64, FEW_BM=16, FEW_BN=32, FEW_BK=16, num_warps=8, num_stages=2, maxnreg=192),
    128: dict(BM=32, BN=32, BK=32, FEW=64, FEW_BM=16, FEW_BN=32, FEW_BK=32, num_warps=4, num_stages=2),
    256: dict(BM=32, BN=32, BK=32, FEW=64, FEW_BM=16, FEW_BN=32, FEW_BK=32, num_warps=4, num_stages=2),
}
_TREE_BLOCK_FLOAT32: Rows = {
    16: dict(BM=32, BN=16, BK=16, SPAN=6, LEVELS=6, num_warps=2, num_stages=2, maxnreg=128),
    32: dict(BM=32, BN=32, BK=16, SPAN=6, LEVELS=6, num_warps=4, num_stages=2, maxnreg=128),
    64: dict(BM=32, BN=64, BK=16, SPAN=6, LEVELS=6, num_warps=8, num_stages=2, maxnreg=192),
    128: dict(BM=32, BN=64, BK=16, SPAN=6, LEVELS=4, num_warps=8, num_stages=2),
}
_LOOK_AHEAD_FLOAT32: Rows = {
    16: dict(BT=16, num_warps=8, num_stages=1),
    32: dict(BT=16, num_warps=8, num_stages=1),
    64: dict(BT=16, num_warps=8, num_stages=1),
}
_FLOAT32: dict[str, Rows] = {
    "attend_fwd": {
        16: dict(BT=64, BK=32, num_warps=8, num_stages=1),
        32: dict(BT=32, BK=32, num_warps=4, num_stages=1),
        64: dict(BT=64, BK=16, num_warps=8, num_stages=1),
        128: dict(BT=16, BK=16, num_warps=8, num_stages=1),
    },
    "attend_bwd": {
        16: dict(BT=32, BK=16, num_warps=8, num_stages=1),
        32: dict(BT=32, BK=32, num_warps=8, num_stages=1),
        64: dict(BT=64, BK=16, num_warps=8, num_stages=1),
        128: dict(BT=32, BK=16, num_warps=8, num_stages=2),
    },
    # It adds float32 whatever the dtype, at any width alike.
    "attend_bwd_reduce": {16: dict(BR=32, BC=128, num_warps=4, num_stages=3)},
    "look_ahead_fwd": _LOOK_AHEAD_FLOAT32,
    "look_ahead_bwd_dq": _LOOK_AHEAD_FLOAT32,
    "look_ahead_bwd_dkv": _LOOK_AHEAD_FLOAT32,
    "look_ahead_bwd_dtable": _LOOK_AHEAD_FLOAT32,
    "tree_level_fwd": _TREE_LEVEL_FLOAT32,
    "tree_level_bwd": _TREE_LEVEL_FLOAT32,
    "tree_tail_fwd": _TREE_TAIL_FLOAT32,
    "tree_tail_bwd": _TREE_TAIL_FLOAT32,
    "tree_block_fwd": _TREE_BLOCK_FLOAT32,
    "tree_block_bwd": _TREE_BLOCK_FLOAT32,
    "tree_bwd_weight": {
        16: dict(BM=16, BN=16, BK=64, num_warps=4, num_stages=2),
        32: dict(BM=32, BN=32, BK=32, num_warps=4, num_stages=2),
        64: dict(BM=64, BN=64, BK=16, num_warps=8, num_stages=2),
        128: dict(BM=64, BN=64, BK=16, num_warps=8, num_stages=2),
        256: dict(BM=64, BN=64, BK=16, num_warps=8, num_stages=2),
    },
}

# By the lowest compute capability that they are for, then kernel, dtype of the products, width. Below sm_80 every
# product is one of float32.
DEFAULTS: dict[int, dict[str, dict[str, Rows]]] = {
    75: {kernel: {"float32": rows} for kernel, rows in _FLOAT32.items()},
    80: {kernel: {"float16": rows, "bfloat16": rows} for kernel, rows in _16_BITS.items()},
}
