"""The records of ``frugal.py``: one file for each task, written after every training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flatwise.errors import UserError
from flatwise.files import read_json, write_json
from flatwise.lab.lock import locked
from frugal_contestants import Contestant
from frugal_tasks import Task

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results" / "frugal"


class Record:
    """What is known about a task.

    Args:
        task: whose record it is.
        folder: where it lies.
    """

    def __init__(self, task: Task, folder: Path = FOLDER) -> None:
        self.task, self.path = task, folder / f"{task.name}.json"

    @property
    def content(self) -> dict[str, Any]:
        """The whole record, as it is on the disk now.

        Raises:
            UserError: it was made with other settings of the task.
        """
        empty: dict[str, Any] = {"task": self.task.name, "settings": self.task.settings, "contestants": {},
                                 "trainings": [], "cost": {}}  # fmt: skip
        found: dict[str, Any] | None = read_json(self.path)
        if found is None:
            return empty
        if found["settings"] != self.task.settings:
            raise UserError(
                f"{self.path.name} was made with other settings of the task: put it away, or train elsewhere"
            )
        return found

    def scores(self, contestant: str) -> dict[int, float]:
        """Return the scores by seed."""
        return {row["seed"]: row["score"] for row in self.content["trainings"] if row["contestant"] == contestant}

    def add(self, contestant: Contestant, seed: int, result: dict[str, Any]) -> None:
        """Keep a training; one of the same contestant with other settings is refused.

        Args:
            contestant: what was trained.
            seed: of the training.
            result: as :meth:`Task.train` returns it.

        Raises:
            UserError: the record holds trainings of another contestant under this name.
        """
        with locked(self.path.parent):  # another process may be training other contestants
            content = self.content
            if content["contestants"].setdefault(contestant.name, contestant.settings) != contestant.settings:
                raise UserError(f"{self.path.name} has {contestant.name!r} with other settings: --forget it first")
            content["trainings"].append({"contestant": contestant.name, "seed": seed, **result})
            content["trainings"].sort(
                key=lambda row: (list(content["contestants"]).index(row["contestant"]), row["seed"])
            )
            write_json(self.path, content)

    def add_cost(self, cost: dict[str, Any]) -> None:
        """Keep times and memory of some contestants."""
        with locked(self.path.parent):
            content = self.content
            content["cost"].update(cost)
            write_json(self.path, content)

    def forget(self, contestants: Iterable[str]) -> int:
        """Take contestants out, and return how many trainings that were."""
        names = set(contestants)
        with locked(self.path.parent):
            content = self.content
            kept = [row for row in content["trainings"] if row["contestant"] not in names]
            gone = len(content["trainings"]) - len(kept)
            for part in ("contestants", "cost"):
                content[part] = {name: value for name, value in content[part].items() if name not in names}
            if self.path.exists():
                write_json(self.path, {**content, "trainings": kept})
        return gone
