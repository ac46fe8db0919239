"""When a step looks around, and what a step that does not is."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from flatwise import SAM, Schedule

# Options -> the steps, out of 20, that are active.
TABLE: list[tuple[dict[str, Any], list[int]]] = [
    ({}, list(range(20))),
    ({"every": 1}, list(range(20))),
    ({"every": 3}, [0, 3, 6, 9, 12, 15, 18]),
    ({"every": 50}, [0]),
    ({"window": (0.5, 1.0), "total_steps": 20}, list(range(10, 20))),
    ({"window": (0.9, 1.0), "total_steps": 10}, list(range(9, 20))),
    ({"window": (0.0, 0.25), "total_steps": 20}, list(range(5))),
    ({"window": (0.25, 0.75), "total_steps": 8}, [2, 3, 4, 5]),
    ({"window": (0.0, 1.0), "total_steps": 5}, list(range(20))),
    ({"window": (0.5, 1.0), "total_steps": 3}, list(range(2, 20))),
    ({"warmup_steps": 17}, [17, 18, 19]),
    ({"warmup_steps": 4, "every": 5}, [5, 10, 15]),
    ({"warmup_steps": 4, "every": 2, "window": (0.0, 0.5), "total_steps": 20}, [4, 6, 8]),
]


@pytest.mark.parametrize(("options", "active"), TABLE, ids=[str(options) for options, _ in TABLE])
def test_the_steps_that_are_active(options: dict[str, Any], active: list[int]) -> None:
    schedule = Schedule(**options)
    assert [step for step in range(20) if schedule.active(step)] == active


@pytest.mark.parametrize("fraction", ["0.07", "0.25", "0.55", "0.9"])
@pytest.mark.parametrize("total", [100, 180])
def test_a_window_has_the_length_that_was_asked_for(fraction: str, total: int) -> None:
    """0.55 * 100 is 55.00000000000001 in floating point; the window opens with step 55 all the same."""
    edge = math.ceil(Fraction(fraction) * total)
    late, early = (
        Schedule(window=window, total_steps=total) for window in ((float(fraction), 1.0), (0.0, float(fraction)))
    )
    assert next(step for step in range(total) if late.active(step)) == edge
    assert sum(early.active(step) for step in range(total)) == edge


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every"),
        ({"every": 1.5}, "every"),
        ({"window": (0.5, 0.5), "total_steps": 10}, "window"),
        ({"window": (0.6, 0.5), "total_steps": 10}, "window"),
        ({"window": (-0.1, 0.5), "total_steps": 10}, "window"),
        ({"window": (0.5, 1.5), "total_steps": 10}, "window"),
        ({"window": (math.nan, 1.0), "total_steps": 10}, "window"),
        ({"window": 0.5, "total_steps": 10}, "window"),
        ({"window": (0.1, 0.2, 0.3), "total_steps": 10}, "window"),
        ({"total_steps": 0}, "total_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"window": (0.5, 1.0)}, "total_steps"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def train(optimizer: str, steps: int, **options: Any) -> tuple[Tensor, list[tuple[bool, str, float]]]:
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5))
    base = torch.optim.SGD([w], lr=0.1, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW([w], lr=0.1)
    opt = SAM(base, **options) if options else base
    seen = []
    for _ in range(steps):
        x = torch.randn(5)

        def closure(x: Tensor = x) -> Tensor:
            opt.zero_grad()
            loss = (w.cos() * x).sum() ** 2
            loss.backward()
            return loss

        opt.step(closure)
        if options:
            seen.append((opt.last.active, opt.last.reason, opt.last.passes))
    return w.detach(), seen


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rho": 0.0}, "zero radius"),
        ({"rho": lambda step: 0.0}, "zero radius"),
        ({"rho": 0.5, "window": (0.9, 1.0), "total_steps": 1000}, "schedule"),
        ({"rho": 0.5, "schedule": Schedule(warmup_steps=1000)}, "schedule"),
    ],
    ids=["rho = 0", "rho() = 0", "window", "warm-up"],
)
def test_a_step_that_is_not_active_is_the_base_optimizers(base: str, options: dict[str, Any], reason: str) -> None:
    plain, _ = train(base, 5)
    got, seen = train(base, 5, **options)
    assert torch.equal(got, plain)
    assert seen == [(False, reason, 1.0)] * 5


def test_active_and_inactive_steps_alternate() -> None:
    _, seen = train("sgd", 6, rho=0.1, every=3)
    assert seen == [(True, "perturbed", 2.0), *[(False, "schedule", 1.0)] * 2] * 2


def test_the_count_goes_on_after_resuming() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    made = []
    opt = SAM(torch.optim.SGD([w], lr=0.1), 0.1, every=3)
    for step in range(9):
        if step in (2, 5):
            saved, opt = opt.state_dict(), SAM(torch.optim.SGD([w], lr=0.1), 0.1, every=3)
            opt.load_state_dict(saved)
        opt.step(lambda x: (w * x).pow(2).sum(), torch.tensor([1.0, 2.0, 3.0]))
        made.append(opt.last.active)
    assert made == [True, False, False] * 3
