"""Scaled losses: with a ``GradScaler`` a step is bit for bit the step without, and an overflow is no step at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.lab.methods import Method, wrap

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
SCALE = 1024.0

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


class World:
    """A small network with batch statistics and dropout, its optimizer and perhaps a scaler."""

    def __init__(self, make: Callable[..., Any], *, scaled: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000, enabled=scaled)
        self.opt = make(self.model, self.scaler if scaled else None)
        self.calls, self.bad = 0, {}
        self.loss = Tensor()

    def loss_fn(self, batch: Any) -> Tensor:
        """The loss, made useless in the passes that ``bad`` names."""
        self.calls += 1
        reduction = "none" if self.opt.wants_sample_losses else "mean"
        loss = F.cross_entropy(self.model(batch[0]), batch[1], reduction=reduction)
        return loss * self.bad.get(self.calls, 1.0)

    def backward(self) -> Tensor:
        self.loss = self.loss_fn((X, Y))
        self.scaler.scale(self.loss).backward()
        return self.loss

    def closure(self) -> Tensor:
        self.opt.zero_grad()
        return self.backward()

    def snapshot(self) -> list[Tensor]:
        state = [v for s in self.opt.state_dict()["state"].values() for v in s.values() if isinstance(v, Tensor)]
        return [t.detach().clone() for t in (*self.model.state_dict().values(), *state)]


def by_step(world: World) -> None:
    world.opt.step(world.closure)


def by_scaler(world: World) -> None:
    world.scaler.step(world.opt, world.closure)


def by_batch(world: World) -> None:
    world.opt.step(world.loss_fn, (X, Y))


def by_two_calls(world: World) -> None:
    world.closure()
    world.opt.first_step(zero_grad=True)
    world.backward()
    world.opt.second_step(zero_grad=True)


def by_framework(world: World) -> None:
    """As frameworks do: they unscale and step by themselves."""
    world.closure()
    if world.opt.perturb():
        world.backward()
        world.opt.restore()
    world.scaler.step(world.opt)


def by_block(world: World) -> None:
    world.closure()
    with world.opt.perturbed():
        world.backward()
    world.scaler.step(world.opt.base_optimizer)


FORMS = {f.__name__: f for f in (by_step, by_scaler, by_batch, by_two_calls, by_framework, by_block)}


def sam(base: str, **options: Any) -> Callable[..., Any]:
    return lambda model, scaler: flatwise.SAM(BASES[base](model.parameters()), 0.1, grad_scaler=scaler, **options)


def variant(name: str, base: str = "sgd", **options: Any) -> Callable[..., Any]:
    def make(model: nn.Module, scaler: Any) -> Any:
        method = Method(name, name, {"grad_scaler": scaler, **options})
        return wrap(method, BASES[base](model.parameters()), 6, model=model, train_size=12, batch_size=12)

    return make


def train(world: World, form: Callable[[World], None], steps: int = 5) -> World:
    for step in range(steps):
        torch.manual_seed(step)
        form(world)
        world.scaler.update()
    return world


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_a_scale_changes_nothing(form: str, base: str) -> None:
    plain = train(World(sam(base), scaled=False), FORMS[form])
    scaled = train(World(sam(base), scaled=True), FORMS[form])
    assert all(map(torch.equal, plain.snapshot(), scaled.snapshot()))
    assert scaled.scaler.get_scale() == SCALE
    assert scaled.opt.last.gradient_norm == plain.opt.last.gradient_norm


@pytest.mark.supports("plain loop", "GradScaler")
@pytest.mark.parametrize("name", flatwise.list_variants())
def test_a_scale_changes_nothing_for_any_method(name: str) -> None:
    """Those that depend on the size of a gradient see the true one, and a sum of parts is a sum of true ones."""
    plain = train(World(variant(name), scaled=False), by_batch)
    scaled = train(World(variant(name), scaled=True), by_batch)
    assert all(map(torch.equal, plain.snapshot(), scaled.snapshot()))


@pytest.mark.parametrize("options", [{"descent": d} for d in ("pgn", "wsam", "stable", "gsam")], ids=str)
@pytest.mark.parametrize("form", ["by_two_calls", "by_framework", "by_block"])
def test_two_gradients_are_joined_at_one_scale(form: str, options: dict[str, str]) -> None:
    name = options["descent"]
    plain = train(World(variant(name), scaled=False), FORMS[form])
    scaled = train(World(variant(name), scaled=True), FORMS[form])
    assert all(map(torch.equal, plain.snapshot(), scaled.snapshot()))


@pytest.mark.parametrize("form", ["by_two_calls", "by_framework"])
@pytest.mark.parametrize("name", ["ae-sam", "looksam", "every-k", "usam", "msam", "stale", "vasso", "fsam"])
def test_a_step_that_a_schedule_leaves_out_is_unscaled_once(name: str, form: str) -> None:
    plain = train(World(variant(name), scaled=False), FORMS[form], 6)
    scaled = train(World(variant(name), scaled=True), FORMS[form], 6)
    assert all(map(torch.equal, plain.snapshot(), scaled.snapshot()))


@pytest.mark.supports("plain loop", "fp16 overflow in either pass")
@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("passes", [(1,), (2,), (1, 2)], ids=["first", "second", "both"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_an_overflow_in_any_pass_is_no_step(form: str, base: str, passes: tuple[int, ...], factor: float) -> None:
    world = train(World(sam(base), scaled=True), FORMS[form], 2)
    world.bad = {world.calls + number: factor for number in passes}
    before = world.snapshot()
    train(world, FORMS[form], 1)
    own = form in ("by_step", "by_scaler", "by_batch")  # flatwise runs the passes, so buffers are its concern too
    after = world.snapshot()
    names = [name for name, _ in world.model.named_parameters()]
    keep = [own or key in names for key in world.model.state_dict()]
    keep += [True] * (len(after) - len(keep))
    assert all(torch.equal(a, b) for a, b, k in zip(after, before, keep, strict=True) if k)
    assert world.scaler.get_scale() == SCALE / 2, "one back-off, not two"
    world.bad = {}
    train(world, FORMS[form], 1)
    assert world.opt.last.reason == "perturbed"
    assert not torch.equal(world.snapshot()[0], before[0])
    assert world.scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("name", ["msam", "pgn", "m-sam", "multi-step", "stale", "bsam", "k-sam"])
def test_an_overflow_is_no_step_for_other_methods(name: str) -> None:
    world = train(World(variant(name), scaled=True), by_batch, 3)
    world.bad = {world.calls + number: math.inf for number in range(1, 10)}
    before = world.snapshot()
    train(world, by_batch, 1)
    assert all(map(torch.equal, before, world.snapshot()))
    assert world.scaler.get_scale() == SCALE / 2


def test_growth_comes_once_a_step() -> None:
    world = World(sam("sgd"), scaled=True)
    world.scaler.set_growth_interval(2)
    train(world, by_step, 4)
    assert world.scaler.get_scale() == 4 * SCALE


def test_a_scaler_that_nobody_attached_is_named() -> None:
    world = World(lambda model, scaler: flatwise.SAM(BASES["sgd"](model.parameters()), 0.1), scaled=True)
    world.closure()
    with pytest.raises(RuntimeError, match=r"opt.attach_scaler\(scaler\)"):
        world.scaler.step(world.opt, world.closure)
    world.opt.attach_scaler(world.scaler)
    train(world, by_scaler, 1)
    assert world.opt.last.reason == "perturbed"
    with pytest.raises(TypeError, match=r"must be a torch.amp.GradScaler, got float"):
        world.opt.attach_scaler(1024.0)


def test_what_differentiates_scaled_gradients_is_refused() -> None:
    model = nn.Linear(2, 2)
    opt = flatwise.create("second-order", BASES["sgd"](model.parameters()), normalised=False)
    with pytest.raises(ValueError, match="differentiates scaled gradients"):
        opt.attach_scaler(torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("base", BASES)
def test_an_accelerators_verdict_joins_both_passes(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator nothing is read after the first pass: its infinity must count when the second is finite."""
    world = train(World(sam(base), scaled=True), by_step, 2)
    monkeypatch.setattr("flatwise.update.all_finite", lambda tensors: torch.tensor(True))
    before = world.snapshot()
    begin = world.opt._begin

    def first_overflows() -> Any:
        record, _ = begin()
        record.__dict__["_norm"] = torch.tensor(math.inf)
        return record, False

    monkeypatch.setattr(world.opt, "_begin", first_overflows)
    train(world, by_step, 1)
    names = [name for name, _ in world.model.named_parameters()]
    kept = [key in names for key in world.model.state_dict()]
    kept += [True] * (len(before) - len(kept))
    assert all(torch.equal(a, b) for a, b, k in zip(world.snapshot(), before, kept, strict=True) if k)
    assert world.opt.last.reason == "non-finite update"


