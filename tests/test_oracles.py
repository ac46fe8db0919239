"""Every method of the registry, and every combination of options, against the papers' equations in float64.

A new method joins by a row in ``METHODS``: what to pass to ``create`` and what that is to the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import flatwise
from flatwise import SAM
from oracles.step import train

SAMPLES, FEATURES, HIDDEN, STEPS = 7, 4, 5, 4
SHAPES = ((HIDDEN, FEATURES), (HIDDEN,), (1, HIDDEN), ())
LR, MOMENTUM = 0.1, 0.9
INF = math.inf


def network(weights: list[Tensor], x: Tensor) -> Tensor:
    """A net with one hidden layer; smooth, so that its second derivatives exist."""
    first, bias, second, offset = weights
    return (torch.tanh(x @ first.T + bias) @ second.T)[:, 0] + offset


def loss_of(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    return ((network(weights, x) - y) ** 2).mean()


def flat_loss(w: Tensor, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The same loss as a function of one flat vector and a list of samples."""
    sizes = [math.prod(shape) for shape in SHAPES]
    weights = [part.view(shape) for part, shape in zip(w.split(sizes), SHAPES, strict=True)]
    return loss_of(weights, torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]))


def make_weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]


def make_batches(sizes: tuple[int, ...] = (SAMPLES,) * STEPS) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, FEATURES).double(), torch.randn(n).double()) for n in sizes]


