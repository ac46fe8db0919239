"""Processes that train side by side: real trainings, and what happens when one of the processes dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.lab.sweep_world import config_in, states

from flatwise.errors import TrainingError
from flatwise.lab.child import Event
from flatwise.lab.sweep import sweep
from flatwise.lab.sweep.crew import Crew
from flatwise.lab.sweep.perform import Task

TINY = {"dataset": "digits", "model": "mlp", "epochs": 2, "train_size": 200, "batch_size": 32, "augment": "none"}
SPACE = {"methods": "base,sam,asam", "fixed": TINY}


def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    # Random search, so that no trial depends on which ended first.
    here = sweep(config_in(tmp_path / "here", sampler="random", trials=4, **SPACE))
    apart = sweep(config_in(tmp_path / "apart", sampler="random", trials=4, workers=2, **SPACE))

    def numbers(rows: list[Any]) -> list[tuple[object, ...]]:
        return [(row.number, row.method, row.rho, row.lr, row.weight_decay, row.accuracies) for row in rows]

    assert numbers(apart.rows) == numbers(here.rows)
    assert len({row.accuracy for row in here.rows}) > 1
    assert not list(apart.folder.glob("worker-*.log"))
    assert (apart.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert states(tmp_path / "apart") == ["complete"] * 4


def test_an_error_in_a_worker_is_one_clear_line(tmp_path: Path) -> None:
    config = config_in(tmp_path, workers=2, methods="sam", fixed={**TINY, "model": "nosuchmodel"})
    with pytest.raises(TrainingError, match=r"trial \d: .*nosuchmodel") as raised:
        sweep(config)
    assert "\n" not in str(raised.value)
    assert sorted(states(tmp_path, "digits-nosuchmodel")) == ["fail", "fail", "waiting", "waiting"]


class Script:
    """Hands out given tasks, and kills the worker of the first at its first epoch."""

    def __init__(self, crew: Crew, tasks: list[Task]) -> None:
        self.crew, self.tasks = crew, tasks
        self.heard: list[tuple[int, str]] = []
        self.gone: list[tuple[int, str]] = []

    def next_task(self) -> Task | None:
        return self.tasks.pop(0) if self.tasks else None

    def hear(self, event: Event) -> bool:
        self.heard.append((event["trial"], event["event"]))
        if not self.gone and event["event"] == "epoch":
            os.kill(self.crew._children[0].pid, signal.SIGKILL)
        return event["trial"] == 2

    def lost(self, number: int, cause: str) -> None:
        self.gone.append((number, cause))


def test_a_worker_that_dies_is_replaced_and_its_trial_reported_as_lost(tmp_path: Path) -> None:
    run = {**TINY, "method": "sam", "val_fraction": 0.1}
    tasks = [{"trial": n, "runs": [{**run, "seed": n, "out": str(tmp_path / "trials" / str(n))}]} for n in range(3)]
    with Crew(1, tmp_path) as crew:
        script = Script(crew, tasks)
        crew.run(script)
    ((number, cause),) = script.gone
    assert number == 0
    assert "exit code -9, out of memory?" in cause
    assert [event for trial, event in script.heard if trial == 1] == ["epoch", "epoch", "run", "done"]
    assert [event for trial, event in script.heard if trial == 2] == ["epoch", "stopped"]
    # What was stopped leaves nothing that could be taken for a result.
    assert sorted(path.name for path in (tmp_path / "trials").iterdir()) == ["0", "1"]


def test_a_sweep_that_was_killed_goes_on_without_loss(tmp_path: Path) -> None:
    words = [
        "sweep", "--dataset", "digits", "--model", "mlp", "--epochs", "2", "--train-size", "200", "--batch-size", "32",
        "--augment", "none", "--methods", "sam", "--pruner", "none", "--workers", "2", "--trials", "40",
        "--out", str(tmp_path),
    ]  # fmt: skip
    journal = tmp_path / "digits-mlp" / "study.journal"
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from flatwise.cli import main; sys.exit(main())", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + 600
        while not journal.exists() or states(tmp_path).count("complete") < 2:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    before = states(tmp_path)
    ended = before.count("complete")
    found = sweep(config_in(tmp_path, methods="sam", trials=ended + 3, fixed=TINY))
    after = states(tmp_path)
    assert after.count("complete") == len(found.rows) == ended + 3
    assert set(after) == {"complete", "fail"}
    assert after.count("fail") == before.count("running")
    kept = json.loads((found.folder / "results.json").read_text())
    assert len(kept["trials"]) == ended + 3
