"""What a row needs: steps and gradients counted by hand, a measured step, and the table of them."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

import flatwise
from flatwise.errors import UserError
from flatwise.lab.models import build_model
from flatwise.lab.paper.experiments import experiment, experiment_names
from flatwise.lab.paper.needs import all_needs, needs, needs_table
from flatwise.lab.paper.rows import configs, runs
from flatwise.lab.paper.steps import StepTime, facts, measure_step, passes_of, steps_of
from flatwise.lab.train.config import TrainConfig

by_shape = pytest.mark.skipif(
    "shape" not in inspect.signature(build_model).parameters, reason="build_model does not take a shape yet"
)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 200 * 195),  # 50,000 // 256
        ({"val_fraction": 0.1}, 200 * 175),  # 45,000 // 256
        ({"dataset": "svhn", "epochs": 1}, 2360),  # (73,257 + 531,131) // 256
        ({"dataset": "imagenet", "batch_size": 4096, "epochs": 90}, 90 * 312),
        ({"dataset": "pets", "steps": 5000}, 5000),
        ({"train_size": 2560, "epochs": 3}, 30),
    ],
)
def test_steps_leave_out_the_last_smaller_batch(settings: dict[str, object], steps: int) -> None:
    assert steps_of(TrainConfig(**settings)) == steps  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("base", 1.0),
        ("sam", 2.0),
        ("msam", 1.0),
        ("lp:p=inf", 2.0),
        ("random:filter_scaled=False", 1.0),
        ("sam:ascent_steps=5", 6.0),
        ("second-order", 3.0),
        ("sam:window=(0.9,1.0)", 1.1),
        ("sam:window=(0.0,0.9)", 1.9),
        ("sam:every=5", 1.2),
    ],
)
def test_the_gradients_of_a_step(method: str, passes: float) -> None:
    assert passes_of(TrainConfig(method=method)) == pytest.approx(passes)


@pytest.mark.parametrize("name", [n for n in flatwise.list_variants() if flatwise.variant_info(n).passes in ("1", "2")])
def test_they_are_what_the_registry_says(name: str) -> None:
    assert passes_of(TrainConfig(method=name)) == float(flatwise.variant_info(name).passes)


def test_sam_of_radius_0_is_the_base() -> None:
    assert passes_of(TrainConfig(rho=0.0)) == 1.0


def test_counting_gradients_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    passes_of(TrainConfig(method="sam:every=7"))
    assert torch.equal(state, torch.get_rng_state())


def test_a_row_is_the_sum_of_its_trainings() -> None:
    asked: list[TrainConfig] = []

    def measure(config: TrainConfig) -> StepTime:
        asked.append(config)
        return StepTime(0.36, passes_of(config), 4, "a clock")

    need = needs("1", "wrn28-10-basic", "cifar10", measure=measure)
    once = 200 * 195
    assert (need.data, need.trainings) == (("cifar10",), 15)
    assert need.steps == 5 * once + 5 * once + 5 * 2 * once
    assert need.passes == pytest.approx(5 * 2 * once + 5 * once + 5 * 2 * once)
    assert need.hours == pytest.approx(need.passes * 0.36 / 3600)
    assert need.device == "a clock"
    assert len(asked) == 3  # seeds cost the same
    without = needs("1", "wrn28-10-basic", "cifar10")
    assert without == replace(need, hours=None, device=None)


def test_every_training_of_the_paper_has_data_and_steps() -> None:
    for name in experiment_names():
        for row in experiment(name).rows:
            for config in configs(name, row):
                assert facts(config).side > 0
                assert steps_of(config) > 0


def test_the_table_has_a_line_for_each_row() -> None:
    rows = all_needs()
    text = needs_table(rows)
    lines = text.splitlines()
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    assert [tuple(row[:2]) for row in cells] == [(n, row) for n in experiment_names() for row in experiment(n).rows]
    assert ["1", "wrn28-10-basic", "cifar10, cifar100", "0.34", "30", "1,560,000", "1,950,000", "not measured"] in cells
    assert "hours: name a table" in text
    measured = needs_table(
        [replace(rows[0], hours=12345.6, device="GPU"), replace(rows[1], hours=0.0123, device="GPU")]
    )
    assert "| 12,346 |" in measured
    assert "|  0.012 |" in measured
    assert "hours: of one GPU," in measured


def test_a_data_set_that_is_not_the_papers() -> None:
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        facts(TrainConfig(dataset="cifar-10"))
    assert facts(TrainConfig(dataset="imagenet", resolution=224)).side == 224


@by_shape
def test_a_step_is_really_timed_and_scaled_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("flatwise.lab.paper.steps._now", lambda device: float(next(clock)))  # a pass takes one second
    config = replace(runs("m", "16")[0].config, model="resnet8")
    step = measure_step(config, "cpu")
    assert (step.images, step.passes) == (4, 2.0)
    assert step.pass_seconds == 256 / 4
    assert step.seconds == 2 * 256 / 4
    assert measure_step(replace(config, method="base", rho=None, m=None), "cpu", images=8).seconds == 256 / 8
    assert "CPU" in step.device
