"""timm: hand-written SAM, and with rho = 0 timm's own loop, bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")
pytest.importorskip("timm.utils")
adapter = pytest.importorskip("flatwise.integrations.timm")

SAMNativeScaler, register = adapter.SAMNativeScaler, adapter.register
create_optimizer_v2, dispatch_clip_grad = timm.optim.create_optimizer_v2, timm.utils.dispatch_clip_grad
RHO, SCALE = 0.1, 1024.0


def vit(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Drop path and dropout."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=3, drop_path_rate=0.3, drop_rate=0.2)
    return model.to(dtype)  # type: ignore[no-any-return]


def resnet(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Batch statistics and drop path."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3, drop_path_rate=0.3).to(dtype)  # type: ignore[no-any-return]


MODELS = {"vit": vit, "resnet": resnet}


def batches(steps: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator, dtype=dtype), torch.randint(3, (4,), generator=generator))
        for _ in range(steps)
    ]


class Bad:
    """A model whose output is made useless in the calls that are named."""

    def __init__(self, model: nn.Module, calls: dict[int, float] | None = None) -> None:
        self.model, self.calls, self.bad = model, 0, calls or {}

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x) * self.bad.get(self.calls, 1.0)  # type: ignore[no-any-return]


def loop(
    model: Any,
    optimizer: Any,
    scaler: Any,
    data: list[tuple[Tensor, Tensor]],
    accum: int = 1,
    clip: tuple[float, str] | None = None,
    seed: int | None = 7,
) -> list[float]:
    """timm's ``train_one_epoch``, as far as it touches optimizer and scaler."""
    losses, params = [], [p for group in optimizer.param_groups for p in group["params"]]
    grad, mode = clip or (None, "norm")
    if seed is not None:
        torch.manual_seed(seed)
    optimizer.zero_grad()
    for index, (x, y) in enumerate(data):
        need_update = (index + 1) % accum == 0

        def _forward(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x), y) / accum

        torch.rand(1)  # the loader's augmentation, in the main process
        loss = scaler.forward(_forward, x, y) if isinstance(scaler, SAMNativeScaler) else _forward(x, y)
        scaler(loss, optimizer, clip_grad=grad, clip_mode=mode, parameters=params, need_update=need_update)
        losses.append(loss.item() * accum)
        if need_update:
            optimizer.zero_grad()
    return losses


def by_hand(
    model: nn.Module, base: Any, data: list[tuple[Tensor, Tensor]], accum: int, clip: tuple[float, str] | None
) -> list[float]:
    """SAM from the equations, with the same masks in both passes and batch statistics of the first."""
    params, losses = [p for group in base.param_groups for p in group["params"]], []
    torch.manual_seed(7)
    for start in range(0, len(data), accum):
        window, states = data[start : start + accum], []
        base.zero_grad()
        for x, y in window:
            torch.rand(1)
            states.append(torch.get_rng_state())
            loss = F.cross_entropy(model(x), y) / accum
            loss.backward()
            losses.append(loss.item() * accum)
        after, buffers = torch.get_rng_state(), copy.deepcopy(list(model.buffers()))
        held = [p.detach().clone() for p in params]
        norm = torch.cat([p.grad.flatten() for p in params]).norm()
        with torch.no_grad():
            for p in params:
                p += RHO * p.grad / norm
        base.zero_grad()
        for (x, y), state in zip(window, states, strict=True):
            torch.set_rng_state(state)
            (F.cross_entropy(model(x), y) / accum).backward()
        torch.set_rng_state(after)
        with torch.no_grad():
            for p, h in zip([*params, *model.buffers()], [*held, *buffers], strict=True):
                p.copy_(h)
        if clip is not None:
            dispatch_clip_grad(params, clip[0], mode=clip[1])
        base.step()
    return losses


def sgd(model: nn.Module) -> Any:
    return create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=0.01)


def sam(model: nn.Module, rho: float = RHO) -> Any:
    return flatwise.SAM(sgd(model), rho)


def state(model: nn.Module, optimizer: Any) -> list[Tensor]:
    entries = optimizer.state_dict()["state"].values()
    moments = [v for entry in entries for v in entry.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*model.state_dict().values(), *moments)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


CLIPS = {"no clip": None, "norm": (0.05, "norm"), "value": (0.01, "value"), "agc": (0.02, "agc")}


