"""Every row of the registry with gradients that are zero, not finite, or there in some steps only."""

import copy
import math

import pytest
import torch
from tests.core_cases import Held, assert_same, batch, same, snapshot, with_dropout
from tests.family_cases import NAMES, NAMES_AND_BASES, STEPS, WRAPPED, loss_of, make, train
from torch import nn

from flatwise import variant_info
from flatwise.directions import Gradient


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_does_no_harm(name):
    model = with_dropout()
    opt = make(name, model)
    train(name, model, opt, range(10))
    opt.step(loss_of(name, model, 0.0), batch(10))
    row = variant_info(name)
    if row.direction is Gradient and row.own is None and opt.last.reason != "schedule":
        assert opt.last.reason == "zero gradient"
        assert not opt.last.active
    assert opt.last.updated
    train(name, model, opt, range(11, 14))
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())


@pytest.mark.parametrize("start", [0, 10])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_non_finite_gradient_changes_nothing_but_the_record(name, factor, start):
    model = with_dropout()
    opt = make(name, model)
    train(name, model, opt, range(start))
    for step in range(start, start + 2):
        held = Held(model.parameters())
        state = copy.deepcopy(opt.state_dict()["state"])
        opt.step(loss_of(name, model, factor), batch(step))
        held.assert_exact()
        if start or name in WRAPPED:  # its own optimizer makes its state before the first pass
            assert_same(opt.state_dict()["state"], state)
        assert opt.last.reason == "non-finite update"
        assert not opt.last.updated
        assert not opt.last.active
    losses = [loss for loss, _ in train(name, model, opt, range(start + 2, start + 6))]
    assert opt.last.updated
    assert held.moved()
    assert all(map(torch.isfinite, losses))
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_after_the_first_pass(name):
    model = with_dropout()
    opt = make(name, model)
    loss_fn, bad = loss_of(name, model), 0
    for step in range(STEPS):
        held, calls = Held(model.parameters()), []

        def turns_bad(part, calls=calls):
            calls.append(0)
            return loss_fn(part) * (1.0 if len(calls) == 1 else math.nan)

        opt.step(turns_bad, batch(step))
        # A functional gradient takes nothing of the second loss but the Jacobian of the model.
        if len(calls) > 1 and not variant_info(name).descent.needs_output:
            bad += 1
            held.assert_exact()
            assert opt.last.reason == "non-finite update"
            assert not opt.last.updated
        else:
            assert held.moved()
            assert opt.last.updated
    row = variant_info(name)
    assert bad or row.descent.needs_output or not row.direction.uses_gradient
    train(name, model, opt, range(STEPS, STEPS + 4))
    assert opt.last.updated
    state = [v for entries in opt.state_dict()["state"].values() for v in entries.values() if torch.is_tensor(v)]
    assert all(bool(t.isfinite().all()) for t in [*state, *model.state_dict().values()])


@pytest.mark.parametrize("name", ["vasso", "fsam", "stale", "looksam", "ae-sam"])
def test_one_bad_batch_spoils_no_memory(name):
    model = with_dropout()
    opt = make(name, model, **({"delta": 0.9} if name == "ae-sam" else {}))
    train(name, model, opt, range(STEPS))
    opt.step(loss_of(name, model, math.nan), batch(0))
    reasons = [reason for _, reason in train(name, model, opt, [0] * 6)]
    assert "perturbed" in reasons
    assert "non-finite update" not in reasons


class Branches(nn.Module):
    """A parameter used in even steps only, one that is never used, one that is frozen later."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.sometimes, self.never, self.frozen = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.even = True

    def forward(self, x):
        hidden = self.first(x) + self.frozen(x) + (self.sometimes(x) if self.even else 0)
        return self.last(self.norm(hidden).relu())


@pytest.mark.parametrize(("name", "base"), NAMES_AND_BASES)
def test_the_set_of_gradients_may_change(name, base):
    model = Branches()
    opt = make(name, model, base)
    start = snapshot(model)
    for step in range(STEPS):
        model.even = step % 2 == 0
        if step == 7:
            model.frozen.requires_grad_(False)
            model.frozen.zero_grad()
        before = snapshot(model)
        opt.step(loss_of(name, model), batch(step))
        after = snapshot(model)
        still = {"sometimes": not model.even, "frozen": step >= 7, "never": True, "first": False, "norm": False}
        for part, unchanged in still.items():
            key = f"{part}.weight"
            assert same(before[key], after[key]) == unchanged, (step, key)
        assert all(bool(t.isfinite().all()) for t in after.values())
        assert opt.last.updated
    assert same(after["never.bias"], start["never.bias"])
