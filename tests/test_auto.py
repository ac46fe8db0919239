"""``rho="auto"`` in a training: what it shows, costs and saves, in every form of call, and where it must do nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core_cases import assert_same, batch, closure_of, mlp, sgd, snapshot, train, with_dropout
from tests.family_cases import NAMES, SHORT, make, options_of
from tests.family_cases import train as train_by_name
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise import SAM, AutoRadius, Frugal

COUNTS = ("sam_auto_steps", "sam_auto_looks", "sam_auto_drag")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sam_auto(model: nn.Module) -> SAM:
    return SAM(sgd(model), rho="auto")


def frugal(model: nn.Module) -> SAM:
    return Frugal(sgd(model), total_steps=400)


def frugal_adamw(model: nn.Module) -> SAM:
    return Frugal(adamw(model))


MAKERS: dict[str, Callable[[nn.Module], SAM]] = {"sam": sam_auto, "frugal": frugal, "frugal, adamw": frugal_adamw}
both = pytest.mark.parametrize("kind", MAKERS)


def counts(opt: Any) -> list[Any]:
    return [opt.param_groups[0].get(name) for name in COUNTS]


def path(opt: Any, model: nn.Module, steps: range) -> list[float]:
    radii = []
    for step in steps:
        train(model, opt, [step])
        radii.append(opt.param_groups[0]["rho"])
    return radii


# What it shows and costs


@both
def test_what_is_shown(kind: str) -> None:
    model = mlp()
    opt = MAKERS[kind](model)
    stretch = 6 if kind == "frugal" else 1
    assert opt.param_groups[0]["rho"] == pytest.approx(0.05 * stretch)
    for step in range(12):
        before = opt.param_groups[0]["rho"]
        train(model, opt, [step])
        last, looks = opt.last, step % 2 == 1
        assert [not math.isnan(number) for number in (last.turn, last.drag)] == [looks, looks]
        assert last.rho == pytest.approx(before / stretch if looks else before, rel=1e-15)
        assert last.passes == (2 if looks or kind == "sam" else 1)
        assert looks or opt.param_groups[0]["rho"] == before
        if looks:
            assert -1 <= last.drag <= 1
            assert last.turn < 1
            assert last.perturbation_norm == pytest.approx(last.rho)
            assert not math.isnan(last.loss + last.perturbed_loss)
    assert counts(opt)[:2] == [12, 6]
    assert opt.param_groups[0]["rho"] != pytest.approx(0.05 * stretch)


@both
def test_a_group_that_comes_later_joins_in_at_the_radius_of_the_others(kind: str) -> None:
    model = mlp()
    opt = MAKERS[kind](model)
    first = opt.param_groups[0]["rho"]
    train(model, opt, range(12))
    reached = opt.param_groups[0]["rho"]
    assert reached != pytest.approx(first)
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "rho": 0.7})
    assert [group["rho"] for group in opt.param_groups] == [reached, reached, 0.7]


def test_frugal_costs_a_thirty_second_and_twelve_looks() -> None:
    model, passes = mlp(), 0.0
    opt = Frugal(sgd(model, 0.01), total_steps=640)
    for step in range(640):
        train(model, opt, [step % 7])
        passes += opt.last.passes
    looks = opt.param_groups[0]["sam_auto_looks"]
    assert passes == 640 + looks
    assert looks == 10 + 19  # 1.5 % of 640, then every 32nd
    assert passes / 640 <= 1 + 1 / 32 + 12 / 640


def test_a_look_uses_the_radius_along_the_gradient() -> None:
    """With the length of the perturbation measured on the weights, by the second pass."""
    model = mlp()
    opt = Frugal(sgd(model))
    train(model, opt, [0])
    before, lengths = torch.cat([p.detach().flatten() for p in model.parameters()]), []

    def loss_fn(part: Any) -> Tensor:
        now = torch.cat([p.detach().flatten() for p in model.parameters()])
        lengths.append(float((now - before).norm()))
        return F.cross_entropy(model(part[0]), part[1])

    opt.step(loss_fn, batch(1))
    assert lengths == [0.0, pytest.approx(0.05, rel=1e-5)]


# Saving


@both
@pytest.mark.parametrize("at", [4, 9, 26])
def test_resuming_equals_never_having_stopped(kind: str, at: int) -> None:
    model = with_dropout()
    opt = MAKERS[kind](model)
    train(model, opt, range(at))
    saved, random = copy.deepcopy((model.state_dict(), opt.state_dict())), torch.get_rng_state()
    group = saved[1]["param_groups"][0]
    assert [group[name] for name in COUNTS] == counts(opt)
    assert None not in counts(opt)
    assert group["rho"] == opt.param_groups[0]["rho"]
    train(model, opt, range(at, 40))

    other = with_dropout(3)
    again = MAKERS[kind](other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    torch.set_rng_state(random)
    train(other, again, range(at, 40))
    assert_same(snapshot(other), snapshot(model))
    assert (counts(again), again.param_groups[0]["rho"]) == (counts(opt), opt.param_groups[0]["rho"])


@both
@pytest.mark.parametrize("by", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_goes_on_alike(kind: str, by: Callable[[Any], Any]) -> None:
    model = mlp()
    opt = MAKERS[kind](model)
    train(model, opt, range(6))
    other, again = by((model, opt))
    assert path(opt, model, range(6, 12)) == path(again, other, range(6, 12))
    assert_same(snapshot(other), snapshot(model))


@both
def test_checkpoints_of_the_plain_base(kind: str) -> None:
    model = mlp()
    opt = MAKERS[kind](model)
    train(model, opt, range(6))
    plain = opt.base_state_dict()
    assert not [key for key in plain["param_groups"][0] if key.startswith("sam_") or key == "rho"]
    opt.load_state_dict(plain)
    rho = opt.param_groups[0]["rho"]
    assert counts(opt) == [None] * 3
    train(model, opt, [0])
    assert opt.param_groups[0]["rho"] == rho
    train(model, opt, [1])
    assert opt.last.turn < 1
    assert counts(opt)[:2] == [2, 1]


# Groups


@both
def test_groups_with_a_radius_of_their_own_stay(kind: str) -> None:
    model = mlp()
    first, last = model[0], model[2]
    groups = [
        {"params": [first.weight]}, {"params": [first.bias], "rho": 0.02}, {"params": [last.weight], "rho": 0.0},
        {"params": [last.bias]},
    ]  # fmt: skip
    base = torch.optim.AdamW(groups, lr=1e-2) if "adamw" in kind else torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    opt = SAM(base, rho="auto") if kind == "sam" else Frugal(base)
    start = [group["rho"] for group in opt.param_groups]
    weight = last.weight.detach().clone()

    def loss_fn(part: Any) -> Tensor:
        assert torch.equal(last.weight, weight)
        return F.cross_entropy(model(part[0]), part[1])

    for step in range(10):
        weight = last.weight.detach().clone()
        opt.step(loss_fn, batch(step))
    end = [group["rho"] for group in opt.param_groups]
    assert end[1:3] == start[1:3] == [0.02, 0.0]
    assert end[0] == end[3] != start[0]


def test_a_radius_that_was_set_to_zero_stays() -> None:
    model = mlp()
    opt = SAM(torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9), rho="auto")
    train(model, opt, range(4))
    opt.param_groups[1]["rho"] = 0.0
    train(model, opt, range(4, 8))
    assert opt.param_groups[1]["rho"] == 0
    assert opt.param_groups[0]["rho"] > 0
    for group in opt.param_groups:
        group["rho"] = 0.0
    seen = counts(opt)
    train(model, opt, range(8, 12))
    assert (opt.last.reason, counts(opt)) == ("zero radius", seen)


# Steps that do not count


@both
@pytest.mark.parametrize("which", [1, 2])
def test_a_look_without_an_update_changes_nothing(kind: str, which: int) -> None:
    """The gradient of pass 1 or 2 is NaN."""
    model = mlp()
    opt = MAKERS[kind](model)
    train(model, opt, range(5))
    seen, rho, weights, calls = counts(opt), opt.param_groups[0]["rho"], snapshot(model), 0

    def loss_fn(part: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = F.cross_entropy(model(part[0]), part[1])
        return loss * math.nan if calls == which else loss

    opt.step(loss_fn, batch(5))
    if which == 2:
        assert opt.last.reason == "non-finite update"
        assert_same(snapshot(model), weights)
    else:
        assert not opt.last.active
    assert opt.param_groups[0]["rho"] == rho
    assert counts(opt) == seen
    train(model, opt, [5])
    assert counts(opt)[:2] == [seen[0] + 1, seen[1] + 1]
    assert opt.param_groups[0]["rho"] != rho


@both
@pytest.mark.parametrize("which", [1, 2])
def test_a_look_that_raises_changes_nothing(kind: str, which: int) -> None:
    model, other = mlp(), mlp()
    opt, never = MAKERS[kind](model), MAKERS[kind](other)
    train(model, opt, range(5))
    train(other, never, range(5))
    calls = 0

    def loss_fn(part: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == which:
            raise KeyError("a fault")
        return F.cross_entropy(model(part[0]), part[1])

    with pytest.raises(KeyError):
        opt.step(loss_fn, batch(5))
    assert (counts(opt), opt.param_groups[0]["rho"]) == (counts(never), never.param_groups[0]["rho"])
    assert path(opt, model, range(5, 12)) == path(never, other, range(5, 12))
    assert_same(snapshot(model), snapshot(other))


@pytest.mark.parametrize("options", [{"every": 5}, {"window": (0.2, 0.7), "total_steps": 40}])
def test_steps_that_the_schedule_leaves_out_do_not_look(options: dict[str, Any]) -> None:
    model = mlp()
    opt, perturbed = SAM(sgd(model), rho="auto", **options), 0
    for step in range(40):
        train(model, opt, [step])
        looks = opt.last.active and perturbed % 2 == 1
        assert math.isnan(opt.last.turn) != looks
        perturbed += opt.last.active
    assert counts(opt)[:2] == [perturbed, perturbed // 2]
    assert 0 < perturbed < 40


def test_the_warm_up_is_left_out_and_ae_sam_counts_what_it_perturbs() -> None:
    model = mlp()
    opt = flatwise.create("warmup-off", sgd(model), warmup_steps=7, rho="auto")
    train(model, opt, range(7))
    assert counts(opt) == [None] * 3
    train(model, opt, range(7, 11))
    assert counts(opt)[:2] == [4, 2]
    model, perturbed, looks = mlp(), 0, 0
    opt = flatwise.create("ae-sam", sgd(model), total_steps=40, delta=0.5, rho="auto")
    for step in range(20):
        train(model, opt, [step])
        perturbed += opt.last.active
        looks += not math.isnan(opt.last.turn)
    assert counts(opt)[:2] == [perturbed, looks]
    assert 2 < perturbed < 20
    assert looks == perturbed // 2


# Forms of call


def by_closure(model: nn.Module, opt: Any, step: int) -> None:
    opt.step(closure_of(model, opt, *batch(step)))


def by_batch(model: nn.Module, opt: Any, step: int) -> None:
    opt.step(lambda part: F.cross_entropy(model(part[0]), part[1]), batch(step))


def by_accumulation(model: nn.Module, opt: Any, step: int) -> None:
    def closure() -> Tensor:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    opt.step([closure])


def by_two_calls(model: nn.Module, opt: Any, step: int) -> None:
    closure = closure_of(model, opt, *batch(step))
    closure()
    opt.first_step()
    closure()
    opt.second_step()


def by_block(model: nn.Module, opt: Any, step: int) -> None:
    closure = closure_of(model, opt, *batch(step))
    closure()
    with opt.perturbed():
        closure()
    opt.base_optimizer.step()


def by_framework(model: nn.Module, opt: Any, step: int) -> None:
    closure = closure_of(model, opt, *batch(step))
    closure()
    if opt.perturb():
        closure()
        opt.restore()
    opt.step()


INSIDE = (by_closure, by_batch, by_accumulation)
OUTSIDE = (by_two_calls, by_block, by_framework)


def turns(form: Callable[..., None], rho: AutoRadius) -> tuple[list[float], list[float], dict[str, Tensor]]:
    model = mlp()
    opt, seen, radii = SAM(sgd(model), rho=rho), [], []
    for step in range(12):
        form(model, opt, step)
        seen += [opt.last.turn, opt.last.drag] if step % 2 else []
        radii.append(opt.param_groups[0]["rho"])
    return seen, radii, snapshot(model)


BLIND: dict[str, Any] = {"rise": 1e9, "slope": 0.0}
"""Without the losses, which flatwise does not see where the passes are the caller's."""