@pytest.mark.supports("timm", "equal to hand-written SAM")
@pytest.mark.supports("timm", "gradient accumulation")
@pytest.mark.supports("timm", "clipping of the last gradient")
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("enabled", [True, False], ids=["scaled", "not scaled"])
def test_it_is_sam_written_by_hand(kind: str, accum: int, clip: tuple[float, str] | None, enabled: bool) -> None:
    double = torch.float64
    ours, theirs = MODELS[kind](double), MODELS[kind](double)
    optimizer = sam(ours)
    losses = loop(ours, optimizer, SAMNativeScaler(optimizer, "cpu", enabled), batches(6, double), accum, clip)
    expected = by_hand(theirs, sgd(theirs), batches(6, double), accum, clip)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert losses == pytest.approx(expected, rel=1e-9), "the loss to log is that at w"
    assert optimizer.last.active
    assert optimizer.last.loss == pytest.approx(sum(expected[-accum:]) / accum, rel=1e-9)
    assert optimizer.last.sharpness > 0


@pytest.mark.supports("timm", "rho = 0 is the plain run, bit for bit")
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_without_a_radius_it_is_timms_own_loop(kind: str, accum: int, clip: tuple[float, str] | None) -> None:
    ours, theirs = MODELS[kind](), MODELS[kind]()
    optimizer, plain = sam(ours, 0.0), sgd(theirs)
    losses = loop(ours, optimizer, SAMNativeScaler(optimizer, "cpu"), batches(6), accum, clip)
    stream = torch.get_rng_state()
    assert losses == loop(theirs, plain, timm.utils.NativeScaler("cpu"), batches(6), accum, clip)
    assert same(state(ours, optimizer), state(theirs, plain))
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.supports("timm", "fp16 overflow in either pass")
@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("clip", [None, (0.05, "norm")], ids=["no clip", "norm"])
@pytest.mark.parametrize("passes", ["first", "second"])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_an_overflow_in_either_pass_backs_off_once(factor: float, passes: str, clip: Any, accum: int) -> None:
    model = resnet()
    optimizer = sam(model)
    scaler = SAMNativeScaler(optimizer, "cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer.attach_scaler(scaler._scaler)
    watched = Bad(model)
    loop(watched, optimizer, scaler, batches(2 * accum), accum, clip)
    watched.bad = {watched.calls + (1 if passes == "first" else accum + 1): factor}
    names = dict(model.named_parameters())
    weights = copy.deepcopy({k: v for k, v in model.state_dict().items() if k in names})
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    loop(watched, optimizer, scaler, batches(accum), accum, clip)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert all(torch.equal(a["momentum_buffer"], moments[k]["momentum_buffer"])
               for k, a in optimizer.state_dict()["state"].items())  # fmt: skip
    assert scaler._scaler.get_scale() == SCALE / 2
    watched.bad = {}
    loop(watched, optimizer, scaler, batches(accum), accum, clip)
    assert optimizer.last.reason == "perturbed"
    assert scaler._scaler.get_scale() == SCALE / 2


@pytest.mark.supports("timm", "resume, bit for bit")
@pytest.mark.parametrize("kind", MODELS)
def test_it_resumes_bit_for_bit(kind: str) -> None:
    scheduler = timm.scheduler.CosineLRScheduler if hasattr(timm, "scheduler") else None
    data = batches(8)

    def make() -> tuple[nn.Module, Any, Any]:
        model = MODELS[kind]()
        optimizer = sam(model)
        return model, optimizer, SAMNativeScaler(optimizer, "cpu")

    model, optimizer, scaler = make()
    loop(model, optimizer, scaler, data[:4], 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scaler.state_dict(), torch.get_rng_state()))
    loop(model, optimizer, scaler, data[4:], 2, seed=None)
    again, other, fresh = make()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    fresh.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    loop(again, other, fresh, data[4:], 2, seed=None)
    assert same(state(model, optimizer), state(again, other))
    assert scaler.state_dict() == fresh.state_dict()
    assert scaler.state_dict_key == "amp_scaler"
    assert scheduler is None or other.last.active


def test_a_scheduler_of_timm_drives_it() -> None:
    scheduler = pytest.importorskip("timm.scheduler")
    model, plain_model = resnet(), resnet()
    optimizer, plain = sam(model, 0.0), sgd(plain_model)
    rates = []
    for m, o, s in (
        (model, optimizer, SAMNativeScaler(optimizer, "cpu")),
        (plain_model, plain, timm.utils.NativeScaler("cpu")),
    ):
        schedule = scheduler.CosineLRScheduler(o, t_initial=4, warmup_t=1, warmup_lr_init=1e-4)
        rates.append([])
        for epoch in range(4):
            schedule.step(epoch)
            rates[-1].append([group["lr"] for group in o.param_groups])
            loop(m, o, s, batches(1))
    assert rates[0] == rates[1]
    assert len({tuple(rate) for rate in rates[0]}) == 4
    assert same(state(model, optimizer), state(plain_model, plain))


# Names for create_optimizer_v2


@pytest.fixture
def names() -> Any:
    registry = adapter.default_registry
    before = dict(registry._optimizers)
    yield register
    registry._optimizers.clear()
    registry._optimizers.update(before)