def test_copies_of_a_step_that_failed_are_not_those_of_the_next() -> None:
    world = train(World(sam("sgd"), scaled=True), by_step, 1)

    def fails() -> Tensor:
        world.closure()
        raise KeyError("the data ended")

    with pytest.raises(KeyError):
        world.opt.step(fails)
    world.model(X)  # statistics go on
    before = world.snapshot()
    world.bad = {world.calls + 1: math.inf}
    train(world, by_step, 1)
    assert all(map(torch.equal, before, world.snapshot()))


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_failed_in_its_second_pass_can_be_taken_again(form: str) -> None:
    """The scaler was not updated: it knows the passes of the failed step still."""
    plain, world = (train(World(sam("sgd"), scaled=scaled), FORMS[form], 1) for scaled in (False, True))
    for attempt in range(4):
        torch.manual_seed(attempt)
        world.bad = {world.calls + 2: "no number"}
        with pytest.raises(TypeError):
            FORMS[form](world)
        if form in ("by_two_calls", "by_framework"):
            world.opt.restore()
    for one in (plain, world):
        one.model.load_state_dict(plain.model.state_dict())
        one.bad = {}
    train(plain, FORMS[form], 2)
    train(world, FORMS[form], 2)
    assert all(map(torch.equal, plain.snapshot(), world.snapshot()))


@pytest.mark.parametrize("form", FORMS)
def test_an_overflow_in_what_is_added_after_the_step_backs_off(form: str) -> None:
    world = train(World(variant("wsam"), scaled=True), FORMS[form], 2)
    world.bad = {world.calls + 2: math.inf}
    train(world, FORMS[form], 1)
    assert world.scaler.get_scale() == SCALE / 2
