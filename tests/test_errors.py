"""Every mistake raises an error that names it, and leaves everything as it was."""

from __future__ import annotations

import math

import pytest
import torch
from tests.core_cases import Held, X, Y, assert_same, batch, closure_of, mlp, sgd, snapshot
from torch import nn
from torch.nn import functional as F

from flatwise import SAM, Ball, Batching, GradientAscent, PerturbedGradient, Schedule


class Checked:
    """A model and its optimizer, and an eye on what an error must not change."""

    def __init__(self, **options):
        self.model = mlp()
        self.base = sgd(self.model)
        self.opt = SAM(self.base, rho=0.3, **options)

    def mark(self):
        self.held = Held(self.model.parameters())
        self.state = self.base.state_dict()["state"]
        self.state = {k: {n: v.clone() for n, v in s.items()} for k, s in self.state.items()}
        self.hooks = self.count_hooks()

    def count_hooks(self):
        on_params = [len(p._post_accumulate_grad_hooks or ()) for p in self.model.parameters()]
        return on_params, len(self.base._optimizer_step_pre_hooks), len(self.base._optimizer_step_post_hooks)

    def backward(self):
        self.opt.zero_grad()
        F.cross_entropy(self.model(X), Y).backward()

    def raises(self, error, match, action):
        self.mark()
        with pytest.raises(error, match=match) as caught:
            action()
        self.held.assert_exact()
        assert_same(self.base.state_dict()["state"], self.state)
        assert self.count_hooks() == self.hooks
        return caught.value

    def assert_usable(self):
        self.opt.step(closure_of(self.model, self.opt))
        assert self.opt.last.active


@pytest.fixture(params=[0, 2], ids=["fresh", "trained"])
def case(request):
    checked = Checked()
    for step in range(request.param):
        checked.opt.step(closure_of(checked.model, checked.opt, *batch(step)))
    return checked


def test_no_closure(case):
    case.backward()
    error = case.raises(RuntimeError, "two gradients per step", case.opt.step)
    for form in ("opt.step(closure)", "opt.step(loss_fn, batch)", "opt.first_step", "opt.second_step", "opt.perturb()"):
        assert form in str(error)
    case.assert_usable()


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda loss: None, TypeError, "return loss"),
        (lambda loss: loss.expand(3), ValueError, r"shape \(3,\).*loss.mean\(\)"),
        (lambda loss: {"loss": loss}, TypeError, "dict.*sum"),
        (lambda loss: (loss, 1), TypeError, "tuple"),
        (lambda loss: True, TypeError, "bool"),
    ],
    ids=["None", "vector", "dict", "tuple", "bool"],
)
@pytest.mark.parametrize("run", [1, 2])
def test_a_closure_that_returns_no_loss(case, result, error, match, run):
    calls = []

    def closure():
        calls.append(1)
        loss = closure_of(case.model, case.opt)()
        return result(loss) if len(calls) == run else loss

    case.raises(error, match, lambda: case.opt.step(closure))
    case.assert_usable()


def test_a_loss_with_one_element_or_a_plain_number_is_fine(case):
    case.opt.step(lambda: closure_of(case.model, case.opt)().reshape(1, 1))
    got = case.opt.step(lambda: closure_of(case.model, case.opt)().item())
    assert isinstance(got, float)
    assert case.opt.last.active


def test_backward_of_a_vector(case):
    def closure():
        case.opt.zero_grad()
        loss = F.cross_entropy(case.model(X), Y, reduction="none")
        loss.backward()
        return loss

    error = case.raises(RuntimeError, r"loss\.mean\(\)", lambda: case.opt.step(closure))
    assert "scalar outputs" in str(error.__cause__)
    case.assert_usable()


@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        (lambda out: F.cross_entropy(out, Y, reduction="none"), ValueError, r"loss\.mean\(\)"),
        (lambda out: None, TypeError, "None"),
        (lambda out: 1.0, TypeError, "tensor"),
    ],
    ids=["vector", "None", "number"],
)
def test_a_loss_function_that_returns_no_loss(case, loss_fn, error, match):
    case.raises(error, match, lambda: case.opt.step(lambda b: loss_fn(case.model(b)), X))
    case.assert_usable()


