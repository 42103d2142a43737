"""Tree construction on a GPU: which kernel, or product of the matrix library, builds which level.

Three ways, by the size of the products:

- groups of at most 128 features, sequences of equal length: a program builds several levels above a
  block of nodes, so that x is read once and nobody waits for anybody;
- else the low levels one by one: by the matrix library where children lie side by side and one matrix
  serves (equal lengths, banks apart, no expander, no scale), by ``tree_fwd_kernel`` otherwise;
- the tail of small levels in one launch of that kernel, whose grid meets between levels.

Gradients run the same launches from the top. The weight gradient is one reduction over all levels: a few
library products, or ``tree_bwd_kernel_weight`` in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from python_ref import tree as reference
from python_ref.layout import Layout, constant
from python_ref.tree import LinearMerge

from . import tree_kernels as kernels
from .common import INTERPRETED, Products, on_device, products_of
from .launch import Launch, launch_for
from .tree_tiles import EQUAL, PAIRED, TABLE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Groups of at most so many features are built in blocks: the widest that have a launch.
BLOCK_FEATURES = 128
# Elements of a bank's level beyond which it gets a launch of its own: 1024 rows at E = 1024, and never
# more than two tiles for each of 132 multiprocessors. Reasoned, not measured.
TAIL_ELEMENTS = 1 << 20
# Programs that a weight gradient is spread over, as far as there are rows for them.
WEIGHT_PROGRAMS = 264

# Tiles of small levels where there are none of their own.
_NO_FEW = {"FEW": 0, "FEW_BM": 16, "FEW_BN": 16, "FEW_BK": 16}


def of_two_sums(launch: Launch) -> Launch:
    """A launch for tiles that keep two sums: gradients of a summarizer with a scale have columns half as wide."""
    return launch.with_blocks(BN=max(launch.blocks["BN"] // 2, 16))


def block_arguments(kernel: Any, launch: Launch) -> dict[str, int]:
    """A launch's sizes as the constant arguments of a kernel."""
    return {name: value for name, value in {**_NO_FEW, **launch.blocks}.items() if name in kernel.arg_names}


class _Problem:
    """One call's sizes and flags, as the kernels take them."""

    def __init__(self, x: Tensor, merge: LinearMerge, token: Tensor | None, layout: Layout, products: Products):
        self.layout = layout
        self.dtype, self.products, self.size = x.dtype, products.dtype, x.shape[1]
        self.x = x.contiguous()
        self.token = None if token is None else token.contiguous()
        self.weight, self.bias = merge.weight.contiguous(), merge.bias.contiguous()
        self.scale = None if merge.scale is None else merge.scale.contiguous()
        self.groups, self.taps, _, self.group_size = self.weight.shape
        self.bank = self.groups * self.group_size // self.size
        ragged = layout.spans is not None
        self.table = child_table(layout) if ragged else torch.empty(0, dtype=torch.int64, device=x.device)
        # One matrix per bank, and children that are a view of the level below.
        self.plain = not ragged and self.groups == self.bank and self.taps == 1 and self.scale is None
        self.in_blocks = not ragged and self.group_size <= BLOCK_FEATURES
        self.tail = self._tail_start()
        carried = -1 if layout.carried_levels is None else layout.carried_levels
        self.arguments = {
            "tokens": layout.tokens,
            "sequences": layout.sequences,
            "length": layout.equal_length,
            "carried": carried,
            "spare": 0 if carried < 0 else layout.sequences << (carried + 1),
            "node_rows": layout.rows,
            "banks": self.bank,
            "p_table": self.table,
            "p_token": self.x if token is None else self.token,
            "p_weight": self.weight,
            "p_bias": self.bias,
            "p_scale": self.bias if self.scale is None else self.scale,
            "p_x": self.x,
            "E": self.size,
            "C": self.group_size,
            "TAPS": self.taps,
            "HAS_SCALE": self.scale is not None,
            "HAS_TOKEN": token is not None,
            "CHILDREN": self._children(),
            **products.constants,
        }

    def _children(self) -> int:
        layout = self.layout
        if layout.spans is not None:
            return int(TABLE.value)
        odd = any(layout.equal_length >> level & 1 for level in range(layout.levels))
        return int(EQUAL.value if odd and layout.sequences > 1 else PAIRED.value)

    def _tail_start(self) -> int:
        """The lowest level from which on all levels are small."""
        start = self.layout.levels + 1
        while start > 1 and self.rows(start - 1) * max(self.size, 64) <= TAIL_ELEMENTS:
            start -= 1
        return start

    def rows(self, level: int, below: int = 0) -> int:
        """Rows of a level's places, each as high as a node of ``below`` levels below it."""
        return self.layout.level_nodes[level] * self.layout.heights[level - below]

    def launch_of(self, part: str, backward: bool) -> Launch:
        """How to launch a part of the tree: ``"level"``, ``"tail"`` or ``"block"``."""
        name = f"tree_{part}_{'bwd' if backward else 'fwd'}"
        found = launch_for(name, self.size, self.products, self.x.device)
        return of_two_sums(found) if backward and self.scale is not None else found

    def run(self, kernel: Any, grid: int, launch: Launch, cooperative: bool = False, **arguments: Any) -> None:
        if grid == 0:
            return
        options: dict[str, Any] = dict(launch.options)
        if cooperative and not INTERPRETED:
            options["launch_cooperative_grid"] = True
        given = self.arguments | arguments
        known = {name: given[name] for name in kernel.arg_names if name in given}
        kernel[(grid,)](**known, **block_arguments(kernel, launch), **options)


