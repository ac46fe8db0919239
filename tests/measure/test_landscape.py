"""A landscape against closed forms, slow oracles and itself; what it may touch is as it was."""

import copy
import dataclasses
import math
import os
import random
import subprocess
import sys
from pathlib import Path

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


def slow_plane(model, data, result, batch_norm):
    """Each point by a model of its own, whose statistics are gathered as torch's own tools for averaged weights do."""
    problem = Problem(model, loss_fn, data)
    directions = [normalised(random_direction(problem, number, 0), problem.params) for number in (0, 1)]
    values = torch.empty(len(result.axes[0]), len(result.axes[1]), dtype=torch.float64)
    for i, a in enumerate(result.axes[0]):
        for j, b in enumerate(result.axes[1]):
            other = copy.deepcopy(model)
            for p, d, e in zip(other.parameters(), *directions, strict=True):
                p.data = p.data + a * d + b * e
            if batch_norm == "recompute":
                torch.optim.swa_utils.update_bn([batch[0] for batch in data], other)
            other.train(batch_norm == "batch")
            losses = torch.stack([loss_fn(other, batch).detach().double() for batch in data])
            counts = torch.tensor([len(batch[0]) for batch in data])
            values[i, j] = (losses * counts).sum() / counts.sum()
    return values


@pytest.mark.parametrize("batch_norm", ["frozen", "recompute", "batch"])
def test_batch_normalisation_does_what_its_name_says(batch_norm):
    data = [samples(20, 1), samples(12, 2), samples(16, 3)]
    model = network(norm=True)
    with torch.no_grad():
        model.train()(torch.randn(50, 4) * 3 + 1)  # statistics that do not fit the data
    result = draw(model, data, batch_norm=batch_norm, points=3)
    torch.testing.assert_close(result.values[0], slow_plane(model, data, result, batch_norm), rtol=1e-5, atol=1e-6)
    assert result.batch_norm == batch_norm


def test_without_batch_normalisation_the_result_names_none():
    assert draw(network(), samples(), points=3).batch_norm == "none"


def test_the_mode_counts_for_dropout_and_not_for_batch_normalisation():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    data = samples()
    plain = draw(model, data, batch_norm="frozen", points=3)
    masked = draw(model, data, batch_norm="frozen", points=3, mode="train")
    again = draw(model, data, batch_norm="frozen", points=3, mode="train")
    assert torch.equal(masked.values, again.values)
    assert not torch.allclose(plain.values, masked.values)
    model[2].p = 0.0
    torch.testing.assert_close(draw(model, data, batch_norm="frozen", points=3, mode="train").values, plain.values)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_size_of_micro_batches_changes_nothing(size):
    whole, cut = (draw(network().double(), as_double(samples()), micro_batch_size=m) for m in (None, size))
    torch.testing.assert_close(cut.values, whole.values, rtol=1e-12, atol=1e-12)


def as_double(batch):
    return batch[0].double(), batch[1]


def test_the_standard_error_is_that_of_a_mean_of_parts():
    data = [samples(20, n) for n in range(5)]
    result = draw(network().double(), [as_double(batch) for batch in data], dimensions=1, points=3)
    model = network().double()
    losses = torch.stack([loss_fn(model, as_double(batch)).detach() for batch in data])
    assert float(result.standard_errors[0, 1]) == pytest.approx(float(losses.std() / 5**0.5))
    assert math.isnan(draw(network(), samples(), points=3).standard_errors[0, 1, 1])


def test_several_models_share_draws_and_each_scales_them_or_one_for_all():
    data = samples()
    one, two = network(0), network(1)
    with torch.no_grad():
        for p in two.parameters():
            p.mul_(3)
    both = draw({"one": one, "two": two}, data)
    alone = draw(two, data)
    assert both.names == ("one", "two")
    assert torch.equal(both.values[1], alone.values[0])
    assert both.norms[1] == alone.norms[0]
    shared = draw({"one": one, "two": two}, data, scale="shared")
    assert shared.norms[0] == shared.norms[1] == both.norms[0]
    assert torch.equal(shared.values[0], both.values[0])
    other = draw({"one": one, "wide": network(2, width=9)}, data)  # other shapes get draws of their own
    assert torch.equal(other.values[0], both.values[0])
    with pytest.raises(UserError, match="scale='own'"):
        draw({"one": one, "wide": network(2, width=9)}, data, scale="shared")


def test_the_line_along_sams_perturbation_has_the_perturbed_loss_at_one():
    model, data = network().double(), as_double(samples())
    result = draw(model, data, directions="sam", rho=0.3)
    loss = loss_fn(model, data)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    other = copy.deepcopy(model)
    for p, g in zip(other.parameters(), gradients, strict=True):
        p.data += 0.3 * g / norm
    assert float(result.values[0, 4]) == pytest.approx(float(loss_fn(other, data).detach()), rel=1e-12)
    assert result.norms[0][0] == pytest.approx(0.3)
    plane = draw(model, data, directions="sam", dimensions=2, rho=0.3)
    assert plane.norms[0] == pytest.approx((0.3, 0.3))
    assert abs(plane.cosines[0]) < 1e-9


def test_half_precision_is_rounded_once():
    model, data = network(), samples()
    exact = {name: p.detach().clone() for name, p in model.bfloat16().float().named_parameters()}
    model = model.bfloat16()
    directions = [{name: torch.randn_like(p) / 100 for name, p in exact.items()} for _ in (0, 1)]
    seen = []

    def looking(model, batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return torch.zeros(())

    landscape(model, looking, data, directions=directions, points=(2, 2), progress=False)
    for place, (a, b) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1))):
        for p, (name, w) in zip(seen[place], exact.items(), strict=True):
            assert torch.equal(p, (w + a * directions[0][name] + b * directions[1][name]).bfloat16())


