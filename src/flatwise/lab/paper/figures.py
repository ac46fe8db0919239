"""A picture for the studies that have a curve: what was measured, with its 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatwise.files import write_atomically
from flatwise.lab.paper.ranks import rank_correlations
from flatwise.lab.paper.record import Record
from flatwise.lab.statistics import Estimate, estimate

WIDTH, HEIGHT = 4.8, 3.9


@dataclass(frozen=True)
class Curve:
    """A line of means with intervals.

    Attributes:
        label: what it is called.
        places: horizontal positions.
        values: one estimate a position.
        level: drawn across the whole width, from its one value.
    """

    label: str
    places: Sequence[float]
    values: Sequence[Estimate]
    level: bool = False


@dataclass(frozen=True)
class Plot:
    """One pair of axes.

    Attributes:
        title: what is shown.
        across: name of the horizontal axis.
        up: name of the vertical axis.
        curves: what is drawn.
        log: whether the horizontal axis is logarithmic.
        lowest: where the vertical axis begins; None: below everything.
    """

    title: str
    across: str
    up: str
    curves: tuple[Curve, ...]
    log: bool = False
    lowest: float | None = None


def draw(record: Record, path: Path) -> bool:
    """Draw a study's picture.

    Args:
        record: its trainings.
        path: the file, a PNG.

    Returns:
        Whether there is a picture of this study, and enough to draw it.
    """
    make = PICTURES.get(record.study.name)
    plots = [] if make is None else make(record)
    plots = [plot for plot in plots if plot.curves]
    if not plots:
        return False
    study = record.study
    between = "\n" if len(plots) == 1 else " "
    _draw(plots, path, f"{study.title}{between}({study.paper}), at a small size")
    return True


def _draw(plots: Sequence[Plot], path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from flatwise.report.figures import FAINT, INK

    figure = Figure(figsize=(WIDTH * len(plots) + 1.2, HEIGHT + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        if plot.log:
            axes.set_xscale("log")
        ends = [place for curve in plot.curves if not curve.level for place in curve.places]
        for number, curve in enumerate(plot.curves):
            _curve(axes, curve, number, (min(ends), max(ends)))
        if plot.log and len(set(ends)) < 9:
            axes.set_xticks(sorted(set(ends)), [f"{place:g}" for place in sorted(set(ends))])
            axes.minorticks_off()
        if plot.lowest is not None:
            axes.set_ylim(bottom=plot.lowest)
        axes.set_title(plot.title, loc="left", fontsize=10.5, color=INK)
        axes.set_xlabel(plot.across, color=INK)
        axes.set_ylabel(plot.up, color=INK)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=FAINT)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _curve(axes: Any, curve: Curve, number: int, ends: tuple[float, float]) -> None:
    from flatwise.report.figures import COLOURS, DASHES

    colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    places = list(ends) if curve.level else list(curve.places)
    values = [curve.values[0]] * 2 if curve.level else list(curve.values)
    means, halves = [value.mean for value in values], [value.ci95 or 0.0 for value in values]
    low = [mean - half for mean, half in zip(means, halves, strict=True)]
    high = [mean + half for mean, half in zip(means, halves, strict=True)]
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    marker = "" if curve.level else "o"
    axes.plot(places, means, color=colour, linestyle=dashes, marker=marker, markersize=4, label=curve.label)


def _points(record: Record, setting: str, arm: str) -> Estimate | None:
    values = record.values(setting, arm)
    return None if values is None else estimate([100 * value for value in values])


def _curve_of(label: str, found: Sequence[tuple[float, Estimate | None]], *, level: bool = False) -> list[Curve]:
    known = [(place, value) for place, value in found if value is not None]
    if not known:
        return []
    return [Curve(label, [place for place, _ in known], [value for _, value in known], level)]


def noise_levels(record: Record) -> list[Plot]:
    """Draw the accuracy of each method against the share of wrong labels.

    Args:
        record: of Table 4.

    Returns:
        One plot.
    """
    settings = record.study.settings
    curves: list[Curve] = []
    for arm in settings[0].arms:
        found = [(float(s.printed or math.nan), _points(record, s.name, arm.name)) for s in settings]
        curves += _curve_of(arm.name, found)
    return [Plot("", "wrong training labels, %", "test accuracy, %", tuple(curves))]


def radii(record: Record) -> list[Plot]:
    """Draw the accuracy against rho, beside that of the base.

    Args:
        record: of the sensitivity to rho.

    Returns:
        One plot a setting.
    """
    plots = []
    for setting in record.study.settings:
        fixed = [arm for arm in setting.arms if arm.name.startswith("SAM, rho = ")]
        found = [(float(arm.candidates[0]["rho"]), _points(record, setting.name, arm.name)) for arm in fixed]
        base = setting.arms[0].name
        curves = [*_curve_of("SAM", found), *_curve_of(base, [(0, _points(record, setting.name, base))], level=True)]
        plots.append(Plot(setting.name, "rho", "test accuracy, %", tuple(curves), log=True))
    return plots


def norms(record: Record) -> list[Plot]:
    """Draw, for each kind of perturbation, the accuracy on the held-out tenth against its own rho.

    Args:
        record: of the norms.

    Returns:
        One plot a setting.
    """
    plots = []
    for setting in record.study.settings:
        curves: list[Curve] = []
        for arm in setting.arms[1:]:
            rows: dict[float, list[float]] = {}
            for line in record.select(setting.name, arm.name, "tuning"):
                rows.setdefault(line["choice"]["rho"], []).append(100 * line["held_out_accuracy"])
            # Two seeds choose, and their interval would hide everything: the mean alone.
            found = [(rho, Estimate(row, sum(row) / len(row), None)) for rho, row in sorted(rows.items())]
            curves += _curve_of("p = 2" if arm.name == "SAM" else arm.name, found)
        # Far below the worst of SAM a radius is simply too large, and how much too large would hide the rest.
        lowest = min((value.mean for value in curves[0].values), default=0.0) - 1 if curves else None
        words = ("rho, in its kind's own unit", "held-out accuracy, %")
        plots.append(Plot(setting.name, *words, tuple(curves), log=True, lowest=lowest))
    return plots


def sizes(record: Record) -> list[Plot]:
    """Draw the accuracy against m, and how well m-sharpness ranks networks.

    Args:
        record: of m-sharpness.

    Returns:
        Two plots.
    """
    setting = record.study.settings[0]
    arms = [arm for arm in setting.arms if "m" in arm.fields]
    found = [(float(arm.fields["m"]), _points(record, setting.name, arm.name)) for arm in arms]
    base = setting.arms[0].name
    curves = [*_curve_of("SAM", found), *_curve_of(base, [(0, _points(record, setting.name, base))], level=True)]
    ranks = rank_correlations(record)
    places = [(float(key.rpartition("_")[2]), value) for key, value in ranks.items()]
    title = "m-sharpness and the generalisation gap"
    return [
        Plot("training with m-sharpness", "m", "test accuracy, %", tuple(curves), log=True),
        Plot(title, "m", "Kendall's tau", tuple(_curve_of("m-sharpness", list(places))), log=True),
    ]


def cosines(record: Record) -> list[Plot]:
    """Draw the cosine between the first- and the second-order update against the epoch.

    Args:
        record: of the second-order term.

    Returns:
        One plot.
    """
    setting = record.study.settings[0]
    last = int(setting.fields["epochs"])
    epochs = [*(int(word) for word in record.study.kept.split(",")), last]
    curves: list[Curve] = []
    for arm in setting.arms[1:]:
        found = [(float(epoch), record.mean(setting.name, arm.name, f"cosine_{epoch}")) for epoch in epochs]
        curves += _curve_of(f"trained with {arm.name}", found)
    return [Plot("", "epoch", "cosine between the two updates", tuple(curves))]


PICTURES: Mapping[str, Callable[[Record], list[Plot]]] = {
    "table4": noise_levels,
    "rho": radii,
    "c5": norms,
    "m": sizes,
    "c4": cosines,
}
__all__ = ["PICTURES", "Curve", "Plot", "draw"]
