"""Layers learn in which passes their gradient must be true: those whose gradient is climbed along, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatwise
from flatwise import SAM, Batching, FunctionalGradient, GradientAscent, Momentum

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Asks(nn.Module):
    """Writes down what it is told in each forward pass with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.told: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.told.append(flatwise.true_gradient_wanted())
        return self.head(x)  # type: ignore[no-any-return]


def step(opt: Any, model: Asks) -> list[bool]:
    model.told = []
    opt.step(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (X, Y))
    assert not flatwise.true_gradient_wanted()
    return model.told


T, N = True, False
CASES: dict[str, tuple[dict[str, Any], list[list[bool]]]] = {
    "sam": ({}, [[T, N], [T, N]]),
    "no radius": ({"rho": 0.0}, [[N]]),
    "every second step": ({"every": 2}, [[T, N], [N], [T, N]]),
    "three steps of ascent": ({"ascent_steps": 3}, [[T, T, T, N]]),
    "second order": ({"second_order": True}, [[T, N, T]]),
    "micro-batches": ({"micro_batch_size": 4}, [[T, N, T, N]]),
    "half of the batch": ({"ascent_fraction": 0.5}, [[T, N]]),
    # One pass at w + eps: its gradient is the one that the base sees.
    "momentum": ({"ascent": GradientAscent(direction=Momentum())}, [[T, N], [N]]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_climbed_along_is_true(name: str) -> None:
    options, expected = CASES[name]
    model = Asks()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **{"rho": 0.1, **options})
    if name == "momentum":  # in the first step there is none yet
        expected = [[N], [N]]
    assert [step(opt, model) for _ in expected] == expected


def test_with_a_closure_with_several_and_with_the_output_gradient_of_the_first_pass() -> None:
    model = Asks()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)

    def backward() -> Tensor:
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    def closure() -> Tensor:
        opt.zero_grad()
        return backward()

    opt.step(closure)
    assert model.told == [T, N]
    model.told = []
    opt.step([backward, backward], each=True)
    assert model.told == [T, N, T, N]
    model.told = []
    opt.step([backward, backward])
    assert model.told == [T, T, N, N]
    functional = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, descent=FunctionalGradient(), model=model)
    assert step(functional, model) == [T, N]


def test_methods_that_choose_samples_and_bsam() -> None:
    model = Asks()
    for name, options in (("k-sam", Batching(top_fraction=0.5)), ("esam", Batching(rising_fraction=0.5))):
        opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, batching=options)
        model.told = []
        opt.step(lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), (X, Y))
        assert model.told == [T, N], name
    assert step(flatwise.BSAM(model.parameters(), train_size=8), model) == [T, N]


def test_a_first_pass_outside_asks_by_itself() -> None:
    model = Asks()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    with flatwise.true_gradients():
        F.cross_entropy(model(X), Y).backward()
    opt.first_step(zero_grad=True)
    F.cross_entropy(model(X), Y).backward()
    opt.second_step(zero_grad=True)
    assert model.told == [T, N]


def test_blocks_nest_and_end_where_something_is_raised() -> None:
    with flatwise.true_gradients():
        with flatwise.true_gradients():
            assert flatwise.true_gradient_wanted()
        assert flatwise.true_gradient_wanted()
        model = Asks()
        assert step_inside(model) == [T, T]  # a whole step inside: both passes
    with pytest.raises(KeyError), flatwise.true_gradients():
        raise KeyError
    assert not flatwise.true_gradient_wanted()
    model = Asks()
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    for failing in (1, 2):
        with pytest.raises(KeyError):
            opt.step(fails_in(model, failing), (X, Y))
        assert not flatwise.true_gradient_wanted()


def step_inside(model: Asks) -> list[bool]:
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    opt.step(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (X, Y))
    return model.told


def fails_in(model: Asks, number: int) -> Callable[[Any], Tensor]:
    calls = 0

    def loss_fn(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if calls == number:
            raise KeyError
        return loss

    return loss_fn


def test_measures_want_the_gradient_of_what_they_measure() -> None:
    model = Asks()

    def loss_fn(asks: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(asks(batch[0]), batch[1])

    flatwise.measure.hessian_eigenvalues(model, loss_fn, (X, Y), k=1, mode="train", progress=False)
    assert model.told
    assert all(model.told)
    assert not flatwise.true_gradient_wanted()
