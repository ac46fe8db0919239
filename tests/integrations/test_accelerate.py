"""Accelerate: hand-written SAM, and with rho = 0 the plain loop, bit for bit."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.ranks.start import Sums, on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flatwise
from flatwise.integrations.accelerate import SAMStep

accelerate = pytest.importorskip("accelerate")

RHO, LR = 0.2, 0.1
GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(20, 6, generator=GENERATOR).double(), torch.randint(3, (20,), generator=GENERATOR)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What Accelerate shares between all of its objects is not shared between tests."""
    forget()
    yield
    forget()


def forget() -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def net(*, apart: bool = True) -> nn.Module:
    """With batch statistics and dropout, which ranks have apart."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)] if apart else [nn.Tanh()]
    return nn.Sequential(nn.Linear(6, 8, bias=False), *middle, nn.Linear(8, 3)).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def sam(model: nn.Module) -> flatwise.SAM:
    return flatwise.SAM(sgd(model), RHO)


class World:
    """A loop as Accelerate's users write it."""

    def __init__(
        self, wrap: Callable[..., Any], *, parts: int = 1, clip: float = 0.0, size: int = 4, apart: bool = True,
        scaled: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.accelerator = accelerate.Accelerator(gradient_accumulation_steps=parts, cpu=True, **options)
        if scaled:  # what it makes on a GPU for fp16
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
            self.accelerator.autocast_handler = accelerate.utils.AutocastKwargs(enabled=False)  # scaling alone
        model = net(apart=apart)
        optimizer = wrap(model)
        # Accelerate's scheduler makes one step for each process.
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9 ** (1 / self.accelerator.num_processes))
        loader = DataLoader(TensorDataset(X, Y), batch_size=size)
        prepared = self.accelerator.prepare(model, optimizer, scheduler, loader)
        self.model, self.optimizer, self.scheduler, self.loader = prepared
        self.step = SAMStep(self.accelerator, self.model, self.optimizer) if wrap is not sgd else None
        self.clip, self.calls, self.bad = clip, 0, dict[int, float]()
        self.losses: list[float] = []
        self.skipped: list[bool] = []
        self.masks: list[Tensor] = []

    def loss_fn(self, batch: Any) -> Tensor:
        self.calls += 1
        self.masks.append(torch.get_rng_state())
        return F.cross_entropy(self.model(batch[0]), batch[1]) * self.bad.get(self.calls, 1.0)

    def backward(self, batch: Any) -> Tensor:
        if self.step is not None:
            return self.step.backward(self.loss_fn, batch)
        loss = self.loss_fn(batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def epoch(self) -> World:
        for batch in self.loader:
            torch.rand(())  # others draw random numbers between micro-batches
            with self.accelerator.accumulate(self.model):
                self.losses.append(self.backward(batch).item())
                if self.accelerator.sync_gradients and self.clip:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.skipped.append(self.optimizer.step_was_skipped)
        return self

    def state(self) -> list[Tensor]:
        entries = self.optimizer.state_dict()["state"].values()
        moments = [v for entry in entries for v in entry.values() if isinstance(v, Tensor)]
        return [t.detach().clone() for t in (*self.model.state_dict().values(), *moments)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def radius(rho: Any) -> Callable[[nn.Module], flatwise.SAM]:
    return lambda model: flatwise.SAM(sgd(model), rho)


# Hand-written SAM


def by_hand(masks: list[Tensor], *, parts: int, clip: float) -> nn.Module:
    """Windows of ``parts`` micro-batches; Accelerate divides by ``parts`` in the partial one at the end as well."""
    model = net()
    base, rate = sgd(model), LR
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 20, 4)]
    for _ in range(2):
        for start in range(0, 5, parts):
            window = batches[start : start + parts]
            states, masks = masks[: len(window)], masks[2 * len(window) :]

            def one_pass(window: Any = window, states: Any = states) -> None:
                base.zero_grad()
                for state, (x, y) in zip(states, window, strict=True):
                    torch.set_rng_state(state)
                    (F.cross_entropy(model(x), y) / parts).backward()

            one_pass()
            buffers, kept = copy.deepcopy(list(model.buffers())), copy.deepcopy(list(model.parameters()))
            norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(RHO * p.grad / norm)
            one_pass()
            with torch.no_grad():
                for now, before in zip((*model.parameters(), *model.buffers()), (*kept, *buffers), strict=True):
                    now.copy_(before)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            base.param_groups[0]["lr"] = rate
            base.step()
            rate *= 0.9
    assert not masks
    return model


