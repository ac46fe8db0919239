"""One grid of checks that every method of the registry joins by being there."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.family_world import RANKS, batches, needed, network
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise import SAM

NAMES = flatwise.list_variants()
OURS = [name for name in NAMES if name != "bsam"]
ONE_PASS = [name for name in OURS if not flatwise.variant_info(name).direction.uses_gradient]
# A step of these is not two passes over the whole batch in the closure forms.
NEED_A_BATCH = ["m-sam", "quarter", "k-sam", "esam-sds"]
OWN_GRADIENTS = [*NEED_A_BATCH, "multi-step", "second-order", "functional"]

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def make(name: str, base: str = "momentum", model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Any]:
    model = network(dtype=torch.float32) if model is None else model
    return model, flatwise.create(name, BASES[base](model.parameters()), **{**needed(name, model, 12), **options})


def loss_of(name: str, model: nn.Module) -> Callable[[Any], Tensor]:
    reduction = "none" if name in RANKS else "mean"
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def train(name: str, model: nn.Module, opt: Any, first: int = 0, last: int = 12) -> None:
    for t, batch in enumerate(batches(12, torch.float32)):
        if first <= t < last:
            torch.manual_seed(t)
            opt.step(loss_of(name, model), batch)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def bases_for(name: str) -> list[str]:
    if name == "bsam":
        return ["sgd"]
    return ["momentum", "adamw"] if name in ("msam", "adaptive-msam") else list(BASES)


@pytest.mark.parametrize(("name", "base"), [(name, base) for name in NAMES for base in bases_for(name)])
@pytest.mark.parametrize("stop", [1, 6])
def test_resuming_is_never_having_stopped(name: str, base: str, stop: int) -> None:
    model, opt = make(name, base)
    train(name, model, opt)
    first, before = make(name, base)
    train(name, first, before, last=stop)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "opt": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, after = make(name, base)
    train(name, second, after, last=2)  # what is there is replaced
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["opt"])
    train(name, second, after, first=stop)
    assert_equal(state(second), state(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deep", "pickle"]
)
def test_a_copy_goes_on_alike(name: str, copied: Any) -> None:
    model, opt = make(name)
    train(name, model, opt, last=6)
    twin, other = copied((model, opt))
    if name == "functional":
        with pytest.raises(RuntimeError, match="make the optimizer anew with model=model"):
            train(name, twin, other, first=6)
        return
    train(name, model, opt, first=6)
    expected = state(model)
    train(name, twin, other, first=6)
    assert_equal(state(twin), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_zero(name: str) -> None:
    model, opt = make(name, "sgd") if name not in ("msam", "adaptive-msam") else make(name)
    x, y = batches(1, torch.float32)[0]
    for _ in range(3):
        opt.step(lambda b: 0 * loss_of(name, model)(b), (x, y))
        assert all(p.isfinite().all() for p in model.parameters())
    train(name, model, opt, last=4)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [0, 5])
def test_a_gradient_that_is_not_finite(name: str, step: int) -> None:
    model, opt = make(name)
    train(name, model, opt, last=step)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    x, y = batches(1, torch.float32)[0]
    opt.step(lambda b: math.nan * loss_of(name, model)(b), (x, y))
    assert not opt.last.updated
    assert opt.last.reason == "non-finite update"
    assert_equal({key: p.detach() for key, p in model.named_parameters()}, before)
    train(name, model, opt, first=step, last=step + 5)
    assert all(p.isfinite().all() for p in model.parameters())
    assert opt.last.updated


@pytest.mark.parametrize("name", NAMES)
def test_sets_of_gradients_that_change(name: str) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra, self.never = network(dtype=torch.float32), nn.Linear(3, 3), nn.Linear(3, 3)
            self.use = True

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x)
            return self.extra(out) if self.use else out

    model = Sometimes()
    untouched = model.never.weight.detach().clone()
    _, opt = make(name, "momentum", model)
    for t, batch in enumerate(batches(10, torch.float32)):
        model.use = t % 2 == 0
        if t == 6:
            model.body[0].bias.requires_grad_(False)
        opt.zero_grad()
        opt.step(loss_of(name, model), batch)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.never.weight, untouched)
    assert model.body[0].weight.requires_grad


CALLS = {
    **dict.fromkeys(ONE_PASS, 10), "multi-step": 30, "second-order": 30, "looksam": 12, "every-k": 12, "late": 11,
    "warmup-off": 17, "m-sam": 60, "k-sam": 30, "esam-sds": 30,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_function_is_called_as_often_as_said(name: str) -> None:
    model = network(dtype=torch.float32)
    opt = flatwise.create(name, BASES["momentum"](model.parameters()), **needed(name, model, 10))
    calls, said, active = 0, 0, 0

    def loss_fn(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(name, model)(batch)

    for batch in batches(10, torch.float32):
        opt.step(loss_fn, batch)
        said += opt.last.closure_calls
        active += opt.last.reason != "schedule"
    assert calls == said
    assert calls == (10 + active if name in ("ae-sam", "bernoulli") else CALLS.get(name, 20))


@pytest.mark.parametrize("name", NAMES)
def test_buffers_and_random_state_are_those_of_one_pass(name: str) -> None:
    model, opt = make(name)
    plain = copy.deepcopy(model)
    x, y = batches(1, torch.float32)[0]
    torch.manual_seed(3)
    opt.step(loss_of(name, model), (x, y))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    parts = torch.split(x, 5) if name == "m-sam" else (x,)
    for part in parts:
        plain(part)
    if name != "quarter":  # whose first pass sees a part
        assert torch.equal(after, torch.get_rng_state())
        if name not in (*ONE_PASS, "bsam"):  # whose one pass is elsewhere
            assert torch.equal(model[1].running_mean, plain[1].running_mean)
            assert torch.equal(model[1].running_var, plain[1].running_var)
    assert model[1].num_batches_tracked == len(parts)


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_schedulers_work_without_warnings(name: str) -> None:
    model, opt = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        for batch in batches(5, torch.float32):
            opt.step(loss_of(name, model), batch)
            scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi / 2)) / 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_stay(name: str, dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    _, opt = make(name, "momentum", model)
    for batch in batches(6, dtype):
        opt.step(loss_of(name, model), batch)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", OURS)
def test_without_a_radius_it_is_the_base(name: str) -> None:
    options = {"rho_min": 0.0} if name == "gsam" else {}
    model, opt = make(name, rho=0.0, **options)
    plain, base = network(dtype=torch.float32), None
    base = BASES["momentum"](plain.parameters())
    for t, batch in enumerate(batches(6, torch.float32)):
        torch.manual_seed(t)
        opt.step(loss_of(name, model), batch)
        assert opt.last.reason == "zero radius"
        torch.manual_seed(t)
        if name == "m-sam":
            continue
        base.zero_grad()
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        base.step()
    if name != "m-sam":  # whose batch statistics are those of the parts
        assert_equal(state(model), state(plain))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_loss_function_that_raises_leaves_the_weights(name: str, call: int) -> None:
    model, opt = make(name)
    train(name, model, opt, last=5)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    addresses = [p.data_ptr() for p in model.parameters()]
    calls = 0

    def loss_fn(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return loss_of(name, model)(batch)

    try:
        opt.step(loss_fn, batches(1, torch.float32)[0])
    except KeyboardInterrupt:
        assert_equal({key: p.detach() for key, p in model.named_parameters()}, before)
        assert all(p.requires_grad for p in model.parameters())
    else:
        assert calls < call
    assert [p.data_ptr() for p in model.parameters()] == addresses
    opt.zero_grad()
    train(name, model, opt, first=5)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", OURS)
def test_checkpoints_of_the_plain_base(name: str) -> None:
    model, opt = make(name)
    train(name, model, opt, last=6)
    saved = opt.base_state_dict()
    assert not any(key.startswith("sam_") or key == "rho" for group in saved["param_groups"] for key in group)
    assert not any(key.startswith("sam_") for entries in saved["state"].values() for key in entries)
    plain = BASES["momentum"](network(dtype=torch.float32).parameters())
    plain.load_state_dict(saved)
    other, fresh = make(name)
    fresh.load_state_dict(plain.state_dict())
    assert fresh.param_groups[0]["rho"] == flatwise.variant_info(name).rho
    train(name, other, fresh, last=3)


def by_closure(opt: SAM, loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    opt.step(closure)


def by_two_calls(opt: SAM, loss: Callable[[], Tensor]) -> None:
    opt.zero_grad()
    if not opt._method.one_pass:
        loss().backward()
    opt.first_step(zero_grad=True)
    loss().backward()
    opt.second_step(zero_grad=True)


def by_block(opt: SAM, loss: Callable[[], Tensor]) -> None:
    opt.zero_grad()
    if not opt._method.one_pass:
        loss().backward()
    with opt.perturbed():
        loss().backward()
    opt.base_optimizer.step()


FORMS = {"closure": by_closure, "two calls": by_two_calls, "block": by_block}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OURS)
def test_forms_of_call_agree_or_say_which_to_use(name: str, form: str) -> None:
    model, opt = make(name)
    train(name, model, opt)
    other, twin = make(name)

    def run() -> None:
        for t, (x, y) in enumerate(batches(12, torch.float32)):
            torch.manual_seed(t)
            FORMS[form](twin, lambda x=x, y=y: F.cross_entropy(other(x), y))

    if name in (NEED_A_BATCH if form == "closure" else OWN_GRADIENTS):
        with pytest.raises(RuntimeError, match=r"use opt.step\(|call opt.step\(loss_fn, batch\)"):
            run()
        return
    run()
    if form != "closure" and flatwise.variant_info(name).slots[-1:] == ("schedule",):
        # Where the schedule is off, the two-call forms still run the second pass, at w.
        assert all(p.isfinite().all() for p in other.parameters())
        for (key, got), want in zip(other.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=key)
        return
    assert_equal(
        {key: p.detach() for key, p in other.named_parameters()},
        {key: p.detach() for key, p in model.named_parameters()},
    )
