"""The board: what it tries, what it keeps, what it chooses, and that a rerun continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flatwise
from flatwise.lab.board.__main__ import main
from flatwise.lab.board.page import BEGIN
from flatwise.lab.board.plan import BASE, LONGER, TASKS, Task, all_methods, config_for, entries, radii, settings_of
from flatwise.lab.board.store import Store
from flatwise.lab.board.train import Left
from flatwise.lab.config import CompareConfig
from flatwise.lab.methods import trained_methods

ROOT = Path(__file__).parents[2]
SMALL = CompareConfig(model="mlp", train_size=100, epochs=1, batch_size=32, quiet=True)
TASK = Task("small", "a small task", SMALL, 2)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_method_is_tried_at_three_radii(task: Task) -> None:
    names = [name for name in flatwise.list_variants() if name != "frugal"]  # whose radius sets itself
    assert all_methods() == [BASE, LONGER, *names]
    for name in names:
        low, high = flatwise.variant_info(name).rho_range
        values = radii(task, name)
        assert 0 < values[0] < values[1] < values[2], name
        if not task.config.label_noise:
            # Usual radii are meant for right labels.
            assert low <= values[0], name
            assert values[2] <= high, name
    config = config_for(task, [entry for name in all_methods() for entry in entries(task, name)], 5)
    methods = trained_methods(config)
    assert len(methods) == 2 + 3 * len(names)
    assert [method.longer for method in methods if method.name == LONGER] == [2]
    for method in methods:
        if method.variant == "gsam":
            assert method.options["rho_min"] == pytest.approx(method.options["rho"] / 6, rel=1e-4)


def test_a_training_is_known_by_everything_that_decides_its_numbers() -> None:
    entry = entries(TASK, "sam")[0]
    others = [
        settings_of(TASK, entries(TASK, "sam")[1]),
        settings_of(replace(TASK, config=replace(SMALL, epochs=2)), entry),
        settings_of(TASK, entries(TASK, BASE)[0]),
        settings_of(TASK, entries(TASK, LONGER)[0]),
    ]
    assert len({settings_of(TASK, entry), *others}) == 5
    assert settings_of(replace(TASK, config=replace(SMALL, workers=3)), entry) == settings_of(TASK, entry)


def result(seed: int, test: float = 0.5, validation: float = 0.5, gradients: float = 2.0) -> dict[str, Any]:
    rest = {"train_accuracy": 1.0, "wrong_labels_fitted": 1.0, "epochs": 1, "steps": 2, "seconds": 1.0}
    scores = {"test_accuracy": test, "validation_accuracy": validation, "gradient_evaluations_per_step": gradients}
    return {"seed": seed, **scores, **rest}


def test_the_store_keeps_each_training_once(tmp_path: Path) -> None:
    store, (first, second, _) = Store(tmp_path), entries(TASK, "sam")
    store.add(TASK, first, result(1, test=0.25), "torch")
    store.add(TASK, first, result(1, test=0.75), "torch")
    store.add(TASK, second, result(0), "torch")
    assert {seed: run["test_accuracy"] for seed, run in store.runs(TASK, first).items()} == {1: 0.75}
    assert set(store.runs(TASK, second)) == {0}
    assert len(json.loads(store.path(TASK, "sam").read_text())["runs"]) == 2
    # A training under other settings is another training.
    assert store.runs(replace(TASK, config=replace(SMALL, epochs=2)), first) == {}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "docs" / "methods.md"
    path.parent.mkdir()
    path.write_text(f"# By hand\n\n{BEGIN}\n\nold\n")
    return path


@pytest.fixture
def board(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the board on a task of a second; two gradients cost twice the time."""

    def timed(config: CompareConfig, budget: float) -> dict[str, Any]:
        steps = {method.name: {"ratio": 2.0, "quartiles": [1.9, 2.1]} for method in trained_methods(config)}
        steps[BASE] = {"ratio": 1.0, "quartiles": [1.0, 1.0]}
        return {"rounds": 20, "methods": {name: {**step, "step_seconds": 0.1} for name, step in steps.items()}}

    monkeypatch.setattr("flatwise.lab.board.train.time_methods", timed)

    def run(*words: str, tasks: tuple[Task, ...] = (TASK,)) -> int:
        places = ["--store", str(tmp_path / "docs/board"), "--runs", str(tmp_path / "runs"), "--page", str(page)]
        return main([*places, "--workers", "1", *words], tasks)

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was trained, in order."""
    calls: list[str] = []
    from flatwise.lab import tasks

    real = tasks.run_job

    def watched(config: Any, job: Any, folder: Any, **options: Any) -> Any:
        calls.append(f"{job.method.name}/{job.seed}")
        return real(config, job, folder, **options)

    monkeypatch.setattr(tasks, "run_job", watched)
    return calls


def test_a_rerun_trains_what_is_missing_and_nothing_else(
    board: Callable[..., int], trained: list[str], page: Path
) -> None:
    assert board("--methods", "sam", "--seeds", "1") == 0
    first = ["sgd/0", "sam:rho=0.02/0", "sam:rho=0.05/0", "sam:rho=0.2/0"]
    assert trained == first
    assert board("--methods", "sam", "--seeds", "1") == 0
    assert trained == first
    assert board("--methods", "sgd-2x-epochs,sam", "--seeds", "2") == 0
    more = ["sgd/1", "sgd-2x-epochs/0", "sgd-2x-epochs/1", *(f"sam:rho={rho}/1" for rho in (0.02, 0.05, 0.2))]
    assert trained == first + more
    assert board("--methods", "sam", "--seeds", "1", "--fresh") == 0
    assert trained == first + more + first
    assert "`sam` (6 of 15 trainings done)" in page.read_text()


def test_what_was_finished_survives_an_interruption(
    board: Callable[..., int], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add, count = Store.add, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(Store, "add", interrupted)
    assert board("--methods", "sam", "--seeds", "1") == 130
    assert len(trained) == 3
    monkeypatch.setattr(Store, "add", add)
    assert board("--methods", "sam", "--seeds", "1") == 0
    # The third was trained already, and only had to be taken over.
    assert trained[3:] == ["sam:rho=0.05/0", "sam:rho=0.2/0"]


def test_rendering_trains_nothing_and_keeps_what_a_person_wrote(
    board: Callable[..., int], trained: list[str], page: Path
) -> None:
    assert board("--render") == 0
    assert trained == []
    text = page.read_text()
    assert text.startswith(f"# By hand\n\n{BEGIN}\n\n")
    assert "old" not in text
    assert "**Nothing of this task has been run yet.**" in text
    page.write_text("no mark")
    assert board("--render") == 2


def test_mistakes(board: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert board("--methods", "samm") == 2
    assert "did you mean 'sam'" in capsys.readouterr().err
    assert board("--tasks", "smal") == 2
    assert "did you mean 'small'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        board("--seeds", "0")


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr("flatwise.lab.board.train.time.monotonic", lambda: clock[0])
    left = Left([60.0, 120.0, 120.0], workers=1)
    left.say()
    clock[0] = 120.0  # twice as slow as expected
    left.advance(60.0)
    before, after = capsys.readouterr().err.splitlines()
    assert before.startswith("0 of 3 trainings, about 5 min left")
    assert after.startswith("1 of 3 trainings, about 8 min left")


def test_the_page_of_the_repository_says_what_its_records_say(tmp_path: Path) -> None:
    # Rendered again from docs/results/board, the page is the same: no number on it was typed.
    source = ROOT / "docs" / "results" / "board"
    page, store = tmp_path / "docs" / "methods.md", tmp_path / "docs" / "results" / "board"
    for file in source.rglob("*.json"):
        copy = store / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    page.write_text((ROOT / "docs" / "methods.md").read_text())
    assert main(["--render", "--store", str(store), "--page", str(page)]) == 0
    assert page.read_text() == (ROOT / "docs" / "methods.md").read_text()
    runs = [json.loads(file.read_text()) for file in store.rglob("*.json") if file.stem != "timing"]
    assert sum(len(run["runs"]) for run in runs) > 0
