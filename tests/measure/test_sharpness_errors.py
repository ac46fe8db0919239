"""Standard errors: what they are of, against what they claim, in simulation."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatwise.ascent import Ball
from flatwise.measure import sharpness
from flatwise.measure.curvature import quadratic_forms
from flatwise.measure.hessian import hessian_eigenvalues
from flatwise.measure.problem import Problem
from flatwise.measure.slope import gradient_and_noise
from flatwise.measure.spread import over_draws_and_parts, over_parts
from flatwise.measure.worst import climb, turning


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def drawn(count, seed):
    """Samples of a population: labels drawn from a softmax of the inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=g).double()
    return x, torch.multinomial((2 * x[:, :3]).softmax(1), 1, generator=g)[:, 0]


def problem_of(sizes):
    x, y = drawn(sum(sizes), 0)
    return Problem(network(), mean_loss, list(zip(x.split(sizes), y.split(sizes), strict=True)))


def test_an_error_over_parts_is_that_of_a_weighted_mean():
    problem = problem_of([2, 3, 5])
    values = torch.tensor([1.0, 2.0, 4.0]).double()
    shares = torch.tensor([0.2, 0.3, 0.5]).double()
    mean = float((shares * values).sum())
    found = over_parts(problem, values)
    assert found.value == pytest.approx(mean)
    assert found.standard_error == pytest.approx(math.sqrt(float((shares * (values - mean)).square().sum()) * 3 / 2))
    assert found.over == "3 parts"


def test_an_error_over_equal_parts_is_the_textbook_one():
    values = torch.randn(8).double()
    found = over_parts(problem_of([3] * 8), values)
    assert found.standard_error == pytest.approx(float(values.std()) / math.sqrt(8))


@pytest.mark.parametrize("spreads", [(1.0, 1.0, 1.0), (2.0, 0.1, 0.1), (0.1, 2.0, 0.1), (0.1, 0.1, 2.0)])
def test_errors_over_draws_and_parts_are_right_on_average(spreads):
    """Crossed random effects of known variances: the squared errors have the variance of the mean as their mean."""
    problem, pairs = problem_of([4] * 6), 5
    g = torch.Generator().manual_seed(3)
    means, squares = [], []
    for _ in range(600):
        a, b, c = (torch.randn(*shape, generator=g).double() for shape in ((pairs, 1), (1, 6), (pairs, 6)))
        estimate, _, _ = over_draws_and_parts(problem, 1 + spreads[0] * a + spreads[1] * b + spreads[2] * c, "draws")
        means.append(estimate.value)
        squares.append(estimate.standard_error**2)
    variance = spreads[0] ** 2 / pairs + spreads[1] ** 2 / 6 + spreads[2] ** 2 / (6 * pairs)
    assert sum(means) / len(means) == pytest.approx(1, abs=4 * math.sqrt(variance / 600))
    # Where all is interaction, the floor at either of the two keeps the estimate a little above.
    assert 0.9 < sum(squares) / len(squares) / variance < (1.5 if spreads[2] == 2 else 1.12)


def test_errors_of_averages_and_m_sharpness_cover_the_population():
    """New samples and new draws each time: the errors are as large as the numbers really vary."""
    names = ["average", "m_sharpness"]
    options = {"measures": names, "m": [4], "micro_batches": None, "draws": 12, "rho": 0.3}
    model, runs = network(), 60
    tables = [
        sharpness(model, mean_loss, drawn(120, 100 + run), micro_batch_size=8, seed=run, **options)
        for run in range(runs)
    ]
    exact = sharpness(model, mean_loss, drawn(4000, 7), micro_batch_size=400, **{**options, "draws": 100})
    for name in ("average", "m_sharpness_4"):
        values = torch.tensor([table.row(name).value for table in tables])
        errors = torch.tensor([table.row(name).standard_error for table in tables])
        assert 0.75 < float(errors.square().mean().sqrt() / values.std()) < 1.3, name
        covered = ((values - exact.row(name).value).abs() < 2 * errors).double().mean()
        assert float(covered) > 0.8, name


@pytest.fixture(scope="module")
def trained():
    model, (x, y) = network(), drawn(3000, 99)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, 0.9)
    for _ in range(150):
        optimizer.zero_grad()
        mean_loss(model, (x, y)).backward()
        optimizer.step()
    return model