def test_every_form_sees_the_same() -> None:
    wanted = turns(by_closure, AutoRadius(**BLIND))
    assert len(set(wanted[1])) > 3
    assert not any(map(math.isnan, wanted[0]))
    for form in (*INSIDE, *OUTSIDE):
        assert_same(turns(form, AutoRadius(**BLIND)), wanted)


@pytest.mark.parametrize("more", [{"rise": 1e-3}, {"slope": 1e3}])
def test_the_losses_count_where_they_are_seen(more: dict[str, float]) -> None:
    rule, blind = AutoRadius(**{**BLIND, **more}), turns(by_closure, AutoRadius(**BLIND))[1]
    wanted = turns(by_closure, rule)
    assert wanted[1][-1] < blind[-1]
    for form in INSIDE:
        assert turns(form, rule)[1] == wanted[1]
    for form in OUTSIDE:
        assert turns(form, rule)[1] == blind


@pytest.mark.parametrize(("name", "counted"), [("frugal", True), ("asam", True), ("stale", False), ("random", False)])
def test_the_slope_is_one_along_the_gradient(name: str, counted: bool) -> None:
    radii = []
    for slope in (0.0, 1e9):
        model = mlp()
        opt = flatwise.create(name, sgd(model), rho=AutoRadius(slope=slope, rise=1e9, drag=5.0))
        radii.append(path(opt, model, range(12)))
    assert (radii[0] != radii[1]) == counted


