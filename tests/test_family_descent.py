"""The descents of the family beside their oracles: 50 random steps with BatchNorm, dropout and two base optimizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.family_paths import (
    BASES,
    LR,
    STEPS,
    Path,
    Problem,
    base_of,
    batches,
    flat,
    network,
    reseed,
    run_fast,
    run_oracle,
)
from torch import Tensor
from torch.nn import functional as F

import flatwise
from oracles import family_descent as paper


def cosine(t: int) -> float:
    """A learning rate that falls from LR to LR / 10."""
    return LR / 10 + (LR - LR / 10) * (1 + math.cos(math.pi * t / STEPS)) / 2


class Cosine:
    """torch's scheduler of the same, on the wrapper; steps before every step but the first."""

    def __call__(self, step: int, opt: Any) -> None:
        if step == 0:
            self._it = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS, eta_min=LR / 10)
        else:
            self._it.step()


def constant(t: int) -> float:
    return LR


FALLING = {"lr_of": cosine, "lr_max": LR}

# name -> method of flatwise, its options, the oracle, the oracle's options (without the radius, which both are given).
CASES: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "pgn": ("pgn", {"rho": 0.1}, paper.pgn, {"alpha": 0.8}),
    "pgn, beyond": ("pgn", {"rho": 0.1, "alpha": 1.7}, paper.pgn, {"alpha": 1.7}),
    "wsam": ("wsam", {"rho": 0.05}, paper.wsam, {"gamma": 0.9, "decoupled": True}),
    "wsam, 0.8": ("wsam", {"rho": 0.1, "gamma": 0.8}, paper.wsam, {"gamma": 0.8, "decoupled": True}),
    "wsam, coupled": (
        "wsam",
        {"rho": 0.05, "gamma": 0.7, "decoupled": False},
        paper.wsam,
        {"gamma": 0.7, "decoupled": False},
    ),
    "stable": ("stable", {"rho": 0.2}, paper.stable, {}),
    "gsam": ("gsam", {"rho": 0.3}, paper.gsam, {"alpha": 0.6, "rho_min": 0.1, **FALLING}),
    "gsam, given": (
        "gsam",
        {"rho": 0.3, "alpha": 0.4, "rho_min": 0.02, "lr_max": 2 * LR, "lr_min": LR / 10},
        paper.gsam,
        {"alpha": 0.4, "rho_min": 0.02, "lr_of": cosine, "lr_max": 2 * LR, "lr_min": LR / 10},
    ),
    "second-order": ("second-order", {"rho": 0.1}, paper.second_order, {}),
    "functional": ("functional", {"rho": 0.2, "model": True}, paper.functional, {}),
    "looksam": ("looksam", {"rho": 0.1}, paper.looksam, {"k": 5, "alpha": 0.1}),
    "looksam, 3": ("looksam", {"rho": 0.1, "every": 3, "alpha": 0.7}, paper.looksam, {"k": 3, "alpha": 0.7}),
}


def oracle(case: str, base: str = "sgd", factor: float = 1.0, **loop: Any) -> Path:
    _, options, method, settings = CASES[case]
    return run_oracle(lambda: method(factor * options["rho"], **settings), base, **loop)


def fast(case: str, base: str = "sgd", **loop: Any) -> Path:
    name, options, _, settings = CASES[case]
    return run_fast(name, options, base, before=Cosine() if "lr_of" in settings else None, **loop)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_follow_the_equations(case: str, base: str) -> None:
    fast(case, base).assert_close(oracle(case, base))


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_sees_a_radius_that_is_off_by_a_thousandth(case: str) -> None:
    with pytest.raises(AssertionError, match="weights of step"):
        fast(case).assert_close(oracle(case, factor=1.001))


def test_the_cases_differ_from_each_other_and_from_sam() -> None:
    """Cases in which an option made no difference would prove nothing."""
    ends = {case: oracle(case, steps=8).weights[-1] for case in CASES}
    for rho in (0.05, 0.1, 0.2, 0.3):
        ends[f"sam, {rho}"] = run_oracle(lambda rho=rho: paper.sam(rho), steps=8).weights[-1]
    alike = {(a, b) for a in ends for b in ends if a < b and torch.allclose(ends[a], ends[b], rtol=0, atol=1e-7)}
    assert not alike