@pytest.mark.parametrize("run", [1, 2])
def test_no_gradients(case, run):
    calls = []

    def closure():
        calls.append(1)
        if len(calls) >= run:
            case.opt.zero_grad()
            return F.cross_entropy(case.model(X), Y)
        return closure_of(case.model, case.opt)()

    case.raises(RuntimeError, r"backward\(\)", lambda: case.opt.step(closure))
    case.assert_usable()


@pytest.mark.parametrize("call", ["first_step", "perturbed"])
def test_no_gradients_in_the_two_calls(case, call):
    case.opt.zero_grad()

    def action():
        if call == "first_step":
            case.opt.first_step()
        else:
            with case.opt.perturbed():
                raise AssertionError("not reached")

    case.raises(RuntimeError, rf"no gradients for {call}\(\).*backward", action)
    case.assert_usable()


def test_perturb_without_gradients_says_so(case):
    case.opt.zero_grad()
    case.mark()
    assert case.opt.perturb() is False
    assert case.opt.last.reason == "no gradient"
    case.held.assert_exact()
    case.opt.step()
    case.assert_usable()


def test_no_gradients_before_second_step(case):
    case.backward()
    case.mark()
    assert case.opt.first_step()
    assert case.held.moved()
    with pytest.raises(RuntimeError, match="no gradients for second_step"):
        case.opt.second_step()
    case.held.assert_exact()
    assert_same(case.base.state_dict()["state"], case.state)
    with pytest.raises(RuntimeError, match="two gradients per step"):
        case.opt.step()
    case.assert_usable()


# Gradients of an earlier batch


def test_gradients_that_were_not_cleared(case):
    def closure():
        loss = F.cross_entropy(case.model(X), Y)
        loss.backward()
        return loss

    case.opt.zero_grad()
    case.opt.step(closure)  # nothing to clear yet
    case.raises(
        RuntimeError, r"did not clear(.|\n)*opt\.zero_grad\(\)(.|\n)*micro_batch_size", lambda: case.opt.step(closure)
    )
    case.assert_usable()


def test_gradients_that_were_not_cleared_and_two_backward_passes(case):
    def closure():
        for half in (slice(0, 8), slice(8, 16)):
            loss = F.cross_entropy(case.model(X[half]), Y[half])
            loss.backward()
        return loss

    case.opt.zero_grad()
    case.opt.step(closure)
    case.raises(RuntimeError, "did not clear", lambda: case.opt.step(closure))


def test_gradients_that_were_not_cleared_although_a_parameter_was_frozen_since(case):
    def closure():
        loss = F.cross_entropy(case.model(X), Y)
        loss.backward()
        return loss

    case.opt.zero_grad()
    case.opt.step(closure)
    case.model[0].weight.requires_grad_(False)
    case.raises(RuntimeError, "did not clear", lambda: case.opt.step(closure))


CLEAR = {
    "to None": lambda case: case.opt.zero_grad(),
    "to zero": lambda case: case.opt.zero_grad(set_to_none=False),
    "base": lambda case: case.base.zero_grad(),
    "base to zero": lambda case: case.base.zero_grad(set_to_none=False),
    "model": lambda case: case.model.zero_grad(),
    "model to zero": lambda case: case.model.zero_grad(set_to_none=False),
    "by hand": lambda case: [setattr(p, "grad", None) for p in case.model.parameters()],
    "by hand, in place": lambda case: [p.grad.zero_() for p in case.model.parameters() if p.grad is not None],
    "by hand, behind autograd": lambda case: [
        p.grad.data.zero_() for p in case.model.parameters() if p.grad is not None
    ],
    "by hand, new zeros": lambda case: [setattr(p, "grad", torch.zeros_like(p)) for p in case.model.parameters()],
}