def child_table(layout: Layout) -> Tensor:
    """`Layout.children` of all levels in one table ``[P, 2]``; -1 for places that hold no node."""
    return layout.keep("tree children", lambda: _child_table(layout))


def _child_table(layout: Layout) -> Tensor:
    device, levels, total = layout.device, layout.levels, sum(layout.level_nodes[1:])
    if total == 0 or layout.sequences == 0:
        return torch.full((total, 2), -1, dtype=torch.int64, device=device)
    _, _, _, first, place = layout.tables()
    counts = constant((0, *layout.level_nodes[1:]), device)
    shelf = torch.arange(levels + 1, device=device)
    level = torch.repeat_interleave(shelf, counts, output_size=total)
    number = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[level]
    # One ascending list to search: where the sequences of a level end, level after level.
    ends = (place[1:, 1:] + (total + 1) * shelf[1:, None]).flatten()
    sequence = torch.searchsorted(ends, number + (total + 1) * level, right=True) - (level - 1) * layout.sequences
    real = sequence < layout.sequences
    sequence = sequence.clamp(max=layout.sequences - 1)
    left = 2 * (first[level, sequence] + number - place[level, sequence])
    rows = [layout.node_row(level - 1, sequence, left + side)[0] for side in (0, 1)]
    return torch.where(real[:, None], torch.stack(rows, 1), -1)


def _programs(device: torch.device) -> int:
    """Programs that surely run at the same time; the interpreter runs one after the other."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _walk(problem: _Problem, kernel: Any, first: int, last: int, backward: bool, **pointers: Any) -> None:
    """Levels ``first … last-1`` in one launch: many programs for one level, else as many as can meet."""
    if first >= last:
        return
    layout, together = problem.layout, last - first > 1
    launch = problem.launch_of("tail" if together else "level", backward)

    def tiles(level: int) -> int:
        rows = problem.rows(level, below=int(backward))
        few = together and rows <= launch.blocks["FEW"]
        row_size, col_size = (launch.blocks[f"FEW_{name}" if few else name] for name in ("BM", "BN"))
        units = problem.bank if not backward else 1 if level == 1 else problem.bank
        sides = 2 if backward and problem.scale is None else 1
        return units * sides * -(-rows // row_size) * -(-problem.size // col_size)

    grid = max(tiles(level) for level in range(first, last))
    start = last - 1 if backward else first
    device = problem.x.device
    counter = torch.empty(1, dtype=torch.int32, device=device)
    problem.run(
        kernel,
        min(grid, _programs(device)) if together else grid,
        launch,
        cooperative=together,
        p_counter=counter.zero_() if together else counter,
        first=first,
        last=last,
        base=layout.level_base[start],
        below=layout.level_base[start - 1],
        table=sum(layout.level_nodes[1:start]),
        **pointers,
    )


def _block_plan(layout: Layout, launch: Launch) -> list[tuple[int, int]]:
    """(first level, levels) of each launch, from below."""
    plan, first, span, levels = [], 1, launch.blocks["SPAN"], launch.blocks["LEVELS"]
    while first <= layout.levels:
        remaining = layout.levels - first + 1
        plan.append((first, remaining if remaining <= span else min(levels, remaining)))
        first += plan[-1][1]
    return plan


def _walk_blocks(problem: _Problem, kernel: Any, backward: bool, **pointers: Any) -> None:
    """All levels, several per launch."""
    layout, launch = problem.layout, problem.launch_of("block", backward)
    plan = _block_plan(layout, launch)
    for first, count in reversed(plan) if backward else plan:
        blocks = -(-(layout.equal_length >> first) // (1 << (launch.blocks["SPAN"] - 1)))
        start = first + count - 1 if backward else first
        problem.run(
            kernel,
            layout.sequences * blocks * (1 if backward else problem.groups),
            launch,
            first=first,
            count=count,
            blocks=blocks,
            base=layout.level_base[start],
            below=layout.level_base[start - 1],
            **pointers,
        )


def _sides(rows: Tensor, level: int, layout: Layout) -> Tensor:
    """A bank's level ``level-1`` as pairs, a view: ``[P, 2E]``, or ``[S, P/S, 2E]`` where it leaves nodes over."""
    each, size = layout.equal_length >> level, rows.shape[1]
    if layout.sequences == 1 or layout.equal_length >> (level - 1) == 2 * each:
        return rows[: layout.sequences * 2 * each].view(-1, 2 * size)
    return rows.view(layout.sequences, -1, size)[:, : 2 * each].view(layout.sequences, each, 2 * size)


