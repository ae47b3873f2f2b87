"""The sensitivity plot as one HTML page that opens from disk; its camera button saves it as SVG."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from cluster.simulation.sensitivity import TARGET, Sensitivity


def write_plot(
    file: Path, found: Sensitivity, own: tuple[float, float], baseline: float, title: str, notes: Sequence[str]
) -> None:
    """Goodput against the pause, the pause model's own point `own` (seconds, goodput), the restart `baseline`, 0.98."""
    pauses, values = zip(*found.points, strict=True)
    figure = go.Figure()
    figure.add_scatter(x=pauses, y=values, mode="lines+markers", line_color="#06c", name="simulated goodput")
    for value, label, colour in ((TARGET, "goal", "#b00"), (baseline, "restart from storage", "#777")):
        figure.add_hline(value, line_dash="dash", line_color=colour, annotation_text=f"{label}: {value:.4f}")
    if own[0] <= max(pauses):
        label = f"pause model: {own[0]:.1f} s, {own[1]:.4f}"
        figure.add_scatter(x=own[:1], y=own[1:], mode="markers", marker={"size": 12, "color": "#080"}, name=label)
    if found.pause_at_98 is not None:
        label = f"0.98 is lost at {found.pause_at_98:.0f} s"
        figure.add_vline(found.pause_at_98, line_dash="dot", line_color="#b00", annotation_text=label)
    told = "SIMULATED, no hardware: capacity-weighted goodput by pause of a re-forming"
    lines = [f"<b>{escape(title)}</b>", told, *(f"<sub>{escape(note)}</sub>" for note in notes)]
    figure.update_layout(template="plotly_white", title_text="<br>".join(lines), margin_t=140, showlegend=True)
    figure.update_xaxes(title_text="pause (s), detection apart")
    figure.update_yaxes(title_text="goodput")
    figure.write_html(file, config={"toImageButtonOptions": {"format": "svg"}})
