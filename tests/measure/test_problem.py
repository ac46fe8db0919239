"""The loss and its gradient that every measure stands on: data, micro-batches, selection, counting, processes."""

import math
from collections import UserDict

import pytest
import torch
from tests.ranks.start import on_ranks
from torch import nn
from torch.nn import functional as F

from flatwise.errors import UserError
from flatwise.measure.data import read_batches
from flatwise.measure.problem import Problem
from flatwise.measure.result import digits, plain
from flatwise.measure.select import selected


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    model[2].running_mean.uniform_(-1, 1)
    return model


def samples(count=11, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g).double(), torch.randint(4, (count,), generator=g)


def pairs(count=11, sizes=(4, 7)):
    x, y = samples(count)
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def whole(model, x, y):
    model.eval()
    loss = F.cross_entropy(model(x), y)
    return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


X, Y = samples()
ONE = [(X, Y), [X, Y], {"x": X, "y": Y}, UserDict(x=X, y=Y), X]


@pytest.mark.parametrize("data", ONE)
def test_one_batch_is_one_batch(data):
    batches = read_batches(data)
    assert len(batches) == 1
    assert batches[0] is data


@pytest.mark.parametrize("data", [[(X, Y), (X, Y)], iter([X, X]), ({"x": X} for _ in range(2)), [None, None]])
def test_anything_else_that_can_be_iterated_is_a_series(data):
    assert len(read_batches(data)) == 2


@pytest.mark.parametrize(("data", "message"), [([], "no batch"), (3, "must be a batch"), ("xy", "must be a batch")])
def test_what_is_no_data_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        read_batches(data)


@pytest.mark.parametrize("micro", [None, 1, 3, 100])
def test_loss_and_gradient_do_not_depend_on_how_the_samples_are_cut(micro):
    loss, gradient = whole(network(), X, Y)
    problem = Problem(network(), mean_loss, pairs(), micro_batch_size=micro)
    with problem.open():
        seen, g = problem.gradient()
        assert problem.loss() == pytest.approx(loss, rel=1e-12)
    assert seen == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(g, gradient, rtol=1e-11, atol=1e-12)
    assert problem.conditions().samples == 11
    assert problem.conditions().micro_batch_size == (min(7, micro) if micro else 7)


def test_passes_are_counted_in_gradient_evaluations():
    problem = Problem(network(), mean_loss, pairs(), micro_batch_size=2)
    with problem.open():
        problem.gradient()
        assert problem.gradient_evaluations == pytest.approx(1)
        problem.loss()
    assert problem.cost().gradient_evaluations == pytest.approx(4 / 3)
    assert problem.cost().gradient_evaluations == 0


@pytest.mark.parametrize(("mode", "training"), [("eval", False), ("train", True)])
def test_the_mode_is_set_inside_and_put_back(mode, training):
    model = network()
    model.train(not training)
    problem = Problem(model, mean_loss, (X, Y), mode=mode)
    with problem.open():
        assert model.training is training
    assert model.training is not training


def test_dropout_draws_the_same_masks_in_every_evaluation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.Dropout(), nn.Linear(20, 4)).double()
    problem = Problem(model, mean_loss, pairs(), mode="train", seed=3)
    other = Problem(model, mean_loss, pairs(), mode="train", seed=4)
    with problem.open():
        first = problem.losses()
        torch.rand(17)
        assert torch.equal(problem.losses(), first)
    with other.open():
        assert not torch.equal(other.losses(), first)


def test_batch_statistics_with_micro_batches_are_noted():
    assert "micro_batch_size" in Problem(network(), mean_loss, (X, Y), mode="train", micro_batch_size=4).notes[0]
    assert Problem(network(), mean_loss, (X, Y), micro_batch_size=4).notes == []


def test_batches_that_cannot_be_counted_weigh_alike_and_cannot_be_cut():
    problem = Problem(network(), lambda m, b: m(X[:b]).square().mean(), [3, 5])
    with problem.open():
        model = network().eval()
        each = [float(model(X[:b]).square().mean().detach()) for b in (3, 5)]
        assert problem.loss() == pytest.approx(sum(each) / 2)
    assert "could not be counted" in problem.notes[0]
    with pytest.raises(UserError, match="can be cut"):
        Problem(network(), mean_loss, [3, 5], micro_batch_size=2)