@pytest.mark.parametrize("form", OUTSIDE)
@pytest.mark.parametrize("name", ["frugal", "msam", "stale", "random"])
def test_methods_with_one_pass_refuse_the_passes_of_others(form: Callable[..., None], name: str) -> None:
    model = mlp()
    opt = flatwise.create(name, sgd(model), rho="auto")
    by_batch(model, opt, 0)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="runs one pass of a method that needs one, and rho='auto' must see both"):
        form(model, opt, 1)
    assert_same(snapshot(model), before)
    by_closure(model, opt, 1)
    assert not math.isnan(opt.last.turn)


# Every method


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bsam"])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_every_method_moves_its_radius(name: str, base: str) -> None:
    model = nn.Sequential(nn.LayerNorm(6), mlp())
    more = {"rho_min": None} if name == "gsam" else {}
    opt = make(name, model, base, rho="auto", **{**SHORT.get(name, {}), **more})
    start, radii, looks = opt.param_groups[0]["rho"], [], 0
    for step in range(20):
        train_by_name(name, model, opt, [step])
        radii.append(opt.param_groups[0]["rho"])
        looks += not math.isnan(opt.last.turn)
    assert looks == counts(opt)[1] >= 2
    assert any(rho != start for rho in radii)
    assert all(start / 8 <= rho < math.inf for rho in radii)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["quarter", "esam-sds", "k-sam"])
