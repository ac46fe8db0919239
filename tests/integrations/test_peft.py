"""LoRA: what is frozen is neither copied nor touched, and the adapters take the step of SAM written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.weights import Displacement

peft = pytest.importorskip("peft")

RHO, LR = 0.2, 0.1
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(8) % 3


def lora() -> Any:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    return peft.get_peft_model(backbone, config).double()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


@pytest.mark.parametrize("everything", [True, False], ids=["all parameters", "the trained ones"])
@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_only_adapters_are_copied(everything: bool, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    versions = [p._version for p in frozen]
    copied: list[int] = []
    undo = Displacement.undo

    def counted(self: Displacement) -> None:
        copied.extend(before.numel() for _, before in self.moved())
        undo(self)

    monkeypatch.setattr(Displacement, "undo", counted)
    base = torch.optim.SGD(model.parameters() if everything else trained(model), lr=LR)
    opt = flatwise.SAM(base, RHO)
    if form == "closure":
        opt.step(lambda _: loss_of(model), X)
    else:
        loss_of(model).backward()
        opt.first_step()
        loss_of(model).backward()
        opt.second_step()
    adapters = sum(p.numel() for p in trained(model))
    assert sum(copied) == adapters < sum(p.numel() for p in frozen) / 5
    assert [p._version for p in frozen] == versions, "nobody wrote to a frozen weight"
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("everything", [True, False], ids=["all parameters", "the trained ones"])
def test_adapters_take_the_step_of_sam(everything: bool) -> None:
    model, other = lora(), lora()
    opt = flatwise.SAM(torch.optim.SGD(model.parameters() if everything else trained(model), lr=LR), RHO)
    for _ in range(3):
        opt.step(lambda _: loss_of(model), X)
        params = trained(other)
        first = torch.autograd.grad(loss_of(other), params)
        held, norm = copy.deepcopy(params), torch.cat([g.flatten() for g in first]).norm()
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p += RHO * g / norm
        last = torch.autograd.grad(loss_of(other), params)
        with torch.no_grad():
            for p, h, g in zip(params, held, last, strict=True):
                p.copy_(h - LR * g)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
