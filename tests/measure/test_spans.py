"""Lines and planes through eigenvectors, checkpoints and training runs; processes; figures."""

import copy
import dataclasses
import json
import math

import numpy
import pytest
import torch
from tests.measure.test_landscape import ONE, Quadratic, as_double, draw, loss_fn, network, quadratic_loss, samples
from tests.ranks.start import on_ranks
from torch import nn

from flatwise.errors import UserError
from flatwise.measure import Landscape, Trajectory, TrajectoryRecorder, landscape
from flatwise.measure.trajectory import principal

pytest.importorskip("matplotlib")


def weights_of(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_eigenvectors_show_the_curvature_that_they_have():
    model = Quadratic()
    result = landscape(model, quadratic_loss, ONE, directions="hessian", points=3, progress=False)
    values, vectors = torch.linalg.eigh(model.matrix)
    assert result.norms[0] == pytest.approx((1.0, 1.0), rel=1e-6)
    slope = model.matrix @ (weights_of(model) - model.minimum)
    for axis in (0, 1):
        value, vector = float(values[-1 - axis]), vectors[:, -1 - axis]
        vector = vector * torch.sign(vector[vector.abs().argmax()])
        line = result.values[0, :, 1] if axis == 0 else result.values[0, 1]
        assert float(line[0] + line[2] - 2 * line[1]) == pytest.approx(value, rel=1e-3)  # L(w+v) + L(w-v) - 2L(w)
        assert float(line[2] - line[0]) / 2 == pytest.approx(float(slope @ vector), rel=1e-3)
        assert result.annotate[f"lambda_{axis + 1}"]["model"] == pytest.approx(value, rel=1e-3)


def test_a_line_through_two_checkpoints_has_their_losses_at_zero_and_one():
    one, two, data = network(0).double(), network(1).double(), as_double(samples())
    for arguments in (
        {"model": {"one": one, "two": two}},
        {"model": {"one": one}, "through": {"two": two.state_dict()}},
    ):
        result = draw(data=data, directions="checkpoints", points=7, **arguments)
        assert result.axes[0][1] == 0.0
        assert result.axes[0][5] == pytest.approx(1.0)
        for place, model in ((1, one), (5, two)):
            assert float(result.values[0, place]) == pytest.approx(float(loss_fn(model, data).detach()), rel=1e-12)
        assert [mark.name for mark in result.marks] == ["one", "two"]
        assert [mark.coordinates for mark in result.marks] == [(0.0,), (pytest.approx(1.0),)]


def test_a_plane_through_three_checkpoints_keeps_their_distances_and_losses():
    models = {name: network(seed).double() for seed, name in enumerate(("a", "b", "c"))}
    data = as_double(samples())
    result = draw(models, data, directions="checkpoints")
    assert result.names == ("a",)
    assert result.norms[0] == pytest.approx((1, 1))
    assert abs(result.cosines[0]) < 1e-12
    for mark in result.marks:
        assert mark.loss == pytest.approx(float(loss_fn(models[mark.name], data).detach()), rel=1e-12)
        for other in result.marks:
            seen = math.dist(mark.coordinates, other.coordinates)
            assert seen == pytest.approx(float((weights_of(models[mark.name]) - weights_of(models[other.name])).norm()))
        for axis, place in zip(result.axes, mark.coordinates, strict=True):
            assert axis[0] < place < axis[-1]


def test_principal_components_are_those_of_numpy():
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 2, generator=draws, dtype=torch.float64) @ torch.diag(torch.tensor([5.0, 1.0]).double())
    plane, _ = torch.linalg.qr(torch.randn(40, 2, generator=draws, dtype=torch.float64))
    noise = 0.1 * torch.randn(9, 40, generator=draws, dtype=torch.float64)
    points = 3 + rows @ plane.T + noise
    found, shares = principal(list(points), 2)
    centred = (points - points.mean(0)).numpy()
    _, singular, right = numpy.linalg.svd(centred, full_matrices=False)
    assert shares == pytest.approx(singular[:2] ** 2 / (singular**2).sum())
    for vector, row in zip(found, right, strict=False):
        assert abs(float(vector @ torch.tensor(row))) == pytest.approx(1)
        assert float(vector[vector.abs().argmax()]) > 0
    exact, share = principal(list(3 + rows @ plane.T), 2)
    assert sum(share) == pytest.approx(1)  # all of it lies in the plane
    torch.testing.assert_close(plane @ (plane.T @ exact[0]), exact[0])
    with pytest.raises(UserError, match="fewer than 2"):
        principal([torch.ones(3), torch.zeros(3)], 2)
    with pytest.raises(UserError, match="fewer than 2"):
        principal([n * torch.ones(3) for n in range(5)], 2)