@pytest.mark.supports("Accelerate", "equal to hand-written SAM")
@pytest.mark.supports("Accelerate", "gradient accumulation")
@pytest.mark.supports("Accelerate", "clipping of the last gradient")
@pytest.mark.parametrize("clip", [0.0, 0.1], ids=["", "clipped"])
@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_sam_by_hand(parts: int, clip: float) -> None:
    """5 batches in windows of 2: the last window of an epoch is a partial one."""
    world = World(sam, parts=parts, clip=clip).epoch().epoch()
    hand = by_hand(world.masks, parts=parts, clip=clip)
    for ours, theirs in zip(world.model.state_dict().values(), hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.supports("Accelerate", "rho = 0 is the plain run, bit for bit")
@pytest.mark.parametrize("options", [{}, {"parts": 2}, {"clip": 0.1}, {"mixed_precision": "bf16"}], ids=str)
def test_a_radius_of_zero_is_the_plain_loop(options: dict[str, Any]) -> None:
    ends = []
    for wrap in (sgd, radius(0.0)):
        world = World(wrap, **options).epoch().epoch()
        ends.append([*world.state(), torch.tensor(world.losses), torch.get_rng_state()])
        assert world.calls == 10
        forget()
    assert same(*ends)


@pytest.mark.supports("Accelerate", "logged loss is the clean one, metrics count once")
def test_losses_and_random_state_are_those_of_the_first_pass() -> None:
    ends = []
    for wrap in (sgd, sam):
        world = World(wrap)
        next(iter(world.loader))
        world.epoch()
        ends.append((world.losses[0], torch.get_rng_state()))
        forget()
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_record_has_the_losses_of_the_step() -> None:
    world = World(sam, parts=2)
    seen: list[tuple[float, bool]] = []
    loss_fn = world.loss_fn

    def watched(batch: Any) -> Tensor:
        loss = loss_fn(batch)
        seen.append((loss.item(), world.step.second_pass))
        return loss

    world.loss_fn = watched  # type: ignore[method-assign]
    world.epoch()
    (only,), (again,) = [s for s, second in seen[-2:] if not second], [s for s, second in seen[-2:] if second]
    assert world.step.last.loss == pytest.approx(only / 2), "divided as the gradient is, in a partial window too"
    assert world.step.last.sharpness == pytest.approx((again - only) / 2)
    assert [second for _, second in seen] == [False, False, True, True] * 2 + [False, True]


# Every method


@pytest.mark.parametrize("name", flatwise.list_variants())
def test_every_method_is_what_it_is_in_a_plain_loop_or_says_why_not(name: str) -> None:
    from flatwise.lab.methods import Method, wrap

    def make(model: nn.Module) -> Any:
        return wrap(Method(name, name, {}), sgd(model), 10, model=model, train_size=20, batch_size=4)

    if name == "bsam":
        with pytest.raises(TypeError, match=r"found no flatwise\.SAM"):
            World(make)
        return
    world = World(make)
    opt = world.step._sam
    cannot = opt._batching.splits or opt._ascent.steps > 1 or opt._descent.adds_term or opt._descent.needs_output
    cannot = cannot or (opt._auto is not None and opt._method.one_pass)
    with pytest.raises(RuntimeError, match=r"use opt\.step") if cannot else nullcontext():
        world.epoch().epoch()
    if cannot:
        assert same([p.detach() for p in world.model.parameters()], [p.detach() for p in net().parameters()])
        return
    masks, model = world.masks, net()
    opt, rate, calls = make(model), LR, 0
    for index in range(10):
        part = slice(index % 5 * 4, index % 5 * 4 + 4)
        opt.param_groups[0]["lr"] = rate
        torch.set_rng_state(masks[calls])
        opt.step(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (X[part], Y[part]))
        calls += 2 if opt.last.active else 1
        rate *= 0.9
    assert calls == len(masks)
    assert same([p.detach() for p in world.model.parameters()], [p.detach() for p in model.parameters()])
    assert world.model[1].num_batches_tracked == 10


# Scaled losses


@pytest.mark.supports("Accelerate", "GradScaler")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.1], ids=["", "clipped"])
@pytest.mark.parametrize("name", ["sam", "usam", "pgn", "every-k"])
def test_a_scale_changes_nothing(name: str, parts: int, clip: float) -> None:
    """Neither where the size of the gradient counts, nor where two gradients are joined, nor where one is left out."""

    def wrap(model: nn.Module) -> flatwise.SAM:
        return flatwise.create(name, sgd(model), rho=RHO)

    plain = World(wrap, parts=parts, clip=clip).epoch().state()
    forget()
    world = World(wrap, parts=parts, clip=clip, scaled=True).epoch()
    assert same(plain, world.state())
    assert world.accelerator.scaler.get_scale() == 1024
    assert not any(world.skipped)


