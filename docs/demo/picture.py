"""The results as a table and as a picture.

Owns Markdown and SVG. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

# Layout of the picture in pixels.
WIDTH, LABEL_WIDTH, BAR_HEIGHT, ROW_HEIGHT, GAP = 760, 250, 20, 27, 16
COLOURS = {"given": "#8a8f98", "average": "#d1713f", "median": "#2b6cb0"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bar_chart(title: str, sections: Mapping[str, Sequence[tuple[str, str, float]]]) -> str:
    """Return an SVG of horizontal bars.

    Args:
        title: The line above the picture.
        sections: Heading → bars, each with its label, its kind (a key of `COLOURS`) and its value in percent.
    """
    parts, y = [_text(16, 28, title, 16, "bold")], 44
    scale = (WIDTH - LABEL_WIDTH - 60) / 100
    for heading, bars in sections.items():
        y += GAP
        parts.append(_text(16, y + 4, heading, 13, "bold"))
        y += 14
        for label, kind, value in bars:
            length = value * scale
            parts.append(_text(28, y + 15, label, 13))
            parts.append(
                f'<rect x="{LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}" fill="{COLOURS[kind]}"/>'
            )
            parts.append(_text(LABEL_WIDTH + length + 8, y + 15, f"{value:.1f}", 13))
            y += ROW_HEIGHT
    parts.append(_text(LABEL_WIDTH, y + 18, "mean held-out accuracy over the tasks, in percent", 12))
    height = y + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="sans-serif"><title>{escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>' + "".join(parts) + "</svg>\n"
    )


def _text(x: float, y: float, text: str, size: int, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="#1a1a1a">{escape(text)}</text>'
    )
