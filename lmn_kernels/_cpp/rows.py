"""The extension, and row arithmetic as it takes it."""

from __future__ import annotations

import importlib
from typing import Any

from python_ref.layout import Layout

EXTENSION: Any = importlib.import_module("lmn_kernels._C")


def rows_of(layout: Layout) -> Any:
    """Those of a layout, made once for it."""
    base = [*layout.level_base, layout.unused_base]
    sizes = layout.tokens, layout.sequences, layout.expand, layout.levels, layout.carried_levels, layout.rows
    return layout.keep("cpp", lambda: EXTENSION.Layout(layout.spans, *sizes, base))