@pytest.mark.supports("Accelerate", "fp16 overflow in either pass")
@pytest.mark.parametrize("bad", [(7,), (8,)], ids=["first", "second"])
@pytest.mark.parametrize("clip", [0.0, 0.1], ids=["", "clipped"])
def test_an_overflow_in_any_pass_is_no_step(bad: tuple[int, ...], clip: float) -> None:
    """10 passes in 5 steps: the 7th and the 8th are those of the 4th step."""
    world = World(sam, clip=clip, scaled=True)
    world.bad = dict.fromkeys(bad, math.inf)
    ends: list[list[Tensor]] = []
    zero_grad = world.optimizer.zero_grad

    def end() -> None:
        zero_grad()
        moments = [e["momentum_buffer"].clone() for e in world.optimizer.state_dict()["state"].values()]
        ends.append([*(p.detach().clone() for p in world.model.parameters()), *moments])

    world.optimizer.zero_grad = end
    rates = []
    step = world.scheduler.step
    world.scheduler.step = lambda: (step(), rates.append(world.scheduler.get_last_lr()[0]))
    world.epoch()
    assert world.skipped == [False, False, False, True, False]
    assert same(ends[2], ends[3])
    assert not same(ends[3], ends[4])
    assert world.accelerator.scaler.get_scale() == 512
    assert rates[1] > rates[2] == rates[3] > rates[4]


# Saving


@pytest.mark.supports("Accelerate", "resume, bit for bit")
@pytest.mark.parametrize("parts", [1, 2])
def test_saving_and_loading_is_bit_for_bit(parts: int, tmp_path: Path) -> None:
    wrap = radius(lambda step: RHO / (1 + step))
    whole = World(wrap, parts=parts).epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()
    forget()
    torch.manual_seed(9)
    again = World(wrap, parts=parts)
    again.accelerator.load_state(str(tmp_path))
    again.epoch()
    assert same(whole.state(), again.state())
    assert whole.losses[5:] == again.losses


# Mistakes


def test_a_closure_does_not_run_between_two_updates() -> None:
    """Why there is this adapter: nothing says so, and no loss comes back."""
    world = World(sam, parts=2)
    world.step._sam._optimizer_step_pre_hooks.clear()
    calls = []
    for batch in world.loader:
        with world.accelerator.accumulate(world.model):

            def closure(batch: Any = batch) -> Tensor:
                world.optimizer.zero_grad()
                loss = world.loss_fn(batch)
                world.accelerator.backward(loss)
                return loss

            assert world.optimizer.step(closure) is None
            calls.append(world.calls)
    assert calls == [0, 2, 2, 4, 6]


@pytest.mark.supports("Accelerate", "misuse is refused by name")
def test_a_closure_beside_the_adapter_is_refused() -> None:
    world = World(sam)
    with pytest.raises(RuntimeError, match=r"optimizer.step\(closure\) beside SAMStep"):
        world.optimizer.step(lambda: None)


def test_no_sam_and_a_wrapper_in_the_wrong_place() -> None:
    world = World(sgd)
    with pytest.raises(TypeError, match="before it is prepared"):
        SAMStep(world.accelerator, world.model, world.optimizer)
    with pytest.raises(TypeError, match=r"framework's wrapper \(AcceleratedOptimizer\): wrap the plain optimizer"):
        flatwise.SAM(world.optimizer)


def test_a_loss_that_is_no_tensor() -> None:
    world = World(sam)
    with pytest.raises(TypeError, match="loss_fn must return a tensor, got float"):
        world.step.backward(lambda batch: 1.0, (X, Y))


@pytest.mark.supports("Accelerate", "DeepSpeed is refused")
@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_an_engine_is_refused(kind: str) -> None:
    world = World(sam)
    engine = SimpleNamespace(distributed_type=accelerate.DistributedType(kind))
    with pytest.raises(ValueError, match=rf"under {kind}.*FSDP2 \(fully sharded\) or DDP"):
        SAMStep(engine, world.model, world.optimizer)


