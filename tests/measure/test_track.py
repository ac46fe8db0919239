"""Tracking: what is recorded, and that the training does not notice, bit for bit."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatwise
from flatwise.errors import UserError
from flatwise.measure import sharpness, track


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def samples(count=48, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=g), torch.randint(3, (count,), generator=g)


def train(method, tracked):
    """A run with dropout, batch normalisation, momentum and a shuffle that draws from the global generator."""
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = flatwise.SAM(base, rho=0.05) if method == "sam" else base
    x, y = samples()
    tracker = track(model, mean_loss, (x[:16], y[:16]), every=3, measures=["first_order", "lambda_max"], draws=2, m=[4])
    losses = []
    for step in range(1, 8):
        batch = torch.randperm(48)[:16]
        if method == "sam":
            loss = optimizer.step(lambda part: mean_loss(model, part), (x[batch], y[batch]))
        else:
            optimizer.zero_grad()
            loss = mean_loss(model, (x[batch], y[batch]))
            loss.backward()
            optimizer.step()
        losses.append(loss.detach().clone())
        if tracked:
            tracker(step)
    state = [*model.state_dict().values(), *(p.grad for p in model.parameters()), *losses, torch.get_rng_state()]
    momenta = [entry["momentum_buffer"] for entry in base.state.values()]
    return tracker, [t.clone() for t in (*state, *momenta) if t is not None]


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_training_is_the_same_with_and_without_a_tracker(method):
    tracker, with_it = train(method, True)
    _, without = train(method, False)
    assert len(with_it) == len(without)
    for a, b in zip(with_it, without, strict=True):
        assert torch.equal(a, b)
    assert [record.step for record in tracker.records] == [3, 6]


def test_a_record_is_what_the_call_gives_and_comes_when_it_is_time():
    model, probe = network(), samples()
    tracker = track(model, mean_loss, probe, every=10, measures="one_step", rho=0.1, micro_batch_size=8)
    assert tracker(9) is None
    record = tracker(10)
    table = sharpness(model, mean_loss, probe, measures="one_step", rho=0.1, micro_batch_size=8)
    assert record is tracker.records[-1]
    assert record.values["one_step"] == table.row("one_step").value
    assert record.standard_errors["one_step"] == table.row("one_step").standard_error
    assert str(record).startswith("step 10: loss ")


def test_the_probe_is_read_once():
    x, y = samples()
    tracker = track(network(), mean_loss, iter([(x, y)]), every=1, measures="one_step")
    assert tracker(1).values == tracker(2).values


def test_a_probe_of_bare_tensors_stays_one():
    model = nn.Linear(6, 1)
    tracker = track(model, lambda model, x: model(x).square().mean(), samples()[0], every=1, measures="lambda_max")
    assert tracker(1).values["lambda_max"] > 0


def test_eigenvalues_start_where_they_were():
    model, probe, counts = network(), samples(), []

    def counting(model, batch):
        counts[-1] += 1
        return mean_loss(model, batch)

    tracker = track(model, counting, probe, every=1, measures="lambda_max", eigenvalues=1)
    first, second = (counts.append(0) or tracker(step) for step in (1, 2))
    assert second.gradient_evaluations < first.gradient_evaluations
    assert second.values["lambda_max"] == pytest.approx(first.values["lambda_max"], rel=1e-3)


def test_records_are_saved_and_loaded(tmp_path):
    model, probe = network(), samples()
    tracker = track(model, mean_loss, probe, every=1, measures="one_step", micro_batch_size=8)
    tracker(1)
    tracker.save(tmp_path / "track.json")
    other = track(model, mean_loss, probe, every=1, measures="one_step", micro_batch_size=8)
    other.load(tmp_path / "track.json")
    assert other.records == tracker.records
    other(2)
    assert len(other.records) == 2
    assert json.loads((tmp_path / "track.json").read_text())["every"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["track.json"]


def test_records_of_another_kind_are_refused(tmp_path):
    model, probe = network(), samples()
    tracker = track(model, mean_loss, probe, every=1, measures="one_step")
    tracker(1)
    tracker.save(tmp_path / "track.json")
    with pytest.raises(UserError, match="was written with options"):
        track(model, mean_loss, probe, every=1, measures="one_step", rho=0.1).load(tmp_path / "track.json")
    (tmp_path / "torn.json").write_text('{"kind": "fl')
    with pytest.raises(UserError, match="holds no records"):
        tracker.load(tmp_path / "torn.json")


def test_a_picture_is_drawn(tmp_path):
    tracker = track(network(), mean_loss, samples(), every=1, measures="one_step", micro_batch_size=8)
    with pytest.raises(UserError, match="nothing to draw"):
        tracker.plot(tmp_path / "track.png")
    tracker(1)
    tracker(2)
    tracker.plot(tmp_path / "track.png")
    tracker.plot(tmp_path / "one.png", ["one_step"])
    assert (tmp_path / "one.png").stat().st_size < (tmp_path / "track.png").stat().st_size
    with pytest.raises(UserError, match="did you mean 'one_step'"):
        tracker.plot(tmp_path / "none.png", ["onestep"])
    assert (tmp_path / "track.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"every": 0}, "every must be"),
        ({"measures": "one_stp"}, "did you mean 'one_step'"),
        ({"roh": 0.1}, "did you mean 'rho'"),
    ],
)
def test_what_cannot_be_tracked_is_refused_at_once(options, complaint):
    with pytest.raises(UserError, match=complaint):
        track(network(), mean_loss, samples(), **options)
