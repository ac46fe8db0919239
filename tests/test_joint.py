"""Several base optimizers, several networks, several losses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise

STEPS, RHO = 12, 0.2
NEEDS: dict[str, dict[str, Any]] = {
    "lp": {"p": 3.0},
    "late": {"total_steps": STEPS},
    "ae-sam": {"total_steps": STEPS},
    "m-sam": {"micro_batch_size": 4},
    "warmup-off": {"warmup_steps": 2},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 6, generator=generator).double(), torch.randint(3, (12,), generator=generator))
        for _ in range(steps)
    ]


def weights(*modules: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for m in modules for p in m.parameters()])


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def train(opt: Any, model: Net, steps: range = range(STEPS)) -> None:
    for step in steps:
        torch.manual_seed(step)
        reduction = "none" if opt.wants_sample_losses else "mean"
        opt.step(lambda b, how=reduction: F.cross_entropy(model(b[0]), b[1], reduction=how), batches()[step])


@pytest.mark.supports("plain loop", "several base optimizers")
@pytest.mark.parametrize("name", [n for n in flatwise.list_variants() if n != "bsam"])
def test_two_bases_are_one_base_with_two_groups_bit_for_bit(name: str) -> None:
    model, other = Net(), Net()
    options = NEEDS.get(name, {})
    both = [{"params": other.backbone.parameters()}, {"params": other.head.parameters()}]
    one = flatwise.create(name, torch.optim.SGD(both, lr=0.05, momentum=0.9), model=other, **options)
    two = flatwise.create(name, [sgd(model.backbone), sgd(model.head)], model=model, **options)
    train(two, model)
    train(one, other)
    assert torch.equal(weights(model), weights(other))
    saved, wanted = two.state_dict(), one.state_dict()
    assert saved["param_groups"] == wanted["param_groups"]
    assert saved["state"].keys() == wanted["state"].keys()
    for key, entries in wanted["state"].items():
        assert entries.keys() == saved["state"][key].keys()
        assert all(torch.equal(v, saved["state"][key][k]) for k, v in entries.items() if isinstance(v, Tensor))


def by_hand(model: Net, bases: list[torch.optim.Optimizer], *, apart: bool = False) -> None:
    """One norm over both networks, or one for each."""
    parts = [list(model.backbone.parameters()), list(model.head.parameters())]
    for step, (x, y) in enumerate(batches()):
        torch.manual_seed(step)
        params = [p for part in parts for p in part]
        grads = dict(zip(params, torch.autograd.grad(F.cross_entropy(model(x), y), params), strict=True))
        buffers, random = [b.clone() for b in model.buffers()], torch.get_rng_state()
        kept = {p: p.detach().clone() for p in params}
        with torch.no_grad():
            for balls in parts if apart else [params]:
                norm = torch.cat([grads[p].flatten() for p in balls]).norm()
                for p in balls:
                    p.add_(RHO * grads[p] / norm)
        torch.manual_seed(step)
        for p, g in zip(params, torch.autograd.grad(F.cross_entropy(model(x), y), params), strict=True):
            p.grad = g
        with torch.no_grad():
            for p, w in kept.items():
                p.copy_(w)
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        torch.set_rng_state(random)
        for base in bases:
            base.step()


def two_kinds(model: Net) -> list[torch.optim.Optimizer]:
    return [sgd(model.backbone), torch.optim.AdamW(model.head.parameters(), lr=0.01)]


def test_a_backbone_and_a_head_share_one_norm() -> None:
    model, other = Net(), Net()
    opt = flatwise.SAM(two_kinds(model), RHO)
    train(opt, model)
    by_hand(other, two_kinds(other))
    assert torch.allclose(weights(model), weights(other), rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert opt.last.perturbation_norm == pytest.approx(RHO, rel=1e-12)


def test_a_ball_for_each_network() -> None:
    model, other = Net(), Net()
    first, second = (flatwise.SAM(base, RHO) for base in two_kinds(model))
    for step, (x, y) in enumerate(batches()):
        torch.manual_seed(step)

        def backward(x: Tensor = x, y: Tensor = y) -> None:
            F.cross_entropy(model(x), y).backward()

        first.zero_grad()
        second.zero_grad()
        backward()
        first.perturb()
        second.perturb()
        backward()
        second.restore()
        first.restore()
        first.step()
        second.step()
    by_hand(other, two_kinds(other), apart=True)
    assert torch.allclose(weights(model), weights(other), rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def round_trip(how: str, model: Net, opt: Any) -> tuple[Net, Any]:
    if how == "state_dict":
        fresh = Net()
        other = flatwise.create("vasso", two_kinds(fresh))
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        return fresh, other
    if how == "deepcopy":
        return copy.deepcopy((model, opt))
    return pickle.loads(pickle.dumps((model, opt)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_resuming_goes_on_bit_for_bit(how: str) -> None:
    model = Net()
    opt = flatwise.create("vasso", two_kinds(model))
    train(opt, model, range(5))
    fresh, other = round_trip(how, model, opt)
    train(opt, model, range(5, STEPS))
    train(other, fresh, range(5, STEPS))
    assert torch.equal(weights(model), weights(fresh))


def test_a_scheduler_drives_all_or_one() -> None:
    model = Net()
    bases = two_kinds(model)
    opt = flatwise.SAM(bases, RHO)
    every = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    one = torch.optim.lr_scheduler.LambdaLR(bases[1], lambda step: 0.1 if step else 1.0)
    train(opt, model, range(1))
    every.step()
    assert [g["lr"] for g in opt.param_groups] == [0.025, 0.005]
    one.step()
    assert [g["lr"] for g in opt.param_groups] == [0.025, pytest.approx(0.001)]


class Gan:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.g = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.d = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def loss_d(self, real: Tensor, noise: Tensor) -> Tensor:
        fake = self.g(noise).detach()
        return F.softplus(-self.d(real)).mean() + F.softplus(self.d(fake)).mean()

    def loss_g(self, noise: Tensor) -> Tensor:
        return F.softplus(-self.d(self.g(noise))).mean()


def sam_by_hand(params: list[Tensor], loss: Callable[[], Tensor], base: torch.optim.Optimizer) -> None:
    grads = torch.autograd.grad(loss(), params)
    norm, kept = torch.cat([g.flatten() for g in grads]).norm(), [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p.add_(RHO * g / norm)
    second = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        for p, w, g in zip(params, kept, second, strict=True):
            p.copy_(w)
            p.grad = g
    base.step()


def test_a_gan_takes_turns() -> None:
    gan, hand = Gan(), Gan()
    opt_d, opt_g = flatwise.SAM(sgd(gan.d), RHO), flatwise.SAM(sgd(gan.g), RHO)
    base_d, base_g = sgd(hand.d), sgd(hand.g)
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        real, noise = torch.randn(8, 3, generator=generator).double(), torch.randn(8, 2, generator=generator).double()
        opt_d.step(lambda b: gan.loss_d(*b), (real, noise))
        opt_g.step(gan.loss_g, noise)
        sam_by_hand(list(hand.d.parameters()), lambda r=real, n=noise: hand.loss_d(r, n), base_d)
        sam_by_hand(list(hand.g.parameters()), lambda n=noise: hand.loss_g(n), base_g)
    assert torch.allclose(weights(gan.d, gan.g), weights(hand.d, hand.g), rtol=0, atol=1e-12)


def test_several_losses_are_one_sum_and_their_mistakes_are_named() -> None:
    model = Net()
    opt = flatwise.SAM(two_kinds(model), RHO)
    x, y = batches(1)[0]

    def losses() -> list[Tensor]:
        out = model(x)
        return [F.cross_entropy(out, y), out.square().mean()]

    def closure() -> Tensor:
        opt.zero_grad()
        loss = torch.stack(losses()).sum()
        loss.backward()
        return loss

    assert opt.step(closure).ndim == 0
    with pytest.raises(ValueError, match=r"several elements|shape"):
        opt.step(lambda b: torch.stack(losses()), x)
    with pytest.raises(TypeError, match="return their sum"):
        opt.step(lambda: losses())
    kept = model.backbone(x)  # made before the weights moved, and used in both passes

    def reuses() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model.head(kept), y)
        loss.backward()
        return loss

    before = weights(model)
    with pytest.raises(RuntimeError, match="computed before the weights were"):
        opt.step(reuses)
    assert torch.equal(weights(model), before)


def test_mistakes_are_named() -> None:
    model = Net()
    with pytest.raises(ValueError, match="belongs to two of the base optimizers"):
        flatwise.SAM([sgd(model), sgd(model.head)])
    with pytest.raises(ValueError, match="already a SAM"):
        flatwise.SAM([sgd(model.backbone), flatwise.SAM(sgd(model.head))])
    with pytest.raises(TypeError, match="a ready optimizer and a class"):
        flatwise.SAM([sgd(model.backbone)], torch.optim.SGD)
    bases = two_kinds(model)
    opt = flatwise.SAM(bases, RHO)
    with pytest.raises(RuntimeError, match="cannot take a parameter group"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="has 1 parameter groups, the base optimizers 2"):
        opt.load_state_dict(flatwise.SAM(sgd(Net())).state_dict())
    swapped = flatwise.SAM([bases[1], bases[0]]).state_dict()
    with pytest.raises(ValueError, match="other sizes"):
        opt.load_state_dict(swapped)
    model(batches(1)[0][0]).sum().backward()
    with opt.perturbed(), pytest.raises(RuntimeError, match="about to step while the weights are perturbed"):
        bases[0].step()
    bases[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(RuntimeError, match="added to one of several"):
        train(opt, model, range(1))
