"""What the table says in words, and what is said about several models."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatwise.errors import UserError
from flatwise.measure import WarmStart, compare_sharpness, hessian_eigenvalues, hessian_trace, sharpness
from flatwise.measure.result import Conditions, Cost
from flatwise.measure.rows import Row, Sharpness


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), *layers, nn.Tanh(), nn.Linear(5, 4)).double()


def samples(count=48, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g).double(), torch.randint(4, (count,), generator=g)


class Bowl(nn.Module):
    """``1/2 a |w|^2 + c |w|^4``, the same for every sample but for a small linear term."""

    def __init__(self, w, a=1.0, c=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.a, self.c = a, c

    def forward(self, x):
        squared = self.w.square().sum()
        return 0.5 * self.a * squared + self.c * squared**2 + x @ self.w


def own_loss(model, batch):
    return model(batch).mean()


CENTRED = torch.cat([t := 1e-4 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0)).double(), -t])


def said(table, words):
    return any(words in sentence for sentence in table.cautions)


# Curvature in the table


def test_rows_of_curvature_are_those_of_the_measures_of_curvature():
    model, data = network(), samples()
    table = sharpness(model, mean_loss, data, measures="curvature", micro_batch_size=12)
    found = hessian_eigenvalues(model, mean_loss, data, 5, which="largest", micro_batch_size=12)
    trace = hessian_trace(model, mean_loss, data, micro_batch_size=12)
    assert table.row("lambda_max").value == pytest.approx(found.values[0], rel=1e-6)
    assert table.row("lambda_ratio").value == pytest.approx(found.ratio, rel=1e-3)
    assert table.row("trace").value == pytest.approx(trace.value)
    assert table.row("lambda_max").error_over == "4 parts"
    assert table.cost.gradient_evaluations == pytest.approx(sum(row.gradient_evaluations for row in table.rows))


def test_curvature_can_be_left_out():
    table = sharpness(network(), mean_loss, samples(), measures="curvature", eigenvalues=0, trace=False)
    assert [row.name for row in table.rows] == ["loss"]


def test_a_warm_start_takes_fewer_products():
    model, data, warm = network(), samples(), WarmStart()
    first, second = (
        sharpness(model, mean_loss, data, measures="lambda_max", eigenvalues=1, warm_start=warm) for _ in range(2)
    )
    assert second.row("lambda_max").settings["products"] < first.row("lambda_max").settings["products"]
    assert second.row("lambda_max").value == pytest.approx(first.row("lambda_max").value, rel=1e-4)


# Cautions about one model


def test_the_slope_is_named_where_it_explains_the_rise():
    assert said(sharpness(Bowl([1.0, 1.0]), own_loss, CENTRED, measures="one_step"), "w is not at a minimum")
    flat = sharpness(Bowl([1e-6, 1e-6], a=100.0), own_loss, CENTRED, measures="one_step")
    assert not said(flat, "w is not at a minimum")


def test_a_radius_beyond_the_quadratic_model_is_named():
    measures = ["gradient_norm", "n_steps", "lambda_max"]
    beyond = sharpness(Bowl([1e-6, 0.0], c=50.0), own_loss, CENTRED, measures=measures, rho=0.5, eigenvalues=2)
    assert said(beyond, "the quadratic model fails")
    within = sharpness(Bowl([1e-6, 0.0], c=50.0), own_loss, CENTRED, measures=measures, rho=0.01, eigenvalues=2)
    assert not said(within, "the quadratic model")


def test_an_ascent_that_has_not_arrived_is_named():
    class Valley(Bowl):
        def forward(self, x):  # a slope along one axis, curvature along the other
            return 1e-3 * self.w[0] + 50.0 * self.w[1] ** 2 + x @ self.w

    table = sharpness(
        Valley([0.0, 0.0]),
        own_loss,
        0 * CENTRED,
        measures=["gradient_norm", "n_steps", "lambda_max"],
        steps=2,
        eigenvalues=1,
    )
    assert said(table, "the ascent has not arrived")


def test_normalising_layers_are_named_where_plain_measures_are_shown():
    model = network(nn.BatchNorm1d(5))
    assert said(sharpness(model, mean_loss, samples(), measures="one_step"), "1 normalising layer")
    assert not said(sharpness(model, mean_loss, samples(), measures="one_step_adaptive"), "normalising")
    assert not said(sharpness(network(), mean_loss, samples(), measures="one_step"), "normalising")


def test_noise_is_named():
    table = sharpness(Bowl([1e-9, 0.0]), own_loss, 1e4 * CENTRED[:20], measures="worst", micro_batch_size=1)
    assert said(table, "sampling alone would give")
    few = sharpness(network(), mean_loss, samples(), measures="worst", micro_batch_size=24)
    assert said(few, "2 parts")


def test_numbers_that_are_none_are_named_and_do_not_raise():
    table = sharpness(Bowl([1.0, float("nan")]), own_loss, CENTRED, measures="first_order", m=[8], draws=2)
    assert said(table, "not finite")
    assert table.row("one_step").value != table.row("one_step").value
    str(table)


def test_coarse_weights_are_named():
    x, y = samples()
    table = sharpness(network().bfloat16(), mean_loss, (x.bfloat16(), y), measures="one_step")
    assert said(table, "bfloat16")


# Several models


def made(values, errors=None, rho=0.05, samples=100):
    rows = [
        Row(name, value, (errors or {}).get(name, 0.01), "9 parts", {"rho": rho}, 1.0, 1.0, "A row.")
        for name, value in values.items()
    ]
    conditions = Conditions(samples, 1, samples, "eval", 0, 10, (), (), 1, "float32", "cpu", ())
    return Sharpness(tuple(rows), 1.0, (), conditions, Cost(1.0, 1.0))


def test_measures_that_order_models_differently_are_named():
    found = compare_sharpness(
        {"sgd": made({"one_step": 0.5, "trace": 3.0}), "sam": made({"one_step": 0.1, "trace": 4.0})}
    )
    assert found.disagreements == (("one_step", "sam", "sgd", "trace"),)
    assert any("disagree" in sentence and "Andriushchenko" in sentence for sentence in found.cautions)
    assert found.flattest == ("sam", "sgd")


def test_the_ratio_of_eigenvalues_says_nothing_about_flatness():
    one = {"one_step": 0.5, "lambda_max": 9.0, "lambda_ratio": 1.5}
    found = compare_sharpness(
        {"sgd": made(one), "sam": made({"one_step": 0.1, "lambda_max": 2.0, "lambda_ratio": 2.0})}
    )
    assert found.disagreements == ()


def test_differences_within_the_errors_are_no_disagreement():
    errors = {"one_step": 0.01, "trace": 2.0}
    found = compare_sharpness(
        {
            "sgd": made({"one_step": 0.5, "trace": 3.0}, errors),
            "sam": made({"one_step": 0.1, "trace": 4.0}, errors),
        }
    )
    assert found.disagreements == ()
    assert found.flattest == ("sam", None)
    assert "cannot be told" in str(found)
    assert not found.cautions


def test_rows_at_other_settings_are_not_compared():
    one = made({"one_step": 0.5, "trace": 3.0})
    other = made({"one_step": 0.1, "trace": 3.0}, rho=0.1)
    with pytest.raises(UserError, match="no measure in common"):
        compare_sharpness({"a": one, "b": other})
    with pytest.raises(UserError, match="at least two"):
        compare_sharpness({"a": one})


def test_other_samples_and_missing_errors_are_named():
    bare = {"one_step": None}
    found = compare_sharpness({"a": made({"one_step": 0.5}, bare), "b": made({"one_step": 0.1}, bare, samples=50)})
    assert any("as many samples" in sentence for sentence in found.cautions)
    assert any("no standard errors" in sentence for sentence in found.cautions)


def test_names_of_models_are_escaped_and_the_result_is_json():
    found = compare_sharpness({"<script>": made({"one_step": 0.5}), "b": made({"one_step": 0.1})})
    assert "<script>" not in found._repr_html_()
    assert "<script>" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["models"] == ["<script>", "b"]


def test_real_tables_of_two_models_can_be_compared():
    data = samples()
    tables = {name: sharpness(network(), mean_loss, data, measures="first_order", m=[8]) for name in ("a", "b")}
    found = compare_sharpness(tables)
    assert "one_step_adaptive" in found.measures
    assert not any("left out" in sentence for sentence in found.cautions)
