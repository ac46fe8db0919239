"""The doctor names what is wrong, on models and optimizers that are broken on purpose, and changes nothing."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatwise
from flatwise.errors import UserError
from flatwise.measure import doctor

QUICK = {"steps": 40, "progress": False}


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task(*, norm=False, dtype=torch.float32, samples=640):
    """A small network, and batches that it can learn from."""
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    model = nn.Sequential(nn.Linear(8, 16), middle, nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    x = torch.randn(samples, 8)
    y = (x[:, :3] + 0.3 * torch.randn(samples, 3)).argmax(1)
    return model, list(zip(x.to(dtype).split(16), y.split(16), strict=True))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


class OlderSAM(torch.optim.Optimizer):
    """The form that older SAM code has: two calls, batch normalisation is nobody's business."""

    def __init__(self, params, base, rho=0.05, adaptive=False, restore=True, move=True, **arguments):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **arguments})
        self.base_optimizer = base(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups
        self.restore, self.move = restore, move

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["kept"] = p.clone()
                if self.move:
                    p.add_(p.grad * group["rho"] / norm)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if self.restore:
                    p.data = self.state[p]["kept"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure=None):
        raise AssertionError("the doctor calls first_step and second_step")


class ClosureSAM(torch.optim.Optimizer):
    """Another library's ``step(closure)``."""

    def __init__(self, base, rho):
        super().__init__(base.param_groups, {"rho": rho})
        self.base_optimizer, self.inner = base, OlderSAM.first_step
        self.restore = self.move = True

    def step(self, closure=None):
        closure()
        OlderSAM.first_step(self, zero_grad=True)
        loss = closure()
        OlderSAM.second_step(self)
        return loss


# The verdicts


def test_a_radius_of_the_right_size_is_fine():
    model, data = task()
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=0.1), **QUICK)
    assert (found.verdict, found.active, found.passes) == ("fine", 1.0, 2.0)
    assert found.made == pytest.approx(1, abs=1e-4)
    assert found.perturbation.value == pytest.approx(0.1, rel=1e-4)
    assert 0.1 < found.gradient_change.value < 1
    assert found.fall_base.value > 0
    assert found.fall_sam.value > 0
    assert found.time_ratio > 0


def test_the_numbers_are_those_of_the_formula():
    """Of one step, with no momentum: loss, gap, cosine and change by hand."""
    model, data = task()
    batch, rho = data[0], 0.3
    found = doctor(model, loss_fn, batch, flatwise.SAM(sgd(model), rho=rho), steps=2, progress=False)
    params = list(model.parameters())
    g = torch.autograd.grad(loss_fn(model, batch), params)
    norm = torch.stack([x.norm() for x in g]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, x in zip(moved.parameters(), g, strict=True):
            p.add_(x * rho / norm)
    h = torch.autograd.grad(loss_fn(moved, batch), list(moved.parameters()))
    at_w, away = loss_fn(model, batch).item(), loss_fn(moved, batch).item()
    a, b = (torch.cat([x.flatten() for x in grads]) for grads in (g, h))
    step, base, sam = found.curve[0]
    assert step == 0
    assert base == pytest.approx(at_w)
    assert sam == pytest.approx(base)
    once = doctor(model, loss_fn, batch, flatwise.SAM(sgd(model, lr=0.0), rho=rho), steps=2, progress=False)
    assert once.gap.value == pytest.approx(away - at_w, rel=1e-4)
    assert once.cosine.value == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-4)
    assert once.gradient_change.value == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-4)
    assert any("learning rate is 0" in note for note in once.notes)


def test_a_plain_optimizer_is_not_sam():
    model, data = task()
    found = doctor(model, loss_fn, data, torch.optim.AdamW(model.parameters(), lr=1e-2), **QUICK)
    assert (found.verdict, found.cause, found.rho, found.passes) == ("not applied", "no SAM", None, 1)
    assert "flatwise.SAM(optimizer" in found.change
    assert found.fall_base == found.fall_sam
    assert math.isnan(found.time_ratio)
    assert "1 gradient\n" in str(found)
    assert "base alone  " not in str(found)  # it is the base


def test_the_rho_of_adadelta_is_no_radius():
    model, data = task()
    found = doctor(model, loss_fn, data, torch.optim.Adadelta(model.parameters()), **QUICK)
    assert (found.verdict, found.cause, found.rho) == ("not applied", "no SAM", None)


