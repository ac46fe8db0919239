"""How much of the gain of the best radius of a grid does the suggested one keep, and is it ever worse than the base?

For every task: the base optimizer, every radius of the grid, and a training with the radius that ``suggest_rho`` gives
for that seed's own weights and batches (its cost is at most 5 % of the training; the training itself starts afresh).
Trainings that the board holds already are taken from there. What is missing is trained, two at a time, and each result
is written at once, so that an interrupted run goes on where it was.

    python benchmarks/suggest_rho.py                          # everything that is missing, then the table
    python benchmarks/suggest_rho.py --tasks digits-noise     # one task
    python benchmarks/suggest_rho.py --table                  # the table alone
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from flatwise.files import read_json, write_json
from flatwise.lab.config import CompareConfig
from flatwise.lab.statistics import estimate, paired_difference
from suggest_rho_chars import Chars
from suggest_rho_lab import LabTask

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results" / "suggest_rho"
BOARD = ROOT / "docs" / "results" / "board"
GRID = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
# An adaptive ball wants radii about ten times larger; a ball along the momentum is not comparable.
GRIDS = {"sam": GRID, "asam": (0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0), "msam": (0.1, 0.3, 1.0, 2.0, 3.0, 6.0, 10.0)}
BASE, SUGGESTED = "base", "suggested"
LEAST = 3
"""Seeds from which a radius of the grid is judged: the best of many from two would be luck."""


def _fashion(**settings: Any) -> CompareConfig:
    return CompareConfig(dataset="fashion-mnist", quiet=True, **settings)


TASKS: dict[str, Any] = {
    "digits-noise": LabTask(CompareConfig(quiet=True)),
    "fashion-noise": LabTask(_fashion(train_size=5000, epochs=20)),
    "fashion-clean": LabTask(_fashion(train_size=10000, epochs=10, label_noise=0.0)),
    "digits-mlp-adamw": LabTask(CompareConfig(model="mlp", optimizer="adamw", label_noise=0.0, quiet=True)),
    "characters": Chars(ROOT / "LICENSE"),
}
METHODS = {name: ("sam", "asam", "msam") if name == "digits-noise" else ("sam",) for name in TASKS}


def from_board(task: str, method: str) -> Iterator[dict[str, Any]]:
    """Yield the board's trainings of a method."""
    found = read_json(BOARD / task / f"{'sgd' if method == BASE else method}.json") or {"runs": []}
    for run in found["runs"]:
        yield {"method": method, "rho": run["rho"], "seed": run["seed"], "score": 100 * run["test_accuracy"]}


class Record:
    """The trainings and suggestions of a task, on disk."""

    def __init__(self, task: str) -> None:
        self.task, self.path = task, FOLDER / f"{task}.json"
        self.content: dict[str, Any] = read_json(self.path) or {"task": task, "trainings": [], "suggestions": []}

    def scores(self, method: str, rho: Any) -> dict[int, float]:
        """Return the scores by seed."""
        wanted = (method, rho)
        rows = [*from_board(self.task, method), *self.content["trainings"]]
        return {row["seed"]: row["score"] for row in rows if (row["method"], row["rho"]) == wanted}

    def suggestion(self, method: str, seed: int) -> dict[str, Any] | None:
        """Return what was suggested, where it was asked for already."""
        rows = self.content["suggestions"]
        return next((row for row in rows if (row["method"], row["seed"]) == (method, seed)), None)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Keep a result."""
        self.content[kind].append(row)
        self.content["torch"] = torch.__version__
        write_json(self.path, self.content)


def probe(task: str, method: str, seed: int) -> dict[str, Any]:
    """Ask for a radius, at the start of the training of this seed."""
    torch.set_num_threads(1)
    found = TASKS[task].suggest(method, seed)
    return {
        "method": method, "seed": seed, "rho": found.rho, "gradients": found.gradients, "allowed": found.allowed,
        "base_agreement": [round(x, 5) for x in found.base_agreement],
        "candidates": [[round(c.rho, 5), round(c.agreement, 4), round(c.cosine.value, 4)] for c in found.candidates],
    }  # fmt: skip


def work(task: str, method: str, rho: Any, seed: int, suggestion: dict[str, Any] | None, train: bool) -> Any:
    """Make one training, and the suggestion before it where there is one to make."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    if rho == SUGGESTED and suggestion is None:
        suggestion = probe(task, method, seed)
    radius = suggestion["rho"] if suggestion else rho
    score = TASKS[task].train(None if method == BASE else method, radius, seed) if train else None
    return task, method, rho, seed, suggestion, score, time.perf_counter() - started


