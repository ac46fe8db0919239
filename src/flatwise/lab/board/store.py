"""Finished trainings on disk: one small JSON file for each task and method, which grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatwise.files import make_folder, read_json, write_json
from flatwise.lab.board.plan import Entry, Task, settings_of

Result = dict[str, Any]
KEPT = (
    "test_accuracy",
    "validation_accuracy",
    "train_accuracy",
    "wrong_labels_fitted",
    "gradient_evaluations_per_step",
    "epochs",
    "steps",
    "seconds",
)


class Store:
    """The trainings of a board.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, task: Task, method: str) -> Path:
        """Name the file of a method.

        Args:
            task: the task.
            method: the method, or ``"timing"``.

        Returns:
            The file.
        """
        return self.folder / task.name / f"{method}.json"

    def runs(self, task: Task, entry: Entry) -> dict[int, Result]:
        """Read the finished trainings of a method at one radius, under the settings that hold now.

        Args:
            task: the task.
            entry: method and radius.

        Returns:
            The trainings by seed.
        """
        settings = settings_of(task, entry)
        return {run["seed"]: run for run in self._all(task, entry.method) if run["settings"] == settings}

    def add(self, task: Task, entry: Entry, result: Result, versions: str) -> None:
        """Keep a finished training.

        Args:
            task: the task.
            entry: method and radius.
            result: what the lab's run gave.
            versions: of torch and flatwise.
        """
        run = {"text": entry.text, "rho": entry.rho, "seed": result["seed"], "settings": settings_of(task, entry)}
        run |= {key: _short(result[key]) for key in KEPT} | {"versions": versions}
        key = (run["settings"], run["seed"])
        runs = [known for known in self._all(task, entry.method) if (known["settings"], known["seed"]) != key]
        runs.append(run)
        runs.sort(key=lambda run: (run["rho"] or 0.0, run["settings"], run["seed"]))
        self.write(task, entry.method, {"task": task.name, "method": entry.method, "runs": runs})

    def timing(self, task: Task) -> Result:
        """Read what a step of each method costs.

        Args:
            task: the task.

        Returns:
            For each method its time relative to the base; empty where nothing was timed.
        """
        content = read_json(self.path(task, "timing"))
        return dict(content["methods"]) if isinstance(content, dict) else {}

    def write(self, task: Task, name: str, content: Result) -> None:
        """Write a file of a task.

        Args:
            task: the task.
            name: the method, or ``"timing"``.
            content: what goes in.
        """
        path = self.path(task, name)
        make_folder(path.parent)
        write_json(path, content)

    def _all(self, task: Task, method: str) -> list[Result]:
        content = read_json(self.path(task, method))
        return list(content["runs"]) if isinstance(content, dict) else []


def _short(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
