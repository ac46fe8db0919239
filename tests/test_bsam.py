"""bSAM beside its oracle, and that nothing of its noise and perturbation is left behind."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tests.core_cases import Held, same
from tests.family_paths import DECAY, LR, Path, Problem, base_of, batches, flat, network, reseed, run_fast, run_oracle
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise import BSAM
from oracles import family_descent as paper

PLAIN: dict[str, Any] = {"train_size": 600, "rho": 0.05}
OTHER: dict[str, Any] = {
    "train_size": 50,
    "rho": 0.02,
    "betas": (0.8, 0.95),
    "damping": 0.3,
    "weight_decay": 0.02,
    "initial_precision": 2.0,
    "noise_seed": 7,
    "lr": 0.2,
}


def draw(seed: int) -> Any:
    def normal(problem: Problem) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + problem.step)
        parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in problem.shapes]
        return torch.cat([part.flatten() for part in parts])

    return normal


def oracle(options: dict[str, Any], factor: float = 1.0, **loop: Any) -> Path:
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    return run_oracle(
        lambda: paper.bsam(
            factor * options["rho"],
            N=options["train_size"],
            lr=options.get("lr", LR),
            beta1=beta1,
            beta2=beta2,
            delta=options.get("weight_decay", DECAY),
            gamma=options.get("damping", 0.1),
            s_0=options.get("initial_precision", 1.0),
            draw=draw(options.get("noise_seed", 0)),
        ),
        **loop,
    )


def make(model: nn.Module, **options: Any) -> BSAM:
    return flatwise.create("bsam", base_of("sgd", model.parameters()), **{**PLAIN, **options})


def train(model: nn.Module, opt: Any, steps: Iterable[int]) -> None:
    data = batches()
    for step in steps:
        reseed(step)
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), data[step])


@pytest.mark.parametrize("options", [PLAIN, OTHER], ids=["defaults", "others"])
def test_fifty_steps_follow_the_equations(options: dict[str, Any]) -> None:
    run_fast("bsam", options).assert_close(oracle(options))


@pytest.mark.parametrize("name", ["rho", "train_size", "betas", "damping", "weight_decay", "initial_precision", "lr"])
def test_the_comparison_sees_every_number(name: str) -> None:
    value = OTHER[name]
    wrong = (0.8, 0.951) if name == "betas" else value + 1 if name == "train_size" else 1.001 * value
    with pytest.raises(AssertionError, match="weights of step"):
        run_fast("bsam", OTHER).assert_close(oracle({**OTHER, name: wrong}))


def test_the_noise_is_that_of_its_seed_and_has_the_papers_variance() -> None:
    """Variance 1 / (N s): with N = 400 and s = 4 the standard deviation is 1 / 40."""
    weight, seen = nn.Parameter(torch.zeros(100_000)), []
    opt = BSAM([weight], train_size=400, initial_precision=4.0, rho=0.0)

    def closure() -> Tensor:
        opt.zero_grad()
        seen.append(weight.detach().clone())
        loss = (0 * weight).sum()
        loss.backward()
        return loss

    opt.step(closure)
    theta, omega = seen
    assert float(theta.std()) == pytest.approx(1 / 40, rel=0.02)
    assert abs(float(theta.mean())) < 1e-3
    assert torch.equal(omega, torch.zeros_like(omega)), "the second pass is at omega + eps, without the noise"


def test_the_noise_leaves_the_random_state_alone() -> None:
    model = network()
    model[5].p = 0.0
    opt, state = make(model), torch.get_rng_state()
    x, y = batches(1)[0]
    opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_passes_are_at_theta_and_at_omega_plus_eps() -> None:
    model, where = network(), []
    opt = make(model)
    x, y = batches(1)[0]
    omega, problem = flat(model.parameters()), Problem([(x, y)])

    def loss_fn(batch: Any) -> Tensor:
        where.append(flat(model.parameters()))
        return F.cross_entropy(model(batch[0]), batch[1])

    reseed(0)
    loss = opt.step(loss_fn, (x, y))
    theta = omega + draw(0)(problem) / math.sqrt(600)
    torch.testing.assert_close(where[0], theta, rtol=0, atol=1e-15)
    torch.testing.assert_close(where[1], omega + 0.05 * problem.gradient(theta), rtol=0, atol=1e-14)
    assert len(where) == opt.last.closure_calls == opt.last.passes == 2
    assert float(loss) == pytest.approx(float(problem.loss(theta)), abs=1e-12)


class Broken(BaseException):  # as Ctrl-C is
    pass


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("after", ["forward", "backward"])
def test_an_error_in_the_closure_leaves_omega_bit_for_bit(warm: int, call: int, after: str) -> None:
    model = network()
    opt = make(model)
    train(model, opt, range(warm))
    held, calls, (x, y) = Held(model.parameters()), 0, batches()[warm]
    state = copy.deepcopy(opt.state_dict()) if warm else None

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        assert held.moved()
        if calls == call and after == "forward":
            raise Broken
        loss.backward()
        if calls == call:
            raise Broken
        return loss

    reseed(warm)
    with pytest.raises(Broken):
        opt.step(closure)
    held.assert_exact()
    assert state is None or same(opt.state_dict(), state)
    twin = network()
    twin_opt = make(twin)
    train(twin, twin_opt, range(warm + 3))
    model.load_state_dict({**model.state_dict(), **buffers_after(warm)})  # the broken pass was seen by BatchNorm
    train(model, opt, range(warm, warm + 3))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def buffers_after(steps: int) -> dict[str, Tensor]:
    model = network()
    train(model, make(model), range(steps))
    return dict(model.named_buffers())


def test_at_rest_the_weights_are_what_the_update_made_of_omega() -> None:
    """With lr = 0 they never move at all, however often noise and perturbation come and go."""
    model = network()
    held, opt = Held(model.parameters()), make(model, lr=0.0)
    train(model, opt, range(20))
    held.assert_exact()


@pytest.mark.parametrize("at", [1, 4])
def test_resuming_equals_never_having_stopped(at: int) -> None:
    model = network()
    opt = make(model, **OTHER)
    train(model, opt, range(at))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    train(model, opt, range(at, at + 5))
    file.seek(0)
    saved, fresh = torch.load(file), network(seed=9)
    again = make(fresh, **PLAIN)  # what was saved counts, not what is given here
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    train(fresh, again, range(at, at + 5))
    assert same(fresh.state_dict(), model.state_dict())
    assert same(again.state_dict(), opt.state_dict())


def test_a_copy_goes_on_the_same_and_apart() -> None:
    model = network()
    opt = make(model)
    train(model, opt, range(3))
    other, twin = copy.deepcopy((model, opt))
    before = flat(model.parameters())
    train(other, twin, range(3, 8))
    assert torch.equal(flat(model.parameters()), before)
    train(model, opt, range(3, 8))
    assert same(other.state_dict(), model.state_dict())
    assert same(twin.state_dict(), opt.state_dict())


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("call", [1, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(call: int, bad: float, start: int) -> None:
    model = network()
    opt = make(model)
    train(model, opt, range(start + 1))
    before, state, calls = flat(model.parameters()), copy.deepcopy(opt.state_dict()["state"]), 0

    def loss_fn(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(batch[0]), batch[1]) * (bad if calls == call else 1.0)

    opt.step(loss_fn, batches(1)[0])
    assert torch.equal(flat(model.parameters()), before)
    assert same(opt.state_dict()["state"], state)
    assert not opt.last.updated
    assert opt.last.reason == "non-finite update"
    train(model, opt, [start + 2])
    assert opt.last.reason == "perturbed"
    assert flat(model.parameters()).isfinite().all()


def test_groups_have_radii_and_rates_of_their_own() -> None:
    model = network()
    parts = [list(model[:3].parameters()), list(model[3:].parameters())]
    opt = BSAM([{"params": parts[0], "lr": 0.0}, {"params": parts[1], "rho": 0.0}], **PLAIN, lr=LR)
    held = Held(parts[0])
    train(model, opt, range(3))
    held.assert_exact()
    assert not torch.equal(flat(parts[1]), flat(list(network()[3:].parameters())))


def test_options_go_before_what_the_base_has() -> None:
    base = base_of("sgd", network().parameters())
    torch.optim.lr_scheduler.ConstantLR(base)  # leaves initial_lr in the groups
    taken, given = (flatwise.create("bsam", base, train_size=9, **o) for o in ({}, {"lr": 0.2, "weight_decay": 0.3}))
    numbers = [
        [group.get(k) for k in ("lr", "initial_lr", "weight_decay")]
        for opt in (taken, given)
        for group in opt.param_groups
    ]
    assert numbers == [[base.param_groups[0]["lr"], LR, DECAY], [0.2, None, 0.3]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_size": 0}, "train_size"),
        ({"train_size": 0.5}, "train_size"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"lr": -1.0}, "lr must be"),
        ({"damping": math.nan}, "damping"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"initial_precision": 0.0}, "initial_precision"),
        ({"rho": -0.1}, "rho"),
    ],
)
def test_a_number_out_of_its_range_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BSAM(network().parameters(), **{**PLAIN, **options})
