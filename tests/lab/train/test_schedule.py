"""The learning rate against closed forms."""

from __future__ import annotations

import math

import pytest

from flatwise.lab.train import TrainConfig
from flatwise.lab.train.schedule import relative_rate


def rates(warmup: int = 0, total: int = 10, **settings: object) -> list[float]:
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    return [relative_rate(config, step, warmup, total) for step in range(total)]


def test_warm_up_rises_from_nothing_to_the_peak() -> None:
    assert rates(4, 8, schedule="constant") == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_a_cosine_begins_at_the_peak_after_the_warm_up_and_would_end_at_nothing() -> None:
    found = rates(2, 10)
    assert found[:3] == [0, 0.5, 1]
    assert found[6] == pytest.approx(0.5)  # half of the fall
    assert found[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


def test_a_straight_fall() -> None:
    assert rates(0, 4, schedule="linear") == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(("total", "falls"), [(10, [3, 6, 8]), (5, [2, 3, 4]), (200, [60, 120, 160])])
def test_steps_fall_at_the_milestones_of_the_whole_training(total: int, falls: list[int]) -> None:
    found = rates(1, total, schedule="step", milestones="0.3,0.6,0.8", gamma=0.2)
    for number, step in enumerate(falls):
        assert found[step - 1] == pytest.approx(0.2**number, abs=1e-12) or step == 1
        assert found[step] == pytest.approx(0.2 ** (number + 1))


def test_a_milestone_that_rounding_puts_behind_its_step() -> None:
    assert 0.28 * 25 > 7
    assert rates(0, 25, schedule="step", milestones="0.28", gamma=0.5)[6:8] == [1, 0.5]
