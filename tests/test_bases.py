"""Every optimizer of torch serves as base, given ready, as a class, or as a function."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
from tests.core_cases import X, Y, assert_same, closure_of, mlp, snapshot
from torch import nn, optim
from torch.nn import functional as F

import flatwise
from flatwise import SAM

ROWS = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "maximize": (optim.SGD, {"lr": 0.01, "maximize": True}),
    "sgd foreach": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "sgd fused": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam foreach": (optim.Adam, {"lr": 0.01, "foreach": True}),
    "adam fused": (optim.Adam, {"lr": 0.01, "fused": True}),
    "adam tensor lr": (optim.Adam, {"lr": torch.tensor(0.01)}),
    "adamw": (optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "adamw foreach": (optim.AdamW, {"lr": 0.01, "foreach": True}),
    "adamw fused": (optim.AdamW, {"lr": 0.01, "fused": True}),
    "adagrad": (optim.Adagrad, {"lr": 0.05}),
    "adagrad fused": (optim.Adagrad, {"lr": 0.05, "fused": True}),
    "adadelta": (optim.Adadelta, {}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "nadam": (optim.NAdam, {"lr": 0.01}),
    "radam": (optim.RAdam, {"lr": 0.01}),
    "adamax": (optim.Adamax, {"lr": 0.01}),
    "asgd": (optim.ASGD, {"lr": 0.1}),
    "rprop": (optim.Rprop, {"lr": 0.01}),
    "adafactor": (optim.Adafactor, {"lr": 0.01}),
    "muon": (optim.Muon, {"lr": 0.01}),
}


def matrices(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))


def model_for(name):
    return matrices() if name == "muon" else mlp()


def by_hand(model, base, rho, x, y):
    """The algorithm as printed, one tensor at a time."""
    params = [p for p in model.parameters() if p.requires_grad]
    loss = F.cross_entropy(model(x), y)
    first = torch.autograd.grad(loss, params)
    norm = torch.sqrt(sum(g.double().pow(2).sum() for g in first))
    start = [p.detach().clone() for p in params]
    with torch.no_grad():
        for param, grad in zip(params, first, strict=True):
            param.add_((rho * grad.double() / norm).to(param.dtype))
    second = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    with torch.no_grad():
        for param, value, grad in zip(params, start, second, strict=True):
            param.copy_(value)
            param.grad = grad.clone()
    base.step()
    return loss.detach()


@pytest.mark.parametrize("name", ROWS)
def test_steps_are_those_written_by_hand(name):
    make, options = ROWS[name]
    model, twin = model_for(name).double(), model_for(name).double()
    opt = SAM(make(model.parameters(), **options), rho=0.2)
    base = make(twin.parameters(), **options)
    for _ in range(3):
        loss = opt.step(closure_of(model, opt, X.double(), Y))
        torch.testing.assert_close(loss, by_hand(twin, base, 0.2, X.double(), Y))
    assert opt.last.active
    # Rprop and Muon's five low-precision iterations turn rounding into more.
    tolerance = 1e-4 if name == "muon" else 1e-9
    torch.testing.assert_close(snapshot(model), snapshot(twin), rtol=tolerance, atol=tolerance)


@pytest.mark.supports("plain loop", "rho = 0 is the plain run, bit for bit")
@pytest.mark.parametrize("name", ROWS)
def test_zero_radius_is_the_base(name):
    make, options = ROWS[name]
    model, twin = model_for(name), model_for(name)
    start = snapshot(model)
    base = make(twin.parameters(), **options)
    opt = SAM(make(model.parameters(), **options), rho=0.0)
    for _ in range(4):
        opt.step(closure_of(model, opt))
        base.step(closure_of(twin, base))
    assert_same(snapshot(model), snapshot(twin))
    assert_same(opt.state_dict()["state"], base.state_dict()["state"])
    assert any(not torch.equal(v, start[k]) for k, v in snapshot(model).items())


@pytest.mark.parametrize("name", ROWS)
def test_every_way_to_give_the_base(name):
    make, options = ROWS[name]
    results = []
    for way in ("instance", "class", "partial", "function", "groups", "named"):
        model = model_for(name)
        params = list(model.parameters())
        if way == "instance":
            opt = SAM(make(params, **options), 0.2)
        elif way == "class":
            opt = SAM(model.parameters(), make, rho=0.2, **options)
        elif way == "partial":
            opt = SAM(params, partial(make, **options), rho=0.2)
        elif way == "function":
            opt = SAM(params, lambda ps: make(ps, **options), 0.2)
        elif way == "groups":
            radius = {"sam_rho" if name == "adadelta" else "rho": 0.2}
            opt = SAM([{"params": params[:1], **radius}, {"params": params[1:]}], make, rho=0.2, **options)
        else:
            opt = SAM(model.named_parameters(), make, rho=0.2, **options)
        assert type(opt.base_optimizer) is make
        for _ in range(2):
            opt.step(closure_of(model, opt))
        assert opt.last.active
        results.append(snapshot(model))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("way", ["instance", "class"])
def test_a_base_with_a_rho_of_its_own_keeps_it(way):
    model = mlp()
    if way == "instance":
        opt = SAM(optim.Adadelta(model.parameters(), rho=0.7), rho=0.2)
        assert opt.param_groups[0]["rho"] == 0.7
    else:
        opt = SAM(model.parameters(), optim.Adadelta, rho=0.2)
        assert opt.param_groups[0]["rho"] == 0.9
    assert opt.param_groups[0]["sam_rho"] == 0.2
    opt.step(closure_of(model, opt))
    assert opt.last.rho == 0.2
    assert opt.last.perturbation_norm == pytest.approx(0.2, rel=1e-5)
    saved = opt.base_state_dict()["param_groups"][0]
    assert "rho" in saved
    assert "sam_rho" not in saved
    optim.Adadelta(mlp().parameters()).load_state_dict(opt.base_state_dict())


def test_alpha_of_rmsprop_is_its_own():
    opt = SAM(mlp().parameters(), optim.RMSprop, rho=0.2, alpha=0.7, lr=0.01)
    assert opt.param_groups[0]["alpha"] == 0.7
    assert opt.defaults["alpha"] == 0.7


@pytest.mark.parametrize("name", ROWS)
def test_a_base_can_be_made_again_from_groups_and_defaults(name):
    make, options = ROWS[name]
    model = model_for(name)
    opt = SAM(make(model.parameters(), **options), rho=0.2)
    known = make(model_for(name).parameters(), **options).defaults
    assert {key: opt.defaults[key] for key in known} == known
    groups = [{k: v for k, v in g.items() if k in (*known, "params")} for g in opt.param_groups]
    make(groups, **options)


def test_param_groups_state_and_defaults_are_those_of_the_base():
    model = mlp()
    base = optim.Adam(model.parameters(), lr=0.01)
    opt = SAM(base, rho=0.2)
    assert isinstance(opt, optim.Optimizer)
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    opt.step(closure_of(model, opt))
    assert len(opt.state) == 4
    opt.param_groups[0]["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["momentum", "adamw", "adamw fused"])
def test_the_base_steps_once_a_step(name):
    make, options = ROWS[name]
    model = mlp()
    base = make(model.parameters(), **options)
    calls = []
    base.register_step_post_hook(lambda *_: calls.append(1))
    opt = SAM(base, rho=0.1)
    for step in range(3):
        opt.step(closure_of(model, opt))
        assert len(calls) == step + 1
    if "adamw" in name:
        assert {float(s["step"]) for s in base.state.values()} == {3.0}


class Bare(torch.optim.Optimizer):
    """A wrapper as timm's Lookahead: it leaves out torch's constructor, so its hooks are there and never called."""

    def __init__(self, inner):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure=None):
        self.inner.step()


def test_a_base_whose_hooks_are_never_called():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opts = [
        flatwise.create("stale", base, rho=0.1)
        for base in (Bare(torch.optim.SGD([params[0]], lr=0.1)), torch.optim.SGD([params[1]], lr=0.1))
    ]
    for factor in (1.0, 1.0, math.nan, 1.0):
        for param, opt in zip(params, opts, strict=True):
            opt.step(lambda w, factor=factor: w.pow(3).sum() * factor, param)
    assert torch.equal(*params)
    assert params[0].isfinite().all()
    assert opts[0].last.updated
