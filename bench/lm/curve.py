"""The loss curve of a run as CSV and as an SVG drawing."""

from __future__ import annotations

import io
from typing import Any

COLOURS = {"train": "#1f6feb", "validation": "#d1242f"}


def to_csv(rows: list[dict[str, Any]]) -> str:
    """One line per evaluation."""
    lines = ["step,train,validation"]
    lines += [f"{row['step']},{row['train']:.6f},{row['validation']:.6f}" for row in rows]
    return "\n".join(lines) + "\n"


def to_svg(rows: list[dict[str, Any]], title: str, entropy: float) -> bytes:
    """Training and validation loss over steps, with the unigram entropy as a dashed line.

    Args:
        rows: evaluations with ``step``, ``train`` and ``validation``; one at least.
        title: text above the drawing.
        entropy: nats per character.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for split, colour in COLOURS.items():
        label, losses = f"{split} {rows[-1][split]:.4f}", [row[split] for row in rows]
        axes.plot([row["step"] for row in rows], losses, "o-", color=colour, markersize=3, label=label, gid=split)
    axes.axhline(entropy, color="#57606a", linestyle="--", label=f"unigram entropy {entropy:.2f}")
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="step", ylabel="nats per character")
    axes.grid(color="#d8dee4")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
