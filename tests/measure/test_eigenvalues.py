"""Eigenvalues against dense ones and against spectra that were chosen."""

import pytest
import torch
from tests.measure.curvature_cases import (
    ALL,
    cross_entropy,
    dense_gauss_newton,
    dense_hessian,
    make,
    quadratic,
    with_spectrum,
)

from flatwise.errors import UserError
from flatwise.measure import by_group, hessian, hessian_eigenvalues, sharpness
from flatwise.measure.journal import Journal
from flatwise.measure.lanczos import Lanczos, start_vector

torch.set_num_threads(1)


def eigenvalues_of(case, k=5, **options):
    return hessian_eigenvalues(case.model, case.loss_fn, [case.batch], k, mode=case.mode, progress=False, **options)


def true_residuals(result, dense):
    values = torch.tensor(result.values, dtype=torch.float64)
    return (result.vectors.double() @ dense - values[:, None] * result.vectors.double()).norm(dim=1)


@pytest.mark.parametrize("name", ALL)
def test_every_eigenvalue_is_that_of_the_dense_matrix(name):
    case = make(name)
    dense = dense_hessian(case)
    n = len(dense)
    result = eigenvalues_of(case, n, which="largest", tol=1e-9, max_products=n)
    expected = torch.linalg.eigvalsh(dense).flip(0)
    torch.testing.assert_close(torch.tensor(result.values, dtype=torch.float64), expected, rtol=1e-8, atol=1e-9)
    assert all(result.converged)
    assert result.products == n


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
@pytest.mark.parametrize("name", ["cnn train", "transformer"])
def test_the_leading_ones_are_found_and_their_residuals_are_true(name, which):
    case = make(name)
    dense = dense_hessian(case)
    result = eigenvalues_of(case, which=which, keep_vectors=True, tol=1e-5)
    key = {"magnitude": lambda v: -abs(v), "largest": lambda v: -v, "smallest": lambda v: v}[which]
    expected = sorted(torch.linalg.eigvalsh(dense).tolist(), key=key)[:5]
    scale = float(torch.linalg.eigvalsh(dense).abs().max())
    assert list(result.values) == pytest.approx(expected, abs=1e-5 * scale)
    assert all(result.converged)
    assert list(result.residuals) == pytest.approx(true_residuals(result, dense).tolist(), rel=1e-4, abs=1e-11)
    assert max(result.residuals) <= 1e-5 * scale
    assert result.products < len(dense)


def test_gauss_newton():
    case = make("cnn eval")
    result = eigenvalues_of(case, matrix="ggn", tol=1e-6)
    expected = torch.linalg.eigvalsh(dense_gauss_newton(case)).flip(0)[:5]
    assert list(result.values) == pytest.approx(expected.tolist(), rel=1e-5)


def test_residuals_of_differences_are_those_of_the_products_that_were_made():
    case = make("mlp")
    result = eigenvalues_of(case, product="finite difference", keep_vectors=True, tol=1e-4)
    assert not result.exact
    assert list(result.residuals) == pytest.approx(true_residuals(result, dense_hessian(case)).tolist(), abs=1e-7)


