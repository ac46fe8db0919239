"""The board's page: its tables, its pictures, and what has not been run yet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from flatwise.errors import CannotWriteError, UserError
from flatwise.files import read_json, write_atomically
from flatwise.lab.board.plan import BASE, LONGER, SEEDS, Task, all_methods, entries
from flatwise.lab.board.store import Store
from flatwise.lab.board.summary import Row, front, progress, rows_of
from flatwise.lab.statistics import Estimate

BEGIN = "<!-- The rest is written by `make board`: do not edit it. -->"
COSTS, RADII = "cost.png", "rho.png"


def write_page(tasks: Sequence[Task], store: Store, page: Path) -> None:
    """Draw the pictures and write the page's second part; its first part, before the mark, is a person's.

    Args:
        tasks: every task there is, run or not.
        store: the finished trainings; takes the pictures too.
        page: the page.

    Raises:
        UserError: there is no page with the mark, or matplotlib is missing.
        CannotWriteError: the page's own text could not be read.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise CannotWriteError(page, error) from error
    if BEGIN not in text:
        raise UserError(f"{page} has no line {BEGIN!r}, after which the board could write")
    tables = [(task, rows_of(task, all_methods(), store)) for task in tasks]
    shown = [(task, rows) for task, rows in tables if len(rows) > 1]
    parts = [text.partition(BEGIN)[0] + BEGIN]
    if shown:
        _draw(shown, store.folder)
        parts.append(_pictures(store.folder, os.path.relpath(store.folder, page.parent)))
    parts += [_task(task, rows, store) for task, rows in tables]
    parts += ["## The radii tried", _radii_table(tasks)]
    write_atomically(page, lambda file: file.write(("\n\n".join(parts) + "\n").encode()))


def _draw(shown: Sequence[tuple[Task, Sequence[Row]]], folder: Path) -> None:
    try:
        from flatwise.report.board import Curve, Dot, draw_costs, draw_radii
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'flatwise[lab]'") from error
    costs, curves = [], {name: [] for name in all_methods() if name not in (BASE, LONGER)}  # type: ignore[var-annotated]
    for task, rows in shown:
        best = front(rows)
        dots = [
            Dot(row.method, row.cost, 100 * row.best.test.mean, 100 * (row.best.test.ci95 or 0.0), row in best)
            for row in rows
            if row.cost is not None
        ]
        costs.append((task.title, dots))
        for row in rows:
            if row.method in curves:
                gains = [point.difference for point in row.points if point.difference is not None]
                curve = Curve(
                    task.title,
                    [point.rho for point in row.points if point.rho is not None],
                    [100 * gain.mean for gain in gains],
                    [100 * (gain.ci95 or 0.0) for gain in gains],
                    row.points.index(row.best),
                )
                curves[row.method].append(curve)
    image = BytesIO()
    draw_costs(costs, image, subtitle="radius chosen by validation; bars are 95 % intervals over the seeds")
    write_atomically(folder / COSTS, lambda file: file.write(image.getvalue()))
    panels = [(name, found) for name, found in curves.items() if found]
    if panels:
        picture = BytesIO()
        draw_radii(panels, picture, subtitle="95 % intervals over paired seeds; ringed: chosen by validation")
        write_atomically(folder / RADII, lambda file: file.write(picture.getvalue()))


def _pictures(store: Path, folder: str) -> str:
    captions = {
        COSTS: "Test accuracy against the time of a training, with the Pareto front",
        RADII: "Test accuracy minus SGD's against rho, a panel for each method",
    }
    lines = [f"![{caption}]({folder}/{name})" for name, caption in captions.items() if (store / name).exists()]
    return "\n\n".join(["## Pictures", *lines])


