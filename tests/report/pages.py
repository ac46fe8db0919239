"""Comparisons made by hand, to make pages from: no training, numbers that are known."""

from __future__ import annotations

import math
from typing import Any

from flatwise.report.bands import Band, Panel
from flatwise.report.content import Comparison, Missing
from flatwise.report.page import Entry, Page, make_page
from flatwise.report.planes import Plane
from flatwise.report.surface3d import Surface

CONDITIONS = {
    "samples": 1024, "batches": 8, "micro_batch_size": 128, "mode": "eval", "seed": 0, "weights": 19914, "unused": [],
    "frozen": [], "processes": 1, "dtype": "float32", "device": "cpu", "notes": ["a note on the samples"],
}  # fmt: skip
COST = {"gradient_evaluations": 30.0, "seconds": 4.0}
PAIRS = {"base": None, "sam": (0.25, 0.02), "asam": (-0.03, 0.01), "msam": (0.01, 0.02)}
"""Differences to the base and half their intervals: better, worse, undecided."""


def estimate(mean: float, half: float | None) -> dict[str, Any]:
    return {"per_seed": [mean - 0.01, mean + 0.01], "mean": mean, "ci95": half}


def record(name: str, accuracy: float, half: float | None, number: int) -> dict[str, Any]:
    return {
        "variant": None if number == 0 else name,
        "options": {} if number == 0 else {"rho": 0.05 * number},
        "epochs": 3,
        "steps": 60,
        "test_accuracy": estimate(accuracy, half),
        "validation_accuracy": estimate(accuracy, half),
        "best_validation": {"epoch": 3, "mean": accuracy},
        "train_accuracy": estimate(0.99, half),
        "wrong_labels_fitted": estimate(0.5, half),
        "gradient_evaluations_per_step": 2.0 if number else 1.0,
        "wall_time": estimate(3.0, 0.1),
        "relative_time": 2.0 if number else 1.0,
        "relative_time_quartiles": [1.9, 2.1] if number else [1.0, 1.0],
        "step_seconds": 0.001,
    }


def results(names: list[str], *, one_seed: bool = False, data_set: str = "digits") -> dict[str, Any]:
    """The content of results.json for methods that do as PAIRS says, in its order."""
    pairs = list(PAIRS.values())
    methods, paired = {}, {}
    for number, name in enumerate(names):
        mean, half = pairs[number % 4] or (0.0, 0.0)
        methods[name] = record(name, 0.7 + mean, None if one_seed else 0.01, number)
        if number:
            gap = {"per_seed": [mean] * (1 if one_seed else 2), "mean": mean, "ci95": None if one_seed else half}
            paired[name] = {"reference": names[0], "difference": gap}
    return {
        "schema": "flatwise.compare/1",
        "identity": "abc/torch-2/flatwise-0",
        "config": {"methods": ",".join(names), "dataset": data_set, "epochs": 3, "seeds": 2, "lr": 0.05, "rho": None},
        "data": {"name": data_set, "classes": 10, "train": 1294, "validation": 144, "test": 359,
                 "wrong_training_labels": 518},
        "base": names[0],
        "reference": names[0],
        "methods": methods,
        "paired": paired,
        "equal_compute": None,
        "timing": {"rounds": 9, "how": "interleaved"},
        "environment": {"python": "3.11", "packages": {"torch": "2.14", "timm": None}, "cores": 2},
        "verdict": [f"{name} is a sentence of the verdict." for name in names],
    }  # fmt: skip


def sharpness(scale: float, *, error: float | None = 0.001) -> dict[str, Any]:
    def row(name: str, value: float, meaning: str, **settings: Any) -> dict[str, Any]:
        return {
            "name": name, "value": value, "standard_error": error, "error_over": "8 parts", "settings": settings,
            "gradient_evaluations": 2.0, "seconds": 0.5, "meaning": meaning,
        }  # fmt: skip

    return {
        "rows": [
            row("loss", 0.1, "The loss at the weights as they are."),
            row("gradient_norm", 0.3, "How steep the loss is at w."),
            row("one_step", 1.2 * scale, "How much the loss rises by SAM's own step.", rho=0.05, p=2.0, steps=1),
            row("average", 0.05 * scale, "How much it rises on average.", rho=0.05, sigma=0.001 * scale),
            row("lambda_max", 52.0 * scale, "The largest eigenvalue of the Hessian."),
        ],
        "loss": 0.1,
        "cautions": ["The measures disagree about something."],
        "conditions": CONDITIONS,
        "cost": COST,
    }


def density(scale: float) -> dict[str, Any]:
    grid = [number * 0.3 * scale - 2.0 for number in range(200)]
    values = [math.exp(-(x**2)) + 1e-3 * math.exp(-((x / scale - 50) ** 2)) for x in grid]
    return {
        "grid": grid, "density": values, "low": [0.7 * v for v in values], "high": [1.3 * v for v in values],
        "smallest": -2.0, "largest": 58.0 * scale, "conditions": CONDITIONS, "cost": COST,
    }  # fmt: skip


def plane(names: list[str], points: int = 25) -> Plane:
    axis = [2 * i / (points - 1) - 1 for i in range(points)]
    surfaces = [
        Surface(name, [[0.05 + (8 / (n + 1)) * x * x + (4 / (n + 1)) * y * y for y in axis] for x in axis])
        for n, name in enumerate(names)
    ]
    return Plane(("first direction", "second direction"), axis, axis, surfaces, "Directions: random.")


def panels(names: list[str]) -> list[Panel]:
    bands = [Band(name, [1, 2, 3], [2.0 - 0.1 * n, 1.0, 0.5], [0.2, 0.1, 0.1]) for n, name in enumerate(names)]
    high = [Band(name, [1, 2, 3], [50.0, 80.0, 99.0], [20.0, 10.0, 5.0]) for name in names]
    return [
        Panel("Training loss", "cross-entropy", bands, from_zero=True),
        Panel("Validation accuracy", "% of clean labels", high, limits=(0, 100)),
    ]


def entry(names: list[str], *, measured: bool = True, name: str = "run", data_set: str = "digits") -> Entry:
    scales = [1.0, 0.2, 0.1, 0.9]
    measures = {
        n: {"seed": 0, "sharpness": sharpness(s), "density": density(s)} for n, s in zip(names, scales, strict=False)
    }
    missing = [] if measured else [Missing("loss surfaces", f"flatwise landscape {name}")]
    comparison = Comparison(
        name=name,
        results=results(names, data_set=data_set),
        trained=names,
        protocol=f"a network on {data_set}.",
        command=f"flatwise compare --dataset {data_set}",
        measures=measures if measured else {},
        missing=missing,
    )
    return Entry(comparison, panels(names), plane(names) if measured else None)


def page(*entries: Entry) -> Page:
    return make_page(entries or [entry(["sgd", "sam", "asam", "msam"])], made="Made by hand.")
