"""The schedules of the family: how often each of them perturbs, and by what it decides."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests.family_table import SCHEDULES
from tests.family_world import STEPS, base_of, batches, flat, network, reseed
from tests.ranks.start import on_ranks
from torch import Tensor
from torch.nn import functional as F

import flatwise
from flatwise import AdaptiveSchedule, Schedule

RHO = 0.2


def drawn(probability: float, seed: int) -> list[bool]:
    """The rule in the docstring of Schedule."""
    return [random.Random(seed * 1_000_003 + t).random() < probability for t in range(STEPS)]


PERTURBED = {
    "every-k": 10, "every-k, 3": 17, "late": 5, "late, middle": 24, "warmup-off": 43,
    "bernoulli": sum(drawn(0.5, 0)), "bernoulli, seed": sum(drawn(0.2, 3)),
}  # fmt: skip
"""Steps of 50 that perturb, where not the data decide."""


def decisions(name: str, options: dict[str, Any], noise: int = 0) -> tuple[list[bool], int, float, Any]:
    """Train; return what each step was, the calls of the closure, the gradients computed, and the optimizer."""
    model, calls, passes, seen = network(), 0, 0.0, []
    opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=RHO, **options)
    for step, (x, y) in enumerate(batches()):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            nonlocal calls
            calls += 1
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        reseed(step)
        opt.step(closure)
        torch.manual_seed(noise)  # what else is drawn between steps is nobody's business
        seen.append(opt.last.reason == "perturbed")
        assert opt.last.reason in ("perturbed", "schedule")
        passes += opt.last.passes
    return seen, calls, passes, opt


@pytest.mark.parametrize("case", SCHEDULES)
def test_a_step_that_does_not_look_around_costs_one_call(case: str) -> None:
    row = SCHEDULES[case]
    seen, calls, passes, _ = decisions(row.name, row.options)
    assert calls == passes == STEPS + sum(seen)
    assert 5 <= sum(seen) <= STEPS - 5, "both kinds of steps must happen"
    assert row.name == "ae-sam" or sum(seen) == PERTURBED[case]


def test_bernoulli_is_drawn_from_the_seed_and_the_step_alone() -> None:
    one, two = (decisions("bernoulli", {"seed": 4}, noise)[0] for noise in (0, 1))
    assert one == two
    assert one == drawn(0.5, 4)
    assert one != decisions("bernoulli", {"seed": 5})[0]


def test_random_decisions_are_the_same_whatever_torch_drew() -> None:
    def decided(seed: int) -> list[bool]:
        schedule = Schedule(probability=0.3, seed=seed)
        return [schedule.active(step) for step in range(500)]

    torch.manual_seed(1)
    one = decided(7)
    torch.manual_seed(2)
    assert decided(7) == one
    assert decided(8) != one
    assert 0.2 < sum(one) / 500 < 0.4


def test_ae_sam_remembers_two_numbers_in_its_groups() -> None:
    """From the rule, by hand: ||g||^2 = 4, then 9."""
    schedule, group = AdaptiveSchedule(total_steps=10), dict[str, Any]()
    assert schedule.accepts(4.0, 0, group), "4 >= 0.4 + sqrt(1.296)"
    assert (group["sam_mean"], group["sam_variance"]) == pytest.approx((0.4, 1.296))
    assert schedule.accepts(9.0, 1, group)
    assert (group["sam_mean"], group["sam_variance"]) == pytest.approx((1.26, 0.9 * 1.296 + 0.1 * 7.74**2))
    mean, variance = group["sam_mean"], group["sam_variance"]
    assert not schedule.accepts(float("nan"), 2, group)
    assert (group["sam_mean"], group["sam_variance"]) == (mean, variance)


def test_ae_sam_looks_around_more_towards_the_end() -> None:
    """At a steady size of gradients c falls from 1, above which few lie, to -1, above which most do."""
    schedule, group = AdaptiveSchedule(total_steps=2000), dict[str, Any]()
    sizes = 4 + torch.randn(2000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    active = torch.tensor([schedule.accepts(float(size), t, group) for t, size in enumerate(sizes)])
    shares = active.view(4, 500).double().mean(1).tolist()
    assert shares == sorted(shares)
    assert shares[0] < 0.35 < 0.65 < shares[-1]
    assert 0.4 < float(active.double().mean()) < 0.6


METHODS_OF_RANKS: dict[str, dict[str, Any]] = {
    "ae-sam": {"total_steps": 20},
    "bernoulli": {"probability": 0.5},
    "looksam": {"every": 3},
}


def decisions_of_ranks(rank: int) -> dict[str, Any]:
    """One of two processes of a DistributedDataParallel training, on its own half of each batch."""
    results = {}
    for name, options in METHODS_OF_RANKS.items():
        torch.manual_seed(rank)  # masks are a rank's own, and the same in every run
        model = torch.nn.parallel.DistributedDataParallel(network())
        opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=RHO, **options)
        reasons = []
        for x, y in batches(20):
            half = slice(6 * rank, 6 * rank + 6)
            opt.step(lambda b, model=model: F.cross_entropy(model(b[0]), b[1]), (x[half], y[half]))
            reasons.append(opt.last.reason)
        results[name] = reasons, flat(model)
    return results


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_every_rank_takes_the_same_decision(tmp_path: Any) -> None:
    """Otherwise one rank would wait for the gradients of a second pass that the other never makes."""
    one, two = on_ranks(decisions_of_ranks, tmp_path)
    for name in METHODS_OF_RANKS:
        assert one[name][0] == two[name][0]
        assert torch.equal(one[name][1], two[name][1])
        assert {"perturbed", "schedule"} == set(one[name][0])