def _task(task: Task, rows: Sequence[Row], store: Store) -> str:
    config = task.config
    parts = [f"## {task.title[0].upper()}{task.title[1:]}", f"Task `{task.name}`: {_protocol(task)}"]
    if rows:
        parts.append(_table(rows))
        parts += _sentences(rows)
    missing = []
    for name in all_methods():
        done, wanted = progress(task, name, SEEDS, store)
        if done < wanted:
            missing.append(f"`{name}`" if done == 0 else f"`{name}` ({done} of {wanted} trainings done)")
    if len(missing) == len(all_methods()) and not rows:
        parts.append(f"**Nothing of this task has been run yet.** `make board ARGS='--tasks {task.name}'` runs it.")
    elif missing:
        parts.append(
            f"**Not run yet, or not from all {SEEDS} seeds:** {', '.join(missing)}. "
            f"`make board ARGS='--tasks {task.name}'` runs what is missing."
        )
    else:
        parts.append(f"Every method was run, from {SEEDS} seeds at each radius.")
    timing = read_json(store.path(task, "timing"))
    if rows and isinstance(timing, dict):
        machine = timing["environment"]
        parts.append(
            f"Timed on {machine['processor']}, one thread, torch {machine['packages']['torch']}; "
            f"{config.epochs} epochs with batches of {config.batch_size}."
        )
    return "\n\n".join(parts)


def _protocol(task: Task) -> str:
    config = task.config
    size = f"{config.train_size:,} images, of which a tenth for validation" if config.train_size else "all images"
    wrong = 100 * config.label_noise
    noise = f", {wrong:g} % of the training labels wrong" if wrong else ", all labels right"
    return (
        f"`{config.model}`, {size}{noise}; {config.epochs} epochs of {config.optimizer} with learning rate "
        f"{config.learning_rate:g}, momentum {config.momentum:g}, weight decay {config.weight_decay:g}."
    )


def _table(rows: Sequence[Row]) -> str:
    best = front(rows)
    lines = [
        "| method | rho | test accuracy, % | minus SGD, points | against SGD | gradients/step | time / SGD | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        point = row.best
        name = f"**{row.method}** ◆" if row in best else row.method
        arrow = {"largest": " ↑", "smallest": " ↓"}.get(row.edge, "")
        rho = "" if point.rho is None else f"{point.rho:g}{arrow}"
        gain = "" if point.difference is None else _with_interval(point.difference, "+.1f")
        verdict = f"**{row.verdict}**" if row.verdict == "worse" else row.verdict
        cost = "not timed" if row.cost is None or row.quartiles is None else f"{row.cost:.2f}"
        if row.quartiles is not None and row.quartiles[1] > row.quartiles[0]:
            cost += f" ({row.quartiles[0]:.2f}-{row.quartiles[1]:.2f})"
        accuracy = _with_interval(point.test, ".1f")
        cells = [name, rho, accuracy, gain, verdict, f"{point.gradients:.2f}", cost, str(row.seeds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(value: Estimate, form: str) -> str:
    mean = format(100 * value.mean, form)
    return mean if value.ci95 is None else f"{mean} ± {100 * value.ci95:.1f}"


def _sentences(rows: Sequence[Row]) -> list[str]:
    compared = [row for row in rows if row.best.difference is not None]
    if not compared:
        return []
    named = {
        verdict: [f"`{row.method}`" for row in compared if row.verdict == verdict]
        for verdict in ("better", "open", "worse")
    }
    lines = []
    if named["worse"]:
        lines.append(f"**Worse than plain SGD here:** {', '.join(named['worse'])}.")
    else:
        lines.append("No method is worse than plain SGD here beyond chance.")
    if named["open"]:
        lines.append(f"Undecided, the interval of the difference includes 0: {', '.join(named['open'])}.")
    lines.append(f"Better than SGD: {', '.join(named['better']) or 'none'}.")
    longer = next((row for row in rows if row.method == LONGER), None)
    if longer is not None:
        behind = [
            f"`{row.method}`" for row in compared if row is not longer and row.best.test.mean < longer.best.test.mean
        ]
        if behind:
            lines.append(f"Mean below SGD with twice the epochs: {', '.join(behind)}.")
    return ["\n".join(f"- {line}" for line in lines)]


def _radii_table(tasks: Sequence[Task]) -> str:
    lines = [f"| method | {' | '.join(task.name for task in tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name in all_methods():
        if name not in (BASE, LONGER):
            cells = [", ".join(f"{entry.rho:g}" for entry in entries(task, name)) for task in tasks]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
