"""The suggested radius: its rule against formulas and closed forms, its cost, and that it changes nothing."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatwise
from flatwise.errors import UserError
from flatwise.measure import suggest_rho
from flatwise.measure.agreement import Agreement, Reading
from flatwise.measure.ladder import BORNE, LEAST_COSINE, chosen, search
from flatwise.measure.means import Mean
from flatwise.measure.twin import Twin


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task(noise=0.0, samples=960):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(samples, 8)
    y = (x[:, :3] + 0.3 * torch.randn(samples, 3)).argmax(1)
    wrong = torch.rand(samples) < noise
    y = torch.where(wrong, (y + torch.randint(1, 3, (samples,))) % 3, y)
    return model, list(zip(x.split(16), y.split(16), strict=True))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def agreement(model, optimizer, fn=loss_fn, borne=BORNE, least_cosine=LEAST_COSINE):
    return Agreement(Twin(model, optimizer), fn, borne=borne, least_cosine=least_cosine, seed=0)


# The quantities


def by_hand(model, batches, rho):
    """A(rho) and the cosine of SAM, written down as in the documentation."""

    def gradient(net, batch):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(net, batch), list(net.parameters()))])

    clean = [gradient(model, batch) for batch in batches]
    agreements, base, cosines = [], [], []
    for i, batch in enumerate(batches):
        moved, offset = copy.deepcopy(model), 0
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(rho * clean[i][offset : offset + p.numel()].view_as(p) / clean[i].norm())
                offset += p.numel()
        direction = gradient(moved, batch)
        others = torch.stack([g for j, g in enumerate(clean) if j != i]).mean(0)
        agreements.append((others @ direction / direction.norm()).item())
        base.append((others @ clean[i] / clean[i].norm()).item())
        cosines.append((clean[i] @ direction / clean[i].norm() / direction.norm()).item())
    return agreements, base, cosines


@pytest.mark.parametrize("rho", [0.05, 0.7])
def test_agreement_and_cosine_are_those_of_the_formula(rho):
    model, data = task()
    look = agreement(model, flatwise.SAM(sgd(model), rho=0.3))
    look.stand(data[:4])
    reading = look.read(rho)
    agreements, base, cosines = by_hand(model, data[:4], rho)
    assert look.own == pytest.approx(base, rel=1e-4)
    assert reading.agreement == pytest.approx(sum(agreements) / sum(base), rel=1e-4)
    assert reading.cosine.value == pytest.approx(sum(cosines) / 4, rel=1e-4)
    size = sum(map(abs, base)) / 4
    margin = sum(a - (1 - BORNE) * b for a, b in zip(agreements, base, strict=True)) / 4 / size
    assert reading.margin.value == pytest.approx(margin, rel=1e-3, abs=1e-6)


def test_both_bounds_must_hold():
    model, data = task()

    def harmless(borne, least_cosine):
        look = agreement(model, flatwise.SAM(sgd(model)), borne=borne, least_cosine=least_cosine)
        look.stand(data[:4])
        return look.read(1.0).harmless

    assert harmless(borne=10.0, least_cosine=-1.0)
    assert not harmless(borne=10.0, least_cosine=1.0)
    assert not harmless(borne=-10.0, least_cosine=-1.0)


def test_a_reading_leaves_weights_and_state_where_they_were():
    model, data = task()
    optimizer = flatwise.create("vasso", sgd(model))
    look = agreement(model, optimizer)
    look.train(data, 5)
    look.stand(data[:4])
    first = look.read(0.3)
    look.read(1.0)
    assert look.read(0.3) == first


@pytest.mark.parametrize("name", [n for n in flatwise.list_variants() if n not in ("bsam", "sam-on")])
def test_next_to_no_radius_changes_no_direction(name):
    """Every method becomes the base where its radius vanishes, so that A(rho) becomes A(0)."""
    model, data = task()
    needs = {
        "lp": {"p": math.inf},
        "functional": {"model": model},
        "late": {"total_steps": 100},
        "warmup-off": {"warmup_steps": 5},
        "ae-sam": {"total_steps": 100},
        "m-sam": {"micro_batch_size": 8},
        "quarter": {"ascent_fraction": 0.5},
        "k-sam": {"top_fraction": 1.0},
        "esam-sds": {"rising_fraction": 1.0},
        "wsam": {},
    }
    look = agreement(model, flatwise.create(name, sgd(model), **needs.get(name, {})))
    look.train(data, 6)
    look.stand(data[:4])
    tiny = look.read(1e-7)
    if name == "wsam":  # decoupled: its direction is the whole update, momentum included
        assert tiny.agreement > 0
        return
    assert tiny.agreement == pytest.approx(1, abs=1e-3)
    assert tiny.cosine.value == pytest.approx(1, abs=1e-3)
    assert tiny.harmless


# The search


def reader(limit_a, limit_c=math.inf, tried=None):
    """Readings whose two bounds are crossed at known radii."""

    def read(rho):
        if tried is not None:
            tried.append(rho)
        margin = math.log(limit_a / rho)
        cosine = LEAST_COSINE + (1.0 if math.isinf(limit_c) else math.log(limit_c / rho))
        return Reading(rho, 1 + margin, Mean(margin, 0.0), Mean(cosine, 0.0), margin >= 0 and cosine >= LEAST_COSINE)

    return read


@pytest.mark.parametrize("limit", [0.003, 0.04, 0.3, 2.0, 11.0])
def test_the_crossing_is_found(limit):
    """Linear in log(rho), as these readings are, the interpolation is exact."""
    rho, reason, notes = chosen(search(reader(limit), 0.05, 5))
    assert rho == pytest.approx(limit, rel=0.05)
    assert "95%" in reason
    assert not notes


def test_radii_are_tried_on_a_logarithmic_scale():
    tried = []
    search(reader(0.3, tried=tried), 0.05, 5)
    assert tried == pytest.approx([0.05, 0.2, 0.8, 0.4, math.sqrt(0.08)])


def test_the_tighter_of_both_bounds_decides():
    assert chosen(search(reader(2.0, 0.3), 0.05, 5))[0] == pytest.approx(0.3, rel=0.05)
    assert chosen(search(reader(0.3, 2.0), 0.05, 5))[0] == pytest.approx(0.3, rel=0.05)


def test_a_radius_that_is_always_free_and_one_that_never_is():
    tried = []
    rho, reason, _ = chosen(search(reader(1e9, tried=tried), 0.05, 5))
    assert rho == pytest.approx(max(tried), rel=0.05)
    assert "none cost too much" in reason
    rho, reason, notes = chosen(search(reader(1e-9, tried=tried), 0.05, 5))
    assert rho < min(tried)
    assert "costs more" in reason
    assert "may not help" in notes[0]


def test_a_radius_at_which_the_loss_is_not_finite_is_too_much():
    model, data = task()

    def steep(model, batch):
        return torch.exp(20 * loss_fn(model, batch)) / 1e9

    look = agreement(model, flatwise.SAM(sgd(model)), steep)
    look.stand(data[:4])
    assert not look.read(50.0).harmless


# The whole


def test_noisy_labels_bear_a_larger_radius():
    """The fact that the rule rests on, where it is plain: nothing is set for this task."""
    model, data = task()
    clean = suggest_rho(model, loss_fn, data, sgd(model), total_steps=800, progress=False)
    model, data = task(noise=0.5)
    noisy = suggest_rho(model, loss_fn, data, sgd(model), total_steps=800, progress=False)
    assert noisy.rho > 2 * clean.rho


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [("sam", {}, 2), ("asam", {}, 2), ("vasso", {}, 2), ("multi-step", {}, 3), ("m-sam", {}, 2)],
)
def test_the_cost_is_what_is_counted_and_within_a_twentieth(name, options, passes):
    model, data = task()
    if name == "m-sam":
        options = {"micro_batch_size": 8}
    counted = 0.0

    def counting(model, batch):
        nonlocal counted
        if torch.is_grad_enabled():
            counted += len(batch[1]) / 16
        return loss_fn(model, batch)

    found = suggest_rho(model, counting, data, sgd(model), total_steps=1000, method=name, progress=False, **options)
    assert found.gradients == counted
    assert counted <= found.allowed == 0.05 * 1000 * passes
    assert counted > 0.8 * found.allowed
    assert found.cost.gradient_evaluations == pytest.approx(counted / (found.conditions.samples / 16))


@pytest.mark.parametrize("name", ["msam", "adaptive-msam", "stale", "random"])
def test_a_method_with_one_pass_keeps_its_own_radius_and_costs_nothing(name):
    model, data = task()

    def never(model, batch):
        raise AssertionError("nothing is measured")

    found = suggest_rho(model, never, data, sgd(model), total_steps=1000, method=name, progress=False)
    assert found.rho == flatwise.variant_info(name).rho
    assert found.gradients == 0 == found.cost.gradient_evaluations
    assert found.candidates == ()
    assert "one pass" in str(found)
    ready = flatwise.create(name, sgd(model), rho=0.7)
    assert suggest_rho(model, never, data, ready, total_steps=1000, progress=False).rho == 0.7


def test_an_optimizer_of_flatwise_is_taken_as_it_is():
    model, data = task(noise=0.3)
    named = suggest_rho(model, loss_fn, data, sgd(model), total_steps=800, method="asam", progress=False)
    ready = flatwise.create("asam", sgd(model))
    given = suggest_rho(model, loss_fn, data, ready, total_steps=800, progress=False)
    assert given.rho == named.rho
    assert given.candidates == named.candidates


def test_a_schedule_is_put_aside_and_its_training_counted_as_the_cheaper_one():
    model, data = task()
    late = flatwise.create("late", sgd(model), total_steps=1600)
    found = suggest_rho(model, loss_fn, data, late, total_steps=1600, progress=False)
    assert found.allowed == 0.05 * 1600
    assert any(reading.cosine.value < 0.999 for reading in found.candidates)


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_of_the_users_is_changed(raises):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(96, 8), torch.randint(3, (96,)))
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    base = sgd(model)
    for batch in loader:
        loss_fn(model, batch).backward()
    base.step()
    model.eval()
    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        if raises and calls == 40:
            raise KeyError("in the middle")
        return loss_fn(model, batch)

    def state():
        return {
            "model": {k: v.clone() for k, v in model.state_dict().items()},
            "grads": [p.grad.clone() for p in model.parameters()],
            "base": copy.deepcopy(base.state_dict()),
            "random": [torch.get_rng_state(), generator.get_state()],
        }

    before = state()
    if raises:
        with pytest.raises(KeyError):
            suggest_rho(model, counted, loader, base, total_steps=1000, progress=False)
    else:
        suggest_rho(model, counted, loader, base, total_steps=1000, progress=False)
    after = state()
    assert not model.training
    for a, b in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert "rho" not in base.param_groups[0]


def test_what_is_printed_and_saved():
    model, data = task()
    found = suggest_rho(model, loss_fn, data, sgd(model), total_steps=800, progress=False)
    text = str(found)
    for word in (f"rho = {found.rho:g}", "descent on other samples", "allowed: 80", "batches at each radius"):
        assert word in text
    assert json.loads(json.dumps(found.as_dict()))["rho"] == found.rho


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 100}, "give a larger share, or train for"),
        ({"total_steps": 0}, "total_steps must be"),
        ({"share": 2}, "share must be"),
        ({"method": "bsam"}, "bSAM has none"),
        ({"method": "lp"}, "needs p"),
        ({"method": "sam", "adaptiv": True}, "adaptive"),
        ({"few": 2}, "at least 3 batches"),
    ],
)
def test_bad_arguments(change, message):
    model, data = task()
    data = data[: change.pop("few", None)]
    with pytest.raises(UserError, match=message):
        suggest_rho(model, loss_fn, data, sgd(model), **{"total_steps": 800, "progress": False, **change})


def test_the_length_that_the_error_asks_for_is_enough():
    model, data = task()
    with pytest.raises(UserError) as raised:
        suggest_rho(model, loss_fn, data, sgd(model), total_steps=100, progress=False)
    needed = int(str(raised.value).split("train for ")[1].split()[0])
    assert suggest_rho(model, loss_fn, data, sgd(model), total_steps=needed, progress=False).batches == 3
    with pytest.raises(UserError):
        suggest_rho(model, loss_fn, data, sgd(model), total_steps=int(0.9 * needed), progress=False)
