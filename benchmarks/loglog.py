"""Curves on logarithmic axes as an SVG picture, panels side by side."""

import math
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 260, 220, 52, 56, 34  # of a panel's frame, and around it; in pixels
COLOURS = ("#c2571a", "#2a6fb0", "#3c8d40")
STYLE = "font-family:sans-serif;font-size:12px"


class Panel(NamedTuple):
    """A title that names x, the unit of y, and curves of (x, y) by their legend."""

    title: str
    unit: str
    curves: dict[str, list[tuple[float, float]]]


def draw(panels: list[Panel]) -> str:
    """The whole picture."""
    width = len(panels) * (LEFT + WIDTH) + 20
    size = f'width="{width}" height="{TOP + HEIGHT + BOTTOM}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{STYLE}">'
    shapes = [shape for i, panel in enumerate(panels) for shape in _panel(panel, i * (LEFT + WIDTH) + LEFT)]
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>\n"])


def _panel(panel: Panel, left: int) -> list[str]:
    xs = sorted({x for curve in panel.curves.values() for x, _ in curve})
    ys = [y for curve in panel.curves.values() for _, y in curve]
    decades = range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1)

    def across(x: float) -> float:
        return left + 12 + (WIDTH - 24) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def down(y: float) -> float:
        return TOP + HEIGHT * (decades[-1] - math.log10(y)) / (decades[-1] - decades[0])

    shapes = [f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#444"/>']
    for x in xs:
        shapes.append(f'<path d="M{across(x):.1f},{TOP} v{HEIGHT}" stroke="#ddd"/>')
        shapes.append(_text(across(x), TOP + HEIGHT + 15, f"{x:g}", "middle"))
    for decade in decades:
        shapes.append(f'<path d="M{left},{down(10**decade):.1f} h{WIDTH}" stroke="#ddd"/>')
        shapes.append(_text(left - 4, down(10**decade) + 4, f"{10**decade:g}", "end"))
    shapes.append(_text(left + WIDTH / 2, TOP + HEIGHT + 30, f"{panel.title} (time in {panel.unit})", "middle"))
    for i, ((legend, curve), colour) in enumerate(zip(panel.curves.items(), COLOURS, strict=False)):
        points = [(across(x), down(y)) for x, y in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        shapes.append(_text(left + 4, TOP - 24 + 16 * i, legend, "start", colour))
    return shapes


def _text(x: float, y: float, text: str, anchor: str, colour: str = "black") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
