"""Interleaved timing: who runs when, and what is made of the seconds."""

from __future__ import annotations

import pytest

from flatwise.lab.config import CompareConfig
from flatwise.lab.timing import WARM_UP, in_training, interleave, relative, time_methods


def test_steps_alternate_and_each_comes_first_equally_often() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = interleave(steps, fewest=6, most=6)
    rounds = ["".join(calls[start : start + 3]) for start in range(3 * WARM_UP, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab"] * 2
    assert all(len(values) == 6 for values in seconds.values())


def test_the_budget_ends_the_rounds_but_not_before_the_fewest() -> None:
    seconds = interleave({"a": lambda: None}, fewest=4, most=1000, budget=0.0)
    assert len(seconds["a"]) == 4


def test_the_ratio_is_the_median_over_rounds() -> None:
    # Round by round 2, 2, 2, 3, 10: a slow moment of one step moves the median little.
    result = relative([2.0, 4.0, 2.0, 3.0, 10.0], [1.0, 2.0, 1.0, 1.0, 1.0])
    assert result == {"ratio": 2.0, "quartiles": [2.0, 3.0], "step_seconds": 3.0}


def test_steps_of_two_kinds_count_by_their_share() -> None:
    # One step in five costs twice as much: 1.2 on average, though the median step costs 1.
    result = relative([1.0, 1.0, 2.0, 1.0, 1.0], [1.0] * 5, [64, 64, 128, 64, 64])
    assert result["ratio"] == pytest.approx(1.2)
    assert result["step_seconds"] == pytest.approx(1.2)


def test_a_timing_is_carried_over_by_the_gradients_of_the_training() -> None:
    step = {"ratio": 1.5, "quartiles": [1.4, 1.6], "gradients": 1.5}
    ratio, quartiles = in_training(step, 1.2)
    assert ratio == pytest.approx(1.2)
    assert quartiles == pytest.approx([1.12, 1.28])


def test_a_schedule_runs_through_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatwise.lab.timing.BUDGET_SECONDS", 0.0)
    seen: dict[str, list[int]] = {}

    def watched(seconds: list[float], reference: list[float], work: list[int]) -> dict[str, object]:
        seen[str(len(seen))] = work
        return relative(seconds, reference, work)

    monkeypatch.setattr("flatwise.lab.timing.relative", watched)
    time_methods(CompareConfig(methods="late,every-k,sam", model="mlp", train_size=200, batch_size=32))
    base, late, every, sam = seen.values()
    assert base == [32] * 20
    assert sam == [64] * 20
    assert late == [32] * 18 + [64] * 2
    assert sorted(every) == [32] * 16 + [64] * 4


def test_every_method_is_timed_against_the_base_even_where_it_is_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flatwise.lab.timing.BUDGET_SECONDS", 0.1)
    config = CompareConfig(methods="sam,asam", model="mlp", train_size=200)
    timing = time_methods(config)
    assert set(timing["methods"]) == {"sgd", "sam", "asam"}
    assert timing["methods"]["sgd"]["ratio"] == 1.0
    assert timing["methods"]["sam"]["ratio"] > 1.2
