"""Curves on logarithmic axes as an SVG, panels side by side."""

import math
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 260, 220, 52, 56, 34  # pixels of a panel's frame, and of the margins around it
COLOURS = ("#c2571a", "#2a6fb0", "#3c8d40")
STYLE = "font-family:sans-serif;font-size:12px"


class Panel(NamedTuple):
    """One plot."""

    title: str  # name of x
    unit: str  # of y
    curves: dict[str, list[tuple[float, float]]]  # points (x, y) by legend


def draw(panels: list[Panel]) -> str:
    """Return the SVG."""
    width = len(panels) * (LEFT + WIDTH) + 20
    size = f'width="{width}" height="{TOP + HEIGHT + BOTTOM}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{STYLE}">'
    shapes = [shape for i, panel in enumerate(panels) for shape in _draw_panel(panel, i * (LEFT + WIDTH) + LEFT)]
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>\n"])


def _draw_panel(panel: Panel, left: int) -> list[str]:
    xs = sorted({x for curve in panel.curves.values() for x, _ in curve})
    ys = [y for curve in panel.curves.values() for _, y in curve]
    decades = range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1)

    def x_pixel(x: float) -> float:
        return left + 12 + (WIDTH - 24) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def y_pixel(y: float) -> float:
        return TOP + HEIGHT * (decades[-1] - math.log10(y)) / (decades[-1] - decades[0])

    shapes = [f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#444"/>']
    for x in xs:
        shapes.append(f'<path d="M{x_pixel(x):.1f},{TOP} v{HEIGHT}" stroke="#ddd"/>')
        shapes.append(_draw_text(x_pixel(x), TOP + HEIGHT + 15, f"{x:g}", "middle"))
    for decade in decades:
        shapes.append(f'<path d="M{left},{y_pixel(10**decade):.1f} h{WIDTH}" stroke="#ddd"/>')
        shapes.append(_draw_text(left - 4, y_pixel(10**decade) + 4, f"{10**decade:g}", "end"))
    shapes.append(_draw_text(left + WIDTH / 2, TOP + HEIGHT + 30, f"{panel.title} (time in {panel.unit})", "middle"))
    for i, ((legend, curve), colour) in enumerate(zip(panel.curves.items(), COLOURS, strict=False)):
        points = [(x_pixel(x), y_pixel(y)) for x, y in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        shapes.append(_draw_text(left + 4, TOP - 24 + 16 * i, legend, "start", colour))
    return shapes


def _draw_text(x: float, y: float, text: str, anchor: str, colour: str = "black") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