def test_unused_and_frozen_parameters_are_listed():
    model = network()
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    model[0].bias.requires_grad_(False)
    problem = Problem(model, mean_loss, (X, Y))
    with problem.open():
        _, g = problem.gradient()
    assert problem.conditions().unused == ("spare",)
    assert problem.conditions().frozen == ("0.bias",)
    assert g.numel() == problem.weights == sum(p.numel() for p in model.parameters()) - 5


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("weight", ["0.weight", "2.weight", "3.weight"]),
        (r"^3\.", ["3.weight", "3.bias"]),
        (["3.bias", "0.bias"], ["3.bias", "0.bias"]),
        (lambda name, p: p.dim() == 2, ["0.weight", "3.weight"]),
    ],
)
def test_parameters_are_chosen(parameters, names):
    assert list(selected(network(), parameters)[0]) == names


def test_parameters_are_chosen_by_module_and_tensor():
    model = network()
    assert list(selected(model, model[3])[0]) == ["3.weight", "3.bias"]
    assert list(selected(model, [model[0].weight])[0]) == ["0.weight"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("wieght", "no parameter's name matches"),
        (["0.wight"], r"no parameter '0.wight'; did you mean '0.weight'"),
        ([torch.ones(2)], "no parameter of the model"),
        (lambda name, p: False, "no trainable parameter"),
    ],
)
def test_parameters_that_are_not_there_are_refused(parameters, message):
    with pytest.raises(UserError, match=message):
        selected(network(), parameters)


def test_a_frozen_model_is_refused_by_name():
    model = network().requires_grad_(False)
    with pytest.raises(UserError, match=r"0\.weight, 0\.bias, 2\.weight are frozen"):
        selected(model, None)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: m(b[0]), r"a tensor of shape \(11, 4\)"),
        (lambda m, b: 1.0, "got float"),
        (lambda m, b: m(b[0]).sum().detach(), "none of the parameters"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss_fn, message):
    problem = Problem(network(), loss_fn, (X, Y))
    with problem.open(), pytest.raises(UserError, match=message):
        problem.gradient()


@pytest.mark.parametrize("options", [{"mode": "test"}, {"micro_batch_size": 0}, {"micro_batch_size": 2.0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Problem(network(), mean_loss, (X, Y), **options)


def test_vectors_and_tensors_turn_into_each_other():
    problem = Problem(network(), mean_loss, (X, Y))
    vector = torch.arange(problem.weights, dtype=torch.float64)
    tensors = problem.shaped(vector)
    assert [t.shape for t in tensors] == [p.shape for p in problem.params]
    assert torch.equal(problem.flat(tensors), vector)


def _gradient_of_a_share(rank, sizes):
    torch.manual_seed(rank)
    data = pairs(11, sizes)
    model = network()
    if rank == 1:
        model.register_parameter("spare", None)
    problem = Problem(model, mean_loss, [data[rank]], process_group=torch.distributed.group.WORLD)
    with problem.open():
        loss, g = problem.gradient()
        return {"loss": loss, "again": problem.loss(), "gradient": g, "samples": problem.samples}


def test_two_processes_are_one(tmp_path):
    loss, gradient = whole(network(), X, Y)
    for result in on_ranks(_gradient_of_a_share, tmp_path, (4, 7)):
        assert result["samples"] == 11
        assert result["loss"] == pytest.approx(loss, rel=1e-12)
        assert result["again"] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(result["gradient"], gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3149, 0.1372, "12.31 ± 0.14"),
        (0.00123456, 0.000012, "0.001235 ± 0.000012"),
        (123456.0, 2345.0, "123500 ± 2300"),
        (1.5, None, "1.5"),
        (math.inf, None, "inf"),
        (2.0, 0.0, "2"),
        (3.2e-9, 1.1e-10, "3.20e-09 ± 1.1e-10"),
    ],
)
def test_numbers_have_no_more_digits_than_are_known(value, error, text):
    assert digits(value, error) == text


def test_results_turn_into_json():
    problem = Problem(network(), mean_loss, (X, Y))
    record = plain({"conditions": problem.conditions(), "t": torch.ones(2), "tuple": (1, 2)})
    assert record["conditions"]["samples"] == 11
    assert record["t"] == [1.0, 1.0]
    assert record["tuple"] == [1, 2]