def test_given_directions_are_taken_as_they_are():
    model, data = network().double(), as_double(samples())
    given = {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}
    result = draw(model, data, directions=[given, [2 * t for t in given.values()]], points=3)
    count = sum(p.numel() for p in model.parameters())
    assert result.norms[0] == pytest.approx((0.1 * count**0.5, 0.2 * count**0.5))
    assert float(result.values[0, 2, 1]) == pytest.approx(
        float(draw(model, data, directions=[given], points=3).values[0, 2])
    )
    assert result.directions == ("given", "given")


def test_values_that_are_not_finite_are_kept(tmp_path):
    def breaking(model, batch):
        w = float(model[0].weight[0, 0].detach())
        return torch.tensor(math.inf if w > start + 0.01 else math.nan if w < start - 0.01 else 1.0)

    model = network()
    start = float(model[0].weight[0, 0].detach())
    draws = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    kept = landscape(model, breaking, samples(), directions=[draws], points=3, path=tmp_path / "x.json", progress=False)
    for result in (kept, Landscape.load(tmp_path / "x.json")):
        assert [str(float(v)) for v in result.values[0]] == ["nan", "1.0", "inf"]
        assert bool((result.states == 1).all())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("options", [{"points": 5}, {"points": 13, "tolerance": 0.05}], ids=["full", "refined"])
@pytest.mark.parametrize("after", [1, 9, 23])
def test_an_interrupted_run_goes_on_to_the_same_file(tmp_path, options, after):
    data, models = [samples(20, 1), samples(20, 2)], {"a": network(0, norm=True), "b": network(1, norm=True)}
    whole = draw(models, data, path=tmp_path / "whole.json", **options)
    calls = []

    def counted(model, batch):
        calls.append(1)
        if len(calls) == 4 * after + 2:
            raise Interrupted
        return loss_fn(model, batch)

    with pytest.raises(Interrupted):
        landscape(models, counted, data, path=tmp_path / "cut.json", progress=False, **options)
    part = Landscape.load(tmp_path / "cut.json")
    assert not part.complete
    assert part.evaluations == after
    assert "not complete" in str(part)
    calls.clear()
    calls += [1] * 10**6
    result = landscape(models, counted, data, path=tmp_path / "cut.json", progress=False, **options)
    assert len(calls) - 10**6 == 4 * (whole.evaluations - after)  # only what was missing
    assert lines_but_cost(tmp_path / "cut.json") == lines_but_cost(tmp_path / "whole.json")
    assert torch.equal(result.values, whole.values)
    calls.clear()
    calls += [1] * 10**6
    landscape(models, counted, data, path=tmp_path / "cut.json", progress=False, **options)
    assert len(calls) == 10**6  # nothing is left to do


def lines_but_cost(path):
    lines = path.read_text().splitlines()
    kept = [line for line in lines if "gradient_evaluations" not in line and '"seconds"' not in line]
    assert len(lines) - len(kept) == 2
    return kept


KILLED = """
import os, sys, torch
torch.set_num_threads(1)
from tests.measure.test_landscape import landscape, loss_fn, network, samples
calls = []
def killing(model, batch):
    calls.append(1)
    if len(calls) == 12:
        os._exit(9)
    return loss_fn(model, batch)
import flatwise.measure.survey as survey
survey.WRITE_EVERY = 0.0
landscape(network(), killing, samples(), points=5, path=sys.argv[1], progress=False)
"""


def test_a_killed_run_leaves_a_whole_file_that_is_continued(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "cut.json")], env=environment, check=False)
    assert done.returncode == 9
    assert Landscape.load(tmp_path / "cut.json").evaluations == 11
    draw(network(), samples(), path=tmp_path / "cut.json")
    draw(network(), samples(), path=tmp_path / "whole.json")
    assert lines_but_cost(tmp_path / "cut.json") == lines_but_cost(tmp_path / "whole.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"points": 7}, "axes was"),
        ({"data": samples(40, 6)}, "other weights, directions or data"),
        ({"model": network(1)}, "other weights, directions or data"),
        ({"micro_batch_size": 10}, "other conditions"),
    ],
)
def test_a_file_of_another_landscape_is_refused(tmp_path, change, words):
    draw(network(), samples(), path=tmp_path / "x.json")
    before = (tmp_path / "x.json").read_bytes()
    arguments = {"model": network(), "data": samples(), **change}
    with pytest.raises(UserError, match=words):
        draw(arguments.pop("model"), arguments.pop("data"), path=tmp_path / "x.json", **arguments)
    assert (tmp_path / "x.json").read_bytes() == before


def test_a_file_that_is_no_landscape_is_refused(tmp_path):
    for name, text in (("a.json", "{"), ("b.json", '{"x": 1}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="no landscape"):
            draw(network(), samples(), path=tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        Landscape.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"directions": "randon"}, "did you mean 'random'"),
        ({"directions": ["random"] * 3}, "1 or 2 directions"),
        ({"directions": [torch.ones(3)]}, "the model has 67 weights"),
        ({"directions": [{"0.weight": torch.ones(8, 4)}]}, "no parameter '0.bias'"),
        ({"points": 1}, "points must be"),
        ({"extent": -1.0}, "extent must be"),
        ({"extent": [1.0, 2.0, 3.0]}, "extent must be"),
        ({"normalize": "filters"}, "normalize must be"),
        ({"batch_norm": "train"}, "batch_norm must be"),
        ({"tolerance": 2}, "share of the range"),
        ({"scale": "each"}, "scale must be"),
        ({"parameters": "bias"}, "pass biases=True"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as raised:
        draw(network(), samples(), **options)
    assert "\n" not in str(raised.value)
