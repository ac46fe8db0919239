"""benchmarks/frugal.py: its statistics on records made by hand, its tasks, its contestants, and that a run goes on."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatwise.errors import UserError
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.loop import Trainer
from flatwise.lab.methods import parse_methods

ROOT = Path(__file__).parents[1]
TASKS = (
    "digits-noise", "fashion-noise", "fashion-clean", "digits-mlp-adamw", "chars",
    "digits-resnet-long", "fashion-noise20-plain", "fashion-long", "vit-adamw", "finetune",
    "digits-resnet-noise", "fashion-mlp-noise", "vit-noise-adamw", "finetune-noise", "chars-sgd",
)  # fmt: skip
NO_FASHION = {"digits-noise", "digits-mlp-adamw", "chars", "digits-resnet-long", "digits-resnet-noise", "chars-sgd"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parts = ("tasks", "data", "contestants", "records", "judge", "cost", "page")
    modules = {part: importlib.import_module(f"frugal_{part}") for part in parts}
    return SimpleNamespace(main=importlib.import_module("frugal"), **modules)


def tiny(bench: Any, name: str, size: int = 40) -> Any:
    if name not in NO_FASHION:
        try:
            load_data("fashion-mnist")
        except UserError as error:
            pytest.skip(str(error))
    return bench.tasks.TASKS[name].smaller(size)


def record_of(bench: Any, folder: Path, scores: dict[str, list[float]], cost: dict[str, Any] | None = None) -> Any:
    """Write a record of which only the scores matter."""
    record = bench.records.Record(bench.tasks.TASKS["digits-noise"], folder)
    for name, values in scores.items():
        for seed, value in enumerate(values):
            record.add(bench.contestants.CONTESTANTS[name], seed, {"score": value})
    record.add_cost(cost or {})
    return record


def full(bench: Any, folder: Path, **more: list[float]) -> Any:
    """Base 0, 10, 20; SAM 0.1 gains 4, 5, 6, the other radii nothing."""
    base = [0.0, 10.0, 20.0]
    grid = dict.fromkeys(bench.contestants.SAMS.values(), base)
    grid["sam 0.1"] = [4.0, 15.0, 26.0]
    return record_of(bench, folder, {"base": base, **grid, **more})


# The tasks


def test_ten_tasks_and_five_that_are_set_aside(bench: Any) -> None:
    assert tuple(bench.tasks.TASKS) == TASKS == tuple(bench.tasks.of_half("all"))
    assert tuple(bench.tasks.of_half("development")) == TASKS[:10]
    assert tuple(bench.tasks.of_half("held-out")) == TASKS[10:]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("contestant", ["base", "sam 0.1"])
def test_every_task_trains(bench: Any, name: str, contestant: str) -> None:
    task = tiny(bench, name)
    who = bench.contestants.CONTESTANTS[contestant]
    result = task.train(who, seed=0, steps=2)
    assert result["steps"] == 2
    assert math.isfinite(result["score"])
    assert task.train(who, seed=0, steps=2)["score"] == result["score"]
    before = task.build(0).model.state_dict()
    training = bench.tasks.Training(task, who, 0, 2)
    training.step()
    assert any(not torch.equal(before[key], value) for key, value in training.material.model.state_dict().items())


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_fixes_all_but_the_contestant(bench: Any, name: str) -> None:
    task = tiny(bench, name)
    first, again, other = (
        bench.tasks.Training(task, bench.contestants.CONTESTANTS[who], seed)
        for who, seed in (("base", 3), ("sam 0.5", 3), ("base", 4))
    )
    batches = [next(training.batches()) for training in (first, again, other)]
    weights = [torch.cat([p.flatten() for p in t.material.model.parameters()]) for t in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for mine, theirs in zip(batches[0], batches[1], strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(batches[0][0], batches[2][0])


def test_digits_noise_is_the_labs_own(bench: Any) -> None:
    """Three epochs of the lab's trainer, laid out for 40, end at the same weights."""
    config = CompareConfig(methods="base", quiet=True)
    trainer = Trainer(config, parse_methods(config)[0], 1, load_data("digits"))
    ours = bench.tasks.Training(bench.tasks.TASKS["digits-noise"], bench.contestants.CONTESTANTS["base"], 1)
    assert ours.total_steps == trainer.total_steps
    for epoch in range(3):
        trainer.train_epoch(epoch)
        for _ in range(trainer.steps_per_epoch):
            ours.step()
    for mine, theirs in zip(ours.material.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_learning_rate_by_hand(bench: Any) -> None:
    rates = [bench.tasks.learning_rate(step, 10, 2) for step in (0, 1, 2, 6, 9)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 7 / 8))])
    assert bench.tasks.learning_rate(5, 10, 0) == pytest.approx(0.5)