def flat(weights: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([w.detach().flatten() for w in weights])


@dataclass(frozen=True)
class Case:
    """One row: options of SAM, radii of the groups, and the same in the oracle's words."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)
    radii: tuple[float, ...] = (0.3,)
    """One for all parameters, or one for each (each is a group then)."""

    def groups(self, weights: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        if len(self.radii) == 1:
            return [{"params": weights, "rho": self.radii[0]}]
        return [{"params": [w], "rho": rho} for w, rho in zip(weights, self.radii, strict=True)]

    def rho(self) -> Tensor:
        radii = self.radii * len(SHAPES) if len(self.radii) == 1 else self.radii
        sizes = (math.prod(shape) for shape in SHAPES)
        return torch.cat([torch.full((n,), rho, dtype=torch.float64) for n, rho in zip(sizes, radii, strict=True)])

    def expected(self, weights: list[torch.nn.Parameter], batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        samples = [list(zip(x, y, strict=True)) for x, y in batches]
        return train(flat_loss, flat(weights), samples, self.rho(), lr=LR, momentum=MOMENTUM, **self.oracle)


def same(name: str, radii: tuple[float, ...] = (0.3,), **options: Any) -> Case:
    """A row whose options have the same names in the oracle."""
    return Case(name, options, options, radii)


GROUPS = (0.3, 0.05, 0.7, 0.3)
LEFT_OUT = (0.3, 0.0, 0.7, 0.0)
BALLS = [
    *(same(f"p={p}", p=p) for p in (1, 1.1, 1.5, 2, 3, 10, INF)),
    *(same(f"p={p}, adaptive", p=p, adaptive=True) for p in (1, 1.5, 2, 3, INF)),
    *(same(f"p={p}, adaptive, eta", p=p, adaptive=True, eta=0.1) for p in (1, 1.5, 2, 3, INF)),
    *(same(f"p={p}, groups", GROUPS, p=p) for p in (1, 1.5, 2, 3, INF)),
    *(same(f"p={p}, group left out", LEFT_OUT, p=p) for p in (1, 1.5, 2, 3, INF)),
    *(same(f"p={p}, groups, adaptive, eta", LEFT_OUT, p=p, adaptive=True, eta=0.1) for p in (1, 1.5, 2, 3, INF)),
    same("no radius", (0.0,)),
]


def steps(n: int, ball: Case) -> Case:
    return Case(f"{n} steps, {ball.name}", {**ball.options, "ascent_steps": n}, {**ball.oracle, "n": n}, ball.radii)


def second_order(ball: Case) -> Case:
    options = {"second_order": True}
    return Case(f"second order, {ball.name}", {**ball.options, **options}, {**ball.oracle, **options}, ball.radii)


def batched(name: str, m: int | None = None, seen: Callable[[int], int] | None = None, **options: Any) -> Case:
    oracle: dict[str, Any] = {k: v for k, v in options.items() if k not in ("micro_batch_size", "ascent_fraction")}
    return Case(name, options, {**oracle, "m": m, "seen": seen})


BATCHED = [
    *(batched(f"m={m}", m, micro_batch_size=m) for m in (1, 2, 3, SAMPLES, 100)),
    batched("half", seen=lambda n: math.ceil(n / 2), ascent_fraction=0.5),
    batched("a tenth is one sample", seen=lambda n: 1, ascent_fraction=0.1),
    batched("m=3, a third", 3, lambda n: math.ceil(n / 3), micro_batch_size=3, ascent_fraction=1 / 3),
    batched("m=3, p=1.5, adaptive", 3, micro_batch_size=3, p=1.5, adaptive=True, eta=0.1),
    Case(
        "m=3, two steps, half",
        {"micro_batch_size": 3, "ascent_steps": 2, "ascent_fraction": 0.5},
        {"m": 3, "n": 2, "seen": lambda n: math.ceil(n / 2)},
    ),
    Case("m=2, second order", {"micro_batch_size": 2, "second_order": True}, {"m": 2, "second_order": True}),
    Case(
        "second order, half",
        {"second_order": True, "ascent_fraction": 0.5},
        {"second_order": True, "seen": lambda n: math.ceil(n / 2)},
    ),
]
SCHEDULED = [
    Case("every second", {"every": 2}, {"active": lambda step: step in (0, 2)}),
    Case("a window", {"window": (0.25, 0.75), "total_steps": 4}, {"active": lambda step: step in (1, 2)}),
    Case("warm-up", {"schedule": flatwise.Schedule(warmup_steps=2)}, {"active": lambda step: step >= 2}),
    Case("every second, m=3", {"every": 2, "micro_batch_size": 3}, {"active": lambda step: step in (0, 2), "m": 3}),
]
GRID = [
    *BALLS,
    *(steps(n, ball) for n in (2, 5) for ball in BALLS),
    *(second_order(ball) for ball in BALLS),
    *BATCHED,
    *SCHEDULED,
]


def rows(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def run(make: Callable[[list[torch.nn.Parameter]], SAM], case: Case, sizes: tuple[int, ...]) -> None:
    """Train with both, and compare the weights after each step."""
    weights, batches = make_weights(), make_batches(sizes)
    path = case.expected(weights, batches)
    opt = make(weights)
    for (x, y), expected in zip(batches, path, strict=True):
        opt.step(lambda batch: loss_of(weights, *batch), (x, y))
        close(flat(weights), expected)


@rows(GRID)
def test_training_follows_the_oracle(case: Case) -> None:
    run(
        lambda weights: SAM(case.groups(weights), torch.optim.SGD, lr=LR, momentum=MOMENTUM, **case.options),
        case,
        (SAMPLES,) * (2 if case.options.get("second_order") else STEPS),
    )


@rows(BATCHED)
@pytest.mark.parametrize("sizes", [(1, 2), (6, 5)], ids=str)
def test_batches_of_every_size_follow_the_oracle(case: Case, sizes: tuple[int, ...]) -> None:
    run(
        lambda weights: SAM(case.groups(weights), torch.optim.SGD, lr=LR, momentum=MOMENTUM, **case.options),
        case,
        sizes,
    )


# Of the registry, what these oracles cover (test_family_oracles.py has all of it):
# name -> options to give, and what the method is to the oracle.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sam": ({}, {}),
    "asam": ({}, {"adaptive": True, "eta": 0.01}),
    "lp": ({"p": INF}, {"p": INF}),
    "multi-step": ({}, {"n": 2}),
    "second-order": ({}, {"second_order": True}),
    "every-k": ({"every": 3}, {"active": lambda step: step in (0, 3)}),
    "late": ({"total_steps": 4, "window": (0.5, 1.0)}, {"active": lambda step: step >= 2}),
    "m-sam": ({"micro_batch_size": 2}, {"m": 2}),
    "quarter": ({}, {"seen": lambda n: math.ceil(n / 4)}),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_registry_follow_their_oracle(name: str) -> None:
    options, oracle = METHODS[name]
    rho = flatwise.variant_info(name).rho
    run(
        lambda weights: flatwise.create(
            name, torch.optim.SGD(weights, lr=LR, momentum=MOMENTUM), **{"rho": rho, **options}
        ),
        Case(name, options, oracle, (rho,)),
        (SAMPLES,) * STEPS,
    )


def test_the_rows_differ_from_each_other() -> None:
    """A grid in which the options made no difference would prove nothing."""
    torch.manual_seed(1)
    weights, batches = make_weights(), make_batches()
    ends = {case.name: case.expected(weights, batches)[-1] for case in [*BALLS, *BATCHED]}
    plain = ends.pop("p=2")
    alike = {name for name, end in ends.items() if torch.allclose(end, plain, rtol=1e-6, atol=0)}
    assert alike == {f"m={SAMPLES}", "m=100"}


def test_a_function_of_the_step_gives_the_radius() -> None:
    weights, batches = make_weights(), make_batches()
    radii = (0.1, 0.0, 0.4, 0.2)
    opt = SAM(torch.optim.SGD(weights, lr=LR), rho=lambda step: radii[step])
    w = flat(weights)
    for (x, y), rho in zip(batches, radii, strict=True):
        samples = [list(zip(x, y, strict=True))]
        (w,) = train(flat_loss, w, samples, torch.full_like(w, rho), lr=LR)
        opt.step(lambda batch: loss_of(weights, *batch), (x, y))
        close(flat(weights), w)
