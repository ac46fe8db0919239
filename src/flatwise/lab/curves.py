"""The figure of a comparison: training loss and validation accuracy by epoch, with bands over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from flatwise.errors import UserError
from flatwise.files import write_atomically
from flatwise.lab.statistics import estimate
from flatwise.report.bands import Band, Panel

Result = dict[str, Any]


def draw(results: Result, runs: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Draw the figure into the run folder.

    Args:
        results: the content of ``results.json``.
        runs: the finished runs of each trained method.
        path: the PNG file.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from flatwise.report.figures import draw_panels
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'flatwise[lab]'") from error
    config, data = results["config"], results["data"]
    noise = f", {100 * config['label_noise']:g} % wrong labels" if config["label_noise"] else ""
    count = config["seeds"]
    spread = f"Mean and 95 % interval over {count} paired seeds" if count > 1 else "One seed"
    image = BytesIO()
    draw_panels(
        panels(runs),
        image,
        title=f"{config['model']} on {data['name']}: {data['train']} training images{noise}",
        subtitle=spread,
        horizontal="epoch",
    )
    write_atomically(path, lambda file: file.write(image.getvalue()))


def panels(runs: Mapping[str, Sequence[Result]]) -> list[Panel]:
    """Say what the figure shows: training loss and validation accuracy, mean and interval over the seeds.

    Args:
        runs: the finished runs of each trained method.

    Returns:
        Two panels.
    """
    return [
        Panel("Training loss", "cross-entropy", _bands(runs, "train_loss", 1.0), from_zero=True),
        Panel(
            "Validation accuracy",
            "% of clean labels",
            _bands(runs, "validation_accuracy", 100.0),
            limits=(0, 100),
        ),
    ]


def _bands(runs: Mapping[str, Sequence[Result]], key: str, scale: float) -> list[Band]:
    bands = []
    for name, seeds in runs.items():
        histories = [run["history"] for run in seeds]
        # A loss that was not a number is null in the file; an epoch with one is left out.
        rows = [
            (epoch[0]["epoch"], estimate([scale * record[key] for record in epoch]))
            for epoch in zip(*histories, strict=True)
            if all(record[key] is not None for record in epoch)
        ]
        bands.append(
            Band(
                label=name,
                positions=[position for position, _ in rows],
                means=[row.mean for _, row in rows],
                half_widths=[row.ci95 or 0.0 for _, row in rows],
            )
        )
    return bands
