"""Fabric: a step is that of the plain loop, in every precision."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.start import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.integrations.fabric import sam_step
from flatwise.integrations.replay import find_sam

lightning_fabric = pytest.importorskip("lightning.fabric", reason="needs flatwise[lightning]")
from lightning.fabric.plugins.precision import MixedPrecision  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3
RHO, STEPS = 0.1, 5


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    return nn.Sequential(*layers).double()


def optimizer(model: nn.Module, /, **options: Any) -> flatwise.SAM:
    return flatwise.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), RHO, **options)


def snapshot(model: nn.Module, opt: Any) -> list[Tensor]:
    state = [v for s in opt.state_dict()["state"].values() for v in s.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*model.state_dict().values(), *state, torch.get_rng_state())]


class Scaled(MixedPrecision):
    """Losses are scaled, nothing is cast."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000))

    def forward_context(self) -> Any:
        return torch.autocast("cpu", enabled=False)

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data


class Ends:
    """A callback of Fabric."""

    def __init__(self) -> None:
        self.count = 0

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.count += 1


def plain(steps: int, parts: int) -> list[Tensor]:
    model = network()
    opt = optimizer(model)
    for step in range(steps):
        torch.manual_seed(step)
        opt.step(closures(model, opt, parts, Tensor.backward))
    return snapshot(model, opt)


def closures(model: nn.Module, opt: Any, parts: int, backward: Callable[[Tensor], Any]) -> Any:
    def one(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            if parts == 1:
                opt.zero_grad()
            loss = F.cross_entropy(model(x), y) / parts
            backward(loss)
            return loss

        return closure

    made = [one(x, y) for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True)]
    return made[0] if parts == 1 else made


def run(plugin: Any, parts: int = 1, *, own: bool = False) -> tuple[list[Tensor], Any, Ends]:
    ends = Ends()
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin] if plugin else [], callbacks=[ends])
    model = network()
    wrapped, opt = fabric.setup(model, optimizer(model))
    for step in range(STEPS):
        torch.manual_seed(step)
        made = closures(wrapped, opt, parts, fabric.backward)
        loss = opt.step(made) if own else sam_step(fabric, opt, made)
        assert loss.item() == pytest.approx(find_sam(opt).last.loss)
    return snapshot(model, find_sam(opt)), opt, ends


@pytest.mark.supports("Fabric", "equal to hand-written SAM")
@pytest.mark.supports("Fabric", "gradient accumulation")
@pytest.mark.supports("Fabric", "GradScaler")
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_that_of_the_plain_loop(scaled: bool, parts: int) -> None:
    found, opt, ends = run(Scaled() if scaled else None, parts)
    assert all(map(torch.equal, found, plain(STEPS, parts)))
    assert find_sam(opt).last.reason == "perturbed"
    assert ends.count == STEPS


@pytest.mark.parametrize("parts", [1, 3])
def test_without_a_scaler_the_optimizer_steps_alone(parts: int) -> None:
    assert all(map(torch.equal, run(None, parts, own=True)[0], plain(STEPS, parts)))


@pytest.mark.supports("Fabric", "autocast")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision: str) -> None:
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = network().float()
    wrapped, opt = fabric.setup(model, optimizer(model))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(wrapped(X.float()), Y)
        fabric.backward(loss)
        return loss

    losses = [float(sam_step(fabric, opt, closure)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert find_sam(opt).last.reason == "perturbed"


@pytest.mark.supports("Fabric", "fp16 overflow in either pass")
@pytest.mark.parametrize("bad", [5, 6], ids=["first", "second"])
def test_an_overflow_in_either_pass_is_no_step(bad: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1, plugins=plugins)
    model = network().float()
    wrapped, opt = fabric.setup(model, optimizer(model))
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = F.cross_entropy(wrapped(X.float()), Y)
        fabric.backward(loss * math.inf if calls == bad else loss)
        return loss

    found = []
    for _ in range(4):
        sam_step(fabric, opt, closure)
        found.append((scaler.get_scale(), snapshot(model, find_sam(opt))[:-1]))
    assert [scale for scale, _ in found] == [1024.0, 1024.0, 512.0, 512.0]
    assert all(map(torch.equal, found[1][1], found[2][1])), "batch statistics too"
    assert not torch.equal(found[2][1][0], found[3][1][0])


@pytest.mark.supports("Fabric", "resume, bit for bit")
def test_saving_and_loading(tmp_path: Path) -> None:
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    states = []
    for begin in (0, 3):
        model = network()
        wrapped, opt = fabric.setup(model, optimizer(model))
        state = {"model": wrapped, "optimizer": opt}
        if begin:
            fabric.load(tmp_path / "saved", state)
        for step in range(begin, STEPS):
            if step == 3 and not begin:
                fabric.save(tmp_path / "saved", state)
            torch.manual_seed(step)
            sam_step(fabric, opt, closures(wrapped, opt, 1, fabric.backward))
        states.append(snapshot(model, find_sam(opt)))
    assert all(map(torch.equal, *states))


def test_torch_refuses_a_closure_where_losses_are_scaled() -> None:
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        run(Scaled(), own=True)


@pytest.mark.supports("Fabric", "misuse is refused by name")
def test_another_optimizer_is_named() -> None:
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    model = network()
    wrapped, opt = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert find_sam(opt) is None
    with pytest.raises(TypeError, match=r"without a flatwise\.SAM inside"):
        sam_step(fabric, opt, closures(wrapped, opt, 1, fabric.backward))


def test_the_optimizer_inside_a_wrapper_is_found() -> None:
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    model = network()
    sam = optimizer(model)
    _, opt = fabric.setup(model, sam)
    assert isinstance(opt, flatwise.SAM), "the wrapper says so, and has nothing of it"
    assert find_sam(opt) is sam
    with pytest.raises(RuntimeError, match=r"call opt\.optimizer\.first_step\(\)"):
        opt.first_step()


def on_two_ranks(rank: int, sync: bool, scaled: bool, parts: int) -> Any:
    plugins = [Scaled()] if scaled else []
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "0"})
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=plugins)
    fabric.launch()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    wrapped = fabric.setup_module(model)
    opt = fabric.setup_optimizers(optimizer(wrapped, model=wrapped, sync_ascent=sync))
    x, y = X[rank * 6 : rank * 6 + 6].chunk(parts), Y[rank * 6 : rank * 6 + 6].chunk(parts)

    def one(index: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            if parts == 1:
                opt.zero_grad()
            loss = F.cross_entropy(wrapped(x[index]), y[index]) / parts
            fabric.backward(loss)
            return loss

        return closure

    for _ in range(STEPS):
        sam_step(fabric, opt, one(0) if parts == 1 else [one(index) for index in range(parts)])
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.supports("Fabric", "two processes")
@pytest.mark.slow
@pytest.mark.parametrize(("sync", "scaled", "parts"), [(True, True, 2), (False, False, 2), (False, True, 1)])
def test_two_processes(sync: bool, scaled: bool, parts: int, tmp_path: Path) -> None:
    first, second = on_ranks(on_two_ranks, tmp_path, sync, scaled, parts)
    assert torch.equal(first, second)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    opt = optimizer(model, **({} if sync else {"micro_batch_size": 6}))
    for _ in range(STEPS):
        opt.step(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (X, Y))
    single = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(first, single, rtol=0, atol=1e-12)
