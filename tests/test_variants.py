"""The registry: every row makes an optimizer that steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.core_cases import X, Y, assert_same, mlp, sgd, snapshot
from torch import nn
from torch.nn import functional as F

from flatwise import SAM, Variant, create, list_variants, variant_info

NEEDED = {"p": math.inf, "total_steps": 10, "micro_batch_size": 5}


def options_of(name):
    return {key: NEEDED[key] for key in variant_info(name).needs}


@pytest.mark.parametrize("name", list_variants())
def test_every_method_steps(name):
    model = mlp()
    opt = create(name, sgd(model), **options_of(name))
    assert isinstance(opt, SAM)
    assert opt.param_groups[0]["rho"] == variant_info(name).rho
    before = snapshot(model)
    losses, active, passes = [], 0, 0.0
    for _ in range(10):
        losses.append(float(opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), (X, Y))))
        active += opt.last.active
        passes += opt.last.passes
    assert losses[-1] < losses[0]
    assert active >= 1
    expected = {"every-k": 12, "late": 11, "quarter": 12.5, "multi-step": 30, "second-order": 30}
    assert passes == pytest.approx(expected.get(name, 20))
    assert any(not torch.equal(before[k], v) for k, v in snapshot(model).items())


@pytest.mark.parametrize("name", list_variants())
def test_every_method_is_sam_with_the_options_of_its_row(name):
    row = variant_info(name)
    by_name, by_hand = mlp(), mlp()
    opts = (
        create(name, sgd(by_name), **options_of(name)),
        SAM(sgd(by_hand), rho=row.rho, **row.options, **options_of(name)),
    )
    for model, opt in zip((by_name, by_hand), opts, strict=True):
        for _ in range(3):
            opt.step(lambda b, model=model: F.cross_entropy(model(b[0]), b[1]), (X, Y))
    assert_same(snapshot(by_name), snapshot(by_hand))


@pytest.mark.parametrize("name", list_variants())
def test_every_row_says_what_it_is(name):
    row = variant_info(name)
    assert isinstance(row, Variant)
    assert row.name == name
    assert row.rho > 0
    assert set(row.slots) <= {"ascent", "descent", "schedule", "batching"}
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


@pytest.mark.parametrize(("wrong", "right"), [("assam", "asam"), ("second_order", "second-order"), ("msam", "m-sam")])
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