def _library_merge(problem: _Problem, nodes: Tensor, level: int) -> None:
    """One level by the matrix library, bank by bank: its epilogue adds the bias."""
    layout = problem.layout
    for bank in range(problem.bank):
        below = problem.x if level == 1 else nodes[bank, layout.level_rows[level - 1]]
        pair, target = _sides(below, level, layout), nodes[bank, layout.level_rows[level]]
        weight, bias = problem.weight[bank, 0], problem.bias[bank]
        if pair.dim() == 2:
            torch.addmm(bias, pair, weight, out=target)
        else:
            torch.baddbmm(bias, pair, weight.expand(len(pair), -1, -1), out=target.view(*pair.shape[:2], -1))


def _library_grad(problem: _Problem, total: Tensor, grad_x: Tensor, level: int) -> None:
    """What one level sends to its children, by the matrix library."""
    layout = problem.layout
    for bank in range(problem.bank):
        below = grad_x if level == 1 else total[bank, layout.level_rows[level - 1]]
        target, grad = _sides(below, level, layout), total[bank, layout.level_rows[level]]
        weight, beta = problem.weight[bank, 0].t(), int(level > 1 or bank > 0)
        if target.dim() == 2:
            target.addmm_(grad, weight, beta=beta)
        else:
            target.baddbmm_(grad.view(*target.shape[:2], -1), weight.expand(len(target), -1, -1), beta=beta)


def build_tree(
    x: Tensor, merge: LinearMerge, bank: int, token: Tensor | None, carried: Tensor | None, layout: Layout
) -> Tensor:
    """`python_ref.tree.build_tree` by the kernels."""
    if x.dtype not in DTYPES:
        return reference.build_tree(x, merge, bank, token, carried, layout)
    nodes = x.new_empty(bank, layout.rows, x.shape[1])
    nodes[:, layout.unused_base :] = 0
    if carried is not None:
        nodes[:, layout.carry_base : layout.null_row] = carried.flatten(0, 1).transpose(0, 1)
    with on_device(x):
        problem = _Problem(x, merge, token, layout, products_of(x))
        if problem.in_blocks:
            _walk_blocks(problem, kernels.tree_block_fwd_kernel, False, p_nodes=nodes)
            return nodes
        for level in range(1, problem.tail):
            if problem.plain:
                _library_merge(problem, nodes, level)
            else:
                _walk(problem, kernels.tree_fwd_kernel, level, level + 1, False, p_nodes=nodes)
        _walk(problem, kernels.tree_fwd_kernel, problem.tail, layout.levels + 1, False, p_nodes=nodes)
    return nodes


