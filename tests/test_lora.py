"""Flat-LoRA: noise on the merged weights, against an oracle with the paper's equation, on layers like those of peft."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.lora import MergedNoise

STEPS, RHO, SCALE = 20, 0.3, 0.5


class Lora(nn.Module):
    """A linear layer below an adapter of rank 2, with the methods that peft's layers have."""

    active_adapters = ("default",)
    merged = False
    fan_in_fan_out = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs) / 3), nn.Parameter(torch.randn(outputs, 2) / 3)

    def get_base_layer(self) -> nn.Linear:
        return self.base

    def get_delta_weight(self, adapter: str) -> Tensor:
        assert adapter == "default"
        return SCALE * self.b @ self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * F.linear(F.linear(x, self.a), self.b)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Lora(6, 8), nn.Tanh(), Lora(8, 3)).double()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 6, generator=generator).double(), torch.randint(3, (12,), generator=generator))
        for _ in range(STEPS)
    ]


def cosine(t: int) -> float:
    """The radius grows from 0, as in the paper."""
    return RHO * (1 - math.cos(math.pi * t / STEPS)) / 2


def oracle(seed: int) -> Tensor:
    """Li et al., eq. 8: L(W + s B A + eps), eps_ij ~ N(0, (rho_t^2 / n) ||W'_i||^2), for the gradients of A and B."""
    model = network()
    base = torch.optim.SGD(trained(model), lr=0.05, momentum=0.9)
    for t, (x, y) in enumerate(batches()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + t)
        merged = []
        for layer in (model[0], model[2]):
            w = layer.base.weight + SCALE * layer.b @ layer.a
            sigma = cosine(t) * w.detach().norm(dim=1, keepdim=True) / math.sqrt(w.shape[1])
            merged.append(w + sigma * torch.randn(w.shape, generator=generator, dtype=torch.float64))
        out = F.linear(torch.tanh(F.linear(x, merged[0], model[0].base.bias)), merged[1], model[2].base.bias)
        params = trained(model)
        for p, g in zip(params, torch.autograd.grad(F.cross_entropy(out, y), params), strict=True):
            p.grad = g
        base.step()
    return torch.cat([p.detach().flatten() for p in trained(model)])


def make(model: nn.Module, rho: Any = cosine, **options: Any) -> flatwise.SAM:
    base = torch.optim.SGD(trained(model), lr=0.05, momentum=0.9)
    return flatwise.create("flat-lora", base, rho=rho, model=model, **options)


def train(opt: flatwise.SAM, model: nn.Module, steps: range = range(STEPS)) -> Tensor:
    for step in steps:
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batches()[step])
    return torch.cat([p.detach().flatten() for p in trained(model)])


@pytest.mark.supports("plain loop", "LoRA: noise on the merged weights")
@pytest.mark.parametrize("seed", [0, 5])
def test_it_is_the_papers_equation_and_the_frozen_weights_come_back(seed: int) -> None:
    model = network()
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    opt = make(model, noise_seed=seed)
    assert torch.allclose(train(opt, model), oracle(seed), rtol=0, atol=1e-10)
    assert opt.last.passes == 1
    after = [p for p in model.parameters() if not p.requires_grad]
    assert all(map(torch.equal, frozen, after))


def test_other_noise_is_another_training() -> None:
    first, second = network(), network()
    assert not torch.allclose(train(make(first, noise_seed=0), first), train(make(second, noise_seed=1), second))


def test_without_a_radius_it_is_the_base() -> None:
    model, plain = network(), network()
    base = torch.optim.SGD(trained(plain), lr=0.05, momentum=0.9)
    for x, y in batches():
        base.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        base.step()
    wanted = torch.cat([p.detach().flatten() for p in trained(plain)])
    assert torch.equal(train(make(model, rho=0.0), model), wanted)


def test_the_frozen_weights_come_back_from_an_error() -> None:
    model = network()
    opt, before = make(model, rho=1.0), [p.detach().clone() for p in model.parameters()]

    def fails(batch: Any) -> Tensor:
        assert not torch.equal(model[0].base.weight, before[2]), "the noise is there"
        raise KeyboardInterrupt

    before = [p.detach().clone() for p in model.parameters()]
    index = [name for name, _ in model.named_parameters()].index("0.base.weight")
    before[2] = before[index]
    with pytest.raises(KeyboardInterrupt):
        opt.step(fails, batches()[0])
    assert torch.equal(model[0].base.weight, before[index])


def test_resuming_and_copying_go_on_bit_for_bit() -> None:
    model = network()
    opt = make(model)
    train(opt, model, range(8))
    twin, other = copy.deepcopy((model, opt))
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    resumed = make(fresh)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    wanted = train(opt, model, range(8, STEPS))
    assert torch.equal(train(other, twin, range(8, STEPS)), wanted)
    assert torch.equal(train(resumed, fresh, range(8, STEPS)), wanted)


def test_rows_of_a_transposed_matrix_and_of_half_precision() -> None:
    model = network().float()
    layer = model[0]
    direction = MergedNoise().bound(model)
    rows = direction.layers[0].rows()
    merged = layer.base.weight + layer.get_delta_weight("default")
    assert torch.allclose(rows, merged.norm(dim=1, keepdim=True) / math.sqrt(6))
    layer.fan_in_fan_out = True
    assert torch.allclose(direction.layers[0].rows(), merged.norm(dim=0, keepdim=True) / math.sqrt(8))
    layer.fan_in_fan_out = False
    half = network().bfloat16()
    opt, kept = make(half, rho=0.5), half[0].base.weight.detach().clone()
    opt.step(lambda b: F.cross_entropy(half(b[0].bfloat16()).float(), b[1]), batches()[0])
    assert torch.equal(half[0].base.weight, kept)
    assert opt.last.active


def test_mistakes_are_named() -> None:
    plain = nn.Linear(2, 2)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"this model has none: pass model=model"):
        flatwise.create("flat-lora", sgd, model=plain)
    with pytest.raises(TypeError, match="needs model"):
        flatwise.create("flat-lora", sgd)
    model = network()
    with pytest.raises(ValueError, match="has its own length"):
        make(model, adaptive=True, normalised=True)
    opt = make(model, rho=1.0)
    model[0].merged = True
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        train(opt, model, range(1))
    model = network()
    model[0].base.weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantized \(torch.uint8\)"):
        make(model)


def test_it_is_listed_where_adapters_are_asked_for() -> None:
    assert "flat-lora" not in flatwise.list_variants()
    assert flatwise.list_variants(adapters=True).count("flat-lora") == 1
    assert flatwise.variant_info("flat-lora").adapters


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["0", "2"], r=2, lora_alpha=3)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    opt = make(model, rho=0.5)
    layers = opt._ascent.direction.layers  # type: ignore[attr-defined]
    assert len(layers) == 2
    layer = layers[0].layer
    merged = layer.weight + 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(layers[0].rows(), merged.norm(dim=1, keepdim=True) / math.sqrt(6))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    moved: list[bool] = []

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        moved.append(not torch.equal(layer.weight, layers[0].weight * 0 + frozen[first]))
        return F.cross_entropy(model(batch[0]), batch[1])

    first = next(n for n, p in model.named_parameters() if p is layer.weight)
    for batch in batches():
        opt.step(loss_fn, batch)
    assert moved == [True] * STEPS
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
