"""The descents of the family: what they keep, what they cost, and gradients that are not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.family_table import oracle
from tests.family_world import BASES, Problem, base_of, batches, flat, network, reseed
from torch import Tensor
from torch.nn import functional as F

import flatwise
from oracles import family_descent as paper


def test_a_loss_that_is_linear_in_the_logits_makes_functional_sam_plain_sam() -> None:
    """Its gradient by the logits is the same at w and at w + eps."""

    def run(name: str) -> Tensor:
        model = network()
        options = {"model": model} if name == "functional" else {}
        opt = flatwise.create(name, base_of("sgd", model.parameters()), rho=0.3, **options)
        for step, (x, y) in enumerate(batches(10)):
            reseed(step)
            opt.step(lambda b: (model(b[0]) * F.one_hot(b[1], 3)).mean(), (x, y))
        return flat(model)

    torch.testing.assert_close(run("functional"), run("sam"), rtol=0, atol=1e-13)


def test_the_radius_of_gsam_follows_the_learning_rate_and_is_saved() -> None:
    model = network()
    opt = flatwise.create("gsam", base_of("sgd", model.parameters(), lr=0.1), rho=0.5, rho_min=0.1)
    batch = batches(1)[0]
    radii = []
    for lr in (0.1, 0.05, 0.0):
        opt.param_groups[0]["lr"] = lr
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        radii.append(opt.param_groups[0]["rho"])
    assert radii == pytest.approx([0.5, 0.3, 0.1])
    fresh = flatwise.create("gsam", base_of("sgd", network().parameters(), lr=0.1), rho=0.9, rho_min=0.1)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[0]["sam_rho_max"] == 0.5


def test_a_tensor_with_nothing_uphill_does_not_spoil_the_second_order_term() -> None:
    model = network(dtype=torch.float32)  # whose BatchNorm has biases of zero, so that T g is zero there
    opt = flatwise.create("second-order", base_of("sgd", model.parameters()), adaptive=True, scope="tensor")
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batches(1, torch.float32)[0])
    assert opt.last.updated
    assert flat(model).isfinite().all()


def kept_parts(opt: Any) -> list[Tensor]:
    return [entries["sam_kept"].clone() for entries in opt.state_dict()["state"].values()]


@pytest.mark.parametrize("every", [2, 5])
def test_looksam_keeps_what_is_orthogonal_to_g_over_all_parameters_jointly(every: int) -> None:
    data, model = batches(12), network()
    problem = Problem(data)
    opt = flatwise.create("looksam", base_of("sgd", model.parameters()), every=every)
    before: list[Tensor] = []
    for step, batch in enumerate(data):
        problem.begin(step)
        w = flat(model)
        g, gs = paper.two_gradients(problem, w, 0.1)
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
        kept = kept_parts(opt)
        if step % every:
            assert all(map(torch.equal, kept, before))
        else:
            torch.testing.assert_close(flat(kept), gs - (gs @ g) / (g @ g) * g, rtol=0, atol=1e-12)
            assert flat(kept).norm() > 0.01 * g.norm()
            length = float(flat(kept).norm() * g.norm())
            assert abs(float(flat(kept) @ g)) < 1e-13 * length
            parts = [(a.flatten() @ b.flatten()).abs() for a, b in zip(kept, problem.cut(g), strict=True)]
            assert max(parts) > 1e-3 * length, "tensor by tensor it is not orthogonal: that would be another method"
        before = kept


def test_looksam_without_radius_forgets_to_reuse() -> None:
    model = network(dtype=torch.float32)
    opt = flatwise.create("looksam", base_of("sgd", model.parameters()))
    for step, batch in enumerate(batches(12, torch.float32)):
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
    twin, base = copy.deepcopy((model, opt.base_optimizer))
    opt.param_groups[0]["rho"] = 0.0
    x, y = batches(1, torch.float32)[0]
    reseed(0)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
    reseed(0)
    base.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    base.step()
    assert torch.equal(flat(model), flat(twin))


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
        before = flat(model), flat(t for s in opt.state.values() for t in s.values())
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]) * next(factors), batch)
        after = flat(model), flat(t for s in opt.state.values() for t in s.values())
        assert all(map(torch.equal, before, after)) == (step == 6)
        assert opt.last.reason == ("non-finite update" if step == 6 else "perturbed")
    expected = oracle("wsam", base, data=data, skip=[6])
    torch.testing.assert_close(flat(model), expected.weights[-1], rtol=0, atol=1e-10)