def test_errors_of_one_step_know_that_eps_turns_with_the_samples(trained):
    """Near a minimum the direction of the gradient depends on the samples more than anything else does."""
    options = {"measures": ["one_step", "one_step_adaptive"], "rho": 0.3}
    tables = [sharpness(trained, mean_loss, drawn(1200, run), micro_batch_size=75, **options) for run in range(60)]
    for name in options["measures"]:
        values = torch.tensor([table.row(name).value for table in tables])
        errors = torch.tensor([table.row(name).standard_error for table in tables])
        assert 0.75 < float(errors.square().mean().sqrt() / values.std()) < 1.4, name


def test_the_turning_of_eps_is_its_derivative_by_the_weight_of_a_part(trained):
    """Against finite differences: more weight on one part, everything else done again."""
    x, y = drawn(40, 0)
    problem = Problem(trained, mean_loss, (x, y), micro_batch_size=10)
    ball, rho, h = Ball(2.0, True, 0.01), 0.3, 1e-5

    def rise(shares):
        names = [name for name, _ in trained.named_parameters()]

        def loss(weights):
            logits = torch.func.functional_call(trained, dict(zip(names, weights, strict=True)), (x,))
            each = F.cross_entropy(logits, y, reduction="none").view(4, 10).mean(1)
            return (each * shares).sum()

        weights = [p.detach().requires_grad_() for p in trained.parameters()]
        base = loss(weights)
        grads = torch.autograd.grad(base, weights)
        ts = [w.detach().abs() + 0.01 for w in weights]
        norm = math.sqrt(sum(float((t * g).square().sum()) for t, g in zip(ts, grads, strict=True)))
        moved = [w.detach() + rho * t * t * g / norm for w, t, g in zip(weights, ts, grads, strict=True)]
        return float((loss(moved) - base).detach())

    with problem.open():
        _, gradient = problem.gradient()
        base = problem.losses()
        found = climb(problem, ball, rho, 1, gradient, base, lambda: None)[0]
        influence = found.losses - base + turning(problem, ball, rho, gradient, None)
    shares = torch.full((4,), 0.25).double()
    for part in range(4):
        step = h * (torch.eye(4).double()[part] - shares)
        derivative = (rise(shares + step) - rise(shares - step)) / (2 * h)
        assert float(influence[part] - influence.mean()) == pytest.approx(derivative, rel=1e-5)


def test_one_part_has_no_error_and_says_so():
    table = sharpness(network(), mean_loss, drawn(30, 0), measures="worst")
    assert all(row.standard_error is None for row in table.rows)
    assert any("micro_batch_size=" in sentence for sentence in table.cautions)


def test_one_pair_of_draws_leaves_the_error_over_parts():
    row = sharpness(network(), mean_loss, drawn(30, 0), measures="average", draws=2, micro_batch_size=5).rows[-1]
    assert row.error_over == "6 parts"
    assert row.standard_error == pytest.approx(row.settings["error_of_parts"])


def test_what_parts_say_about_an_eigenvalue_has_the_eigenvalue_as_its_mean():
    model, (x, y) = network(), drawn(60, 0)
    found = hessian_eigenvalues(model, mean_loss, (x, y), 3, which="largest", keep_vectors=True, tol=1e-8)
    problem = Problem(model, mean_loss, (x, y), micro_batch_size=7)
    with problem.open():
        forms = quadratic_forms(problem, list(found.vectors))
    names = [name for name, _ in model.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss_at(flat, part):
        pieces = flat.split([p.numel() for p in model.parameters()])
        weights = {n: w.view_as(p) for n, w, p in zip(names, pieces, model.parameters(), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (x[part],)), y[part])

    for column, start in enumerate(range(0, 60, 7)):
        dense = torch.autograd.functional.hessian(partial(loss_at, part=slice(start, start + 7)), flat)
        exact = (found.vectors @ dense * found.vectors).sum(1)
        assert torch.allclose(forms[:, column], exact, rtol=1e-9, atol=1e-12)
    shares = torch.tensor([part.samples / 60 for part in problem.parts]).double()
    assert (forms @ shares).tolist() == pytest.approx(list(found.values), rel=1e-6)


def test_the_noise_of_the_gradient_is_how_much_it_varies():
    model, runs = network(), 200
    gradients, noises = [], []
    for run in range(runs):
        problem = Problem(model, mean_loss, drawn(64, run), micro_batch_size=16)
        with problem.open():
            gradient, noise = gradient_and_noise(problem)
        gradients.append(gradient)
        noises.append(noise**2)
    varies = torch.stack(gradients).var(0).sum()
    assert sum(noises) / runs == pytest.approx(float(varies), rel=0.1)
