"""The trace and its standard error."""

import statistics

import pytest
import torch
from tests.measure.curvature_cases import dense_gauss_newton, dense_hessian, make, quadratic, with_spectrum

from flatwise.errors import UserError
from flatwise.measure import hessian_trace
from flatwise.measure.lanczos import orthogonalised
from flatwise.measure.sketch import Course, look_outside, signs, sketch
from flatwise.measure.trace import spread, student

torch.set_num_threads(1)

SPECTRUM = [*(30 / 1.4**i for i in range(25)), *(-0.5 + 0.02 * i for i in range(50))]


def estimate(matrix, probes, seed):
    """The estimator on a dense matrix, as the measure runs it."""
    course = Course(torch.empty(probes // 3, len(matrix), dtype=matrix.dtype))
    sketch(lambda v: matrix @ v, course, seed, lambda: None)
    look_outside(lambda v: matrix @ v, course, probes - 2 * (probes // 3), seed, lambda: None)
    mean, error = spread(course.terms)
    return sum(course.inside) + mean, error


def test_the_standard_error_is_right_over_many_seeds():
    matrix = with_spectrum(SPECTRUM).matrix
    truth, degrees, runs = sum(SPECTRUM), 9, 600
    found = [estimate(matrix, 30, seed) for seed in range(runs)]
    bias = statistics.fmean(value - truth for value, _ in found)
    seen = statistics.stdev(value for value, _ in found)
    assert abs(bias) < 4 * seen / runs**0.5
    said = statistics.fmean(error**2 for _, error in found) ** 0.5
    assert said == pytest.approx(seen, rel=0.15)
    half = student(0.95, degrees)
    inside = sum(abs(value - truth) <= half * error for value, error in found) / runs
    assert 0.92 <= inside <= 0.98  # 0.95 with a standard deviation of 0.009


def test_hutch_plus_plus_is_nearer_than_signs_alone_for_the_same_products():
    model = with_spectrum(SPECTRUM)
    better = [hessian_trace(model, quadratic, [None], probes=30, seed=s).standard_error for s in range(5)]
    plain = [hessian_trace(model, quadratic, [None], probes=30, seed=s, method="hutchinson") for s in range(5)]
    assert statistics.fmean(better) < statistics.fmean(r.standard_error for r in plain) / 3
    assert all(r.sketched == 0 and r.probes == 30 and r.degrees == 29 for r in plain)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["cnn train", "transformer"])
def test_the_measure_is_the_dense_trace(name, matrix):
    case = make(name)
    truth = float((dense_hessian(case) if matrix == "hessian" else dense_gauss_newton(case)).trace())
    exact = hessian_trace(case.model, case.loss_fn, [case.batch], mode=case.mode, matrix=matrix, probes=200)
    assert exact.value == pytest.approx(truth, rel=1e-9)
    assert (exact.method, exact.standard_error, exact.interval()) == ("exact", 0.0, (exact.value, exact.value))
    rough = hessian_trace(case.model, case.loss_fn, [case.batch], mode=case.mode, matrix=matrix, probes=30)
    assert rough.probes == 30
    assert rough.standard_error > 0
    assert abs(rough.value - truth) < 5 * rough.standard_error
    low, high = rough.interval()
    assert (low + high) / 2 == pytest.approx(rough.value)
    assert high - low == pytest.approx(2 * 2.262 * rough.standard_error, rel=1e-3)


@pytest.mark.parametrize("values", [[0.0] * 40, [5.0, 3.0, *[0.0] * 38]])
def test_low_rank_and_zero_are_exact(values):
    result = hessian_trace(with_spectrum(values), quadratic, [None], probes=30)
    assert result.value == pytest.approx(sum(values), abs=1e-8)


def test_the_result_can_be_written_and_wrong_settings_are_named():
    case = make("mlp")
    result = hessian_trace(case.model, case.loss_fn, case.batch, probes=12)
    assert result.as_dict()["value"] == result.value
    assert "±" in str(result)
    with pytest.raises(UserError, match="probes must be"):
        hessian_trace(case.model, case.loss_fn, case.batch, probes=5)
    with pytest.raises(UserError, match="did you mean 'hutch"):
        hessian_trace(case.model, case.loss_fn, case.batch, method="hutch+")


def test_signs_are_signs_and_the_same_every_time():
    like = torch.empty(0, dtype=torch.float64)
    a = signs(1000, 3, "probe", 0, like)
    assert set(a.tolist()) == {-1.0, 1.0}
    assert abs(float(a.mean())) < 0.2
    assert torch.equal(a, signs(1000, 3, "probe", 0, like))
    assert not torch.equal(a, signs(1000, 3, "probe", 1, like))
    rest, _ = orthogonalised(torch.eye(2, 1000, dtype=torch.float64), a)
    assert rest[:2].abs().max() < 1e-12
