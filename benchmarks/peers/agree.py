"""What agrees: methods of both libraries whose steps are those of the papers' equations.

python benchmarks/peers/agree.py
"""

from __future__ import annotations

import pytorch_optimizer
import torch
from pytorch_optimizer import FriendlySAM
from small import Line, Task, along, minus, norm, relative, show
from temperon import Temperon
from torch import Tensor

RHO, LR, SIGMA, LMBDA, STEPS = 0.05, 0.1, 1.0, 0.9, 10


def by_equation(*, friendly: bool = False) -> list[Tensor]:
    """Return the weights after some steps; F-SAM climbs along g - sigma m, and along g in its first step."""
    task, average = Task(), None
    weights = task.weights()
    for _ in range(STEPS):
        g = task.gradient(weights)
        direction = g
        if friendly:
            old = [torch.zeros_like(x) for x in g] if average is None else average
            direction = along(g, old, -SIGMA)
            average = g if average is None else [LMBDA * m + (1 - LMBDA) * x for m, x in zip(average, g, strict=True)]
        perturbed = task.gradient(along(weights, direction, RHO / norm(direction)))
        weights = along(weights, perturbed, -LR)
    return weights


def of_sam() -> list[Tensor]:
    """Return the weights after pytorch_optimizer's SAM, with the backward pass that its docstring asks for."""
    task = Task()
    opt = pytorch_optimizer.SAM(task.params, torch.optim.SGD, rho=RHO, lr=LR)
    for _ in range(STEPS):
        task.closure()
        opt.step(task.closure)
    return task.weights()


def of_friendly() -> list[Tensor]:
    """Return the weights after pytorch_optimizer's FriendlySAM."""
    task = Task()
    opt = FriendlySAM(task.params, torch.optim.SGD, rho=RHO, sigma=SIGMA, lmbda=LMBDA, lr=LR)
    for _ in range(STEPS):
        task.closure()
        opt.step(task.closure)
    return task.weights()


def of_temperon() -> list[Tensor]:
    """Return the weights after temperon, with SAM from the first step."""
    task = Task()
    opt = Temperon(torch.optim.SGD(task.params, lr=LR), total_steps=STEPS, tail_frac=1.0, rho=RHO)
    for _ in range(STEPS):
        opt.step(task.closure)
    return task.weights()


def measure() -> list[Line]:
    """Return what is compared, what the paper gives, what the peer does."""
    start = Task().weights()
    sam, friendly = minus(by_equation(), start), minus(by_equation(friendly=True), start)
    return [
        ("SAM, pytorch_optimizer", 0, round(relative(minus(of_sam(), start), sam), 6)),
        ("F-SAM, pytorch_optimizer FriendlySAM", 0, round(relative(minus(of_friendly(), start), friendly), 6)),
        ("SAM, temperon", 0, round(relative(minus(of_temperon(), start), sam), 6)),
    ]


if __name__ == "__main__":
    show(f"Relative difference after {STEPS} steps, from the equations", measure)