@pytest.mark.parametrize("clear", CLEAR.values(), ids=CLEAR)
@pytest.mark.parametrize("backwards", [1, 2, 3])
def test_gradients_that_were_cleared_in_any_way_are_fine(clear, backwards):
    case, twin = Checked(), Checked()

    def closure(case=case, clear=clear):
        clear(case)
        total = 0.0
        for _ in range(backwards):
            loss = F.cross_entropy(case.model(X), Y)
            loss.backward()
            total = total + loss.detach()
        return total

    for _ in range(3):
        case.opt.step(closure)
        twin.opt.step(lambda: closure(twin, CLEAR["to None"]))
    assert case.opt.last.active
    torch.testing.assert_close(snapshot(case.model), snapshot(twin.model))


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_cleared_after_the_step_instead_of_in_the_closure(to_none):
    """The first pass is right then, and so is the second, which starts without gradients."""
    case, twin = Checked(), Checked()

    def closure():
        loss = F.cross_entropy(case.model(X), Y)
        loss.backward()
        return loss

    for _ in range(3):
        if to_none:
            case.opt.step(closure)
        else:
            case.opt.step(closure_of(case.model, case.opt))
        case.opt.zero_grad(set_to_none=True)
        twin.opt.step(closure_of(twin.model, twin.opt))
    assert_same(snapshot(case.model), snapshot(twin.model))


# A graph that is used twice


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("what", ["loss", "output"])
def test_a_graph_made_before_the_weights_moved(case, retain, what):
    output = case.model(X)
    outer = F.cross_entropy(output, Y)

    def closure():
        case.opt.zero_grad()
        loss = outer if what == "loss" else F.cross_entropy(output, Y)
        loss.backward(retain_graph=retain)
        return loss

    error = case.raises(RuntimeError, "before the weights were perturbed", lambda: case.opt.step(closure))
    assert "inside the closure" in str(error)
    assert error.__cause__ is not None
    assert str(error.__cause__) in str(error)
    case.assert_usable()


def test_other_errors_of_the_closure_pass_through(case):
    failure = RuntimeError("something else")

    def closure():
        raise failure

    assert case.raises(RuntimeError, "something else", lambda: case.opt.step(closure)) is failure


# Calls in the wrong order


def test_first_step_twice(case):
    case.backward()
    case.mark()
    case.opt.first_step(zero_grad=True)
    F.cross_entropy(case.model(X), Y).backward()
    where = snapshot(case.model)
    for again in (case.opt.first_step, case.opt.perturb, lambda: case.opt.perturbed().__enter__()):
        with pytest.raises(RuntimeError, match="while the weights are perturbed"):
            again()
    assert_same(snapshot(case.model), where)
    case.opt.restore()
    case.held.assert_exact()
    case.opt.step()
    case.assert_usable()


@pytest.mark.parametrize("call", ["closure", "none", "loss_fn", "base", "state_dict", "base_state_dict"])
def test_nothing_else_while_the_weights_are_perturbed(case, call):
    def action():
        case.backward()
        with case.opt.perturbed():
            case.backward()
            if call == "closure":
                case.opt.step(closure_of(case.model, case.opt))
            elif call == "none":
                case.opt.step()
            elif call == "loss_fn":
                case.opt.step(lambda b: F.cross_entropy(case.model(b), Y), X)
            elif call == "base":
                case.base.step()
            else:
                getattr(case.opt, call)()

    case.raises(RuntimeError, r"perturbed(.|\n)*restore\(\)", action)
    case.assert_usable()


def test_second_step_without_first_step(case):
    case.backward()
    case.raises(RuntimeError, "without first_step", case.opt.second_step)
    case.assert_usable()


def test_a_second_plain_step_after_restore(case):
    case.backward()
    assert case.opt.perturb()
    case.backward()
    case.opt.restore()
    case.opt.step()
    case.raises(RuntimeError, "two gradients per step", case.opt.step)


@pytest.mark.parametrize(
    "options",
    [{"micro_batch_size": 4}, {"ascent_fraction": 0.5}, {"ascent_steps": 2}, {"second_order": True}],
    ids=str,
)
@pytest.mark.parametrize("call", ["first_step", "perturb", "perturbed"])
def test_options_that_two_calls_cannot_serve(options, call):
    case = Checked(**options)
    case.backward()

    def action():
        if call == "perturbed":
            with case.opt.perturbed():
                raise AssertionError("not reached")
        getattr(case.opt, call)()

    case.raises(RuntimeError, rf"{call}\(\) cannot serve", action)


