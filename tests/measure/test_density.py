"""Stochastic Lanczos quadrature against dense moments, and one run for everything."""

import math

import pytest
import torch
from tests.measure.curvature_cases import cross_entropy, dense_hessian, make, quadratic, with_spectrum

from flatwise.errors import UserError
from flatwise.measure import hessian_density, hessian_eigenvalues, spectrum
from flatwise.measure.lanczos import Lanczos, start_vector
from flatwise.measure.quadrature import smoothed

torch.set_num_threads(1)


def density_of(case, **options):
    return hessian_density(case.model, case.loss_fn, [case.batch], mode=case.mode, **options)


@pytest.mark.parametrize("name", ["mlp", "cnn train", "transformer"])
def test_moments_of_each_probe_are_those_of_the_dense_matrix(name):
    case = make(name)
    dense = dense_hessian(case)
    result = density_of(case, iterations=6, probes=3)
    like = torch.empty(0, dtype=torch.float64)
    for number in range(3):
        v = start_vector(len(dense), 0, ("density", number), like)
        nodes, weights = torch.tensor(result.nodes[number]).double(), result.weights[number]
        nodes = torch.tensor(list(result.nodes[number]), dtype=torch.float64)
        weights = torch.tensor(list(weights), dtype=torch.float64)
        for power in range(12):  # up to 2 m - 1
            expected = float(v @ torch.linalg.matrix_power(dense, power) @ v)
            assert float((weights * nodes**power).sum()) == pytest.approx(expected, rel=1e-8, abs=1e-11)


def test_moments_are_those_of_the_dense_matrix_within_their_errors():
    case = make("mlp")
    dense = dense_hessian(case)
    result = density_of(case, iterations=38, probes=300)
    for power, (value, error) in enumerate(zip(result.moments, result.moment_errors, strict=True), start=1):
        truth = float(torch.linalg.matrix_power(dense, power).trace()) / len(dense)
        assert abs(value - truth) < 4 * error
        assert error < 0.1 * max(result.moments)


def test_the_curve_is_a_density_with_a_band_and_its_ends_are_eigenvalues():
    case = make("cnn eval")
    result = density_of(case, iterations=40, probes=6)
    grid, height = torch.tensor(result.grid), torch.tensor(result.density)
    assert float(torch.trapezoid(height, grid)) == pytest.approx(1, abs=1e-3)
    assert all(0 <= low <= y <= high for low, y, high in zip(result.low, result.density, result.high, strict=True))
    assert max(high - low for low, high in zip(result.low, result.high, strict=True)) > 0
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(case))
    assert result.smallest == pytest.approx(float(eigenvalues[0]), rel=1e-6)
    assert result.largest == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert result.width == pytest.approx((result.largest - result.smallest) / 40)
    share, error = result.mass(-math.inf, 0)
    assert abs(share - float((eigenvalues < 0).double().mean())) < 4 * error


def test_the_band_holds_the_true_curve_about_as_often_as_it_says():
    model = with_spectrum([0.1 * i for i in range(30)])
    truth = smoothed(torch.linspace(0, 3, 31, dtype=torch.float64), [0.1 * i for i in range(30)], [1 / 30] * 30, 0.3)
    inside = 0
    for seed in range(40):
        result = hessian_density(model, quadratic, [None], iterations=30, probes=5, width=0.3, points=400, seed=seed)
        places = [min(range(400), key=lambda i, x=x: abs(result.grid[i] - x)) for x in (0.5, 1.5, 2.5)]
        for x, place in zip((5, 15, 25), places, strict=True):
            inside += (
                result.low[place] <= float(truth[x]) * (1 + 1e-3) and result.high[place] >= float(truth[x]) * 0.999
            )
    assert inside / 120 > 0.88


@pytest.mark.parametrize("values", [[0.0] * 8, [2.0] * 8, [1.0, -1.0] * 6])
def test_known_spectra(values):
    result = hessian_density(with_spectrum(values), quadratic, [None], probes=3)
    assert result.smallest == pytest.approx(min(values), abs=1e-9)
    assert result.largest == pytest.approx(max(values), abs=1e-9)
    assert all(math.isfinite(y) for y in result.density)
    assert result.products <= 3 * len(set(values)) + 3  # a run that has seen all ends


def test_the_basis_stays_orthogonal():
    """Without re-orthogonalisation Lanczos makes copies of eigenvalues that it has found."""
    model = with_spectrum([1.5**-i for i in range(120)])
    start = start_vector(120, 0, ("x",), torch.empty(0, dtype=torch.float64))
    run = Lanczos(lambda v: model.matrix @ v, start, 60, 0)
    while not run.full:
        run.step()
    basis = run._basis[:60]
    torch.testing.assert_close(basis @ basis.T, torch.eye(60).double(), atol=1e-13, rtol=0)


def test_one_run_gives_the_same_as_three():
    case = make("transformer")
    together = spectrum(case.model, cross_entropy, [case.batch], k=3, iterations=30, probes=2, tol=1e-4)
    alone = density_of(case, iterations=30, probes=2)
    assert (together.density.nodes, together.density.weights) == (alone.nodes, alone.weights)
    leading = hessian_eigenvalues(case.model, cross_entropy, [case.batch], 3, tol=1e-4)
    smallest = hessian_eigenvalues(case.model, cross_entropy, [case.batch], 1, tol=1e-4, which="smallest")
    assert together.eigenvalues.values == pytest.approx(leading.values, abs=2e-4)
    assert together.smallest.values == pytest.approx(smallest.values, abs=2e-4)
    assert all(together.eigenvalues.converged)
    assert together.density.products <= alone.products + 5
    assert together.cost.gradient_evaluations == pytest.approx(2 * together.density.products, abs=12)
    assert together.as_dict()["density"]["products"] == together.density.products


@pytest.mark.parametrize("options", [{"iterations": 0}, {"probes": 0}, {"points": 1}, {"width": 0.0}])
def test_bad_settings_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        density_of(make("mlp"), **options)
