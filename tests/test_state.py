"""Checkpoints, copies, schedulers, groups and hooks: nothing hidden is lost."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from tests.core_cases import X, Y, assert_same, batch, closure_of, mlp, sgd, snapshot, train, with_dropout
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from flatwise import SAM

BASES = {
    "sgd": sgd,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True),
}


def linear_radius(step):
    return 0.05 + 0.01 * step


OPTIONS = {
    "constant": {"rho": 0.1},
    "every": {"rho": 0.1, "every": 3},
    "window": {"rho": 0.1, "window": (0.4, 0.8), "total_steps": 20},
    "function": {"rho": linear_radius},
    "asam": {"rho": 0.5, "adaptive": True, "eta": 0.01},
}


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resuming_equals_never_having_stopped(base, options):
    straight = with_dropout()
    opt = SAM(BASES[base](straight), **options)
    torch.manual_seed(7)
    losses = train(straight, opt, range(20))
    radii = [g["rho"] for g in opt.param_groups]

    first = with_dropout()
    first_opt = SAM(BASES[base](first), **options)
    torch.manual_seed(7)
    resumed = train(first, first_opt, range(10))
    saved = through_a_file({"model": first.state_dict(), "opt": first_opt.state_dict(), "rng": torch.get_rng_state()})
    second = with_dropout(seed=99)
    second_opt = SAM(BASES[base](second), **options)
    second.load_state_dict(saved["model"])
    second_opt.load_state_dict(saved["opt"])
    torch.set_rng_state(saved["rng"])
    resumed += train(second, second_opt, range(10, 20))
    assert_same(resumed, losses)
    assert_same(snapshot(second), snapshot(straight))
    assert_same(second_opt.state_dict(), opt.state_dict())
    assert [g["rho"] for g in second_opt.param_groups] == radii
    assert second_opt.last.step == 19


def test_loading_does_not_change_what_is_loaded_and_brings_the_radius():
    model = mlp()
    opt = SAM(sgd(model), rho=0.3)
    train(model, opt, range(2))
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other = SAM(sgd(mlp()), rho=0.1)
    other.load_state_dict(saved)
    assert_same(saved, kept)
    assert other.param_groups[0]["rho"] == 0.3
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.state is other.base_optimizer.state


@pytest.mark.parametrize("base", BASES)
def test_checkpoints_of_the_plain_base_go_both_ways(base):
    plain_model, model = mlp(), mlp()
    plain, opt = BASES[base](plain_model), SAM(BASES[base](model), rho=0.0)
    train(plain_model, plain, range(3))
    model.load_state_dict(plain_model.state_dict())
    opt.load_state_dict(through_a_file(plain.state_dict()))
    assert opt.param_groups[0]["rho"] == 0.0
    train(plain_model, plain, range(3, 6))
    train(model, opt, range(3, 6))
    assert_same(snapshot(model), snapshot(plain_model))
    back_model = mlp()
    back = BASES[base](back_model)
    back_model.load_state_dict(model.state_dict())
    back.load_state_dict(through_a_file(opt.base_state_dict()))
    assert_same(back.state_dict(), plain.state_dict())
    assert "rho" in opt.param_groups[0]  # a copy was changed, not the optimizer
    train(back_model, back, range(6, 8))
    train(plain_model, plain, range(6, 8))
    assert_same(snapshot(back_model), snapshot(plain_model))


def test_the_state_is_the_base_state_and_no_more():
    model, plain_model = mlp(), mlp()
    opt, plain = SAM(sgd(model), rho=0.1), sgd(plain_model)
    train(model, opt)
    train(plain_model, plain)
    saved, expected = opt.state_dict(), plain.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert {k: set(v) for k, v in saved["state"].items()} == {k: set(v) for k, v in expected["state"].items()}
    assert set(saved["param_groups"][0]) - set(expected["param_groups"][0]) == {"rho", "sam_step"}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_distributed_checkpoint_state_dicts(base, flat):
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = mlp()
    opt = SAM(BASES[base](model), rho=linear_radius, every=2)
    train(model, opt, range(5))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    fresh = mlp()
    other = SAM(BASES[base](fresh), rho=linear_radius, every=2)
    fresh.load_state_dict(model.state_dict())
    before = snapshot(fresh)
    dcp.set_optimizer_state_dict(fresh, other, saved, options=options)
    assert_same(snapshot(fresh), before)
    assert_same(other.state_dict(), opt.state_dict())
    train(model, opt, range(5, 9))
    train(fresh, other, range(5, 9))
    assert_same(snapshot(fresh), snapshot(model))


def test_a_step_without_closure_is_allowed_only_as_that_probe():
    model = mlp()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.1)
    closure_of(model, opt)()
    with pytest.raises(RuntimeError, match="two gradients per step"):
        opt.step()


# Copies


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("base", BASES)
def test_a_model_and_its_optimizer_are_copied_together(copier, options, base):
    model = mlp()
    opt = SAM(BASES[base](model), **options)
    train(model, opt, range(4))
    twin, twin_opt = copier((model, opt))
    params = [p for g in twin_opt.param_groups for p in g["params"]]
    assert all(a is b for a, b in zip(params, twin.parameters(), strict=True))
    before = snapshot(model)
    train(twin, twin_opt, range(4, 9))
    assert_same(snapshot(model), before)
    train(model, opt, range(4, 9))
    assert_same(snapshot(twin), snapshot(model))
    assert_same(twin_opt.state_dict(), opt.state_dict())
    assert twin_opt.last.step == 8


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_an_optimizer_is_copied_alone(copier):
    model = mlp()
    opt = SAM(sgd(model), rho=0.2)
    lr_scheduler.StepLR(opt, 1)
    train(model, opt, range(2))
    twin = copier(opt)
    assert type(twin) is SAM
    assert type(twin.base_optimizer) is torch.optim.SGD
    assert twin.base_optimizer is not opt.base_optimizer
    assert twin.defaults == opt.defaults
    assert_same(twin.state_dict(), opt.state_dict())


@pytest.mark.parametrize(
    "action", [copy.deepcopy, pickle.dumps, lambda o: o.state_dict(), lambda o: o.base_state_dict()]
)
def test_saving_while_perturbed_is_refused(action):
    model = mlp()
    opt = SAM(sgd(model), rho=0.2)
    closure_of(model, opt)()
    with opt.perturbed(), pytest.raises(RuntimeError, match="while the weights are perturbed"):
        action(opt)
    action(opt)


def test_the_text_of_an_optimizer_names_base_settings():
    text = repr(SAM(sgd(mlp()), rho=0.123))
    assert "SAM" in text
    assert "0.123" in text
    assert "momentum: 0.9" in text


# Schedulers

SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=10),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
}


def take(form, model, opt, step):
    run = closure_of(model, opt, *batch(step))
    if form == "closure":
        opt.step(run)
    elif form == "loss_fn":
        opt.step(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), batch(step))
    elif form == "plain":
        run()
        opt.step()
    else:
        run()
        if form == "two calls":
            opt.first_step()
            run()
            opt.second_step()
        elif form == "with":
            with opt.perturbed():
                run()
            opt.base_optimizer.step()
        else:
            opt.perturb()
            run()
            opt.restore()
            opt.step()


FORMS = ["closure", "loss_fn", "two calls", "with", "perturb"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(kind, on, form):
    def rates(opt, scheduled, form, model):
        scheduler = SCHEDULERS[kind](scheduled)
        result = []
        for step in range(9):
            take(form, model, opt, step)
            result.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
            scheduler.step()
        return result

    plain_model, model = mlp(), mlp()
    plain = sgd(plain_model)
    opt = SAM(sgd(model), rho=0.1)
    expected = rates(plain, plain, "plain", plain_model)
    assert rates(opt, opt if on == "wrapper" else opt.base_optimizer, form, model) == expected
    assert len(set(expected)) > 2
    assert opt.param_groups[0]["rho"] == 0.1


def test_a_scheduler_before_the_first_step_still_warns():
    opt = SAM(sgd(mlp()), rho=0.1)
    scheduler = lr_scheduler.StepLR(opt, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_plateau_scheduler():
    opt = SAM(sgd(mlp()), rho=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert opt.base_optimizer.param_groups[0]["lr"] < 0.1


# Groups


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_a_group_that_is_added(on):
    a, b = mlp(0), mlp(1)
    whole_a, whole_b = mlp(0), mlp(1)
    opt = SAM(torch.optim.SGD(a.parameters(), lr=0.1), rho=0.2)
    (opt if on == "wrapper" else opt.base_optimizer).add_param_group({"params": list(b.parameters()), "lr": 0.3})
    whole = SAM(
        torch.optim.SGD(
            [{"params": list(whole_a.parameters())}, {"params": list(whole_b.parameters()), "lr": 0.3}], lr=0.1
        ),
        rho=0.2,
    )
    for step in range(3):
        opt.step(closure_of(lambda x: a(x) + b(x), opt, *batch(step)))
        whole.step(closure_of(lambda x: whole_a(x) + whole_b(x), whole, *batch(step)))
    assert [g["rho"] for g in opt.param_groups] == [0.2, 0.2]
    assert_same([snapshot(a), snapshot(b)], [snapshot(whole_a), snapshot(whole_b)])


def test_a_group_with_a_radius_that_is_added():
    a, b = mlp(0), mlp(1)
    opt = SAM(sgd(a), rho=0.2)
    opt.add_param_group({"params": list(b.parameters()), "rho": 0.5})
    opt.step(closure_of(lambda x: a(x) + b(x), opt))
    assert opt.last.rho == 0.5
    assert len(opt.base_optimizer.param_groups) == 2


# Hooks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 3])
def test_step_hooks_fire_once_a_step(form, steps):
    model = mlp()
    opt = SAM(sgd(model), rho=0.1)
    fired = []
    handles = [
        opt.register_step_pre_hook(lambda o, a, k: fired.append("wrapper pre")),
        opt.register_step_post_hook(lambda o, a, k: fired.append("wrapper post")),
        opt.base_optimizer.register_step_pre_hook(lambda o, a, k: fired.append("base pre")),
        opt.base_optimizer.register_step_post_hook(lambda o, a, k: fired.append("base post")),
        register_optimizer_step_pre_hook(lambda o, a, k: fired.append("global pre")),
        register_optimizer_step_post_hook(lambda o, a, k: fired.append("global post")),
    ]
    try:
        for step in range(steps):
            take(form, model, opt, step)
    finally:
        for handle in handles:
            handle.remove()
    expected = {"base pre", "base post", "global pre", "global post"}
    if form != "with":  # there the user calls the base's step
        expected |= {"wrapper pre", "wrapper post"}
    assert {name: fired.count(name) for name in fired} == dict.fromkeys(expected, steps)
    take(form, model, opt, steps)
    assert len(fired) == len(expected) * steps


def test_state_dict_hooks_on_the_wrapper_fire():
    opt = SAM(sgd(mlp()), rho=0.1)
    fired = []
    opt.register_state_dict_pre_hook(lambda o: fired.append("save pre"))
    opt.register_state_dict_post_hook(lambda o, s: fired.append("save post"))
    opt.register_load_state_dict_pre_hook(lambda o, s: fired.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda o: fired.append("load post"))
    opt.load_state_dict(opt.state_dict())
    assert fired == ["save pre", "save post", "load pre", "load post"]


def test_zero_grad_reaches_the_base():
    model = mlp()
    opt = SAM(sgd(model), rho=0.1)
    nn.functional.cross_entropy(model(X), Y).backward()
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
