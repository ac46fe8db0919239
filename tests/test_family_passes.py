"""Every row of the registry: its passes and calls, the buffers and random state after a step, its step at radius 0."""

import re

import pytest
import torch
from tests.core_cases import assert_same, batch, same, snapshot, with_dropout
from tests.family_cases import (
    BASES,
    NAMES,
    NAMES_AND_BASES,
    STEPS,
    WRAPPED,
    loss_of,
    make,
    parts_of,
    ranks,
    train,
)
from torch.nn import functional as F

from flatwise import variant_info

LR = 0.1

PASSES = {
    "sam-on": 2.0,
    "multi-step": 3.0,
    "second-order": 3.0,
    "looksam": 1 + 3 / STEPS,
    "every-k": 1 + 3 / STEPS,
    "late": 1 + 1 / STEPS,
    "warmup-off": 2 - 3 / STEPS,
    "frugal": 1.5,
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
    if row.own is None and not row.direction.uses_gradient and name != "frugal":
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
    looks = int(opt.param_groups[0].get("sam_auto_looks", 0))  # where the pass that counts is at w
    assert at_w or displaced >= STEPS - 1 - looks > 0


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
