"""A loss that is not the same every time is noticed and explained; how many samples a measure needs."""

import math

import pytest
import torch
from tests.measure.curvature_cases import Case, cross_entropy, make
from torch import nn

from flatwise.errors import UserError
from flatwise.measure import determinism, hessian_density, hessian_eigenvalues, hessian_trace, samples_curve

torch.set_num_threads(1)


def own_generator():
    generator = torch.Generator().manual_seed(0)
    return lambda model, batch: cross_entropy(model, (batch[0] + torch.randn(3, generator=generator), batch[1]))


def counting():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) * len(calls)

    return loss_fn


@pytest.mark.parametrize("make_loss", [own_generator, counting])
@pytest.mark.parametrize("product", ["exact", "finite difference"])
@pytest.mark.parametrize("measure", [hessian_eigenvalues, hessian_trace, hessian_density])
def test_every_curvature_measure_refuses_a_loss_that_changes(measure, make_loss, product):
    case = make("mlp")
    with pytest.raises(UserError, match="generator of its own or a counter"):
        measure(case.model, make_loss(), case.batch, product=product)


def test_the_probe_says_what_it_saw():
    case = make("mlp")
    fine = determinism(case.model, cross_entropy, case.batch)
    assert fine.same
    assert fine.gradient_difference == 0
    assert "bit for bit" in str(fine)
    changing = determinism(case.model, counting(), case.batch)
    assert not changing.same
    assert changing.loss_difference == pytest.approx(1)
    assert changing.gradient_difference == pytest.approx(1)
    assert changing.as_dict()["explanation"] == str(changing)


def test_dropout_is_named_and_is_the_same_every_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    case = Case(model, cross_entropy, make("mlp").batch)
    training = determinism(model, cross_entropy, case.batch, mode="train")
    assert training.same
    assert training.random_modules == ("2",)
    assert "what 2 draw" in str(training)
    assert determinism(model, cross_entropy, case.batch).random_modules == ()
    result = hessian_eigenvalues(model, cross_entropy, case.batch, mode="train", tol=1e-8)
    assert all(result.converged)


def test_the_curve_shows_how_many_samples_are_needed():
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.randn(64, 2).double()

    def loss_fn(model, batch):
        return model(batch).square().mean()

    curve = samples_curve(hessian_trace, model, loss_fn, iter(x.split(24)), sizes=[4, 16, 64], subsets=3, probes=6)
    assert curve.sizes == (4, 16, 64)
    assert [len(row) for row in curve.measured] == [3, 3, 1]
    truth = float(2 * x.square().sum(dim=1).mean())
    assert curve.values[-1] == pytest.approx(truth)
    assert math.isnan(curve.errors[-1])
    assert curve.spreads[0] > curve.spreads[1]
    assert curve.errors[0] == pytest.approx(curve.spreads[0] / math.sqrt(3))
    # Disjoint subsets: of four quarters the mean is the whole.
    quarters = samples_curve(hessian_trace, model, loss_fn, x, sizes=[16, 64], subsets=4, probes=6)
    assert quarters.values[0] == pytest.approx(truth)
    assert quarters.enough(10.0) == 16
    assert quarters.enough(1e-9) is None
    assert "64" in str(quarters)
    top = samples_curve(hessian_eigenvalues, model, loss_fn, x, k=1)
    assert top.sizes == (2, 4, 8, 16, 32, 64)
    assert top.values[0] > top.values[-1]  # of few samples it is too large
    assert top.cost.gradient_evaluations > 0
    with pytest.raises(UserError, match="sizes must be"):
        samples_curve(hessian_trace, model, loss_fn, x, sizes=[65])
    with pytest.raises(UserError, match="needs batches that can be cut"):
        samples_curve(hessian_trace, model, loss_fn, [None])
