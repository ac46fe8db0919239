"""``opt.last`` says what a step did, and the closure contract of torch holds."""

from __future__ import annotations

import math

import pytest
import torch
from tests.core_cases import X, Y, assert_same, batch, closure_of, mlp, same, sgd, snapshot, with_dropout
from torch import nn
from torch.nn import functional as F

from flatwise import SAM, Schedule


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_the_closure_runs_twice_with_gradients_enabled(outside):
    model = mlp()
    opt = SAM(sgd(model), rho=0.2)
    losses, enabled = [], []

    def closure():
        enabled.append(torch.is_grad_enabled())
        losses.append(closure_of(model, opt)())
        return losses[-1]

    with outside():
        got = opt.step(closure)
        assert torch.is_grad_enabled() is (outside is torch.enable_grad)
    assert enabled == [True, True]
    assert same(got, losses[0].detach())
    assert not got.requires_grad
    assert losses[1] > losses[0]
    assert opt.last.loss == losses[0].item()
    assert opt.last.perturbed_loss == losses[1].item()
    assert opt.last.sharpness == losses[1].item() - losses[0].item()
    assert opt.last.closure_calls == 2


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_loss_function_runs_with_gradients_enabled(outside, steps):
    model = mlp()
    opt = SAM(sgd(model), rho=0.2, ascent_steps=steps)
    enabled = []

    def loss_fn(b):
        enabled.append(torch.is_grad_enabled())
        return F.cross_entropy(model(b[0]), b[1])

    expected = loss_fn((X, Y)).detach()
    enabled.clear()
    with outside():
        got = opt.step(loss_fn, (X, Y))
    assert enabled == [True] * (1 + steps)
    assert same(got, expected)


def test_a_record_of_known_numbers():
    # loss = 3a + 4b, gradient (3, 4), so eps = rho (0.6, 0.8) and the loss rises by 5 rho.
    param = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    factor = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opt = SAM(torch.optim.SGD([param], lr=0.1), rho=0.25)
    loss = opt.step(lambda: (opt.zero_grad(), (value := (factor * param).sum()).backward(), value)[-1])
    last = opt.last
    assert loss == 11
    assert (last.step, last.loss, last.rho, last.passes, last.closure_calls) == (0, 11.0, 0.25, 2.0, 2)
    assert last.perturbed_loss == pytest.approx(12.25, rel=1e-14)
    assert last.sharpness == pytest.approx(1.25, rel=1e-13)
    assert last.gradient_norm == pytest.approx(5.0, rel=1e-14)
    assert last.perturbation_norm == pytest.approx(0.25, rel=1e-14)
    assert last.active is True
    assert last.updated is True
    assert last.reason == "perturbed"


@pytest.mark.parametrize(
    ("p", "eps", "norm"),
    [(1, (0.0, 1.0), 4.0), (2, (0.6, 0.8), 5.0), (math.inf, (1.0, 1.0), 7.0)],
)
def test_norms_of_other_balls(p, eps, norm):
    param = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    factor = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opt = SAM(torch.optim.SGD([param], lr=0.1), rho=0.25, p=p)
    opt.step(lambda: (opt.zero_grad(), (value := (factor * param).sum()).backward(), value)[-1])
    assert opt.last.sharpness == pytest.approx(0.25 * (3 * eps[0] + 4 * eps[1]), rel=1e-12)
    assert opt.last.gradient_norm == pytest.approx(norm, rel=1e-12)
    assert opt.last.perturbation_norm == pytest.approx(0.25, rel=1e-12)


def test_norms_of_groups_with_radii_of_their_own():
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    opt = SAM(torch.optim.SGD([{"params": [a], "rho": 0.1}, {"params": [b], "rho": 0.3}], lr=0.1))
    opt.step(lambda: (opt.zero_grad(), (value := (3 * a + 4 * b).sum()).backward(), value)[-1])
    assert opt.last.rho == 0.3
    assert opt.last.sharpness == pytest.approx(3 * 0.1 * 0.6 + 4 * 0.3 * 0.8, rel=1e-12)
    assert opt.last.perturbation_norm == pytest.approx(math.hypot(0.1 * 0.6, 0.3 * 0.8), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "active", "passes"),
    [
        ({}, [1, 1, 1, 1, 1, 1], 2),
        ({"every": 3}, [1, 0, 0, 1, 0, 0], 2),
        ({"window": (0.5, 1.0), "total_steps": 6}, [0, 0, 0, 1, 1, 1], 2),
        ({"window": (0.0, 0.5), "total_steps": 4}, [1, 1, 0, 0, 0, 0], 2),
        ({"schedule": Schedule(warmup_steps=4)}, [0, 0, 0, 0, 1, 1], 2),
        ({"ascent_steps": 3}, [1, 1, 1, 1, 1, 1], 4),
        ({"second_order": True}, [1, 1, 1, 1, 1, 1], 3),
    ],
    ids=str,
)
def test_schedules_and_passes(options, active, passes):
    model = mlp()
    opt = SAM(sgd(model), rho=0.1, **options)
    calls = []
    for step, expected in enumerate(active):
        calls.clear()
        run = closure_of(model, opt, *batch(step))
        opt.step(lambda run=run: (calls.append(1), run())[1])
        assert opt.last.step == step
        assert opt.last.active == bool(expected)
        assert opt.last.reason == ("perturbed" if expected else "schedule")
        assert opt.last.passes == opt.last.closure_calls == len(calls) == (passes if expected else 1)
        assert math.isnan(opt.last.perturbed_loss) != bool(expected)
        assert (opt.last.perturbation_norm > 0) == bool(expected)


