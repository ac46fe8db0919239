"""A landscape against closed forms, slow oracles and itself; what it may touch is as it was."""

import dataclasses
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatwise.errors import UserError
from flatwise.measure import Landscape, landscape
from flatwise.measure.directions import normalised, orthogonalised, random_direction
from flatwise.measure.problem import Problem


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def network(seed=0, norm=False, width=8):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(4, width), *middle, nn.Tanh(), nn.Linear(width, 3))


def samples(count=40, seed=5):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=draws), torch.randint(3, (count,), generator=draws)


def draw(model, data, **options):
    return landscape(model, loss_fn, data, progress=False, **{"points": 5, **options})


class Quadratic(nn.Module):
    """L(w) = (w - c)' A (w - c) / 2, whatever the samples."""

    def __init__(self, shapes=((3, 2), (4,))):
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        shape = lambda *s: torch.randn(*s, generator=draws, dtype=torch.float64)  # noqa: E731
        self.pieces = nn.ParameterList([nn.Parameter(shape(*s)) for s in shapes])
        count = sum(p.numel() for p in self.pieces)
        root = shape(count, count)
        self.matrix, self.minimum = root @ root.T, shape(count)

    def forward(self):
        x = torch.cat([p.reshape(-1) for p in self.pieces]) - self.minimum
        return x @ self.matrix @ x / 2


def quadratic_loss(model, batch):
    return model()


ONE = torch.zeros(1, 1)


def test_the_centre_is_the_true_loss_to_the_last_bit():
    model, data = network(), samples()
    result = draw(model, data)
    with torch.inference_mode():
        assert result.values[0, 2, 2] == loss_fn(model, data).double()
    assert result.axes[0][2] == 0 == result.axes[1][2]


def test_a_plane_of_a_quadratic_is_that_of_its_formula():
    model = Quadratic()
    result = landscape(
        model, quadratic_loss, ONE, points=(5, 7), biases=True, extent=(0.5, (-1.0, 2.0)), progress=False
    )
    w = torch.cat([p.detach().reshape(-1) for p in model.pieces])
    problem = Problem(model, quadratic_loss, ONE)
    d = [
        torch.cat([t.reshape(-1) for t in normalised(random_direction(problem, n, 0), problem.params, biases=True)])
        for n in (0, 1)
    ]
    for i, a in enumerate(torch.linspace(-0.5, 0.5, 5).double()):
        for j, b in enumerate(torch.linspace(-1, 2, 7).double()):
            x = w + a * d[0] + b * d[1] - model.minimum
            torch.testing.assert_close(result.values[0, i, j], x @ model.matrix @ x / 2, rtol=1e-6, atol=1e-6)
    assert result.norms[0] == pytest.approx([float(v.norm()) for v in d])


def test_every_filter_of_a_direction_has_the_length_of_the_weights_filter():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)).double()
    problem = Problem(model, quadratic_loss, ONE)
    drawn = random_direction(problem, 0, 3)
    direction = normalised(drawn, problem.params)
    for raw, d, w in zip(drawn, direction, problem.params, strict=True):
        if w.dim() == 1:
            assert not d.any()
            continue
        for number in range(len(w)):  # the definition of Li et al., filter by filter
            expected = raw[number] * w[number].norm() / (raw[number].norm() + 1e-10)
            torch.testing.assert_close(d[number], expected.detach())
            torch.testing.assert_close(d[number].norm(), w[number].detach().norm())
    for d, w in zip(normalised(drawn, problem.params, "layer"), problem.params, strict=True):
        assert w.dim() == 1 or float(d.norm()) == pytest.approx(float(w.detach().norm()))
    every = normalised(drawn, problem.params, biases=True)
    torch.testing.assert_close(every[1].abs(), problem.params[1].detach().abs())  # each weight is a filter of its own


def test_draws_depend_on_seed_number_and_name_alone():
    one, other = (Problem(network(seed), loss_fn, samples()) for seed in (0, 1))
    first, again = random_direction(one, 0, 7), random_direction(other, 0, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], random_direction(one, 1, 7)[0])
    assert not torch.equal(first[0], random_direction(one, 0, 8)[0])
    some = Problem(network(), loss_fn, samples(), parameters="2.weight")
    assert torch.equal(random_direction(some, 0, 7)[0], first[2])
    everything = torch.cat(
        [d.reshape(-1) for d in random_direction(Problem(network(width=4000), loss_fn, samples()), 0, 7)]
    )
    assert abs(float(everything.mean())) < 0.03
    assert abs(float(everything.std()) - 1) < 0.03
    assert abs(float(everything.pow(4).mean()) - 3) < 0.2  # of a Gaussian; of a uniform draw it is 1.8


def test_directions_are_orthogonal_when_asked_and_keep_their_length():
    plain, made = (draw(network(), samples(), orthogonalize=flag) for flag in (False, True))
    assert abs(plain.cosines[0]) > 1e-3
    assert abs(made.cosines[0]) < 1e-6
    assert made.norms[0] == pytest.approx(plain.norms[0], rel=1e-5)
    with pytest.raises(UserError, match="span no plane"):
        orthogonalised([torch.ones(3), -2 * torch.ones(3)])


def test_the_same_seed_gives_the_same_values_and_another_others():
    first, again, other = (draw(network(), samples(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)


def test_a_file_gives_back_everything(tmp_path):
    data = [samples(20, 1), samples(24, 2)]
    kept = draw({"a": network(0), "b": network(1)}, data, path=tmp_path / "plane.json", annotate={"lambda_max": 3.5})
    read = Landscape.load(tmp_path / "plane.json")
    for entry in dataclasses.fields(Landscape):
        ours, theirs = getattr(kept, entry.name), getattr(read, entry.name)
        same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert same, entry.name
    assert read.complete
    assert read.conditions.samples == 44


def test_what_was_there_is_still_there_also_after_an_error():
    model, data = network(norm=True), samples()
    model.train()
    model[3].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    places = [t.data_ptr() for t in model.state_dict().values()]
    momenta = model[1].momentum

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

    drawn = state()
    calls = []

    def breaking(model, batch):
        calls.append(1)
        random.random()
        if len(calls) == 7:
            raise RuntimeError("broken")
        return loss_fn(model, batch) + 0 * torch.rand(())

    for batch_norm in ("frozen", "recompute", "batch"):
        calls.clear()
        with pytest.raises(RuntimeError, match="broken"):
            landscape(model, breaking, data, points=3, batch_norm=batch_norm, progress=False)
        draw(model, data, points=3, batch_norm=batch_norm)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert [t.data_ptr() for t in model.state_dict().values()] == places
        assert [m.training for m in model] == [True, True, True, False]
        assert model[1].momentum == momenta
        assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())
        assert state() == drawn