def trained(folder=None, steps=12, start=0, model=None, recorder=None):
    model = model or network(0).double()
    recorder = recorder or TrajectoryRecorder(model, every=3, folder=folder, start=start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, as_double(samples())).backward()
        optimizer.step()
        recorder.step()
    return model, recorder


def test_a_training_run_is_shown_with_its_true_losses_beside_the_projected_ones(tmp_path):
    model, recorder = trained()
    data = as_double(samples())
    result = draw(model, data, directions="pca", trajectory=recorder, path=tmp_path / "x.json")
    track = result.track
    assert track.steps == (0, 3, 6, 9, 12)
    end = weights_of(model)
    rows = [torch.cat([w.reshape(-1) for w in record.values()]) for record in recorder.trajectory.weights]
    found, shares = principal(rows, 2)
    assert result.explained == pytest.approx(shares)
    for step, row in enumerate(rows):
        coordinates = [float((row - end) @ d) for d in found]
        assert track.coordinates[step] == pytest.approx(coordinates, abs=1e-9)
        foot = end + coordinates[0] * found[0] + coordinates[1] * found[1]
        for weights, seen in ((row, track.losses[step]), (foot, track.projected[step])):
            other = copy.deepcopy(model)
            nn.utils.vector_to_parameters(weights, other.parameters())
            assert seen == pytest.approx(float(loss_fn(other, data).detach()), rel=1e-9)
        assert track.distances[step] == pytest.approx(float((row - foot).norm()), abs=1e-9)
    assert track.distances[-1] == pytest.approx(0, abs=1e-9)
    assert max(track.distances) > 1e-3
    assert Landscape.load(tmp_path / "x.json").track == track


def test_records_in_a_folder_are_those_in_memory_also_after_an_interruption(tmp_path):
    _, kept = trained()
    model, _ = trained(folder=tmp_path, steps=6)
    halfway = copy.deepcopy(model)
    trained(folder=tmp_path, steps=6, model=model, start=6)  # goes on
    trained(folder=tmp_path, steps=6, model=halfway, start=6)  # and once more from there
    ours, theirs = kept.trajectory, Trajectory.load(tmp_path)
    assert ours.steps == theirs.steps == (0, 3, 6, 9, 12)
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UserError, match="holds no record"):
        Trajectory.load(tmp_path / "none")
    with pytest.raises(UserError, match="every must be"):
        TrajectoryRecorder(model, every=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"directions": "checkpoints"}, "needs through="),
        ({"directions": "checkpoints", "through": [network(0)]}, "the same weights"),
        ({"directions": "checkpoints", "through": [network(1)] * 2}, "span no plane"),
        ({"directions": "checkpoints", "through": [network(1, width=9)]}, "has other shapes"),
        ({"directions": "pca"}, "needs trajectory="),
        ({"directions": "pca", "model": {"a": network(0), "b": network(1)}}, "weight space of one model"),
    ],
)
def test_what_is_missing_is_said_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as raised:
        draw(**{"model": network(0), "data": samples(), **options})
    assert "\n" not in str(raised.value)


