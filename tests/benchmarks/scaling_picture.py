"""The picture of docs/scaling.md: seconds of a pass over a 70B family, and of driver and reduction, by workers.

Owns the SVG. Knows nothing of how the figures came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# Layout in pixels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 70, 190, 50, 50
COLOURS = ("#2b6cb0", "#7aa7d9", "#d1713f", "#8a8f98")


def picture(result: Mapping[str, Any]) -> str:
    """Return an SVG with both axes logarithmic.

    Args:
        result: What `tests.benchmarks.simulate` writes.
    """
    most = max(case["files"] for case in result["cases"])
    few = min(case["files"] for case in result["cases"])
    chosen = {files: [c for c in result["cases"] if c["files"] == files and c["points"] == 9] for files in (few, most)}
    small = min(result["model"][0]["seconds"], key=int)
    lines: dict[str, list[tuple[float, float]]] = {
        f"pass, {most} files": [(c["workers"], c["pass_s"]) for c in chosen[most]],
        f"pass, {few} files": [(c["workers"], c["pass_s"]) for c in chosen[few]],
        "driver, CPU": [(c["workers"], c["measure"]["both_s"]) for c in chosen[most]],
        "sum over the ring": [(m["workers"], m["seconds"][small]) for m in result["model"] if m["workers"] > 1],
    }
    return line_chart("One pass over nine 70B models, seconds", lines)


def line_chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return an SVG of lines over workers; both axes logarithmic, ticks at powers of 4 and of 10."""
    points = [point for line in lines.values() for point in line]
    widest = math.log(max(x for x, _ in points))
    low = math.floor(math.log10(min(y for _, y in points)))
    high = math.ceil(math.log10(max(y for _, y in points)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * math.log(x) / widest
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(y)) / (high - low)

    parts = [_text(16, 28, title, 16, "bold")]
    ends: list[tuple[float, str, str]] = []
    for power in range(low, high + 1):
        _, y = place(1, 10.0**power)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{10.0**power:g}", 12, anchor="end"))
    for x in (4**power for power in range(round(widest / math.log(4)) + 1)):
        parts.append(_text(place(x, 10.0**low)[0], HEIGHT - BOTTOM + 20, str(x), 12, anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "workers", 12, anchor="middle"))
    for colour, (label, line) in zip(COLOURS, lines.items(), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        ends.append((place(*line[-1])[1], label, colour))
    below = 0.0
    for end, label, colour in sorted(ends):
        # Labels of lines that end together stand one below the other.
        below = max(end, below + 17)
        parts.append(_text(WIDTH - RIGHT + 8, below + 4, label, 13, colour=colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="sans-serif"><title>{escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>' + "".join(parts) + "</svg>\n"
    )


def _text(
    x: float, y: float, text: str, size: int, weight: str = "normal", anchor: str = "start", colour: str = "#1a1a1a"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
        f' fill="{colour}">{escape(text)}</text>'
    )
