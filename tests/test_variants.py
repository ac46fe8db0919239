"""The registry: every row makes an optimizer that steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.core_cases import X, Y, assert_same, mlp, sgd, snapshot
from tests.family_cases import options_of, ranks
from torch import nn
from torch.nn import functional as F

from flatwise import (
    BSAM,
    SAM,
    AdaptiveSchedule,
    Ball,
    Batching,
    GradientAscent,
    Momentum,
    PerturbedGradient,
    ReusedPart,
    Schedule,
    SurrogateGap,
    Variant,
    create,
    list_variants,
    variant_info,
)

PASSES = {
    "every-k": 12, "late": 11, "quarter": 12.5, "multi-step": 30, "second-order": 30, "looksam": 12, "warmup-off": 17,
    "bernoulli": 16, "k-sam": 10, "esam-sds": 15, "msam": 10, "adaptive-msam": 10, "stale": 10, "random": 10,
    "frugal": 15,
}  # fmt: skip


@pytest.mark.parametrize("name", list_variants())
def test_every_method_steps(name):
    model = nn.Sequential(nn.LayerNorm(6), mlp()) if name == "sam-on" else mlp()
    options = options_of(name, model)
    if "total_steps" in options:
        options["total_steps"] = 10
    opt = create(name, sgd(model), **options)
    assert isinstance(opt, BSAM if name == "bsam" else SAM)
    assert opt.param_groups[0]["rho"] == pytest.approx(variant_info(name).rho, rel=1e-15)
    before = snapshot(model)
    reduction = "none" if ranks(name) else "mean"
    losses, active, passes = [], 0, 0.0
    for _ in range(10):
        losses.append(float(opt.step(lambda b: F.cross_entropy(model(b[0]), b[1], reduction=reduction), (X, Y))))
        active += opt.last.active
        passes += opt.last.passes
    assert all(map(math.isfinite, losses))
    assert active >= 1
    if name != "ae-sam":  # which decides by the gradient
        assert passes == pytest.approx(PASSES.get(name, 20))
    assert any(not torch.equal(before[k], v) for k, v in snapshot(model).items())


SLOTS = {
    "gsam": {"descent": SurrogateGap(), "schedule": Schedule(rho_min=0.1), "rho": 0.6},
    "msam": {"ascent": GradientAscent(direction=Momentum()), "rho": 3.0},
    "looksam": {"descent": ReusedPart(), "schedule": Schedule(every=5), "rho": 0.1},
    "asam": {"ascent": GradientAscent(Ball(adaptive=True, eta=0.01)), "rho": 0.5},
    "quarter": {"batching": Batching(ascent_fraction=0.25), "rho": 0.05},
}


@pytest.mark.parametrize("name", SLOTS)
def test_a_method_is_a_row_of_slots(name):
    by_name, by_hand = mlp(), mlp()
    opts = create(name, sgd(by_name)), SAM(sgd(by_hand), **SLOTS[name])
    for model, opt in zip((by_name, by_hand), opts, strict=True):
        for _ in range(6):
            opt.step(lambda b, model=model: F.cross_entropy(model(b[0]), b[1]), (X, Y))
    assert_same(snapshot(by_name), snapshot(by_hand))


def test_options_of_every_slot_are_flat():
    opt = create("gsam", sgd(mlp()), every=2, p=math.inf, micro_batch_size=5, alpha=0.3, rho_min=0.2)
    assert opt._ascent.ball.p == math.inf
    assert opt._descent == SurrogateGap(0.3)
    assert opt._schedule == Schedule(every=2, rho_min=0.2)
    assert opt._batching == Batching(5)


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("lp", {"ascent": GradientAscent(Ball(p=1))}),
        ("late", {"schedule": Schedule(window=(0.5, 1.0), total_steps=9)}),
        ("warmup-off", {"schedule": Schedule(warmup_steps=2)}),
        ("ae-sam", {"schedule": AdaptiveSchedule(total_steps=9)}),
        ("m-sam", {"batching": Batching(4)}),
    ],
)
def test_a_needed_option_may_be_inside_a_slot(name, slot):
    opt = create(name, sgd(mlp()), **slot)
    ((key, value),) = slot.items()
    assert getattr(opt, f"_{key}") is value
    with pytest.raises(TypeError, match=f"'{name}' needs"):  # another slot does not stand for it
        create(name, sgd(mlp()), descent=PerturbedGradient())


def test_bsam_takes_parameters_and_learning_rates_from_a_base():
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}]
    opt = create("bsam", torch.optim.SGD(groups, lr=0.2, momentum=0.9, weight_decay=0.01), train_size=16)
    assert [g["lr"] for g in opt.param_groups] == [0.3, 0.2]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.01, 0.01]
    assert [p for g in opt.param_groups for p in g["params"]] == list(model.parameters())
    assert "momentum" not in opt.param_groups[0]


def test_parameters_alone_are_no_base():
    with pytest.raises(TypeError, match="SAM needs a base optimizer"):
        create("sam", mlp().parameters())


def test_a_slot_and_its_options_are_not_both_given():
    with pytest.raises(TypeError, match="schedule= and every were both given"):
        create("sam", sgd(mlp()), schedule=Schedule(), every=2)


@pytest.mark.parametrize("name", list_variants())
def test_every_row_says_what_it_is(name):
    row = variant_info(name)
    assert isinstance(row, Variant)
    assert row.name == name
    assert row.rho > 0
    low, high = row.rho_range
    assert low <= row.rho <= high
    assert set(row.slots) <= ({"own"} if row.own else {"ascent", "descent", "schedule", "batching"})
    assert row.evidence.split(":")[0] in {"strong", "good", "fair", "mixed", "weak", "contradicted", "none"}
    assert row.summary
    assert row.passes
    assert row.source
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.rho = 1.0
    with pytest.raises(TypeError):
        row.options["rho"] = 1.0


def test_names_are_unique_and_sam_is_first():
    names = list_variants()
    assert names[0] == "sam"
    assert len(set(names)) == len(names)
    names.clear()
    assert list_variants()


@pytest.mark.parametrize("name", [n for n in list_variants() if variant_info(n).needs])
def test_a_needed_option_that_is_missing(name):
    missing = variant_info(name).needs[0]
    with pytest.raises(TypeError, match=f"'{name}' needs {missing}"):
        create(name, sgd(mlp()))


def test_options_override_the_row():
    opt = create("asam", sgd(mlp()), rho=0.7, eta=0.2)
    assert opt.param_groups[0]["rho"] == 0.7
    opt = create("every-k", sgd(mlp()), every=2)
    param = nn.Parameter(torch.ones(2))
    opt = create("every-k", torch.optim.SGD([param], lr=0.1), every=2)
    seen = []
    for _ in range(4):
        opt.step(lambda: (opt.zero_grad(), (loss := param.sum()).backward(), loss)[-1])
        seen.append(opt.last.active)
    assert seen == [True, False, True, False]


@pytest.mark.parametrize(
    ("wrong", "right"), [("assam", "asam"), ("second_order", "second-order"), ("looksm", "looksam")]
)
def test_an_unknown_name_suggests_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"unknown method '{wrong}'. Did you mean '{right}'"):
        variant_info(wrong)
    with pytest.raises(ValueError, match=f"Did you mean '{right}'"):
        create(wrong, sgd(mlp()))


def test_an_unknown_name_without_a_near_one_lists_all():
    with pytest.raises(ValueError, match="Known: sam, ") as caught:
        create("zzzzzz", sgd(mlp()))
    assert "Did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in list_variants())


def test_an_unknown_option_is_not_swallowed():
    with pytest.raises(TypeError, match=r"'adaptve'.*did you mean 'adaptive'"):
        create("sam", sgd(mlp()), adaptve=True)
    with pytest.raises(TypeError, match="BSAM does not know this option"):
        create("bsam", sgd(mlp()), train_size=5, alpha=1.0)
