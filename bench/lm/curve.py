"""The loss curve of a run as CSV and as an SVG drawing."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 60, 36, 20, 48
COLOURS = {"train": "#1f6feb", "validation": "#d1242f"}


def to_csv(rows: list[dict[str, Any]]) -> str:
    """One line per evaluation."""
    lines = ["step,train,validation"]
    lines += [f"{row['step']},{row['train']:.6f},{row['validation']:.6f}" for row in rows]
    return "\n".join(lines) + "\n"


def to_svg(rows: list[dict[str, Any]], title: str, entropy: float) -> str:
    """Training and validation loss over steps, with the unigram entropy as a dashed line.

    Args:
        rows: evaluations with ``step``, ``train`` and ``validation``; one at least.
        title: text above the drawing.
        entropy: nats per character.
    """
    last = max(row["step"] for row in rows) or 1
    losses = [row[split] for row in rows for split in COLOURS]
    low, high = min(*losses, entropy), max(*losses, entropy)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin

    def at(step: float, loss: float) -> tuple[float, float]:
        across = LEFT + step / last * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, content: str, anchor: str = "middle", colour: str = "#24292f") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(content)}</text>'

    def line(start: tuple[float, float], end: tuple[float, float], style: str) -> str:
        return f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" {style}/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, TOP - 16, title),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "step"),
        text(LEFT - 8, TOP - 6, "nats per character", "start"),
    ]
    for tick in range(6):
        loss, step = low + tick / 5 * (high - low), tick / 5 * last
        parts.append(line(at(0, loss), at(last, loss), 'stroke="#d8dee4"'))
        parts.append(text(LEFT - 8, at(0, loss)[1] + 4, f"{loss:.2f}", "end"))
        parts.append(text(at(step, low)[0], HEIGHT - BOTTOM + 18, f"{step:.0f}"))
    parts.append(line(at(0, entropy), at(last, entropy), 'stroke="#57606a" stroke-dasharray="6 4"'))
    parts.append(text(WIDTH - RIGHT, at(0, entropy)[1] - 5, f"unigram entropy {entropy:.2f}", "end", "#57606a"))
    for number, (split, colour) in enumerate(COLOURS.items()):
        points = [at(row["step"], row[split]) for row in rows]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
        parts.append(text(WIDTH - RIGHT, TOP + 40 + 16 * number, f"{split} {rows[-1][split]:.4f}", "end", colour))
    return "\n".join([*parts, "</svg>", ""])
