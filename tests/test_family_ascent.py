"""The ascents of the family beside their oracles: 50 random steps with BatchNorm, dropout and two base optimizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.family_paths import BASES, DECAY, LR, MOMENTUM, Path, batches, network, run_fast, run_oracle
from torch import Tensor

import flatwise
from flatwise.directions import PreviousGradient
from flatwise.memory import Memory
from oracles import family_ascent as paper

# name -> method of flatwise, its options, the oracle, the oracle's options (without the radius, which both are given).
CASES: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "sam": ("sam", {"rho": 0.1}, paper.sam, {}),
    "usam": ("usam", {"rho": 0.2}, paper.usam, {}),
    "sam-on": ("sam-on", {"rho": 0.5, "model": True}, paper.sam_on, {}),
    "sam-on, adaptive": (
        "sam-on",
        {"rho": 0.5, "model": True, "adaptive": True, "eta": 0.01},
        paper.sam_on,
        {"adaptive": True},
    ),
    "layerwise": ("layerwise", {"rho": 0.05}, paper.layerwise, {}),
    "filterwise": ("filterwise", {"rho": 0.1}, paper.filterwise, {"eta": 0.01}),
    "filterwise, eta": ("filterwise", {"rho": 0.1, "eta": 0.3}, paper.filterwise, {"eta": 0.3}),
    "msam": ("msam", {"rho": 0.3}, paper.msam, {}),
    "adaptive-msam": ("adaptive-msam", {"rho": 0.3}, paper.msam, {"adaptive": True, "eta": 0.01}),
    "msam, norm layers": ("msam", {"rho": 0.3, "only": "norm", "model": True}, paper.msam, {"only_norm": True}),
    "stale": ("stale", {"rho": 0.1}, paper.stale, {}),
    "random": ("random", {"rho": 0.05}, paper.random, {}),
    "random, seed": ("random", {"rho": 0.05, "noise_seed": 7}, paper.random, {"noise_seed": 7}),
    "random, plain": ("random", {"rho": 0.02, "filter_scaled": False}, paper.random, {"filter_scaled": False}),
    "vasso": ("vasso", {"rho": 0.2}, paper.vasso, {}),
    "vasso, 0.4": ("vasso", {"rho": 0.2, "theta": 0.4}, paper.vasso, {"theta": 0.4}),
    "fsam": ("fsam", {"rho": 0.2}, paper.fsam, {}),
    "fsam, script": (
        "fsam",
        {"rho": 0.2, "sigma": 0.7, "lmbda": 0.6},
        paper.fsam,
        {"sigma": 0.7, "lmbda": 0.6},
    ),
    "fisher": ("fisher", {"rho": 0.1}, paper.fisher, {"eta": 1.0}),
    "fisher, eta": ("fisher", {"rho": 0.1, "eta": 50.0}, paper.fisher, {"eta": 50.0}),
    "asam": ("asam", {"rho": 0.5}, paper.asam, {"eta": 0.01}),
    "asam, weights": (
        "asam",
        {"rho": 0.5, "scaled": "weights", "model": True},
        paper.asam,
        {"eta": 0.01, "scaled": "weights"},
    ),
    "lp, 1": ("lp", {"rho": 0.1, "p": 1}, paper.lp, {"p": 1}),
    "lp, 1.5": ("lp", {"rho": 0.1, "p": 1.5}, paper.lp, {"p": 1.5}),
    "lp, inf": ("lp", {"rho": 0.02, "p": math.inf}, paper.lp, {"p": math.inf}),
    "multi-step": ("multi-step", {"rho": 0.1}, paper.multi_step, {}),
    "multi-step, 4": ("multi-step", {"rho": 0.1, "ascent_steps": 4}, paper.multi_step, {"n": 4}),
}


def oracle(case: str, base: str = "sgd", factor: float = 1.0, **loop: Any) -> Path:
    _, options, method, settings = CASES[case]
    return run_oracle(lambda: method(factor * options["rho"], **settings), base, **loop)


def fast(case: str, base: str = "sgd", **loop: Any) -> Path:
    name, options, *_ = CASES[case]
    return run_fast(name, options, base, **loop)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_follow_the_equations(case: str, base: str) -> None:
    fast(case, base).assert_close(oracle(case, base))


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_sees_a_radius_that_is_off_by_a_thousandth(case: str) -> None:
    with pytest.raises(AssertionError, match="weights of step"):
        fast(case).assert_close(oracle(case, factor=1.001))


def test_the_cases_differ_from_each_other() -> None:
    """Cases in which an option made no difference would prove nothing."""
    ends = {case: oracle(case, steps=8).weights[-1] for case in CASES}
    alike = {(a, b) for a in ends for b in ends if a < b and torch.allclose(ends[a], ends[b], rtol=0, atol=1e-7)}
    assert not alike


def test_msam_is_its_authors_form_with_weights_displaced_at_rest() -> None:
    rest: list[Any] = []

    def make_rule() -> Any:
        rule, at_rest = paper.msam_shifted(0.3, LR, MOMENTUM, DECAY)

        def recorded(shifted: Tensor, L: Any, base: Any) -> Tensor:
            shifted = rule(shifted, L, base)
            rest.append(at_rest(shifted))
            return shifted

        return recorded

    displaced = run_oracle(make_rule)
    path = fast("msam")
    path.assert_close(Path(rest, displaced.buffers))
    assert (displaced.weights[-1] - path.weights[-1]).norm() == pytest.approx(0.3)


NAN_STEP = 5


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "case", ["vasso", "vasso, 0.4", "fsam", "fsam, script", "stale", "msam", "random", "multi-step", "sam"]
)
def test_a_step_that_is_not_finite_is_as_if_it_never_was(case: str, base: str) -> None:
    data = batches()
    expected = oracle(case, base, data=data, skip=[NAN_STEP])
    x, y = data[NAN_STEP]
    data[NAN_STEP] = (torch.full_like(x, math.nan), y)
    path = fast(case, base, data=data)
    assert torch.equal(path.weights[NAN_STEP], path.weights[NAN_STEP - 1])
    path.assert_close(expected, buffers=False)  # the statistics have seen the batch, as without flatwise


@pytest.mark.parametrize("name", ["msam", "adaptive-msam"])
def test_a_base_without_momentum_is_refused_by_name(name: str) -> None:
    for base in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adafactor):
        with pytest.raises(ValueError, match=f"momentum .* this {base.__name__} has none"):
            flatwise.create(name, base(network().parameters(), lr=0.1))
    both = [{"params": [torch.nn.Parameter(torch.ones(2))], "momentum": m} for m in (0.9, 0.0)]
    with pytest.raises(ValueError, match="SGD has none"):
        flatwise.create(name, torch.optim.SGD(both, lr=0.1))


def test_an_accelerators_withheld_gradient_is_not_remembered() -> None:
    """There the verdict is a tensor that nobody reads; here it is handed over by hand."""
    weight, memory, direction = torch.nn.Parameter(torch.ones(3)), Memory(), PreviousGradient()
    for verdict, grad, kept in ((False, math.nan, 0.0), (True, 2.0, 2.0), (False, math.inf, 2.0), (True, 3.0, 3.0)):
        weight.grad = torch.full((3,), grad)
        direction.learn([weight], memory, torch.tensor(verdict))
        assert torch.equal(next(direction.offer([weight], memory, None, 0)).grad, torch.full((3,), kept))