def build_tree_backward(
    grad_nodes: Tensor, x: Tensor, nodes: Tensor, merge: LinearMerge, token: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`python_ref.tree.build_tree_backward` by the kernels; rows that hold no node have the gradient zero."""
    if x.dtype not in DTYPES:
        return reference.build_tree_backward(grad_nodes, x, nodes, merge, token, layout)
    problem = _Problem(x, merge, token, layout, products_of(x))
    total = grad_nodes.to(x.dtype).clone(memory_format=torch.contiguous_format)
    # Every token of a sequence of even length has a parent, which writes its gradient.
    whole = layout.spans is None and layout.equal_length % 2 == 0
    grad_x = torch.empty_like(problem.x) if whole else torch.zeros_like(problem.x)
    grad_token = None if problem.token is None else torch.zeros_like(problem.token)
    pointers = {"p_total": total, "p_grad_x": grad_x, "p_grad_token": grad_x if grad_token is None else grad_token}
    with on_device(x):
        if problem.in_blocks:
            _walk_blocks(problem, kernels.tree_block_bwd_kernel, True, p_total=total, p_grad_x=grad_x)
        else:
            _walk(problem, kernels.tree_bwd_kernel, problem.tail, layout.levels + 1, True, **pointers)
            for level in range(problem.tail - 1, 0, -1):
                if problem.plain:
                    _library_grad(problem, total, grad_x, level)
                else:
                    _walk(problem, kernels.tree_bwd_kernel, level, level + 1, True, **pointers)
        by_library = problem.plain and not problem.in_blocks
        sums = (_library_weight_grad if by_library else _kernel_weight_grad)(problem, nodes.contiguous(), total)
    grad_weight, grad_scale = _split_scale(problem, sums)
    grad_bias = total[:, : layout.unused_base].sum(1, dtype=torch.float32).view(problem.bias.shape)
    grad_carried = None
    if layout.carried_levels is not None:
        grad_carried = total[:, layout.carry_base : layout.null_row].transpose(0, 1)
        grad_carried = grad_carried.unflatten(0, (layout.sequences, -1)).contiguous()
    return grad_x, grad_weight, grad_bias.to(x.dtype), grad_scale, grad_token, grad_carried


def _split_scale(problem: _Problem, sums: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and scale from ``Σ child ⊗ grad of its parent``, ``[G, 1+k, 2C, C]`` float32."""
    if problem.scale is None:
        return sums.to(problem.dtype), None
    sides = sums.unflatten(2, (2, -1))
    scale = problem.scale.transpose(0, 1).float()
    grad_weight = (sides * scale[:, None, :, :, None]).sum(2)
    grad_scale = (sides * problem.weight.float()[:, :, None]).sum((1, 4)).transpose(0, 1)
    return grad_weight.to(problem.dtype), grad_scale.to(problem.dtype).contiguous()


def _kernel_weight_grad(problem: _Problem, nodes: Tensor, total: Tensor) -> Tensor:
    layout, device = problem.layout, problem.x.device
    launch = launch_for("tree_bwd_weight", problem.size, problem.products, device)
    banks = problem.group_size // problem.size
    tiles = -(-problem.size // launch.blocks["BM"]) * -(-problem.size // launch.blocks["BN"])
    tiles *= problem.groups * problem.taps * 2 * banks * banks
    rows = sum(problem.rows(level, below=1) for level in range(1, layout.levels + 1))
    splits = max(min(WEIGHT_PROGRAMS // tiles, rows // (4 * launch.blocks["BK"])), 1)
    shape = (splits, problem.groups, problem.taps, 2 * problem.group_size, problem.group_size)
    partial = torch.empty(shape, dtype=torch.float32, device=device)
    problem.run(
        kernels.tree_bwd_kernel_weight,
        tiles * splits,
        launch,
        p_nodes=nodes,
        p_total=total,
        p_partial=partial,
        levels=layout.levels,
        splits=splits,
    )
    return partial.sum(0) if splits > 1 else partial[0]


def _library_weight_grad(problem: _Problem, nodes: Tensor, total: Tensor) -> Tensor:
    """One product for x, and one for every run of levels whose rows and children lie without a gap."""
    layout, bank, size = problem.layout, problem.bank, problem.size
    sums = torch.zeros(bank, 2 * size, size, dtype=torch.float32, device=nodes.device)
    level = 1
    while level <= layout.levels:
        last = level
        while level > 1 and last < layout.levels and _gapless(last, layout):
            last += 1
        rows = slice(layout.level_base[level], layout.level_rows[last].stop)
        for b in range(bank):
            if last > level:
                children = nodes[b, layout.level_base[level - 1] :][: 2 * (rows.stop - rows.start)]
                pair = children.view(-1, 2 * size)
            else:
                pair = _sides(problem.x if level == 1 else nodes[b, layout.level_rows[level - 1]], level, layout)
            sums[b] += torch.mm(pair.reshape(-1, 2 * size).t(), total[b, rows])
        level = last + 1
    return sums[:, None]


def _gapless(level: int, layout: Layout) -> bool:
    """Whether the children of ``level`` fill the level below, and those of the next one begin where it begins."""
    below, each = layout.equal_length >> (level - 1), layout.equal_length >> level
    return below == 2 * each and (layout.sequences == 1 or each % 2 == 0)
