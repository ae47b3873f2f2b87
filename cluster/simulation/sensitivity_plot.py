"""The sensitivity plot as one SVG file, drawn by hand: no plotting library is among the pinned ones."""

from collections.abc import Sequence
from html import escape

from cluster.simulation.sensitivity import TARGET, Sensitivity

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 60, 70


def draw_svg(found: Sensitivity, own: tuple[float, float], baseline: float, title: str, notes: Sequence[str]) -> str:
    """Goodput against the pause, the pause model's own point `own` (seconds, goodput), the restart `baseline`, 0.98."""
    most = max(pause for pause, _ in found.points) or 1.0
    values = [value for _, value in found.points] + [baseline, TARGET, own[1]]
    low, high = min(values) - 0.005, min(1.0, max(values) + 0.005)

    def x(pause_s: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * pause_s / most

    def y(goodput: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - goodput) / (high - low)

    parts = [_text(LEFT, 24, title, 15, weight="bold")]
    parts += [_text(LEFT, 42, "SIMULATED, no hardware: capacity-weighted goodput by pause of a re-forming", 11)]
    for step in range(6):
        goodput, pause_s = low + (high - low) * step / 5, most * step / 5
        parts.append(_line(LEFT, y(goodput), WIDTH - RIGHT, y(goodput), "#ddd"))
        parts.append(_text(LEFT - 8, y(goodput) + 4, f"{goodput:.3f}", 11, anchor="end"))
        parts.append(_text(x(pause_s), HEIGHT - BOTTOM + 18, f"{pause_s:g}", 11, anchor="middle"))
    parts.append(
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 36, "pause (s), detection apart", 12, anchor="middle")
    )
    for value, label, colour in ((TARGET, "goal", "#b00"), (baseline, "restart from storage", "#777")):
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), colour, dashed=True))
        parts.append(_text(WIDTH - RIGHT, y(value) - 5, f"{label}: {value:.4f}", 11, colour, anchor="end"))
    curve = " ".join(f"{x(pause):.1f},{y(value):.1f}" for pause, value in found.points)
    parts.append(f'<polyline points="{curve}" fill="none" stroke="#06c" stroke-width="2"/>')
    parts += [f'<circle cx="{x(pause):.1f}" cy="{y(value):.1f}" r="3" fill="#06c"/>' for pause, value in found.points]
    if own[0] <= most:
        parts.append(
            f'<circle cx="{x(own[0]):.1f}" cy="{y(own[1]):.1f}" r="6" fill="none" stroke="#080" stroke-width="2"/>'
        )
        parts.append(_text(x(own[0]) + 10, y(own[1]) - 8, f"pause model: {own[0]:.1f} s, {own[1]:.4f}", 11, "#080"))
    if found.pause_at_98 is not None:
        at = x(found.pause_at_98)
        parts.append(_line(at, y(TARGET), at, HEIGHT - BOTTOM, "#b00", dashed=True))
        parts.append(_text(at + 5, HEIGHT - BOTTOM - 6, f"0.98 is lost at {found.pause_at_98:.0f} s", 11, "#b00"))
    parts += [_text(LEFT, HEIGHT - 18 + 12 * row, note, 9, "#555") for row, note in enumerate(notes[:2])]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>\n"])


def _text(
    x: float, y: float, text: str, size: int, colour: str = "#222", anchor: str = "start", weight: str = "normal"
) -> str:
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dash}/>'
