"""A bar chart of speeds beside the slowest as SVG, written by hand so that the same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 760, 18, 8, 300, 150, 44
OURS, OTHERS, LINE, TEXT = "#1f6f8b", "#b8c4cc", "#33414a", "#1d252b"
FONT = 'font-family="Helvetica, Arial, sans-serif"'


def bars(title: str, rows: Sequence[tuple[str, dict[str, Any], str]]) -> str:
    """Horizontal bars, the first row at the top.

    Args:
        rows: name, ratio (median, low, high) and a note behind the bar; names that begin with "ours" are coloured.
    """
    height = TOP + len(rows) * (BAR + GAP) + 12
    longest = max(ratio["high"] for _, ratio, _ in rows)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" {FONT} font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="15" font-weight="bold" fill="{TEXT}">{escape(title)}</text>',
    ]
    for number, row in enumerate(rows):
        parts += _bar(*row, y=TOP + number * (BAR + GAP), scale=scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(name: str, ratio: dict[str, Any], note: str, *, y: int, scale: float) -> list[str]:
    middle, (low, median, high) = y + BAR / 2, (LEFT + ratio[key] * scale for key in ("low", "median", "high"))
    is_ours = name.startswith("ours")
    weight = ' font-weight="bold"' if is_ours else ""
    shown = f"{ratio['median']:.2f}" + (f"  {note}" if note else "")
    return [
        f'<text x="{LEFT - 10}" y="{middle + 4.5}" text-anchor="end" fill="{TEXT}"{weight}>{escape(name)}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{median - LEFT:.1f}" height="{BAR}" fill="{OURS if is_ours else OTHERS}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8" '
        f'stroke="{LINE}" fill="none"/>',
        f'<text x="{max(high, median) + 8:.1f}" y="{middle + 4.5}" fill="{TEXT}"{weight}>{escape(shown)}</text>',
    ]
