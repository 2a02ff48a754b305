"""Drawing of a network: resolution levels with sizes, widths and attention, and the skips."""

from __future__ import annotations

from collections import Counter
from xml.sax.saxutils import escape

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.models.summary import LayerSummary, summarize

WIDTH, HEIGHT, GAP, MARGIN = 250, 58, 34, 24  # of a box, between boxes, around the drawing; in pixels
STYLE = "font-family:sans-serif;font-size:12px"


def draw_diagram(config: UNetConfig) -> str:
    """Draw a network as SVG: the encoder on the left from top to bottom, the decoder on the right upwards."""
    parts = {part.name: part for part in summarize(config)}
    levels = range(len(config.widths))
    skips = Counter(level for level, _ in config.skip_levels)
    right, shapes = MARGIN + WIDTH + 3 * GAP, []

    def top_of(row: int) -> int:
        return MARGIN + row * (HEIGHT + GAP)

    for side, x in (("encoder", MARGIN), ("decoder", right)):
        shapes.append(_box(parts["input" if side == "encoder" else "output"], x, top_of(0)))
        for level in levels:
            shapes.append(_box(parts[f"{side} {level}"], x, top_of(level + 1)))
            start, end = top_of(level) + HEIGHT, top_of(level + 1)
            if side == "decoder":
                start, end = end, start
            shapes.append(_line((x + WIDTH // 2, start), (x + WIDTH // 2, end)))
    for level in levels:
        y = top_of(level + 1) + HEIGHT // 2
        shapes.append(_line((MARGIN + WIDTH, y), (right, y), "stroke-dasharray:4"))
        shapes.append(_text(MARGIN + WIDTH + 3 * GAP // 2, y - 5, f"{skips[level]} skips", "middle"))
    bottom, middle = top_of(len(levels) + 1), (MARGIN + right) // 2
    shapes.append(_box(parts["bottleneck"], middle, bottom))
    end = bottom - GAP
    shapes.append(_line((MARGIN + WIDTH // 2, end), (middle + WIDTH // 4, bottom)))
    shapes.append(_line((middle + 3 * WIDTH // 4, bottom), (right + WIDTH // 2, end)))
    size = f'width="{right + WIDTH + MARGIN}" height="{bottom + HEIGHT + MARGIN}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{STYLE}">'
    box = 'markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"'
    arrow = f'<marker id="a" {box}><path d="M0,0 L8,4 L0,8 z"/></marker>'
    return "\n".join(
        [head, f"<defs>{arrow}</defs>", '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>\n"]
    )


def _box(part: LayerSummary, x: int, y: int) -> str:
    fill = "#fde9c8" if part.attention else "#dbe8f7"
    rows = [f"{part.name}: {part.size}, {part.width} channels"]
    rows.append(", ".join(row for row in (f"{part.blocks} blocks" if part.blocks else "", part.attention) if row))
    rows.append(f"{part.parameters:,} parameters")
    rect = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="#444"/>'
    return rect + "".join(
        _text(x + WIDTH // 2, y + 17 + 16 * i, row, "middle") for i, row in enumerate(filter(None, rows))
    )


def _text(x: int, y: int, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(start: tuple[int, int], end: tuple[int, int], style: str = "") -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#444" marker-end="url(#a)" style="{style}"/>'