def _of_rank(rank, options):
    inputs, targets = as_double(samples())
    share = slice(0, 16) if rank == 0 else slice(16, 40)
    group = torch.distributed.group.WORLD
    models = {"a": network(0).double(), "b": network(1).double()}
    result = draw(models, (inputs[share], targets[share]), process_group=group, **options)
    return result.as_dict()


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "ranks").mkdir()
    options = {"points": 9, "path": str(tmp_path / "two.json")}
    first, second = on_ranks(_of_rank, tmp_path / "ranks", options)
    inputs, targets = as_double(samples())
    alone = draw({"a": network(0).double(), "b": network(1).double()}, (inputs, targets), points=9)
    for result in (first, second):
        torch.testing.assert_close(
            torch.tensor(result["values"], dtype=torch.float64), alone.values, rtol=1e-9, atol=1e-12
        )
        assert result["states"] == alone.states.tolist()
    assert json.dumps(first["values"]) == json.dumps(second["values"])
    assert Landscape.load(tmp_path / "two.json").values.tolist() == first["values"]
    assert first["conditions"]["samples"] == 40


def _norm_rank(rank):
    inputs, targets = as_double(samples())
    batches = [(inputs[i : i + 10], targets[i : i + 10]) for i in range(0, 40, 10)]
    group = torch.distributed.group.WORLD
    mine = batches[:1] if rank == 0 else batches[1:]
    return draw(network(0, norm=True).double(), mine, points=3, process_group=group).values


def test_recomputed_statistics_of_two_processes_are_those_of_one(tmp_path):
    found = on_ranks(_norm_rank, tmp_path)
    inputs, targets = as_double(samples())
    batches = [(inputs[i : i + 10], targets[i : i + 10]) for i in range(0, 40, 10)]
    alone = draw(network(0, norm=True).double(), batches, points=3)
    for values in found:
        torch.testing.assert_close(values, alone.values, rtol=1e-9, atol=1e-12)


def texts(figure):
    return " ".join(entry.get_text() for entry in figure.texts).replace("\n", " ")


def test_every_kind_of_picture_is_drawn_and_says_under_which_conditions(tmp_path):
    models = {"sgd": network(0, norm=True), "<b>sam</b>": network(1, norm=True)}
    plane = draw(models, samples(), annotate={"lambda_max": {"sgd": 31.25, "<b>sam</b>": 4.0}})
    for style in ("surface", "contour"):
        figure = plane.plot(tmp_path / f"{style}.png", style)
        said = texts(figure)
        for words in (
            "40 samples",
            "mode eval",
            "recomputed at every point",
            "seed 0",
            "lambda_max: sgd 31.2",
            "2-D cut",
        ):
            assert words in said
        assert (tmp_path / f"{style}.png").read_bytes().startswith(b"\x89PNG")
    first, second = (plane.plot().axes[n] for n in (0, 1))
    assert first.get_zlim() == second.get_zlim()
    assert (first.elev, first.azim) == (second.elev, second.azim)
    line = draw(models, [samples(20, 1), samples(20, 2)], dimensions=1)
    assert "one standard error" in texts(line.plot(tmp_path / "line.svg"))
    with pytest.raises(UserError, match="style='line'"):
        line.plot(style="surface")
    with pytest.raises(UserError, match="drawn with style='surface' or 'contour'"):
        plane.plot(style="line")


def test_gaps_cuts_and_what_is_incomplete_are_said_on_the_picture():
    plane = draw(network(), samples(), points=9, refine=False)
    plane.values[0, 0, 0] = math.inf
    plane.values[0, 0, 1] = math.nan
    assert "2 points without a finite loss" in texts(plane.plot(style="contour"))
    assert "2 points without a finite loss" in texts(plane.plot())
    middle = float(plane.values[torch.isfinite(plane.values)].median())
    assert "cut above" in texts(plane.plot(clip=middle))
    plane.states[0, 5:] = 0
    plane.values[0, 5:] = math.nan
    part = dataclasses.replace(plane, complete=False)
    assert "INCOMPLETE: 45 of 81 points measured" in texts(part.plot())
    plane.values[:] = math.nan
    with pytest.raises(UserError, match="nothing to draw"):
        plane.plot()
