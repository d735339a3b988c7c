"""One chart per question, as SVG: a bar per system up to the median, with a line from minimum to maximum."""

from __future__ import annotations

from html import escape
from pathlib import Path

from bench._figures import MEASURES
from bench._report import Document, charted

WIDTH, LEFT, RIGHT, ROW, TITLE = 720, 160, 120, 26, 36
OURS, THEIRS, LINE = "#1b6ca8", "#9aa5b1", "#222222"


def draw(result: Document) -> str | None:
    """A panel per measure, each with a scale of its own. None when there is nothing to show."""
    parts: list[str] = []
    y = TITLE
    for name in charted(result):
        panel, y = _panel(result, name, y)
        parts += panel
    if not parts:
        return None
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{y}" fill="white"/>',
        f'<text x="12" y="22"><tspan font-size="16" font-weight="bold">{escape(result["name"])}</tspan> '
        f"median, minimum and maximum of {result['rounds']} rounds</text>",
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _panel(result: Document, name: str, top: int) -> tuple[list[str], int]:
    """Its lines, and where the next one begins."""
    shown = {system: spread[name] for system, spread in result["spread"].items() if name in spread}
    measure = MEASURES[name]
    scale = (WIDTH - LEFT - RIGHT) / (max(values["max"] for values in shown.values()) or 1.0)
    better = "lower" if measure.lower_is_better else "higher"
    lines = [f'<text x="12" y="{top + 14}">{escape(measure.text)}, {better} is better</text>']
    for number, (system, values) in enumerate(shown.items()):
        y = top + 22 + number * ROW
        median, low, high = (max(0.0, values[key] * scale) for key in ("median", "min", "max"))
        fill = OURS if system.startswith(result["subject"]) else THEIRS
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(system)}</text>',
            f'<rect x="{LEFT}" y="{y + 3}" width="{median:.1f}" height="{ROW - 8}" fill="{fill}"/>',
            f'<line x1="{LEFT + low:.1f}" x2="{LEFT + high:.1f}" y1="{y + 12}" y2="{y + 12}" stroke="{LINE}" '
            'stroke-width="2"/>',
            f'<text x="{LEFT + high + 8:.1f}" y="{y + 16}">{values["median"]:,.{measure.digits}f}</text>',
        ]
    return lines, top + 22 + ROW * len(shown) + 14


def write_chart(result: Document, folder: Path) -> Path | None:
    drawn = draw(result)
    if drawn is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.svg"
    path.write_text(drawn)
    return path