SPECTRA = {
    "spread": [float(i) for i in range(1, 41)],
    "negative": [-5.0, -3.0, -1.0, *[0.1 * i for i in range(30)]],
    "low rank": [7.0, 4.0, 2.0, 1.5, 1.0, *[0.0] * 35],
    "zero": [0.0] * 12,
    "identity": [2.0] * 10,
    "degenerate": [3.0, 3.0, 3.0, 1.0, 1.0, -1.0, *[0.5] * 10],
    "one": [4.0],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_values_of_a_known_spectrum_are_found_with_their_multiplicity(name, dtype):
    values = SPECTRA[name]
    result = hessian_eigenvalues(with_spectrum(values, dtype=dtype), quadratic, [None], len(values), which="smallest")
    assert list(result.values) == pytest.approx(sorted(values), abs=1e-5 if dtype == torch.float32 else 1e-9)
    assert all(result.converged)


@pytest.mark.parametrize("name", ["spread", "negative", "low rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_leading_values_of_a_known_spectrum(name, dtype):
    model = with_spectrum(SPECTRA[name], dtype=dtype)
    result = hessian_eigenvalues(model, quadratic, [None], 3, tol=1e-4, keep_vectors=True)
    expected = sorted(SPECTRA[name], key=abs, reverse=True)[:3]
    assert list(result.values) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(
        true_residuals(result, model.matrix.double()),
        torch.tensor(result.residuals, dtype=torch.float64),
        atol=2e-5 if dtype == torch.float32 else 1e-10,
        rtol=1e-3,
    )


def test_too_few_products_are_not_called_converged():
    result = hessian_eigenvalues(with_spectrum(SPECTRA["spread"]), quadratic, [None], 5, max_products=8)
    assert result.products == 8
    assert not all(result.converged)
    assert "not converged" in str(result)


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_restarts_find_the_same_with_less_memory(which):
    values = [1.08**i for i in range(80)] + [-(1.15**i) for i in range(40)]
    model = with_spectrum(values)
    start = start_vector(120, 0, ("start",), torch.empty(0, dtype=torch.float64))
    run = Lanczos(lambda v: model.matrix @ v, start, 20, 0)

    class Operator:
        count = 0

        def agreed(self, answer):
            return answer

        def announce(self, *_):
            pass

    class NoBar:
        def advance(self, *_, **__):
            pass

    nowhere = Journal(None, "eigenvalues", None, {})
    ritz = hessian.converge(run, Operator(), 4, which, 1e-6, 3000, nowhere, NoBar(), False)
    assert run.steps > 20
    assert run._basis.shape == (21, 120)
    places = hessian.order(ritz.values, which)[:4]
    key = {"magnitude": lambda v: -abs(v), "largest": lambda v: -v, "smallest": lambda v: v}[which]
    assert ritz.values[places].tolist() == pytest.approx(sorted(values, key=key)[:4], rel=1e-5)
    vectors = run.vectors(ritz.vectors[:, places])
    left = (vectors @ model.matrix - ritz.values[places][:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(left, ritz.residuals[places], rtol=1e-3, atol=1e-10)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(4).double(), atol=1e-10, rtol=0)


def test_a_small_budget_restarts_and_finds_the_same():
    values = [1.05**i for i in range(100)]
    model = with_spectrum(values)
    full = hessian_eigenvalues(model, quadratic, [None], 2, tol=1e-6)
    tight = hessian_eigenvalues(model, quadratic, [None], 2, tol=1e-6, max_memory=45_000)
    assert tight.products > full.products
    assert tight.values == pytest.approx(full.values, rel=1e-6)


def test_a_warm_start_needs_fewer_products_and_finds_the_same():
    model = with_spectrum([1.02**i for i in range(200)])
    first = hessian_eigenvalues(model, quadratic, [None], 1, keep_vectors=True)
    again = hessian_eigenvalues(model, quadratic, [None], 1, warm_start=first)
    vector = hessian_eigenvalues(model, quadratic, [None], 1, warm_start=first.vectors[0])
    assert again.products < first.products / 2
    assert vector.products == again.products
    assert again.values == pytest.approx(first.values, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 1000}, "k must be"),
        ({"which": "large"}, "did you mean 'largest'"),
        ({"tol": 0}, "tol must be"),
        ({"max_products": 2}, "max_products must be"),
        ({"warm_start": torch.ones(3)}, "warm_start has 3 numbers"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        eigenvalues_of(make("mlp"), **options)


def test_a_result_without_vectors_is_no_warm_start():
    case = make("mlp")
    with pytest.raises(UserError, match="keep_vectors=True"):
        eigenvalues_of(case, warm_start=eigenvalues_of(case))


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ("tensor", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("module", ["0", "2"]),
        ("block", ["0", "2"]),
        (r"\.(weight|bias)", ["weight", "bias"]),
        ("weight", ["weight"]),
    ],
)
def test_each_group_has_its_block(groups, names):
    case = make("mlp")
    results = by_group(hessian_eigenvalues, case.model, cross_entropy, iter([case.batch]), groups=groups, k=1, tol=1e-8)
    assert list(results) == names
    for name, result in results.items():
        if groups == "tensor":
            dense = dense_hessian(case, [name])
            assert result.values[0] == pytest.approx(float(max(torch.linalg.eigvalsh(dense), key=abs)), rel=1e-7)
    with pytest.raises(UserError, match="no parameter's name matches"):
        by_group(hessian_eigenvalues, case.model, cross_entropy, case.batch, groups="nothing")


def test_the_result_can_be_written_and_read():
    result = eigenvalues_of(make("mlp"), keep_vectors=True)
    entry = result.as_dict()
    assert entry["values"] == list(result.values)
    assert entry["ratio"] == pytest.approx(result.values[0] / result.values[4])
    assert entry["vectors"] is None
    assert "products" in str(result)
    assert result.cost.gradient_evaluations == pytest.approx(2 * result.products + 2 + 6 * 8 / 12, abs=1.5)
    assert eigenvalues_of(make("mlp"), 2).ratio != eigenvalues_of(make("mlp"), 2).ratio


@pytest.mark.parametrize(("restarted", "inexact"), [(False, 0.3), (True, 0.0), (True, 0.01), (True, 0.3), (True, 2.0)])
def test_residuals_are_true_where_products_are_inexact_and_after_a_restart(restarted, inexact):
    # Inexact as with finite differences: the product is that of a matrix which is not quite symmetric.
    drawn = torch.randn(2, 30, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    matrix = drawn[0] + drawn[0].T + inexact * drawn[1]
    start = start_vector(30, 0, ("start",), torch.empty(0, dtype=torch.float64))
    run = Lanczos(lambda v: matrix @ v, start, 14, 0)
    for _ in range(12):
        run.step()
    if restarted:
        for _ in range(2):
            run.restart(5, "smallest")
            while not run.full:
                run.step()
    ritz = run.ritz()
    vectors = run.vectors(ritz.vectors)
    true = (vectors @ matrix.T - ritz.values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(ritz.residuals, true, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_a_group_that_the_loss_does_not_depend_on_is_left_out_with_a_note(matrix):
    case = make("tied")
    results = by_group(hessian_eigenvalues, case.model, cross_entropy, case.batch, groups="tensor", k=1, matrix=matrix)
    assert list(results) == ["embed.weight", "head.bias"]
    note = "left out, since the loss does not depend on their parameters: unused"
    assert all(result.conditions.notes[-1] == note for result in results.values())
    with pytest.raises(UserError, match="depends on none of the groups' parameters"):
        by_group(hessian_eigenvalues, case.model, cross_entropy, case.batch, groups="unused", k=1, matrix=matrix)


def test_a_part_that_does_not_use_what_others_use_counts_as_zero():
    case = make("tied")
    x, y = case.batch

    def loss_fn(model, batch):
        loss = cross_entropy(model, batch)
        return loss + 3 * model.unused.square().sum() if len(batch[0]) == 4 else loss

    parts = [(x[:8], y[:8]), (x[8:], y[8:])]
    found = hessian_eigenvalues(case.model, loss_fn, iter(parts), 1, parameters=["unused"])
    assert found.values == pytest.approx((6 * 4 / 12,))
    assert found.conditions.unused == ()


def test_a_long_run_says_how_long_it_takes(monkeypatch, capsys):
    case = make("mlp")
    monkeypatch.setattr("flatwise.measure.progress.WORTH_SAYING", 0.0)
    hessian_eigenvalues(case.model, cross_entropy, case.batch, 2, tol=1e-6)
    assert "eigenvalues: a product takes" in capsys.readouterr().err
    sharpness(case.model, cross_entropy, case.batch, measures=["worst", "averages"])
    said = capsys.readouterr().err
    assert "sharpness: a gradient takes" in said
    assert "about 41 are needed" in said  # 1 + 4 balls of 5 steps of 4/3, 2 times 20 draws of 1/3
    sharpness(case.model, cross_entropy, case.batch, measures=["worst", "averages"], progress=False)
    assert not capsys.readouterr().err
