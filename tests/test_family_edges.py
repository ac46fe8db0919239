"""Where methods meet: noise and micro-batches, a kept part and a window, states in half precision, layers left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def batch(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=generator).double(), torch.arange(n) % 2


def test_every_micro_batch_has_noise_of_its_own() -> None:
    model = linear()
    opt = flatwise.create("random", sgd(model), rho=0.1, noise_seed=5, micro_batch_size=2, filter_scaled=False)
    before, seen = model.weight.detach().clone(), []

    def loss_fn(part: Any) -> Tensor:
        seen.append(model.weight.detach() - before)
        return F.cross_entropy(model(part[0]), part[1])

    opt.step(loss_fn, batch(6))
    first = 5 * 1_000_003
    for part, moved in enumerate(seen):
        generator = torch.Generator().manual_seed(first * 1_000_003 + part if part else first)
        noise = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        assert torch.allclose(moved, 0.1 * noise, rtol=0, atol=1e-15)
    assert len(seen) == 3


def test_a_kept_part_is_used_between_the_steps_of_a_window_only() -> None:
    total, options = 12, {"rho": 0.5, "every": 2, "window": (0.25, 0.6), "total_steps": 12, "alpha": 0.5}
    model, plain = linear(), linear()
    opt, base = flatwise.create("looksam", sgd(model), **options), sgd(plain)
    same, reasons = [], []
    for _ in range(total):
        plain.load_state_dict(model.state_dict())
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch(4))
        base.zero_grad()
        F.cross_entropy(plain(batch(4)[0]), batch(4)[1]).backward()
        base.step()
        same.append(torch.equal(model.weight, plain.weight))
        reasons.append(opt.last.reason)
    # Steps 3 to 7 are in the window; 4 and 6 are SAM steps, 5 and 7 reuse, and there is nothing to reuse at 3.
    assert [step for step in range(total) if not same[step]] == [4, 5, 6, 7]
    assert [step for step in range(total) if reasons[step] == "perturbed"] == [4, 6]


@pytest.mark.parametrize("options", [{"micro_batch_size": 2}, {"ascent_fraction": 0.2}])
def test_a_sample_left_alone_before_batch_statistics_is_named(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    opt = flatwise.SAM(sgd(model), 0.1, **options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"(?s)leaves one sample alone.*more than 1 value per channel"):
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch(5))
    assert all(map(torch.equal, before, model.parameters()))
    # Without a choice of ours the error is the model's own.
    with pytest.raises(ValueError, match=r"^Expected more than 1 value"):
        flatwise.SAM(sgd(model), 0.1).step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch(1))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(3, 2).double(), nn.LayerNorm(2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def test_normalisation_layers_that_no_loss_sees_are_named() -> None:
    model = Unused()
    opt = flatwise.create("sam-on", sgd(model), model=model)
    with pytest.raises(RuntimeError, match="the loss depends on none of the parameters that would move"):
        opt.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batch(4))
    assert all(p.requires_grad for p in model.parameters())


class Betas(torch.optim.Optimizer):
    """A base that looks like Adam and keeps something else."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["average"] = param.grad


def test_a_base_without_a_momentum_that_can_be_read_is_named() -> None:
    model = linear()
    opt = flatwise.create("msam", Betas(model.parameters()))
    loss_fn = lambda b: F.cross_entropy(model(b[0]), b[1])  # noqa: E731
    opt.step(loss_fn, batch(4))
    with pytest.raises(RuntimeError, match="and this Betas keeps average: use SGD with momentum"):
        opt.step(loss_fn, batch(4))


def test_the_precision_of_half_precision_weights_moves() -> None:
    model = linear().to(torch.bfloat16)
    opt = flatwise.BSAM(model.parameters(), train_size=10, lr=0.1, damping=0.1)

    def step() -> None:
        opt.step(lambda b: F.cross_entropy(model(b[0].bfloat16()), b[1]), batch(4))

    step()
    before = opt.state[model.weight]["precision"].clone()
    assert before.dtype is torch.float32
    saved = opt.state_dict()
    step()
    precision = opt.state[model.weight]["precision"]
    assert not torch.equal(precision.bfloat16(), precision)
    assert (precision != before).all()
    other = flatwise.BSAM(linear().to(torch.bfloat16).parameters(), train_size=10)
    other.load_state_dict(saved)
    (weight, _) = other.param_groups[0]["params"]
    assert other.state[weight]["precision"].dtype is torch.float32
    assert torch.equal(other.state[weight]["precision"], saved["state"][0]["precision"])