@pytest.mark.parametrize("module", ["deepspeed.runtime.zero.stage3", "accelerate.utils.deepspeed"])
def test_an_optimizer_of_deepspeeds_engine_is_refused(module: str) -> None:
    engine = type("Optimizer", (), {"__module__": module})
    inherited = type("Wrapped", (engine, torch.optim.SGD), {"__module__": "mine"})
    for opt in (engine(), inherited(net().parameters(), lr=0.1)):
        with pytest.raises(TypeError, match="an optimizer of the DeepSpeed engine"):
            flatwise.SAM(opt)
    fused = type("FusedAdam", (torch.optim.SGD,), {"__module__": "deepspeed.ops.adam.fused_adam"})
    assert flatwise.SAM(fused(net().parameters(), lr=0.1)).last.step == 0, "a kernel without the engine is fine"


def test_ranks_that_climb_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatwise.parallel.ranks", lambda: 2)
    with pytest.raises(ValueError, match="leave sync_ascent out"):
        World(lambda model: flatwise.SAM(sgd(model), RHO, sync_ascent=False, model=model))


@pytest.mark.supports("Accelerate", "an exception in either pass leaves w")
@pytest.mark.parametrize("bad", [1, 2, 3, 4])
def test_an_error_in_any_pass_leaves_the_weights_where_they_were(bad: int) -> None:
    """Windows of 2: calls 1, 2 and again 3, 4."""
    world = World(sam, parts=2)
    loss_fn = world.loss_fn

    def fails(batch: Any) -> Tensor:
        if world.calls == bad - 1:
            world.calls += 1
            raise KeyError("the data ended")
        return loss_fn(batch)

    world.loss_fn = fails  # type: ignore[method-assign]
    before = [p.detach().clone() for p in world.model.parameters()]
    with pytest.raises(KeyError):
        world.epoch()
    assert same(before, list(world.model.parameters()))
    assert not world.step.second_pass


def test_a_micro_batch_that_failed_is_left_out_of_the_second_pass() -> None:
    world = World(sam, parts=3)
    seen: list[Tensor] = []
    loss_fn = world.loss_fn

    def fails(batch: Any) -> Tensor:
        if world.calls == 1:
            world.calls += 1
            raise MemoryError
        seen.append(batch[0])
        return loss_fn(batch)

    for number in range(3):
        batch = (X[4 * number : 4 * number + 4], Y[4 * number : 4 * number + 4])
        with world.accelerator.accumulate(world.model):
            with pytest.raises(MemoryError) if number == 1 else nullcontext():
                world.step.backward(fails, batch)
            world.optimizer.step()
    assert [x[0, 0].item() for x in seen] == [X[i, 0].item() for i in (0, 8, 0, 8)]
    assert world.step.last.active


# Two processes


def train_on_rank(rank: int, parts: int, rho: float | None, apart: bool, world: int = 2) -> dict[str, Any]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="localhost")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    loop = World(sgd if rho is None else radius(rho), parts=parts, size=4 // world, apart=apart)
    sums = Sums(loop.model)
    torch.manual_seed(rank)
    loop.epoch().epoch()
    return {"state": loop.state(), "sums": sums.count, "steps": len(loop.skipped), "losses": loop.losses}


@pytest.mark.supports("Accelerate", "two processes")
@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_are_one_with_the_whole_batch(parts: int, tmp_path: Path) -> None:
    first, second = on_ranks(train_on_rank, tmp_path, parts, RHO, False)
    one = World(sam, parts=parts, apart=False).epoch().epoch()
    assert same(first["state"], second["state"])
    for ours, theirs in zip(first["state"], one.state(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert first["steps"] == len(one.skipped)
    assert first["sums"] == 2 * first["steps"], "one sum of gradients for each pass"


@pytest.mark.slow
def test_a_radius_of_zero_is_the_plain_loop_on_two_ranks(tmp_path: Path) -> None:
    """Each rank has batch statistics and masks of its own."""
    ends = []
    for number, rho in enumerate((None, 0.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        ends.append(on_ranks(train_on_rank, folder, 2, rho, True))
    for plain, ours in zip(*ends, strict=True):
        assert same(plain["state"], ours["state"])
        assert (plain["sums"], plain["losses"]) == (ours["sums"], ours["losses"])