@pytest.mark.parametrize("options", [{"micro_batch_size": 4}, {"ascent_fraction": 0.5}], ids=str)
def test_options_that_need_the_batch(options):
    case = Checked(**options)
    case.raises(RuntimeError, r"opt\.step\(loss_fn, batch\)", lambda: case.opt.step(closure_of(case.model, case.opt)))
    case.opt.step(lambda b: F.cross_entropy(case.model(b[0]), b[1]), (X, Y))
    assert case.opt.last.active


@pytest.mark.parametrize("run", [1, 2])
def test_second_order_needs_a_gradient_that_can_be_differentiated(run):
    case = Checked(second_order=True)

    def closure():
        case.opt.zero_grad()
        loss = F.cross_entropy(case.model(X), Y)
        torch.autograd.backward(loss)
        return loss

    case.raises(RuntimeError, r"second_order=True.*loss\.backward\(\)", lambda: case.opt.step(closure))


# Construction


def make(*args, **options):
    model = mlp()
    before = Held(model.parameters())
    base = sgd(model)
    groups = [dict(group) for group in base.param_groups]
    try:
        return SAM(base, *args, **options)
    except (ValueError, TypeError):
        before.assert_exact()
        assert [dict(group) for group in base.param_groups] == groups
        assert not base._optimizer_step_pre_hooks
        raise


@pytest.mark.parametrize("rho", [-0.1, math.inf, math.nan, -math.inf])
def test_a_radius_out_of_range(rho):
    for action in (
        lambda: make(rho=rho),
        lambda: make(rho),
        lambda: make(rho=lambda step: rho),
        lambda: SAM(mlp().parameters(), torch.optim.SGD, rho=rho, lr=0.1),
        lambda: SAM(torch.optim.SGD([{"params": mlp().parameters(), "rho": rho}], lr=0.1)),
        lambda: make(rho=0.1).add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": rho}),
    ):
        with pytest.raises(ValueError, match="rho must be a finite number >= 0"):
            action()


@pytest.mark.parametrize("rho", ["large", [0.1], {}, object()])
def test_a_radius_that_is_no_number(rho):
    with pytest.raises(TypeError, match="rho must be a number"):
        make(rho=rho)


def test_a_radius_that_goes_wrong_later():
    case = Checked()
    case.opt.param_groups[0]["rho"] = -1.0
    case.raises(ValueError, "rho must be a finite number", lambda: case.opt.step(closure_of(case.model, case.opt)))
    model = mlp()
    opt = SAM(sgd(model), rho=lambda step: 0.1 if step < 2 else math.nan)
    opt.step(closure_of(model, opt))
    opt.step(closure_of(model, opt))
    held = Held(model.parameters())
    with pytest.raises(ValueError, match="rho must be a finite number"):
        opt.step(closure_of(model, opt))
    held.assert_exact()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"p": 0.5}, "p must be at least 1"),
        ({"p": -2}, "p must be at least 1"),
        ({"p": math.nan}, "p must be at least 1"),
        ({"eta": 0.1}, "adaptive=True"),
        ({"eta": -0.1, "adaptive": True}, "eta must be"),
        ({"eta": math.inf, "adaptive": True}, "eta must be"),
        ({"ascent_steps": 0}, "ascent_steps must be"),
        ({"ascent_steps": 1.5}, "ascent_steps must be"),
        ({"ascent_steps": 2, "second_order": True}, "second_order"),
        ({"every": 0}, "every must be"),
        ({"every": 1.5}, "every must be"),
        ({"window": (0.9, 1.0)}, "total_steps=epochs"),
        ({"window": (0.9, 0.1), "total_steps": 10}, "window must satisfy"),
        ({"window": (0.5, 1.5), "total_steps": 10}, "window must satisfy"),
        ({"window": (0.5,), "total_steps": 10}, "pair"),
        ({"total_steps": 0}, "total_steps must be"),
        ({"micro_batch_size": 0}, "micro_batch_size must be"),
        ({"micro_batch_size": True}, "micro_batch_size must be"),
        ({"ascent_fraction": 0.0}, "ascent_fraction must be"),
        ({"ascent_fraction": 1.5}, "ascent_fraction must be"),
    ],
    ids=str,
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize(
    ("slot", "value", "short"),
    [
        ("ascent", GradientAscent(Ball()), {"p": 3}),
        ("ascent", GradientAscent(Ball()), {"adaptive": True}),
        ("ascent", GradientAscent(Ball()), {"ascent_steps": 2}),
        ("descent", PerturbedGradient(), {"second_order": True}),
        ("schedule", Schedule(), {"every": 2}),
        ("schedule", Schedule(), {"window": (0.5, 1.0)}),
        ("batching", Batching(), {"micro_batch_size": 2}),
    ],
    ids=str,
)
def test_a_slot_and_its_short_option(slot, value, short):
    with pytest.raises(TypeError, match=f"{slot}= and its short options were both given"):
        make(**{slot: value}, **short)
    make(**{slot: value})


