"""The tables and the picture of ``frugal.py``: in the terminal, and between two marks in ``docs/frugal.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatwise.errors import UserError
from flatwise.lab.statistics import Estimate
from frugal_contestants import SAMS
from frugal_judge import Judged, Judgement, judge
from frugal_records import Record
from frugal_tasks import HALVES

BEGIN, END = "<!-- benchmark: written by benchmarks/frugal.py --page -->", "<!-- end of the benchmark -->"
DRAWN = ("frugal", "sam auto", "sam 0.05", "msam", "looksam", "late", "temperon", "base 2x", "ema")
HEAD = ("contestant", "seeds", "minus the base", "", "of SAM's gain", "time", "memory")
TITLES = {"development": "The ten tasks on which the rule was made", "held-out": "The five that were set aside"}


def _number(found: Estimate, digits: int, sign: str = "+") -> str:
    width = "?" if found.ci95 is None else f"{found.ci95:.{digits}f}"
    return f"{found.mean:{sign}.{digits}f} ± {width}"


def cells(name: str, row: Judged, digits: int) -> tuple[str, ...]:
    """Write a contestant's row."""
    share = ""
    if row.share is not None:
        share = f"{100 * row.share.value:.0f} % ({100 * row.share.low:.0f} to {100 * row.share.high:.0f})"
    time = "" if row.time is None else f"{row.time:.2f}"
    memory = "" if row.memory is None else f"{row.memory:.2f}"
    return name, str(row.gain.seeds), _number(row.gain.difference, digits), row.gain.verdict, share, time, memory


def words(record: Record, found: Judgement) -> str:
    """Say how the base does on a task, and the best SAM."""
    task = record.task
    base = "not trained" if found.base is None else _number(found.base, task.digits, "")
    text = f"Base: {base} ({task.unit}, {0 if found.base is None else len(found.base.per_seed)} seeds). "
    if found.best is None:
        return text + "The grid of SAM is not whole yet."
    best = found.best
    sure = "a sure gain" if best.gain.verdict == "better" else "no sure gain"
    return (
        f"{text}Best SAM of the grid: {best.rho:g}, {_number(best.gain.difference, task.digits)} ({sure}); "
        f"with the radius that the other seeds choose: {_number(best.honest, task.digits)}."
    )


def show(records: Sequence[Record], contestants: Sequence[str]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    colours = {"better": "green", "worse": "red", "open": "default"}
    for record in records:
        found = judge(record, contestants)
        table = Table(title=record.task.name, caption=words(record, found), title_justify="left")
        for number, head in enumerate(HEAD):
            table.add_column(head or "verdict", justify="left" if number in (0, 3) else "right")
        for name, row in found.rows.items():
            table.add_row(*cells(name, row, record.task.digits), style=colours[row.gain.verdict])
        console.print(table)


def markdown(records: Sequence[Record], contestants: Sequence[str]) -> str:
    """Write the tables of the page, part by part."""
    lines = []
    for half in HALVES:
        of_half = [record for record in records if record.task.half == half]
        judged = {record.task.name: judge(record, contestants) for record in of_half}
        if not any(found.rows for found in judged.values()):
            continue
        lines += [f"### {TITLES[half]}", "", *summary(judged), ""]
        for record in of_half:
            found = judged[record.task.name]
            lines += [f"#### {record.task.name}", "", words(record, found), ""]
            lines += [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
            lines += [f"| {' | '.join(cells(name, row, record.task.digits))} |" for name, row in found.rows.items()]
            lines.append("")
    return "\n".join(lines).rstrip()


def summary(judged: dict[str, Judgement]) -> list[str]:
    """Write one row for each contestant over all tasks of a half."""
    names = list(dict.fromkeys(name for found in judged.values() for name in found.rows))
    lines = ["| contestant | better | open | worse | least of SAM's gain | time, most | memory, most |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in names:
        rows = [found.rows[name] for found in judged.values() if name in found.rows]
        counts = [sum(row.gain.verdict == verdict for row in rows) for verdict in ("better", "open", "worse")]
        shares = [row.share.value for row in rows if row.share is not None]
        times = [row.time for row in rows if row.time is not None]
        memory = [row.memory for row in rows if row.memory is not None]
        lines.append(
            f"| {name} | {counts[0]} | {counts[1]} | {counts[2]} | {f'{100 * min(shares):.0f} %' if shares else ''} | "
            f"{f'{max(times):.2f}' if times else ''} | {f'{max(memory):.2f}' if memory else ''} |"
        )
    return lines


def filled(page: str, text: str) -> str:
    """Put the tables between the marks.

    Args:
        page: the whole page.
        text: what belongs there.

    Returns:
        The new page.

    Raises:
        UserError: it has no marks.
    """
    if BEGIN not in page or END not in page:
        raise UserError(f"the page has no place for the tables: write the two lines {BEGIN!r} and {END!r} into it")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"


def fill(path: Path, records: Sequence[Record], contestants: Sequence[str]) -> None:
    """Write the tables into the page, or into a new one where there is none."""
    page = path.read_text("utf-8") if path.exists() else f"# Frugal\n\n{BEGIN}\n{END}\n"
    path.write_text(filled(page, markdown(records, contestants)), "utf-8")


def reach(gains: Sequence[Estimate]) -> tuple[float, float]:
    """Choose the ends of an axis: 0 and all means are on it, and of the intervals what does not dwarf them."""
    means = [0.0, *(gain.mean for gain in gains)]
    room = max(means) - min(means) or 1.0
    widest = min(max(gain.ci95 or 0.0 for gain in gains), room)
    return min(means) - widest - 0.05 * room, max(means) + widest + 0.05 * room


def draw(path: Path, records: Sequence[Record]) -> None:
    """Draw the gains of the main contestants, and of the best SAM, task by task.

    Args:
        path: of the PNG.
        records: of the tasks to draw.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    judged = [(record.task, judge(record, [*DRAWN, *SAMS.values()])) for record in records]
    judged = [(task, found) for task, found in judged if found.rows]
    columns = min(5, len(judged))
    lines = math.ceil(len(judged) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.0 * columns + 1.2, 3.1 * lines), squeeze=False)
    names = [name for name in DRAWN if any(name in found.rows for _, found in judged)]
    order = ["best SAM", *names]
    for axis, (task, found) in zip(axes.flat, judged, strict=False):
        gains: dict[str, Any] = {name: found.rows[name].gain for name in names if name in found.rows}
        if found.best is not None:
            gains["best SAM"] = found.best.gain
        for name, gained in gains.items():
            colour = {"better": "#1a7f37", "worse": "#c62828", "open": "#666666"}[gained.verdict]
            axis.errorbar(gained.difference.mean, order.index(name), xerr=gained.difference.ci95, fmt="o",
                          color=colour, capsize=3, markersize=5)  # fmt: skip
        if found.best is not None and found.best.gain.verdict == "better":
            axis.axvline(0.95 * found.best.gain.difference.mean, color="#1f5fb0", linewidth=0.8, linestyle="--")
        axis.set_xlim(*reach([g.difference for g in gains.values()]))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{task.name}\n({task.half})", fontsize=9)
        axis.set_ylim(len(order) - 0.5, -0.5)
        axis.set_yticks(range(len(order)), order if axis in axes[:, 0] else [""] * len(order))
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel("nats" if task.unit == "minus nats" else "points of accuracy", fontsize=8)
    for axis in list(axes.flat)[len(judged) :]:
        axis.set_visible(False)
    figure.suptitle(
        "Gain over the base optimizer: mean and 95 % interval over paired seeds. Dashed: 95 % of a sure best SAM's",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
