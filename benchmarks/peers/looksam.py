"""LookSAM (Liu et al., CVPR 2022) beside pytorch_optimizer's.

python benchmarks/peers/looksam.py

The paper takes the second gradient in every k-th step only, and projects the whole gradient, as one vector.
"""

from __future__ import annotations

import torch
from pytorch_optimizer import LookSAM
from small import Line, Task, along, dot, minus, norm, relative, show

K, RHO, ALPHA, LR = 5, 0.1, 0.7, 0.1


def passes(steps: int = 10) -> int:
    """Follow the flow of the class's docstring: a backward pass before every step, and a closure."""
    task = Task()
    opt = LookSAM(task.params, torch.optim.SGD, rho=RHO, k=K, alpha=ALPHA, lr=LR)
    for _ in range(steps):
        opt.zero_grad()
        task.closure()
        opt.step(task.closure)
    return task.passes


def kept_part() -> tuple[float, float, float]:
    """Return how far the kept part, and the gradient of the step that reuses it, are from the paper's."""
    task = Task()
    opt = LookSAM(task.params, torch.optim.SGD, rho=RHO, k=K, alpha=ALPHA, lr=LR)
    w = task.weights()
    g = task.gradient()
    perturbed = task.gradient(along(w, g, RHO / norm(g)))
    part = minus(perturbed, [dot(perturbed, g) / dot(g, g) * x for x in g])
    task.closure()
    opt.step(task.closure)
    second = relative(minus(w, task.weights()), [LR * x for x in perturbed])
    kept = relative([opt.state[p]["gv"] for p in task.params], part)

    w, g = task.weights(), task.gradient()
    step = [LR * x for x in along(g, part, ALPHA * norm(g) / norm(part))]
    task.closure()
    opt.step(task.closure)
    return second, kept, relative(minus(w, task.weights()), step)


def measure() -> list[Line]:
    """Return what is compared, what the paper gives, what the peer does."""
    second, kept, reused = kept_part()
    return [
        ("gradients in 10 steps at k = 5, the docstring's flow", 10 + 10 // K, passes()),
        ("first step: relative difference of the update", 0, round(second, 6)),
        ("kept part g_v: relative difference (projected per tensor)", 0, kept),
        ("second step, which reuses it: relative difference of the update", 0, reused),
    ]


if __name__ == "__main__":
    show("LookSAM, pytorch_optimizer", measure)