def test_test_text_is_of_other_modules(bench: Any) -> None:
    assert not set(bench.data.TEXT) & set(bench.data.TEST_TEXT)
    inputs, labels = bench.data._windows(torch.arange(10), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert labels.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize("factor", [math.nan, 1e9])
def test_a_text_that_diverged_scores_as_a_guess(bench: Any, factor: float) -> None:
    material = tiny(bench, "chars").build(0)
    with torch.no_grad():
        material.model.head.weight.mul_(factor)
    assert material.score(material.model) == -math.log(128)


def test_losses_of_samples_have_the_mean_loss(bench: Any) -> None:
    for logits, labels in (
        (torch.randn(6, 5), torch.randint(5, (6,))),
        (torch.randn(6, 4, 5), torch.randint(5, (6, 4))),
    ):
        each = bench.data.cross_entropy(logits, labels, "none")
        assert each.shape == (6,)
        assert each.mean() == pytest.approx(float(bench.data.cross_entropy(logits, labels)))


# The contestants


def test_every_contestant_takes_part_or_says_why(bench: Any) -> None:
    task = tiny(bench, "digits-mlp-adamw")
    for who in bench.contestants.CONTESTANTS.values():
        reason = who.missing()
        if reason is None:
            assert math.isfinite(task.train(who, 0, steps=3)["score"])
        else:
            assert who.name in {"frugal", "sam auto", "temperon"}
    assert bench.contestants.Contestant("x", "no such").missing().startswith("unknown method 'no such'")


def test_longer_trains_longer(bench: Any) -> None:
    task = tiny(bench, "digits-mlp-adamw", 100)
    steps = [task.train(bench.contestants.CONTESTANTS[name], 0)["steps"] for name in ("base", "base 2x")]
    assert steps == [5, 10]


def test_the_average_is_judged(bench: Any) -> None:
    task = tiny(bench, "digits-noise")
    training = bench.tasks.Training(task, bench.contestants.CONTESTANTS["ema"], 0, 3)
    average = next(training.material.model.parameters()).detach().clone()
    for number in range(3):
        training.step()
        now = next(training.material.model.parameters()).detach()
        # The first update copies; the decay of a training of up to 5,000 steps is 0.99.
        average = now.clone() if number == 0 else 0.99 * average + 0.01 * now
    assert torch.allclose(next(training.contestant.result().parameters()), average, atol=1e-7)
    assert [bench.contestants.ema_decay(n) for n in (100, 5000, 10_000, 10**6)] == [0.99, 0.99, 0.995, 0.999]


# The judgement


def test_gains_and_best_of_grid_by_hand(bench: Any, tmp_path: Path) -> None:
    record = full(bench, tmp_path, late=[2.0, 12.5, 23.0], msam=[-1.0, 9.1, 18.9])
    found = bench.judge.judge(record, ["base", "late", "msam", "looksam"])
    assert set(found.rows) == {"late", "msam"}
    late = found.rows["late"]
    assert late.gain.difference.mean == pytest.approx(2.5)
    assert late.gain.difference.ci95 == pytest.approx(4.3027 * 0.5 / math.sqrt(3), rel=1e-4)
    assert (late.gain.verdict, found.rows["msam"].gain.verdict) == ("better", "worse")
    assert (found.best.rho, found.best.gain.difference.mean) == (0.1, pytest.approx(5.0))
    assert late.share.value == pytest.approx(0.5)
    # Its gain is half of SAM's on every seed: there is nothing uncertain about the share.
    assert (late.share.low, late.share.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_fiellers_interval_holds_where_the_difference_is_open(bench: Any) -> None:
    """At the ends of the interval, and nowhere inside, a - R b is just significant."""
    base = dict.fromkeys(range(5), 0.0)
    ours, best = dict(enumerate([2.0, 3.5, 2.2, 4.1, 3.0])), dict(enumerate([4.0, 4.4, 5.2, 6.1, 4.9]))
    share = bench.judge.kept(ours, best, base)

    def excess(ratio: float) -> float:
        gain = bench.judge.gain({s: ours[s] - ratio * best[s] for s in base}, base).difference
        return abs(gain.mean) - gain.ci95

    assert share.low < share.value < share.high
    assert excess(share.low) == pytest.approx(0, abs=1e-9)
    assert excess(share.high) == pytest.approx(0, abs=1e-9)
    assert excess(share.value) < 0


def test_no_share_of_a_gain_that_is_not_sure(bench: Any) -> None:
    base = dict.fromkeys(range(3), 0.0)
    assert bench.judge.kept({0: 1.0, 1: 1.0, 2: 1.0}, {0: 5.0, 1: -4.0, 2: 1.0}, base) is None
    assert bench.judge.kept({0: 1.0, 1: 1.0, 2: 1.0}, {0: -5.0, 1: -4.0, 2: -4.5}, base) is None


def test_choice_by_the_other_seeds(bench: Any) -> None:
    """Each radius wins on one seed alone: chosen by the others, nothing is gained."""
    base = dict.fromkeys(range(3), 0.0)
    grid = {0.1: {0: 9.0, 1: 0.0, 2: 0.0}, 0.2: {0: 0.0, 1: 8.0, 2: 0.0}, 0.3: {0: 0.0, 1: 0.0, 2: 7.0}}
    best = bench.judge.best_of_grid(grid, base)
    assert (best.rho, best.gain.difference.mean, best.honest.mean) == (0.1, pytest.approx(3.0), 0.0)


def test_one_seed_is_no_judgement(bench: Any, tmp_path: Path) -> None:
    record = record_of(bench, tmp_path, {"base": [1.0, 2.0], "late": [3.0]})
    found = bench.judge.judge(record, ["late"])
    assert (found.rows, found.best) == ({}, None)


def test_an_interval_without_a_width_is_open(bench: Any) -> None:
    """Each seed loses one of 360 images; the scores are rounded."""
    base = {0: 98.05556, 1: 98.33333, 2: 97.5}
    found = bench.judge.gain({0: 97.77778, 1: 98.05556, 2: 97.22222}, base)
    assert (found.verdict, round(found.difference.mean, 3)) == ("open", -0.278)
    assert bench.judge.gain({0: 97.7, 1: 98.0, 2: 97.2}, base).verdict == "worse"


# Time and memory


def test_relative_time_sees_the_last_tenth(bench: Any) -> None:
    base = [1.0] * 40
    assert bench.cost.relative([1.0] * 36 + [2.0] * 4, base) == pytest.approx(1.1)
    assert bench.cost.relative([1.0] * 39 + [100.0], base) == pytest.approx(1.0)  # somebody else's work


def test_peak_counts_the_copy_of_the_weights(bench: Any) -> None:
    """Of SGD: AdamW's own step has room for a copy already."""
    task = tiny(bench, "digits-noise")
    weights = sum(p.nbytes for p in task.build(0).model.parameters())
    peaks = {name: bench.cost.peak(task, bench.contestants.CONTESTANTS[name]) for name in ("base", "ema", "sam 0.1")}
    extra = {name: (value - peaks["base"]) / weights for name, value in peaks.items()}
    assert extra["ema"] == pytest.approx(1.0, abs=0.1)
    assert extra["sam 0.1"] == pytest.approx(1.0, abs=0.1)


# The run, and the page


def test_a_run_goes_on_where_it_was(bench: Any, tmp_path: Path) -> None:
    record_of(bench, tmp_path, {"base": [1.0, 2.0], "late": [1.0]})
    jobs = list(bench.main.missing(["digits-noise"], ["base", "late"], 4, tmp_path))
    left = [("late", 1), ("base", 2), ("late", 2), ("base", 3), ("late", 3)]
    assert jobs == [("digits-noise", name, seed) for name, seed in left]
    both = list(bench.main.missing(["digits-noise", "chars"], ["base"], 3, tmp_path))
    assert both == [("chars", "base", 0), ("chars", "base", 1), ("digits-noise", "base", 2), ("chars", "base", 2)]


def test_other_settings_are_not_mixed(bench: Any, tmp_path: Path) -> None:
    record = record_of(bench, tmp_path, {"base": [1.0]})
    other = bench.contestants.Contestant("base", "base", longer=3)
    with pytest.raises(UserError, match="--forget"):
        record.add(other, 1, {"score": 1.0})
    content = json.loads(record.path.read_text())
    content["settings"]["rate"] = 7
    record.path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="other settings"):
        record.scores("base")


def test_forget(bench: Any, tmp_path: Path) -> None:
    record = record_of(bench, tmp_path, {"base": [1.0], "late": [1.0, 2.0]}, {"late": {"time": 1.1}})
    assert record.forget(["late"]) == 2
    assert (record.scores("late"), record.scores("base")) == ({}, {0: 1.0})
    assert record.content["cost"] == {}


def test_tables(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = full(bench, tmp_path, late=[2.0, 12.5, 23.0])
    record.add_cost({"late": {"time": 1.124, "memory": 1.0}})
    text = bench.page.markdown([record], ["base", "sam 0.1", "late"])
    assert "| late | 3 | +2.50 ± 1.24 | better | 50 % (50 to 50) | 1.12 | 1.00 |" in text
    assert "Best SAM of the grid: 0.1, +5.00 ± 2.48 (a sure gain)" in text
    assert "| late | 1 | 0 | 0 | 50 % | 1.12 | 1.00 |" in text
    assert "set aside" not in text
    bench.page.show([record], ["late"])
    assert "+2.50 ± 1.24" in capsys.readouterr().out


def test_the_page_keeps_what_is_around_the_tables(bench: Any, tmp_path: Path) -> None:
    page = f"above\n{bench.page.BEGIN}\nold\n{bench.page.END}\nbelow\n"
    new = bench.page.filled(page, "new")
    assert new == f"above\n{bench.page.BEGIN}\n\nnew\n\n{bench.page.END}\nbelow\n"
    assert bench.page.filled(new, "new") == new
    with pytest.raises(UserError, match="no place"):
        bench.page.filled("nothing", "new")
    bench.page.draw(tmp_path / "gains.png", [full(bench, tmp_path, late=[2.0, 12.5, 23.0])])
    assert 0 < (tmp_path / "gains.png").stat().st_size < 200_000


def test_the_axis_holds_the_means_and_no_huge_interval(bench: Any) -> None:
    estimate = importlib.import_module("flatwise.lab.statistics").Estimate
    low, high = bench.page.reach([estimate([], 4.0, 1.0), estimate([], 2.0, None)])
    assert (low, high) == (pytest.approx(-1.2), pytest.approx(5.2))
    low, high = bench.page.reach([estimate([], 4.0, 100.0)])
    assert (low, high) == (pytest.approx(-4.2), pytest.approx(8.2))


def test_the_page_holds_what_the_records_give(bench: Any) -> None:
    page = bench.main.PAGE.read_text("utf-8")
    records = [bench.records.Record(task) for task in bench.tasks.TASKS.values()]
    assert page == bench.page.filled(page, bench.page.markdown(records, bench.contestants.USUAL))


def test_the_page_holds_what_was_seen_without_a_part(bench: Any) -> None:
    page = bench.main.PAGE.read_text("utf-8")
    tasks = [bench.tasks.TASKS[name] for name in TASKS[:5]]
    rows = [line.split("|")[2:-1] for line in page.partition("## Ablation")[2].splitlines() if line.startswith("| ")][
        1:
    ]
    for name, row in zip(["frugal", *bench.contestants.ABLATIONS], rows, strict=False):
        for task, cell in zip(tasks, row, strict=True):
            record = bench.records.Record(task)
            base, own = record.scores("base"), record.scores(name)
            mean = sum(own[seed] - base[seed] for seed in range(3)) / 3
            assert float(cell) == pytest.approx(mean, abs=0.051 if abs(mean) > 1 else 0.0051), (name, task.name)