def test_passes_of_a_fraction_and_of_micro_batches():
    model = mlp()
    opt = SAM(sgd(model), rho=0.1, ascent_fraction=0.25)
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (X, Y))
    assert opt.last.passes == 1.25
    opt = SAM(sgd(model), rho=0.1, micro_batch_size=6)
    expected = F.cross_entropy(model(X), Y).item()
    loss = opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (X, Y))
    assert opt.last.passes == pytest.approx(2)
    assert opt.last.closure_calls == 6
    assert opt.last.loss == float(loss) == pytest.approx(expected, rel=1e-6)
    assert opt.last.perturbed_loss > opt.last.loss


def test_a_radius_function():
    model = mlp()
    opt = SAM(sgd(model), rho=lambda step: 0.1 * (step + 1))
    for step in range(3):
        opt.step(closure_of(model, opt))
        assert opt.last.rho == opt.param_groups[0]["rho"] == pytest.approx(0.1 * (step + 1))
        assert opt.last.perturbation_norm == pytest.approx(0.1 * (step + 1), rel=1e-5)


def test_a_radius_function_leaves_groups_with_a_number_of_their_own():
    a, b = mlp(), mlp(1)
    groups = [{"params": a.parameters()}, {"params": b.parameters(), "rho": 0.7}]
    opt = SAM(torch.optim.SGD(groups, lr=0.1), rho=lambda step: 0.1 * (step + 1))
    for _ in range(2):
        opt.step(closure_of(lambda x: a(x) + b(x), opt))
    assert [g["rho"] for g in opt.param_groups] == [0.2, 0.7]
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.9})
    opt.step(closure_of(lambda x: a(x) + b(x), opt))
    assert [g["rho"] for g in opt.param_groups] == pytest.approx([0.3, 0.7, 0.3, 0.9])


def test_a_radius_changed_between_steps_takes_effect():
    model = mlp()
    opt = SAM(sgd(model), rho=0.1)
    opt.step(closure_of(model, opt))
    opt.param_groups[0]["rho"] = 0.4
    opt.step(closure_of(model, opt))
    assert opt.last.rho == 0.4
    assert opt.last.perturbation_norm == pytest.approx(0.4, rel=1e-5)
    opt.param_groups[0]["rho"] = 0.0
    opt.step(closure_of(model, opt))
    assert opt.last.reason == "zero radius"


@pytest.mark.parametrize("form", ["two calls", "with", "perturb"])
def test_records_of_the_other_forms(form):
    model = mlp()
    opt = SAM(sgd(model), rho=0.1, every=2)
    for step in range(4):
        opt.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        active = step % 2 == 0
        if form == "two calls":
            assert opt.first_step() is active
            F.cross_entropy(model(X), Y).backward()
            opt.second_step()
        elif form == "with":
            with opt.perturbed() as moved:
                assert moved is active
                F.cross_entropy(model(X), Y).backward()
            opt.base_optimizer.step()
        else:
            assert opt.perturb() is active
            if active:
                F.cross_entropy(model(X), Y).backward()
                opt.restore()
            opt.step()
        last = opt.last
        assert last.step == step
        assert last.active is active
        assert last.passes == (2 if active or form != "perturb" else 1)
        assert math.isnan(last.loss)
        assert math.isnan(last.perturbed_loss)
        assert math.isnan(last.sharpness)
        assert (last.gradient_norm > 0) is active


def test_a_record_before_the_first_step():
    opt = SAM(sgd(mlp()))
    assert math.isnan(opt.last.loss)
    assert opt.last.passes == 0
    assert opt.last.perturbation_norm == 0


def test_a_record_keeps_its_numbers():
    model = mlp()
    opt = SAM(sgd(model), rho=0.1)
    opt.step(closure_of(model, opt))
    first = opt.last
    numbers = first.asdict()
    opt.step(closure_of(model, opt, *batch(1)))
    assert opt.last is not first
    assert first.asdict() == numbers


def test_a_record_as_a_dictionary_of_plain_numbers():
    model = mlp()
    opt = SAM(sgd(model), rho=0.1)
    opt.step(closure_of(model, opt))
    numbers = opt.last.asdict()
    assert {type(v) for v in numbers.values()} <= {int, float, bool, str}
    names = "step loss perturbed_loss sharpness gradient_norm perturbation_norm rho active reason updated passes"
    assert set(names.split()) <= set(numbers)
    assert numbers["loss"] == opt.last.loss


def test_what_the_step_returns_does_not_change_afterwards():
    """Old trainers sum the losses: the value must not be a view of something that is used again."""
    model = with_dropout()
    opt = SAM(sgd(model), rho=0.1)
    kept = []
    for step in range(3):
        loss = opt.step(closure_of(model, opt, *batch(step)))
        kept.append((loss, loss.clone()))
    for loss, copy in kept:
        assert_same(loss, copy)
    assert len({float(loss) for loss, _ in kept}) == 3


def test_reading_the_record_changes_nothing():
    read, blind = mlp(), mlp()
    opts = SAM(sgd(read), rho=0.1), SAM(sgd(blind), rho=0.1)
    for step in range(3):
        for model, opt in zip((read, blind), opts, strict=True):
            opt.step(closure_of(model, opt, *batch(step)))
        opts[0].last.asdict()
        repr(opts[0].last)
    assert_same(snapshot(read), snapshot(blind))
