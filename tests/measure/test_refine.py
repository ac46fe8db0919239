"""A refined plane is the full one within the tolerance, for half of its points, and it says how far it may be off."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatwise.measure import landscape
from flatwise.measure.refine import Scale, guessed, predicted, refined

SIZE = 25
A, B = torch.meshgrid(torch.linspace(-1, 1, SIZE).double(), torch.linspace(-1, 1, SIZE).double(), indexing="ij")

SMOOTH = {
    "quadratic": 3 * A**2 + 0.5 * B**2 + A * B,
    "wide": 0.01 * (4 * A**2 + 3 * B**2 + A * B).exp(),
    "saddle": A**2 - B**2 + 0.3 * A**3,
    "flat": torch.full((SIZE, SIZE), 1.7).double(),
    "zero": torch.zeros(SIZE, SIZE).double(),
}
ROUGH = {
    "Rosenbrock": (1 - 2 * A) ** 2 + 100 * (1.5 * B + 0.5 - 4 * A**2) ** 2,
    "edge": (A - 0.3 * B).abs() * 3 + 0.1 * B,
    "sharp ridge": torch.exp(-(((A - 0.4 * B) / 0.08) ** 2)),
    "pyramid": torch.maximum((A + 0.1).abs(), (B - 0.2).abs() * 2),
}


def follow(surface, tolerance=0.02, seed=0):
    """Do what the plan asks for, and never answer the same twice."""
    plan, answers, asked = refined(tuple(surface.shape), tolerance, seed), None, set()
    while True:
        try:
            points = plan.send(answers)
        except StopIteration as end:
            return *end.value, len(asked)
        assert not asked & set(points)
        asked |= set(points)
        answers = [float(surface[point]) for point in points]


def off(values, surface):
    span = float(surface.max() - surface.min()) or 1.0
    return float((values - surface).abs().max()) / span


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("seed", range(3))
def test_a_smooth_plane_takes_at_most_half_of_its_points(name, seed):
    values, measured, error, asked = follow(SMOOTH[name], seed=seed)
    assert off(values, SMOOTH[name]) <= 0.02
    assert asked == int(measured.sum()) <= SIZE * SIZE / 2
    assert error <= 0.02
    assert torch.equal(values[measured], SMOOTH[name][measured])


@pytest.mark.parametrize("name", ROUGH)
def test_a_rough_plane_takes_what_it_needs(name):
    values, _, error, asked = follow(ROUGH[name])
    assert off(values, ROUGH[name]) <= 0.02
    assert error is None or error <= 0.02
    assert asked < 0.75 * SIZE * SIZE


def test_checks_find_what_hides_between_the_coarse_points():
    hidden = torch.sin(math.pi * torch.arange(SIZE).double() / 4)[:, None] ** 2 * torch.ones(SIZE).double()
    assert float(hidden[::4].max()) < 1e-20  # each point of the coarse grid is on the ground
    values, _, error, _ = follow(hidden + 0.1 * B)
    assert off(values, hidden + 0.1 * B) <= 0.02
    assert error is None or error <= 0.02


def test_a_tighter_tolerance_takes_more_points_and_errs_less():
    coarse, fine = (follow(ROUGH["Rosenbrock"], tolerance) for tolerance in (0.1, 0.005))
    assert coarse[3] < fine[3]
    assert off(fine[0], ROUGH["Rosenbrock"]) <= 0.005 < off(coarse[0], ROUGH["Rosenbrock"]) <= 0.1


def test_the_surroundings_of_what_is_not_finite_are_measured_and_nothing_is_made_up():
    surface = SMOOTH["quadratic"].clone()
    surface[A + B > 1.2] = math.inf
    surface[(A < -0.8) & (B < -0.7)] = math.nan
    values, measured, _, asked = follow(surface)
    there = torch.isfinite(surface)
    assert torch.equal(torch.isfinite(values), there)
    assert torch.equal(torch.isnan(values), torch.isnan(surface))
    assert off(values[there], surface[there]) <= 0.02
    assert asked < SIZE * SIZE / 2
    assert not bool((~there & ~measured).any())
    nothing = torch.full((SIZE, SIZE), math.nan).double()
    assert bool(torch.isnan(follow(nothing)[0]).all())


@pytest.mark.parametrize("sizes", [(9, 9), (10, 23), (51, 9)])
def test_planes_of_any_size(sizes):
    x = torch.linspace(-1, 1, sizes[0]).double()[:, None]
    y = torch.linspace(-1, 1, sizes[1]).double()[None]
    surface = torch.sin(2 * x) * torch.cos(y) + x
    values, *_ = follow(surface)
    assert off(values, surface) <= 0.02


def test_predictions_are_exact_for_quadratic_functions():
    draws = torch.Generator().manual_seed(0)
    known, wanted = (torch.randn(n, 2, generator=draws, dtype=torch.float64) for n in (40, 300))

    def function(p):
        return 1 + 2 * p[:, 0] - p[:, 1] + 3 * p[:, 0] ** 2 + p[:, 0] * p[:, 1] - 0.5 * p[:, 1] ** 2

    torch.testing.assert_close(predicted(known, function(known), wanted), function(wanted), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(predicted(known, known[:, 0].exp(), known), known[:, 0].exp())  # and at what is known


def test_an_error_counts_on_both_scales():
    plain = Scale(torch.tensor([1.0, 2.0, 5.0]).double())
    assert not plain.wide
    assert plain.error(2.0, 2.4) == pytest.approx(0.1)
    wide = Scale(torch.tensor([0.0, 1.0, 100.0]).double())
    assert wide.wide
    span = math.log((100 + 0.1) / 0.1)
    assert wide.error(0.1, 1.0) == pytest.approx(
        math.log(1.1 / 0.2) / span / 3
    )  # a hundredth of the range, but far off
    assert wide.error(60.0, 90.0) == pytest.approx(0.3)
    assert wide.error(1.0, math.inf) == math.inf
    torch.testing.assert_close(wide.back(wide.there(torch.tensor([3.0]).double())), torch.tensor([3.0]).double())


def trained(seed, layers):
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(3)
    inputs = torch.randn(120, 6, generator=draws)
    targets = (inputs[:, 0] * inputs[:, 1] > 0).long() + (inputs[:, 2] > 0.5).long()
    model = nn.Sequential(*layers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model, (inputs, targets)


NETWORKS = {
    "ReLU": lambda: [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)],
    "tanh": lambda: [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)],
    "batch norm": lambda: [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plane_of_a_network_is_within_two_percent_for_half_of_its_evaluations(name):
    model, data = trained(0, NETWORKS[name])
    full, part = (
        landscape(model, lambda m, b: cross_entropy(m(b[0]), b[1]), data, refine=refine, progress=False)
        for refine in (False, True)
    )
    assert full.evaluations == 625
    assert part.evaluations <= 312
    assert off(part.values, full.values) <= 0.02
    assert part.error_seen[0] <= 0.02
    assert part.complete
    measured = part.states == 1
    assert torch.equal(part.values[measured], full.values[measured])
    assert bool((part.states[~measured] == 2).all())


def test_a_picture_that_is_not_complete_is_filled_in_between_what_is_known():
    measured = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    measured[0:17:4, 0:17:4] = True
    surface = SMOOTH["quadratic"] + 1
    values = torch.where(measured, surface, math.nan)
    filled = guessed(values, measured)
    torch.testing.assert_close(filled[:17, :17], surface[:17, :17])
    assert bool(torch.isnan(filled[17:]).all())
    few = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    assert bool(torch.isnan(guessed(values, few)).sum() == torch.isnan(values).sum())