def test_a_look_compares_gradients_of_the_same_samples(name: str) -> None:
    """With a tiny radius nothing turns; with other samples it would."""
    model = mlp()
    opt = make(name, model, rho=AutoRadius(start=1e-4))
    train_by_name(name, model, opt, range(2))
    assert opt.last.turn == pytest.approx(1.0, abs=1e-4)


def test_what_does_not_take_it() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"rho_min ties the radius.*not 'auto' \(rho_min=None unties it\)"):
        flatwise.create("gsam", sgd(model), rho="auto")
    with pytest.raises(ValueError, match=r"rho='auto' steers a ball around w, and bSAM has none"):
        flatwise.create("bsam", sgd(model), rho="auto", **options_of("bsam", model))
    with pytest.raises(TypeError, match="or 'auto', got 'often'"):
        SAM(sgd(model), rho="often")
    for sync in (False, 2):
        with pytest.raises(ValueError, match=f"rho='auto' measures .* which sync_ascent={sync} keeps apart"):
            SAM(sgd(model), rho="auto", sync_ascent=sync)


# Precision


@pytest.mark.parametrize("kind", ["sam", "frugal"])
def test_scaled_losses_give_the_same_radii(kind: str) -> None:
    def run(scaled: bool) -> tuple[list[float], dict[str, Tensor]]:
        model, radii = mlp(), []
        opt = MAKERS[kind](model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        if scaled:
            opt.attach_scaler(scaler)
        for step in range(12):
            x, y = batch(step)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
                return loss

            opt.step(closure)
            scaler.update()
            radii.append(opt.param_groups[0]["rho"])
        return radii, snapshot(model)

    assert_same(run(True), run(False))


def test_weights_in_half_precision() -> None:
    model = mlp().to(torch.bfloat16)
    opt = SAM(sgd(model, 0.01), rho=AutoRadius(start=0.2))
    start, looks = 0.2, 0
    for step in range(10):
        x, y = batch(step)
        opt.step(lambda part: F.cross_entropy(model(part[0]).float(), part[1]), (x.to(torch.bfloat16), y))
        looks += not math.isnan(opt.last.turn)
        assert math.isnan(opt.last.turn) or 0 < opt.last.turn <= 1
    assert looks == 5
    assert opt.param_groups[0]["rho"] != start
