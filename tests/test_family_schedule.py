"""The schedules of the family beside their oracles, and how often each of them looks around."""

from __future__ import annotations

import os
import pathlib
import random
from typing import Any

import pytest
import torch
from tests.family_paths import BASES, STEPS, Path, base_of, batches, flat, network, reseed, run_fast, run_oracle
from torch import Tensor
from torch.nn import functional as F

import flatwise
from flatwise import AdaptiveSchedule
from oracles import family_descent as paper

RHO = 0.2


def drawn(probability: float, seed: int) -> list[bool]:
    """The rule in the docstring of Schedule."""
    return [random.Random(seed * 1_000_003 + t).random() < probability for t in range(STEPS)]


# name -> method of flatwise, its options, the oracle, the oracle's options, steps that perturb (None: as the data say).
CASES: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any], int | None]] = {
    "every-k": ("every-k", {}, paper.every_k, {"k": 5}, 10),
    "every-k, 3": ("every-k", {"every": 3}, paper.every_k, {"k": 3}, 17),
    "late": ("late", {"total_steps": STEPS}, paper.window, {"start": 0.9, "stop": 1.0, "total": STEPS}, 5),
    "late, middle": (
        "late",
        {"total_steps": STEPS, "window": (0.1, 0.58)},
        paper.window,
        {"start": 0.1, "stop": 0.58, "total": STEPS},
        24,
    ),
    "warmup-off": ("warmup-off", {"warmup_steps": 7}, paper.warmup_off, {"warmup": 7}, 43),
    "bernoulli": ("bernoulli", {}, paper.bernoulli, {"probability": 0.5}, sum(drawn(0.5, 0))),
    "bernoulli, seed": (
        "bernoulli",
        {"probability": 0.2, "seed": 3},
        paper.bernoulli,
        {"probability": 0.2, "seed": 3},
        sum(drawn(0.2, 3)),
    ),
    "ae-sam": ("ae-sam", {"total_steps": STEPS}, paper.ae_sam, {"total": STEPS}, None),
    "ae-sam, others": (
        "ae-sam",
        {"total_steps": 2 * STEPS, "delta": 0.5, "lambda_1": -0.5, "lambda_2": 0.3},
        paper.ae_sam,
        {"total": 2 * STEPS, "delta": 0.5, "lambda_1": -0.5, "lambda_2": 0.3},
        None,
    ),
}


def oracle(case: str, base: str = "sgd", factor: float = 1.0, **loop: Any) -> Path:
    _, _, method, settings, _ = CASES[case]
    return run_oracle(lambda: method(factor * RHO, **settings), base, **loop)


def fast(case: str, base: str = "sgd", **loop: Any) -> Path:
    name, options, *_ = CASES[case]
    return run_fast(name, {"rho": RHO, **options}, base, **loop)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_follow_the_equations(case: str, base: str) -> None:
    fast(case, base).assert_close(oracle(case, base))


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_sees_a_radius_that_is_off_by_a_thousandth(case: str) -> None:
    with pytest.raises(AssertionError, match="weights of step"):
        fast(case).assert_close(oracle(case, factor=1.001))


def test_the_cases_differ_from_each_other_and_from_sam() -> None:
    ends = {case: oracle(case).weights[-1] for case in CASES}
    ends["sam"] = run_oracle(lambda: paper.sam(RHO)).weights[-1]
    alike = {(a, b) for a in ends for b in ends if a < b and torch.allclose(ends[a], ends[b], rtol=0, atol=1e-7)}
    assert not alike


LIMITS: dict[str, dict[str, Any]] = {
    "every-k": {"every": 1},
    "bernoulli": {"probability": 1.0},
    "warmup-off": {"warmup_steps": 0},
    "late": {"window": (0.0, 1.0), "total_steps": STEPS},
    "ae-sam": {"total_steps": STEPS, "lambda_1": -1e9, "lambda_2": -1e9},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", LIMITS)
def test_where_every_step_is_active_it_is_sam_bit_for_bit(name: str, base: str) -> None:
    ours, sam = run_fast(name, {"rho": RHO, **LIMITS[name]}, base), run_fast("sam", {"rho": RHO}, base)
    assert all(map(torch.equal, ours.weights, sam.weights))
    assert all(map(torch.equal, ours.buffers, sam.buffers))


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


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_does_not_look_around_costs_one_call(case: str) -> None:
    name, options, _, _, expected = CASES[case]
    seen, calls, passes, _ = decisions(name, options)
    assert calls == passes == STEPS + sum(seen)
    assert 5 <= sum(seen) <= STEPS - 5, "both kinds of steps must happen"
    if expected is not None:
        assert sum(seen) == expected


def test_bernoulli_is_drawn_from_the_seed_and_the_step_alone() -> None:
    one, two = (decisions("bernoulli", {"seed": 4}, noise)[0] for noise in (0, 1))
    assert one == two
    assert one == drawn(0.5, 4)
    assert one != decisions("bernoulli", {"seed": 5})[0]


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


def on_rank(rank: int, folder: str) -> None:
    """One of two processes of a DistributedDataParallel training, on its own half of each batch."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = (pathlib.Path(folder) / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    results = {}
    for name, options in METHODS_OF_RANKS.items():
        model = torch.nn.parallel.DistributedDataParallel(network())
        opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=RHO, **options)
        reasons = []
        for x, y in batches(20):
            half = slice(6 * rank, 6 * rank + 6)
            opt.step(lambda b, model=model: F.cross_entropy(model(b[0]), b[1]), (x[half], y[half]))
            reasons.append(opt.last.reason)
        results[name] = reasons, flat(model.parameters())
    torch.save(results, pathlib.Path(folder) / str(rank))
    torch.distributed.barrier()  # neither leaves while the other may still talk to it
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_every_rank_takes_the_same_decision(tmp_path: Any) -> None:
    """Otherwise one rank would wait for the gradients of a second pass that the other never makes."""
    torch.multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    for name in METHODS_OF_RANKS:
        assert one[name][0] == two[name][0]
        assert torch.equal(one[name][1], two[name][1])
        assert {"perturbed", "schedule"} == set(one[name][0])
