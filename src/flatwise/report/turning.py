"""Loss surfaces to be turned by hand, side by side: one scale of colours and heights, and one camera at the start."""

from __future__ import annotations

from typing import Any

import numpy as np
from plotly.graph_objects import Figure, Scatter3d, Surface

from flatwise.errors import UserError
from flatwise.measure.landscape_result import Landscape
from flatwise.report.heights import heights_of
from flatwise.report.panels import COLOUR_MAP

EYE = {"x": 1.7, "y": -1.7, "z": 1.1}


def draw(landscape: Landscape, *, log: bool | None = None, clip: float | None = None) -> Figure:
    """Draw a plane with plotly.

    Args:
        landscape: complete or not.
        log: a logarithmic scale; None: where it is needed.
        clip: the largest value that is drawn.

    Returns:
        The figure, with one scene for each model.

    Raises:
        UserError: for a line.
    """
    if landscape.dimensions != 2:
        raise UserError("a line has no surface: draw it with .plot()")
    heights = heights_of(landscape, log, clip)
    low, high = (np.log10(heights.low), np.log10(heights.high)) if heights.log else (heights.low, heights.high)
    powers = np.arange(np.ceil(low), np.floor(high) + 1) if heights.log else None
    ticks: dict[str, Any] = {}
    if powers is not None and len(powers) > 1:
        ticks = {"tickvals": list(powers), "ticktext": [f"{10.0**power:g}" for power in powers]}
    x, y = (list(axis) for axis in landscape.axes)
    figure = Figure()
    count = len(landscape.names)
    for number, name in enumerate(landscape.names):
        scene = "scene" if number == 0 else f"scene{number + 1}"
        values = heights.values[number]
        z = np.log10(values) if heights.log else values
        figure.add_trace(
            Surface(
                x=x,
                y=y,
                z=z.T,
                customdata=values.T,
                coloraxis="coloraxis",
                scene=scene,
                name=name,
                hovertemplate="%{x:.3g}, %{y:.3g}<br>loss %{customdata:.4g}<extra>" + _escaped(name) + "</extra>",
            )
        )
        if number == 0 and landscape.marks:
            losses = np.array([mark.loss for mark in landscape.marks])
            figure.add_trace(
                Scatter3d(
                    x=[mark.coordinates[0] for mark in landscape.marks],
                    y=[mark.coordinates[1] for mark in landscape.marks],
                    z=np.log10(losses) if heights.log else losses,
                    text=[_escaped(mark.name) for mark in landscape.marks],
                    mode="markers+text",
                    marker={"size": 4, "color": "#D55E00"},
                    showlegend=False,
                    scene=scene,
                )
            )
        figure.update_layout(
            {
                scene: {
                    "domain": {"x": [number / count, (number + 1) / count], "y": [0, 1]},
                    "xaxis": {"title": {"text": landscape.labels[0]}},
                    "yaxis": {"title": {"text": landscape.labels[1]}},
                    "zaxis": {"title": {"text": "loss"}, "range": [float(low), float(high)], **ticks},
                    "camera": {"eye": EYE},
                    "aspectmode": "cube",
                }
            }
        )
        if count > 1:
            middle = (number + 0.5) / count
            figure.add_annotation(
                text=_escaped(name), x=middle, y=1, xref="paper", yref="paper", showarrow=False, yanchor="bottom"
            )
    figure.update_layout(
        coloraxis={
            "colorscale": COLOUR_MAP,
            "cmin": float(low),
            "cmax": float(high),
            "colorbar": {"title": {"text": "loss"}, **ticks},
        },
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
    )
    return figure


def _escaped(text: str) -> str:
    """Keep a name from being read as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "%&#123;")