def test_a_radius_of_zero():
    model, data = task()
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=0.0), **QUICK)
    assert (found.verdict, found.cause, found.active) == ("not applied", "zero radius", 0.0)


def test_a_radius_that_changes_nothing():
    model, data = task()
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=1e-5), **QUICK)
    assert (found.verdict, found.cause) == ("too small", "negligible")
    wanted = float(found.change.split()[0].removeprefix("rho="))
    assert 1e-3 < wanted <= 0.5  # at one call, and never above what is usual
    assert f"rho={wanted:g} instead of 1e-05" in found.change
    close = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=wanted), **QUICK)
    assert 0.03 < close.gradient_change.value < 0.3


def test_a_radius_below_what_float32_can_see_is_too_small_and_not_a_cached_loss():
    model, data = task()
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=1e-8), **QUICK)
    assert found.verdict == "too small"


@pytest.mark.parametrize("rho", [20.0, 1e3])
def test_a_radius_that_keeps_the_training_from_learning(rho):
    model, data = task()
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=rho), **QUICK)
    assert found.verdict == "too large"
    assert found.perturbed_loss.value > 3 * found.loss.value
    assert "e+0" not in str(found)  # large shares are written in full
    assert f"rho={rho / 4:g} instead of" in found.change


def test_a_radius_that_destroys_what_was_learned():
    model, data = task()
    optimizer = sgd(model)
    for _ in range(10):
        for batch in data:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=50.0), **QUICK)
    assert found.verdict == "too large"


def test_a_radius_that_leads_over_the_hill():
    """1 - cos(w) at w = 1, half a period further on: g' = -g."""

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

    def periodic(model, batch):
        return (1 - torch.cos(model.w) + 0 * batch[0].mean()).mean()

    model = Point()
    optimizer = flatwise.SAM(torch.optim.SGD(model.parameters(), lr=1e-6), rho=math.pi)
    found = doctor(model, periodic, [(torch.zeros(1, 2),)] * 8, optimizer, **QUICK)
    assert (found.verdict, found.cause) == ("too large", "against the gradient")
    assert found.cosine.value == pytest.approx(-1, abs=1e-3)


def test_a_loss_that_overflows_at_the_perturbed_weights():
    model, data = task()

    def steep(model, batch):
        return torch.exp(20 * loss_fn(model, batch)) / 1e9

    found = doctor(model, steep, data, flatwise.SAM(sgd(model, lr=1e-9), rho=30.0), **QUICK)
    assert (found.verdict, found.cause) == ("too large", "loss not finite")


def test_a_loss_that_is_nan_without_sam_is_not_sams_fault():
    model, data = task()

    def broken(model, batch):
        return loss_fn(model, batch) * math.nan

    found = doctor(model, broken, data, flatwise.SAM(sgd(model), rho=0.1), **QUICK)
    assert (found.verdict, found.cause) == ("not applied", "loss not finite")
    assert "without SAM first" in found.change


def test_a_schedule_that_is_never_active():
    model, data = task()
    never = flatwise.create("bernoulli", sgd(model), probability=0.0)
    found = doctor(model, loss_fn, data, never, **QUICK)
    assert (found.verdict, found.cause) == ("not applied", "schedule")
    assert "not active in any step of the training" in found.why


def test_a_schedule_that_is_active_later_is_told_apart():
    model, data = task()
    late = flatwise.SAM(sgd(model), window=(0.9, 1.0), total_steps=1000)
    found = doctor(model, loss_fn, data, late, **QUICK)
    assert (found.verdict, found.cause) == ("not applied", "schedule")
    assert "later" in found.why


def test_a_schedule_of_every_fifth_step_counts_its_steps():
    model, data = task()
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=0.2, every=5), **QUICK)
    assert (found.verdict, found.active, found.passes) == ("fine", 0.2, pytest.approx(1.2))


@pytest.mark.parametrize(("rho", "verdict"), [(1e-4, "not applied"), (8e-3, "too small")])
def test_a_perturbation_that_the_rounding_of_bfloat16_eats(rho, verdict):
    model, data = task(dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.sign() * (p.abs() + 0.5))  # no weight near zero, where the grid is fine
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model, lr=1e-3), rho=rho), **QUICK)
    assert (found.verdict, found.cause) == (verdict, "rounding")
    assert found.made < 0.5
    assert "float32" in found.change


