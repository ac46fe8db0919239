"""What "adaptive" means: ASAM (Kwon et al., ICML 2021, eq. 7) beside ``adaptive=True`` of pytorch_optimizer.

python benchmarks/peers/asam.py

The paper's T is |w| + eta; its authors' code scales the tensors with "weight" in their name alone. The common
convention, here as in many libraries, is |w| on every tensor, without eta: a weight that is 0 is never perturbed.
"""

from __future__ import annotations

import pytorch_optimizer
import torch
from small import Line, Task, minus, norm, relative, show
from torch import Tensor

import flatwise

RHO, ETA = 0.5, 0.01


def _task() -> Task:
    task = Task()
    with torch.no_grad():
        task.params[1].zero_()  # the biases of the first layer, as many initialisations leave them
    return task


def of_peer() -> list[Tensor]:
    """Return the perturbation that pytorch_optimizer makes."""
    task = _task()
    task.closure()
    pytorch_optimizer.SAM(task.params, torch.optim.SGD, rho=RHO, adaptive=True, lr=0.0).step(task.closure)
    return minus(task.seen[1], task.seen[0])


def by_equation(*, eta: float, weights_only: bool) -> list[Tensor]:
    """Return eps = rho T^2 g / ||T g||."""
    task = _task()
    names = [name for name, _ in task.model.named_parameters()]
    scale = [
        p.detach().abs() + eta if "weight" in name or not weights_only else torch.ones_like(p)
        for name, p in zip(names, task.params, strict=True)
    ]
    g = task.gradient()
    length = norm([t * x for t, x in zip(scale, g, strict=True)])
    return [RHO * t**2 * x / length for t, x in zip(scale, g, strict=True)]


def of_flatwise(*, eta: float, scaled: str) -> list[Tensor]:
    """Return the perturbation that flatwise makes."""
    task = _task()
    base = torch.optim.SGD(task.params, lr=0.0)
    flatwise.create("asam", base, rho=RHO, eta=eta, scaled=scaled, model=task.model).step(task.closure)
    return minus(task.seen[1], task.seen[0])


def measure() -> list[Line]:
    """Return what is compared, what the paper gives, what the peer does."""
    peer, paper = of_peer(), by_equation(eta=ETA, weights_only=False)
    authors = by_equation(eta=ETA, weights_only=True)
    zero = by_equation(eta=0.0, weights_only=False)
    return [
        ("norm of eps on the 16 biases that are 0", float(norm(paper[1:2])), float(norm(peer[1:2]))),
        ("eps against T = |w| + 0.01 on all: relative difference", 0, relative(peer, paper)),
        ("eps against the authors' code (weights only)", 0, relative(peer, authors)),
        ("eps against T = |w|, eta = 0", 0, round(relative(peer, zero), 6)),
    ]


if __name__ == "__main__":
    show("ASAM, pytorch_optimizer SAM(adaptive=True)", measure)