def test_an_optimizer_by_name_has_timms_groups(names: Callable[..., list[str]]) -> None:
    assert {"sam-sgd", "sam-adamw", "sam-lamb", "sam-lion"} <= set(names())
    model, other = vit(), vit()
    made = create_optimizer_v2(model, "sam-adamw", lr=0.01, weight_decay=0.05, layer_decay=0.7, rho=0.2, adaptive=True)
    plain = create_optimizer_v2(other, "adamw", lr=0.01, weight_decay=0.05, layer_decay=0.7)
    assert isinstance(made, flatwise.SAM)
    assert type(made.base_optimizer) is type(plain)
    shared = ("lr", "weight_decay", "lr_scale", "betas", "eps")
    for ours, theirs in zip(made.param_groups, plain.param_groups, strict=True):
        assert [ours[k] for k in shared] == [theirs[k] for k in shared]
        assert ours["rho"] == 0.2
    assert made._ascent.ball.adaptive is True
    by_hand_made = flatwise.create("sam", plain, rho=0.2, adaptive=True)
    loop(model, made, SAMNativeScaler(made, "cpu"), batches(2))
    loop(other, by_hand_made, SAMNativeScaler(by_hand_made, "cpu"), batches(2))
    assert same(state(model, made), state(other, by_hand_made))


def test_options_go_to_whom_they_belong(names: Callable[..., list[str]]) -> None:
    assert "asam-adadelta" in names("asam", rho=2.0)
    made = create_optimizer_v2(resnet(), "asam-adadelta", lr=0.1, eps=1e-3)
    assert made.param_groups[0]["sam_rho"] == 2.0
    assert made.param_groups[0]["rho"] == 0.9
    assert made.param_groups[0]["eps"] == 1e-3
    assert create_optimizer_v2(resnet(), "asam-adadelta", rho=3.0).param_groups[0]["sam_rho"] == 3.0
    momentum = create_optimizer_v2(resnet(), "asam-sgd", lr=0.1, momentum=0.8)
    assert momentum.param_groups[0]["momentum"] == 0.8
    assert momentum.param_groups[0]["nesterov"] is True, "timm's defaults of sgd"
    with pytest.raises(TypeError, match="did you mean 'adaptive'"):
        create_optimizer_v2(resnet(), "asam-sgd", lr=0.1, adaptiv=True)


def test_names_can_be_given_again(names: Callable[..., list[str]], caplog: pytest.LogCaptureFixture) -> None:
    first = names("sam", rho=0.1)
    assert names("sam", rho=0.3) == first
    assert not any(name.startswith("sam-sam") for name in first)
    assert create_optimizer_v2(resnet(), "sam-sgd", lr=0.1).param_groups[0]["rho"] == 0.3
    assert not caplog.records
    with pytest.raises(ValueError, match="an optimizer of its own"):
        names("bsam")
    with pytest.raises(ValueError, match="unknown method"):
        names("sma")


def test_a_lookahead_around_it(names: Callable[..., list[str]]) -> None:
    names()
    model, other = vit(), vit()
    ahead = create_optimizer_v2(model, "lookahead_sam-sgd", lr=0.05, rho=0.0)
    plain = create_optimizer_v2(other, "lookahead_sgd", lr=0.05)
    loop(model, ahead, SAMNativeScaler(ahead, "cpu"), batches(7))
    loop(other, plain, timm.utils.NativeScaler("cpu"), batches(7))
    assert same(list(model.state_dict().values()), list(other.state_dict().values()))


# What goes wrong


@pytest.mark.supports("timm", "misuse is refused by name")
def test_an_optimizer_without_sam_is_named() -> None:
    with pytest.raises(TypeError, match=r"found no flatwise\.SAM"):
        SAMNativeScaler(sgd(vit()), "cpu")
    optimizer, other = sam(resnet()), sam(resnet())
    scaler = SAMNativeScaler(optimizer, "cpu")
    with pytest.raises(ValueError, match="made for another optimizer"):
        scaler(scaler.forward(lambda: torch.ones((), requires_grad=True) * 2), other)


def test_a_loss_that_cannot_be_computed_again_is_named() -> None:
    model = resnet()
    optimizer = sam(model)
    scaler = SAMNativeScaler(optimizer, "cpu")
    x, y = batches(1)[0]
    with pytest.raises(RuntimeError, match=r"loss_scaler.forward\(_forward, input, target\)"):
        scaler(F.cross_entropy(model(x), y), optimizer)
    with pytest.raises(RuntimeError, match="whatever changes the loss"):
        scaler(scaler.forward(lambda: F.cross_entropy(model(x), y)) / 2, optimizer)
    with pytest.raises(ValueError, match="create_graph=True"):
        scaler(scaler.forward(lambda: F.cross_entropy(model(x), y)), optimizer, create_graph=True)