@pytest.mark.parametrize(
    ("wrong", "right"), [("rhoo", "rho"), ("adaptve", "adaptive"), ("microbatch_size", "micro_batch_size")]
)
def test_an_unknown_option_names_the_nearest(wrong, right):
    with pytest.raises(TypeError, match=f"'{wrong}'.*did you mean '{right}'"):
        make(**{wrong: 1})
    with pytest.raises(TypeError, match=f"'{wrong}'.*did you mean '{right}'"):
        SAM(mlp().parameters(), torch.optim.SGD, lr=0.1, **{wrong: 1})


def test_an_unknown_option_without_a_near_one():
    with pytest.raises(TypeError, match=r"'xyz'.*Known: rho"):
        make(xyz=1)
    with pytest.raises(TypeError, match="xyz"):
        SAM(mlp().parameters(), torch.optim.SGD, lr=0.1, xyz=1)


def test_options_of_the_base_beside_a_ready_base():
    with pytest.raises(TypeError, match="'lr'"):
        make(lr=0.1)


@pytest.mark.parametrize("params", [[], iter(()), [{"params": []}]], ids=["list", "iterator", "group"])
def test_an_empty_parameter_list(params):
    with pytest.raises(ValueError, match="empty parameter list"):
        SAM(params, torch.optim.SGD, rho=0.1, lr=0.1)


def test_what_cannot_be_a_base():
    model = mlp()
    with pytest.raises(TypeError, match="SAM needs a base optimizer"):
        SAM(model.parameters())
    with pytest.raises(TypeError, match="SAM needs a base optimizer"):
        SAM(model.parameters(), rho=0.1)
    with pytest.raises(ValueError, match="LBFGS cannot be the base"):
        SAM(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="LBFGS cannot be the base"):
        SAM(model.parameters(), torch.optim.LBFGS)
    with pytest.raises(ValueError, match="already a SAM"):
        SAM(SAM(sgd(model)))
    with pytest.raises(TypeError, match="leave the class out"):
        SAM(sgd(model), torch.optim.SGD, rho=0.1)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        SAM(model.parameters(), lambda params: "not one")


def test_errors_of_the_base_class_pass_through():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SAM(mlp().parameters(), torch.optim.SGD, lr=-1.0)


def test_a_group_that_overlaps_is_refused():
    case = Checked()
    groups = len(case.opt.param_groups)
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        case.opt.add_param_group({"params": list(case.model[0].parameters())})
    assert len(case.opt.param_groups) == groups
    case.assert_usable()


@pytest.mark.parametrize(
    ("make_batch", "match"),
    [
        (lambda: {"x": X, "y": Y[:3]}, "different first dimensions.*'x'.*16.*'y'.*3"),
        (lambda: (1, 2), "without tensors"),
        (lambda: X[:0], "empty batch"),
    ],
    ids=["uneven", "no tensor", "empty"],
)
def test_a_batch_that_cannot_be_cut(make_batch, match):
    case = Checked(micro_batch_size=4)
    case.raises(ValueError, match, lambda: case.opt.step(lambda b: 0, make_batch()))