LIMITS: dict[str, dict[str, Any]] = {
    "gsam": {"alpha": 0.0},  # at a constant learning rate the radius is rho
    "wsam": {"gamma": 0.5, "decoupled": False},
    "pgn": {"alpha": 1.0},
    "looksam": {"every": 1},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", LIMITS)
def test_at_its_limit_it_is_sam_bit_for_bit(name: str, base: str) -> None:
    ours, sam = run_fast(name, {"rho": 0.3, **LIMITS[name]}, base), run_fast("sam", {"rho": 0.3}, base)
    assert all(map(torch.equal, ours.weights, sam.weights))
    assert all(map(torch.equal, ours.buffers, sam.buffers))


def test_a_loss_that_is_linear_in_the_logits_makes_functional_sam_plain_sam() -> None:
    """Its gradient by the logits is the same at w and at w + eps."""

    def run(name: str) -> Tensor:
        model = network()
        options = {"model": model} if name == "functional" else {}
        opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=0.3, **options)
        for step, (x, y) in enumerate(batches(10)):
            reseed(step)
            opt.step(lambda b: (model(b[0]) * F.one_hot(b[1], 3)).mean(), (x, y))
        return flat(model.parameters())

    torch.testing.assert_close(run("functional"), run("sam"), rtol=0, atol=1e-13)


def kept_parts(opt: Any) -> list[Tensor]:
    return [entries["sam_kept"].clone() for entries in opt.state_dict()["state"].values()]


def test_looksam_keeps_what_is_orthogonal_to_g_over_all_parameters_jointly() -> None:
    data, model = batches(12), network()
    problem = Problem(data)
    opt = flatwise.create("looksam", base_of("sgd", model.parameters()))
    before: list[Tensor] = []
    for step, batch in enumerate(data):
        problem.begin(step)
        w = flat(model.parameters())
        g, gs = paper.two_gradients(problem, w, 0.1)
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        kept = kept_parts(opt)
        if step % 5:
            assert all(map(torch.equal, kept, before))
        else:
            torch.testing.assert_close(flat(kept), gs - (gs @ g) / (g @ g) * g, rtol=0, atol=1e-12)
            length = float(flat(kept).norm() * g.norm())
            assert abs(float(flat(kept) @ g)) < 1e-13 * length
            parts = [(a.flatten() @ b.flatten()).abs() for a, b in zip(kept, problem.cut(g), strict=True)]
            assert max(parts) > 1e-3 * length, "tensor by tensor it is not orthogonal: that would be another method"
        before = kept


def test_looksam_runs_its_closure_one_time_and_a_fifth() -> None:
    model, calls = network(), 0
    opt = flatwise.create("looksam", base_of("sgd", model.parameters()))
    passes = 0.0
    for x, y in batches(50):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            nonlocal calls
            calls += 1
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        passes += opt.last.passes
    assert calls == passes == 60


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_decoupled_wsam_does_nothing_with_a_second_gradient_that_is_not_finite(bad: float, base: str) -> None:
    """Nor with the first one alone, though that is finite: half a step would be another method."""
    model, data = network(), batches(12)
    opt = flatwise.create("wsam", base_of(base, model.parameters()))
    factors = iter([1.0] * 12 + [1.0, bad] + [1.0] * 10)
    for step, batch in enumerate(data):
        before = flat(model.parameters()), flat(t for s in opt.state.values() for t in s.values())
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]) * next(factors), batch)
        after = flat(model.parameters()), flat(t for s in opt.state.values() for t in s.values())
        assert all(map(torch.equal, before, after)) == (step == 6)
        assert opt.last.reason == ("non-finite update" if step == 6 else "perturbed")
    expected = oracle("wsam", base, data=data, skip=[6])
    torch.testing.assert_close(flat(model.parameters()), expected.weights[-1], rtol=0, atol=1e-10)
