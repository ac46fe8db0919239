"""One grid of checks for the whole registry: every row joins by its name."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from tests import family_cases
from tests.core_cases import Held, assert_same, batch, same, snapshot, with_batchnorm, with_dropout
from tests.family_cases import (
    BASES,
    NAMES,
    NAMES_AND_BASES,
    STEPS,
    WRAPPED,
    bases_of,
    loss_of,
    make,
    options_of,
    parts_of,
    ranks,
    splits,
    train,
)
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import functional as F
from torch.optim import lr_scheduler

from flatwise import variant_info
from flatwise.directions import Gradient, Momentum

LR = 0.1


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_row_that_needs_an_unknown_option_says_where_to_add_it(monkeypatch):
    monkeypatch.delitem(family_cases.NEEDED, "p")
    with pytest.raises(pytest.fail.Exception, match=r"'lp' needs p: add a value to NEEDED in tests/family_cases.py"):
        options_of("lp", nn.Linear(1, 1))


# Saving, copying


@pytest.mark.parametrize(("name", "base"), NAMES_AND_BASES)
def test_resuming_equals_never_having_stopped(name, base):
    straight = with_dropout()
    opt = make(name, straight, base)
    torch.manual_seed(7)
    expected = train(name, straight, opt, range(STEPS), lr=LR)

    first = with_dropout()
    first_opt = make(name, first, base)
    torch.manual_seed(7)
    seen = train(name, first, first_opt, range(7), lr=LR)
    saved = through_a_file({"model": first.state_dict(), "opt": first_opt.state_dict(), "rng": torch.get_rng_state()})
    second = with_dropout(seed=99)
    second_opt = make(name, second, base)
    second.load_state_dict(saved["model"])
    second_opt.load_state_dict(saved["opt"])
    torch.set_rng_state(saved["rng"])
    seen += train(name, second, second_opt, range(7, STEPS), lr=LR)
    assert_same(seen, expected)
    assert_same(snapshot(second), snapshot(straight))
    assert_same(second_opt.state_dict(), opt.state_dict())
    assert second_opt.last.step == STEPS - 1


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_with_its_model_goes_on_the_same(name, way):
    model = with_dropout()
    opt = make(name, model)
    train(name, model, opt, range(7), lr=LR)
    pair = (model, opt)
    twin, twin_opt = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    if variant_info(name).descent.needs_output:  # it looks at the module itself, which an optimizer does not copy
        with pytest.raises(RuntimeError, match=r"make the optimizer anew with model=model, and load_state_dict\(\)"):
            train(name, twin, twin_opt, [7])
        state = twin_opt.state_dict()
        twin_opt = make(name, twin)
        twin_opt.load_state_dict(state)
    torch.manual_seed(8)
    expected = train(name, model, opt, range(7, STEPS), lr=LR)
    before = snapshot(model)
    torch.manual_seed(8)
    assert_same(train(name, twin, twin_opt, range(7, STEPS), lr=LR), expected)
    assert_same(snapshot(twin), before)
    assert_same(snapshot(model), before)
    assert_same(twin_opt.state_dict(), opt.state_dict())


@pytest.mark.parametrize(("name", "base"), [row for row in NAMES_AND_BASES if row[0] in WRAPPED])
def test_checkpoints_of_the_plain_base_go_both_ways(name, base):
    plain_model, model = with_dropout(), with_dropout()
    plain = BASES[base](plain_model)
    for step in range(3):
        plain.zero_grad()
        F.cross_entropy(plain_model(batch(step)[0]), batch(step)[1]).backward()
        plain.step()
    opt = make(name, model, base)
    radius = opt.param_groups[0]["rho"]
    model.load_state_dict(plain_model.state_dict())
    opt.load_state_dict(through_a_file(plain.state_dict()))
    assert opt.param_groups[0]["rho"] == radius
    train(name, model, opt, range(STEPS))
    saved = opt.base_state_dict()
    names = [key for group in saved["param_groups"] for key in group]
    names += [key for entries in saved["state"].values() for key in entries]
    assert not [key for key in names if key.startswith("sam_") or key == "rho"]
    fresh = BASES[base](with_dropout())
    fresh.load_state_dict(through_a_file(saved))
    assert set(fresh.state_dict()["param_groups"][0]) == set(plain.state_dict()["param_groups"][0])
    assert_same(fresh.state_dict()["state"], opt.base_optimizer.state_dict()["state"])


@pytest.mark.parametrize("name", [name for name in NAMES if variant_info(name).memory != "0"])
def test_the_distributed_checkpoint_keeps_what_a_method_remembers(name):
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=False)
    model, fresh = with_dropout(), with_dropout(seed=99)
    opt, other = make(name, model), make(name, fresh)
    train(name, model, opt, range(7))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    fresh.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(fresh, other, saved, options=options)
    for its_model, its in ((model, opt), (fresh, other)):
        torch.manual_seed(2)
        train(name, its_model, its, range(7, STEPS))
    assert_same(snapshot(fresh), snapshot(model))


# Gradients of all kinds


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


# Passes, buffers, random state

PASSES = {
    "sam-on": 2.0,
    "multi-step": 3.0,
    "second-order": 3.0,
    "looksam": 1 + 3 / STEPS,
    "every-k": 1 + 3 / STEPS,
    "late": 1 + 1 / STEPS,
    "warmup-off": 2 - 3 / STEPS,
    "quarter": 1.25,
    "k-sam": 1.0,
    "esam-sds": 1.5,
}
"""Mean gradients per step over the 12 steps, in units of the batch, where the row has a formula."""
CALLS = {"m-sam": 2.0 * 3, "quarter": 2.0, "k-sam": 3.0, "esam-sds": 3.0}
"""Mean calls of the loss function, where they are not the passes: parts, and forward passes that rank samples."""
DRAWN = ("bernoulli", "ae-sam")


@pytest.mark.parametrize("name", NAMES)
def test_passes_and_calls_are_those_of_the_row(name):
    model = with_dropout()
    opt = make(name, model)
    loss_fn, calls, passes, told, active = loss_of(name, model), [], 0.0, 0, 0
    for step in range(STEPS):
        opt.step(lambda part: calls.append(0) or loss_fn(part), batch(step))
        passes += opt.last.passes
        told += opt.last.closure_calls
        active += opt.last.active
    row = variant_info(name)
    assert told == len(calls)
    if name in DRAWN:
        assert passes == len(calls) == STEPS + active
        assert 0 < active < STEPS
        return
    known = PASSES.get(name) or (float(row.passes) if re.fullmatch(r"\d+", row.passes) else None)
    assert known is not None, f"add the mean passes of {name!r} to PASSES: its row says {row.passes!r}"
    assert passes / STEPS == pytest.approx(known)
    assert len(calls) / STEPS == pytest.approx(CALLS.get(name, known))
    if row.own is None and not row.direction.uses_gradient:
        assert len(calls) == STEPS


@pytest.mark.parametrize("name", NAMES)
def test_buffers_and_random_state_are_those_of_one_plain_pass(name):
    model, twin = with_dropout(), with_dropout()
    opt = make(name, model)
    row, loss_fn = variant_info(name), loss_of(name, model)
    at_w = row.own is None and row.direction.uses_gradient
    displaced = 0
    for step in range(STEPS):
        before, rng = snapshot(model), torch.get_rng_state()
        calls = []

        def watched(part, calls=calls):
            calls.append((part, [p.detach().clone() for p in model.parameters()]))
            return loss_fn(part)

        opt.step(watched, batch(step))
        after = torch.get_rng_state()
        # The pass that counts is the first one over each part, at the weights that it saw.
        counted = calls[:: len(calls) // parts_of(name)]
        assert len(counted) == parts_of(name)
        torch.set_rng_state(rng)
        twin.load_state_dict(before)
        for part, weights in counted:
            moved = not same(weights, [before[key] for key, _ in model.named_parameters()])
            displaced += moved
            assert not (moved and at_w)
            for param, weight in zip(twin.parameters(), weights, strict=True):
                param.data.copy_(weight)
            with torch.no_grad():
                twin(part[0])
        mine, its = snapshot(model), snapshot(twin)
        for key, buffer in model.named_buffers():
            assert same(buffer, its[key]), (step, key)
        assert int(mine["3.num_batches_tracked"]) == (step + 1) * parts_of(name)
        if "ascent_fraction" in row.options:  # masks of the whole batch, though the first pass saw a part
            torch.set_rng_state(rng)
            twin(batch(step)[0])
        assert same(torch.get_rng_state(), after)
    assert at_w or displaced >= STEPS - 1


# Schedulers, dtypes, radius 0


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_on_the_wrapper(name):
    model, plain_model = with_dropout(), with_dropout()
    opt, plain = make(name, model), BASES["momentum"](plain_model)
    kinds = (
        lambda o: lr_scheduler.StepLR(o, 3),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    )
    for kind in kinds:
        wrapped, expected = kind(opt), kind(plain)
        for step in range(4):
            train(name, model, opt, [step])
            plain.step()
            value = (1.0,) if isinstance(wrapped, lr_scheduler.ReduceLROnPlateau) else ()
            wrapped.step(*value)
            expected.step(*value)
            assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_stay(name, dtype):
    model = with_dropout().to(dtype)
    opt = make(name, model)
    train(name, model, opt, range(7))
    other = with_dropout().to(dtype)
    loaded = make(name, other)
    loaded.load_state_dict(through_a_file(opt.state_dict()))
    better = {torch.bfloat16: torch.float32}.get(dtype, dtype)
    for entries in (opt.state_dict()["state"], loaded.state_dict()["state"]):
        assert entries
        for entry in entries.values():
            for key, value in entry.items():
                # What changes by little in a step: an average, and bSAM's two.
                fine = key in ("sam_average", "precision", "momentum")
                assert value.dtype == (better if fine else dtype), key
    assert_same(loaded.state_dict(), opt.state_dict())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} <= {dtype}
    other.load_state_dict(model.state_dict())
    for twin, its in ((model, opt), (other, loaded)):
        torch.manual_seed(9)
        train(name, twin, its, range(7, STEPS))
    assert_same(snapshot(other), snapshot(model))


@pytest.mark.parametrize(("name", "base"), [row for row in NAMES_AND_BASES if row[0] in WRAPPED])
def test_radius_0_is_the_base(name, base):
    options = {"rho": 0.0, **({"rho_min": 0.0} if "rho_min" in variant_info(name).options else {})}
    model, plain_model = with_dropout(), with_dropout()
    opt, plain = make(name, model, base, **options), BASES[base](plain_model)
    torch.manual_seed(3)
    for _, reason in train(name, model, opt, range(STEPS), lr=LR):
        assert reason == "zero radius"
    state = torch.get_rng_state()
    torch.manual_seed(3)
    for step in range(STEPS):
        plain.param_groups[0]["lr"] = LR * (1 - step / (2 * STEPS))
        x, y = batch(step)
        size = -(-16 // parts_of(name)) if parts_of(name) > 1 else 16
        total = {}
        for xs, ys in zip(x.split(size), y.split(size), strict=True):
            plain.zero_grad()
            loss = F.cross_entropy(plain_model(xs), ys, reduction="none" if ranks(name) else "mean")
            loss.mean().backward()
            for p in plain_model.parameters():
                grad = p.grad * (len(ys) / 16)
                total[p] = total[p] + grad if p in total else grad
        for p, grad in total.items():
            p.grad = grad
        plain.step()
    assert_same(snapshot(model), snapshot(plain_model))
    assert same(torch.get_rng_state(), state)
    assert_same(opt.base_state_dict(), plain.state_dict())


# Outside a step the weights are w


class Broken(BaseException):  # as Ctrl-C is
    pass


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


# Forms of call


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
    own = row.descent.needs_output or not row.options.keys().isdisjoint({"ascent_steps", "second_order"})
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