def test_a_batch_that_was_replaced_is_named() -> None:
    """Python binds late: at the step, every remembered function would see the last batch."""
    model = resnet()
    optimizer = sam(model)
    scaler = SAMNativeScaler(optimizer, "cpu")
    held = copy.deepcopy(list(model.parameters()))

    def late(accum: int) -> None:
        optimizer.zero_grad()
        for index, (x, y) in enumerate(batches(2)):

            def _forward() -> Tensor:
                return F.cross_entropy(model(x), y) / accum  # noqa: B023

            scaler(scaler.forward(_forward), optimizer, need_update=(index + 1) % accum == 0)

    with pytest.raises(RuntimeError, match="reads tensors from the loop around it"):
        late(2)
    assert all(map(torch.equal, held, model.parameters()))
    late(1)  # nothing changes between forward and step
    assert optimizer.last.active


def test_what_a_loop_gave_up_is_not_replayed() -> None:
    model, other = resnet(), resnet()
    optimizer, clean = sam(model), sam(other)
    scaler = SAMNativeScaler(optimizer, "cpu")
    first, *rest = batches(3)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.eval()(x), y)

    def fails(x: Tensor) -> Tensor:
        raise KeyError("the data ended")

    scaler.forward(loss_of, *first)  # never differentiated
    with pytest.raises(KeyError):
        scaler.forward(fails, first[0])
    scaler(scaler.forward(loss_of, *first), optimizer, need_update=False)  # a window that is given up
    loop(model.train(), optimizer, scaler, rest, 2)
    loop(other, clean, SAMNativeScaler(clean, "cpu"), rest, 2)
    assert same(state(model, optimizer), state(other, clean))


@pytest.mark.supports("timm", "an exception in either pass leaves w")
@pytest.mark.parametrize("accum", [1, 2])
def test_an_error_in_the_second_pass_leaves_the_weights_at_w(accum: int) -> None:
    model = resnet()
    optimizer = sam(model)
    scaler = SAMNativeScaler(optimizer, "cpu")
    held = copy.deepcopy(list(model.parameters()))

    class Fails(Bad):
        def __call__(self, x: Tensor) -> Tensor:
            if self.calls == accum:
                self.calls += 1
                raise KeyError("in the second pass")
            return super().__call__(x)

    watched = Fails(model)
    with pytest.raises(KeyError):
        loop(watched, optimizer, scaler, batches(accum), accum)
    assert all(map(torch.equal, held, model.parameters()))
    with pytest.raises(RuntimeError, match="two gradients per step"):
        optimizer.step()
    loop(watched, optimizer, scaler, batches(accum), accum)
    assert optimizer.last.active


@pytest.mark.parametrize("name", ["msam", "random", "stale", "vasso", "gsam", "asam", "looksam"])
def test_other_methods_take_the_step_that_they_take_with_a_closure(name: str) -> None:
    """Those with one pass make a first one here too: the framework has run it."""
    models, data = [resnet(torch.float64).eval() for _ in range(2)], batches(4, torch.float64)
    ours, theirs = (flatwise.create(name, sgd(m)) for m in models)
    loop(models[0], ours, SAMNativeScaler(ours, "cpu"), data)
    for x, y in data:
        theirs.step(lambda batch: F.cross_entropy(models[1](batch[0]), batch[1]), (x, y))
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def _rank(rank: int, accum: int) -> list[Tensor]:
    model = vit(torch.float64).eval()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = sam(model)  # as timm does: made before the model is wrapped
    scaler = SAMNativeScaler(optimizer, "cpu")
    sums = [0]

    def count(state, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations, and wants no strings
        sums[0] += bucket.is_last()
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0] / 2)

    ddp.register_comm_hook(None, count)
    optimizer.zero_grad()
    for index, (x, y) in enumerate(batches(3 * accum, torch.float64)):

        def _forward(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(ddp(x), y) / accum

        mine = slice(2 * rank, 2 * rank + 2)
        need_update = (index + 1) % accum == 0
        if need_update:
            scaler(scaler.forward(_forward, x[mine], y[mine]), optimizer)
            optimizer.zero_grad()
        else:
            with ddp.no_sync():
                scaler(scaler.forward(_forward, x[mine], y[mine]), optimizer, need_update=False)
    assert sums[0] == 6, "two sums a step"
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.supports("timm", "two processes")
@pytest.mark.slow
@pytest.mark.parametrize("accum", [1, 2])
def test_two_processes_step_as_one(accum: int, tmp_path: Path) -> None:
    first, second = on_ranks(_rank, tmp_path, accum)
    assert all(map(torch.equal, first, second))
    model = vit(torch.float64).eval()
    optimizer = sam(model)
    loop(model, optimizer, SAMNativeScaler(optimizer, "cpu"), batches(3 * accum, torch.float64), accum)
    for a, b in zip(first, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9)