def test_a_loss_that_does_not_see_the_moved_weights():
    """Straight-through from weights that were cached: a value and a gradient, but those of the cache."""
    model, data = task()

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.cache = [p.detach().clone() for p in model.parameters()]

        def forward(self, x):
            names = [name for name, _ in self.inner.named_parameters()]
            tensors = [c + p - p.detach() for c, p in zip(self.cache, self.inner.parameters(), strict=True)]
            return torch.func.functional_call(self.inner, dict(zip(names, tensors, strict=True)), (x,))

    cached = Cached()
    found = doctor(cached, loss_fn, data, flatwise.SAM(sgd(cached), rho=0.1), **QUICK)
    assert (found.verdict, found.cause) == ("not applied", "same gradient")


def test_an_adaptive_ball_with_a_radius_of_sam():
    model, data = task()
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=0.005, adaptive=True), **QUICK)
    assert found.verdict == "too small"
    assert "ten times" in found.why
    assert any("carried over" in note for note in found.notes)
    right = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=0.5, adaptive=True, eta=0.01), **QUICK)
    assert right.verdict == "fine"
    assert not any("carried over" in note for note in right.notes)


# Optimizers of others, and loops of users


@pytest.mark.parametrize("norm", [False, True])
def test_older_sam_is_judged_from_outside(norm):
    model, data = task(norm=norm)
    optimizer = OlderSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    found = doctor(model, loss_fn, data, optimizer, **QUICK)
    assert (found.verdict, found.passes, found.active) == ("fine", 2.0, 1.0)
    assert found.made == pytest.approx(1, abs=1e-3)
    if norm:
        assert found.batch_norm.counted == 2
        assert found.batch_norm.statistics_error > 0.5
        assert any("more than once" in note for note in found.notes)
    else:
        assert found.batch_norm is None


def test_flatwise_updates_batch_normalisation_once():
    model, data = task(norm=True)
    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=0.1), **QUICK)
    assert (found.batch_norm.counted, found.batch_norm.statistics_error) == (1, 0)
    assert found.batch_norm.shift > 0


def test_step_with_a_closure_of_another_library():
    model, data = task()
    found = doctor(model, loss_fn, data, ClosureSAM(sgd(model), 0.1), **QUICK)
    assert (found.verdict, found.passes) == ("fine", 2.0)


def test_a_perturbation_that_is_never_undone():
    model, data = task()
    optimizer = OlderSAM(model.parameters(), torch.optim.SGD, rho=0.1, restore=False, lr=0.01)
    found = doctor(model, loss_fn, data, optimizer, **QUICK)
    assert (found.verdict, found.cause) == ("not applied", "not undone")


def test_both_gradients_at_one_point():
    model, data = task()
    optimizer = OlderSAM(model.parameters(), torch.optim.SGD, rho=0.1, move=False, lr=0.01)
    found = doctor(model, loss_fn, data, optimizer, **QUICK)
    assert (found.verdict, found.cause, found.passes) == ("not applied", "one point", 2.0)


def test_a_loop_that_leaves_the_closure_out():
    model, data = task()

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()

    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model)), train_step=train_step, **QUICK)
    assert (found.verdict, found.cause) == ("not applied", "the step raises")
    assert "closure" in found.why
    assert "(in step 1)" in found.why
    assert "optimizer.step(closure)" in found.change
    assert "nan" not in str(found)  # of a step that raised at once there are no numbers


@pytest.mark.parametrize("number", range(1, 7))
def test_a_loop_that_raises_is_named_in_whichever_step_it_does(number):
    """Also in a step that is not watched; a loop that forgets second_step() raises in its second step."""
    model, data = task()
    calls = 0

    def train_step(model, optimizer, batch):
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyError("images")
        loss_fn(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model, batch).backward()
        optimizer.second_step(zero_grad=True)

    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model)), train_step=train_step, steps=200, progress=False)
    assert (found.verdict, found.cause, found.steps) == ("not applied", "the step raises", number - 1)
    assert f"KeyError: 'images' (in step {number})" in found.why


def test_a_loop_that_forgets_the_second_step():
    model, data = task()

    def train_step(model, optimizer, batch):
        loss_fn(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model, batch).backward()

    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model)), train_step=train_step, steps=200, progress=False)
    assert (found.verdict, found.cause) == ("not applied", "the step raises")
    assert "call opt.restore() or second_step() first" in found.why