def missing(tasks: list[str], seeds: int, grid_seeds: int) -> Iterator[tuple[str, str, Any, int]]:
    """Yield what is not trained yet: base and suggestion first, then the grid."""
    for task in tasks:
        record = Record(task)
        plan = [(BASE, None, seeds)]
        plan += [(method, SUGGESTED, seeds) for method in METHODS[task]]
        plan += [(method, rho, grid_seeds) for method in METHODS[task] for rho in GRIDS[method]]
        for method, rho, count in plan:
            done = record.scores(method, rho)
            yield from ((task, method, rho, seed) for seed in range(count) if seed not in done)


def table(tasks: list[str]) -> str:
    """Write the table."""
    lines = [
        "| task | method | base | grid | best of the grid | suggested | its radii | gain kept | suggested minus base |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in tasks:
        record = Record(task)
        base = record.scores(BASE, None)
        for method in METHODS[task]:
            ours = record.scores(method, SUGGESTED)
            grid = {rho: record.scores(method, rho) for rho in GRIDS[method]}
            common = sorted(set(base) & set(ours))
            complete = {rho: runs for rho, runs in grid.items() if len(runs) >= LEAST}
            if not common or not complete:
                continue
            # Every radius is judged against the base from the seeds that it has itself.
            gains = {
                rho: math.fsum(runs[s] - base[s] for s in runs if s in base) / len(runs)
                for rho, runs in complete.items()
            }
            best = max(gains, key=lambda rho: gains[rho])
            runs = complete[best]
            shared = sorted(set(runs) & set(base))
            top = paired_difference([runs[s] for s in shared], [base[s] for s in shared])
            mine = paired_difference([ours[s] for s in common], [base[s] for s in common])
            radii = sorted(s["rho"] for s in record.content["suggestions"] if s["method"] == method)
            digits = TASKS[task].digits
            sure = top.ci95 is not None and top.mean > top.ci95
            kept = f"{100 * mine.mean / top.mean:.0f} %" if sure else "no sure gain to keep"
            cells = [
                task,
                method,
                _written(list(base.values()), digits),
                ", ".join(f"{rho:g}" for rho in complete),
                f"{best:g}: {_written(list(runs.values()), digits)}",
                _written([ours[s] for s in common], digits),
                f"{radii[0]:g} to {radii[-1]:g}",
                kept,
                f"{mine.mean:+.{digits}f} ± {mine.ci95 or math.nan:.{digits}f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _written(values: list[float], digits: int) -> str:
    found = estimate(values)
    return f"{found.mean:.{digits}f} ± {found.ci95 or math.nan:.{digits}f} (n = {len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5, help="of the base and of the suggestion")
    parser.add_argument("--grid-seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="train nothing, ask for nothing")
    parser.add_argument("--probe", action="store_true", help="ask for the radii, and train nothing")
    arguments = parser.parse_args()
    tasks = arguments.tasks.split(",")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        parser.error(f"unknown task {unknown[0]!r} (known: {', '.join(TASKS)})")
    if not arguments.table:
        todo = list(missing(tasks, arguments.seeds, arguments.grid_seeds))
        known = {job: Record(job[0]).suggestion(job[1], job[3]) for job in todo if job[2] == SUGGESTED}
        if arguments.probe:
            todo = [job for job, suggestion in known.items() if suggestion is None]
        with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(work, *job, known.get(job), not arguments.probe) for job in todo]
            for number, future in enumerate(as_completed(futures), start=1):
                task, method, rho, seed, suggestion, score, seconds = future.result()
                record = Record(task)
                if suggestion is not None and record.suggestion(method, seed) is None:
                    record.add("suggestions", suggestion)
                if score is not None:
                    record.add("trainings", {"method": method, "rho": rho, "seed": seed, "score": round(score, 4)})
                shown = f"{rho} {suggestion['rho']}" if suggestion else rho
                print(f"{number} of {len(todo)}: {task} {method} {shown} seed {seed}: {score} ({seconds:.0f} s)",
                      flush=True)  # fmt: skip
    text = table(tasks)
    print(text)
    if tasks == list(TASKS):
        (FOLDER / "table.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
