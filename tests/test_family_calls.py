"""Every row of the registry in every form of call, and when a call breaks off: outside a step the weights are w."""

import re

import pytest
import torch
from tests import family_cases
from tests.core_cases import Held, assert_same, batch, snapshot, with_batchnorm, with_dropout
from tests.family_cases import NAMES, STEPS, WRAPPED, bases_of, loss_of, make, options_of, splits
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from flatwise import variant_info
from flatwise.directions import Momentum


class Broken(BaseException):  # as Ctrl-C is
    pass


@pytest.mark.supports("plain loop", "an exception in either pass leaves w")
@pytest.mark.parametrize("late", [False, True], ids=["before backward", "in backward"])
@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_any_call_leaves_the_weights_as_they_were(name, late):
    model = with_dropout()
    opt = make(name, model)
    loss_fn, broken = loss_of(name, model), 0

    def fail(_):
        raise Broken

    for step in range(STEPS):
        stop = 0
        while True:
            held, calls = Held(model.parameters()), []

            def breaks(part, calls=calls, stop=stop):
                calls.append(0)
                if len(calls) <= stop or (late and not torch.is_grad_enabled()):
                    return loss_fn(part)
                if not late:
                    raise Broken
                loss = loss_fn(part)
                loss.register_hook(fail)
                return loss

            try:
                opt.step(breaks, batch(step))
            except Broken:
                broken += 1
                held.assert_exact()
                assert all(p.requires_grad for p in model.parameters())
                stop += 1
                continue
            break
        assert held.moved()
        assert [p.data_ptr() for p in model.parameters()] == held._addresses
    assert broken >= STEPS


def by_closure(name, model, opt, x, y):
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)


def by_loss_fn(name, model, opt, x, y):
    opt.step(loss_of(name, model), (x, y))


def backward(model, x, y):
    F.cross_entropy(model(x), y).backward()


def by_two_calls(name, model, opt, x, y):
    if variant_info(name).direction.uses_gradient:
        backward(model, x, y)
    opt.first_step(zero_grad=True)
    backward(model, x, y)
    opt.second_step(zero_grad=True)


def by_context(name, model, opt, x, y):
    opt.zero_grad()
    if variant_info(name).direction.uses_gradient:
        backward(model, x, y)
    with opt.perturbed():
        backward(model, x, y)
    opt.base_optimizer.step()


FORMS = {"closure": by_closure, "two calls": by_two_calls, "context": by_context}


def refused(name, form):
    """Whether a form cannot serve a method: it needs the batch, or gradients of its own."""
    if splits(name):
        return True
    row = variant_info(name)
    own = row.descent.needs_output or not row.options.keys().isdisjoint({"ascent_steps", "second_order", "rho"})
    return own and form != "closure"


# An optimizer of its own has no base that could step later: it has the two forms of step() alone.
NAMES_AND_FORMS = [(name, form) for name in NAMES for form in FORMS if name in WRAPPED or form == "closure"]


@pytest.mark.parametrize(("name", "form"), NAMES_AND_FORMS)
def test_forms_of_call_give_the_same_weights(name, form):
    models, states = (with_dropout(), with_dropout()), []
    for model, call in zip(models, (by_loss_fn, FORMS[form]), strict=True):
        opt = make(name, model)
        torch.manual_seed(4)
        if call is not by_loss_fn and refused(name, form):
            held = Held(model.parameters())
            backward(model, *batch(0))
            with pytest.raises(RuntimeError, match=r"opt.step\(loss_fn, batch\)"):
                call(name, model, opt, *batch(0))
            held.assert_exact()
            return
        scheduler = lr_scheduler.ExponentialLR(opt, 0.9)  # which warns where it does not see that a step was made
        for step in range(STEPS):
            call(name, model, opt, *batch(step))
            scheduler.step()
        states.append((opt.state_dict(), torch.get_rng_state()))
    assert_same(snapshot(models[1]), snapshot(models[0]))
    assert_same(states[1], states[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_closure_shows_forms_that_exist(name):
    model = with_dropout()
    opt = make(name, model)
    for rate in (0.1, 0.0):  # at 0 only a dry step is meant, and its gradients are zero
        opt.param_groups[0]["lr"] = rate
        opt.zero_grad()
        backward(model, *batch(0))
        held = Held(model.parameters())
        with pytest.raises(RuntimeError, match=r"opt.step\(loss_fn, batch\)") as caught:
            opt.step()
        assert all(hasattr(opt, call) for call in re.findall(r"opt\.(\w+)\(", str(caught.value)))
        held.assert_exact()


@pytest.mark.parametrize("name", [n for n in NAMES if variant_info(n).direction is Momentum])
def test_a_method_that_needs_momentum_refuses_a_base_without(name):
    assert "plain" not in bases_of(name)
    with pytest.raises(ValueError, match=r"give it momentum=0\.9, or use one of the Adam family"):
        make(name, with_batchnorm(), "plain")


def test_a_row_that_needs_an_unknown_option_says_where_to_add_it(monkeypatch):
    monkeypatch.delitem(family_cases.NEEDED, "p")
    with pytest.raises(pytest.fail.Exception, match=r"'lp' needs p: add a value to NEEDED in tests/family_cases.py"):
        options_of("lp", nn.Linear(1, 1))