def test_a_loop_that_uses_one_loss_for_both_passes():
    model, data = task()

    def train_step(model, optimizer, batch):
        loss = loss_fn(model, batch)
        loss.backward(retain_graph=True)
        optimizer.first_step()
        loss_fn(model, batch)  # a loss at w + eps, which nobody differentiates
        optimizer.second_step(zero_grad=True)

    optimizer = OlderSAM(model.parameters(), torch.optim.SGD, rho=0.1, move=False, lr=0.01)
    found = doctor(model, loss_fn, data, optimizer, train_step=train_step, **QUICK)
    assert (found.verdict, found.cause) == ("not applied", "one point")


def test_a_loop_of_the_users_own_that_is_right():
    model, data = task()

    def train_step(model, optimizer, batch):
        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)

    found = doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=0.1), train_step=train_step, **QUICK)
    assert (found.verdict, found.passes) == ("fine", 2.0)


@pytest.mark.parametrize("name", ["sam", "gsam", "msam", "vasso", "lp", "usam", "layerwise", "m-sam", "k-sam", "bsam"])
def test_methods_of_the_family_can_be_asked_about(name):
    model, data = task()
    options = {"lp": {"p": math.inf, "rho": 1e-2}, "m-sam": {"micro_batch_size": 4}, "bsam": {"train_size": 640}}
    optimizer = flatwise.create(name, sgd(model), **options.get(name, {}))

    def losses(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none" if name == "k-sam" else "mean")

    found = doctor(model, losses, data, optimizer, **QUICK)
    assert found.verdict in ("fine", "too large", "too small")
    assert found.perturbation.value > 0


# Nothing is changed


def state_of(model, optimizer):
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    saved = copy.deepcopy(optimizer.state_dict())
    return [t.clone() for t in tensors], [p.data_ptr() for p in model.parameters()], saved, torch.get_rng_state()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("kind", ["flatwise", "older", "closure"])
def test_nothing_of_the_users_is_changed(raises, kind):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(
        TensorDataset(torch.randn(64, 8), torch.randint(3, (64,))), batch_size=8, shuffle=True, generator=generator
    )
    optimizer = {
        "flatwise": lambda: flatwise.SAM(sgd(model)),
        "older": lambda: OlderSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9),
        "closure": lambda: ClosureSAM(sgd(model), 0.1),
    }[kind]()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a step of its own into the optimizer
    for batch in loader:  # momentum, gradients, statistics
        loss_fn(model, batch).backward()
    model.eval()
    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        if raises and calls == 30:
            raise KeyError("in the middle")
        return loss_fn(model, batch)

    before, order = state_of(model, optimizer), generator.get_state()
    if raises:
        with pytest.raises(KeyError):
            doctor(model, counted, loader, optimizer, **QUICK)
    else:
        doctor(model, counted, loader, optimizer, **QUICK)
    assert equal(before, state_of(model, optimizer))
    assert torch.equal(order, generator.get_state())
    assert not model.training
    assert scheduler.last_epoch == 0


def test_the_same_seed_gives_the_same_numbers():
    model, data = task()
    first, second = (
        doctor(model, loss_fn, data, flatwise.SAM(sgd(model)), seed=3, **QUICK).as_dict() for _ in range(2)
    )
    for result in (first, second):
        del result["time_ratio"], result["cost"]
    assert json.dumps(first) == json.dumps(second)


def test_what_is_printed_has_the_verdict_and_the_numbers():
    model, data = task(norm=True)
    text = str(doctor(model, loss_fn, data, flatwise.SAM(sgd(model), rho=0.1), **QUICK))
    for word in ("FINE", "SAM around SGD", "cosine", "loss at w + eps", "batch norm", "base's time", "640 samples"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1}, "steps must be"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)}, "no parameter of this model"),
        ({"optimizer": object()}, "must be an optimizer"),
        ({"data": []}, "no batch"),
        ({"mode": "test"}, "mode must be"),
    ],
)
def test_bad_arguments(change, message):
    model, data = task()
    arguments = {"data": data, "optimizer": flatwise.SAM(sgd(model)), **QUICK, **change}
    with pytest.raises(UserError, match=message):
        doctor(model, loss_fn, **arguments)


def test_an_endless_stream_is_read_as_far_as_needed():
    model, data = task()
    taken = 0

    def stream():
        nonlocal taken
        while True:
            taken += 1
            yield data[taken % len(data)]

    doctor(model, loss_fn, stream(), flatwise.SAM(sgd(model), rho=0.1), **QUICK)
    assert taken == 48
