"""How many floating-point operations an operation takes, for `torch.utils.flop_counter`.

As torch does, two for a multiplication and an addition of a product, and nothing for what goes element by element.
Counted is what the algorithm needs, whoever serves: a merge for each node, and for each slot that a position sees its
score and its share of the mix. Formulas see shapes, no values. So of fresh sequences of equal length counts are exact;
where spans, positions, slots of a pool or starts of streams decide, they are upper bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from python_ref.layout import level_count, stack_height
from python_ref.sequences import Sequences

# Takes an operation's arguments with shapes in the place of tensors, and ``out_shape``.
Formula = Callable[..., int]
_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Formula] = {}


def count_with(operation: str, formula: Formula) -> None:
    """Have torch count an operation, once its counter is imported: with it come Triton and a tenth of a second."""
    _formulas[operation] = formula
    if _COUNTER in sys.modules:
        _tell(sys.modules[_COUNTER], operation)


def _tell(counter: ModuleType, operation: str) -> None:
    counter.register_flop_formula(getattr(torch.ops.lmn_kernels, operation))(_formulas[operation])


class _WhenImported(MetaPathFinder):
    """Tells torch's counter the formulas as soon as somebody imports it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                for operation in _formulas:
                    _tell(module, operation)

            loader.exec_module = execute_and_tell
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())


def nodes(sequences: Sequences) -> list[int]:
    """Nodes that all sequences complete, of levels 1, 2, …"""
    tokens, count, last = sequences.tokens, sequences.count, sequences.max_position
    # Behind a state, whatever its position, l tokens complete at most ⌈l / 2^i⌉ nodes.
    behind = 0 if sequences.carried_levels is None else count
    levels = range(1, level_count(last) + 1)
    return [min(count * (last >> i), (tokens + behind * ((1 << i) - 1)) >> i) for i in levels]


def visible_slots(sequences: Sequences, bank: int, expand: int) -> int:
    """Slots that all positions see, their own tokens included."""
    count, last = sequences.count, sequences.max_position
    tokens = min(sequences.tokens, count * last)
    if not tokens:
        return 0

    def up_to(position: int) -> int:
        """Of one sequence's positions 1 … ``position``; it rises ever faster, so few long sequences see most."""
        seen = (
            stack_height(level, expand) * (position - (1 << level) + 1)
            for level in range(1, level_count(position) + 1)
        )  # fmt: skip
        return position + bank * sum(seen)

    if sequences.carried_levels is None:
        whole, rest = divmod(tokens, last)
        return whole * up_to(last) + up_to(rest)
    each, longer = divmod(tokens, count)  # all end at the last position; equal chunks see most

    def of_last(length: int) -> int:
        return up_to(last) - up_to(last - length)

    return (count - longer) * of_last(each) + (longer and longer * of_last(each + 1))
