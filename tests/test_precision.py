"""Half precision: autocast sees the moved weights, and what rounding does to a perturbation is known."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise.rounding import round_at_random

HALF = [torch.bfloat16, torch.float16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of the dtype just below and above, by walking through its bit patterns."""
    grid = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    grid = grid[grid.isfinite()].sort().values
    above = torch.searchsorted(grid, value)
    return grid[torch.where(grid[above] == value, above, above - 1)], grid[above]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_at_random_gives_a_neighbour_and_the_right_mean(dtype: torch.dtype) -> None:
    exact = torch.cat([torch.randn(40, generator=generator()) * 0.02, torch.tensor([3e-6, -5e-7, 1.0, -0.25, 0.0])])
    below, above = neighbours(exact, dtype)
    draws, total = generator(1), torch.zeros(exact.shape, dtype=torch.float64)
    for _ in range(4000):
        drawn = round_at_random(exact, dtype, draws).float()
        assert ((drawn == below) | (drawn == above)).all()
        total += drawn
    # The mean of 4000 draws between two neighbours is off by at most four standard errors.
    error = ((above - below) / 2 / 4000**0.5).double()
    assert ((total / 4000 - exact).abs() <= 4 * error + 1e-3 * (above - below)).all()


class Flat(nn.Module):
    """A million weights of standard deviation 0.02, and a loss whose gradient is given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(1_000_000, generator=generator()) * 0.02).to(dtype))
        self.slope = torch.randn(1_000_000, generator=generator(1)).to(dtype)

    def forward(self) -> Tensor:
        return (self.weight * self.slope).float().sum()


def eps_made(opt: Any, model: Flat) -> Tensor:
    """What a step moves the weights by."""
    before, seen = model.weight.detach().clone(), []

    def closure() -> Tensor:
        seen.append(model.weight.detach().float() - before.float())
        opt.zero_grad()
        loss = model()
        loss.backward()
        return loss

    opt.step(closure)
    assert torch.equal(model.weight.detach(), before)
    return seen[-1]


def sam(model: nn.Module, **options: Any) -> Any:
    return flatwise.create("sam", torch.optim.SGD(model.parameters(), lr=0.0), **options)


def arrives(eps: Tensor, model: Flat, rho: float) -> float:
    wanted = rho * model.slope.float() / model.slope.float().norm()
    return float(eps @ wanted / wanted.square().sum())


@pytest.mark.parametrize(("rho", "share"), [(0.02, 52), (0.05, 88)])
def test_a_swallowed_perturbation_is_said_once_with_its_share(rho: float, share: int) -> None:
    model = Flat(torch.bfloat16)
    opt = sam(model, rho=rho)
    with pytest.warns(UserWarning, match=f"only {share} % of the perturbation arrives: weights in bfloat16"):
        eps = eps_made(opt, model)
    assert round(100 * arrives(eps, model, rho)) == share
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eps_made(opt, model)
        eps_made(sam(model, rho=0.2), model)
        eps_made(sam(model, rho=rho, rounding="stochastic"), model)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_with_stochastic_rounding_all_of_it_arrives(dtype: torch.dtype) -> None:
    model, other = Flat(dtype), Flat(dtype)
    opt, same = sam(model, rho=0.02, rounding="stochastic"), sam(other, rho=0.02, rounding="stochastic")
    state = torch.get_rng_state()
    steps = [eps_made(opt, model) for _ in range(2)]
    assert all(0.97 < arrives(eps, model, 0.02) < 1.03 for eps in steps)
    assert not torch.equal(*steps), "every step draws anew"
    assert all(map(torch.equal, steps, [eps_made(same, other) for _ in range(2)])), "from the step alone"
    assert torch.equal(state, torch.get_rng_state())
    seeded = sam(model, rho=0.02, rounding="stochastic", rounding_seed=1)
    assert not torch.equal(eps_made(seeded, model), steps[0])


def test_stochastic_rounding_follows_every_way_of_moving() -> None:
    model = Flat(torch.bfloat16)
    for options in ({"ascent_steps": 2}, {"adaptive": True, "eta": 0.1}, {"p": 3.0}):
        opt = sam(model, rho=0.02, rounding="stochastic", **options)
        eps = eps_made(opt, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nearest = eps_made(sam(model, rho=0.02, **options), model)
        assert not torch.equal(eps, nearest), options


def test_an_unknown_rounding_is_named() -> None:
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        flatwise.GradientAscent(rounding="up")  # type: ignore[arg-type]


@pytest.mark.supports("plain loop", "autocast")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["sam", "msam", "multi-step", "pgn"])
def test_autocast_around_the_step_sees_the_moved_weights(name: str, dtype: torch.dtype) -> None:
    """Its cache of casts would hand the second pass the weights of the first."""
    x, y = torch.randn(8, 6, generator=generator()), torch.arange(8) % 3

    def train(*, around: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        opt = flatwise.create(name, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=1.0)
        losses = []

        def closure() -> Tensor:
            opt.zero_grad()
            with torch.autocast("cpu", dtype=dtype, cache_enabled=around):
                loss = F.cross_entropy(model(x).float(), y)
            losses.append(loss.item())
            loss.backward()
            return loss

        for _ in range(3):
            with torch.autocast("cpu", dtype=dtype) if around else nullcontext():
                if around:
                    F.cross_entropy(model(x).float(), y).backward()  # fills the cache with casts of w
                opt.step(closure)
        return losses, [p.detach() for p in model.parameters()]

    without, around = train(around=False), train(around=True)
    assert without[0] == around[0]
    assert all(map(torch.equal, without[1], around[1]))
    assert len(set(without[0])) > 2
