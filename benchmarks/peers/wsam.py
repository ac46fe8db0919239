"""WSAM (Yue et al., KDD 2023) beside pytorch_optimizer's, around a base optimizer with an option of the same name.

python benchmarks/peers/wsam.py

The weight of the sharpness, gamma / (1 - gamma), is kept in the groups of the base optimizer as ``alpha``. RMSprop
has an ``alpha`` there too: the decay of its running mean.
"""

from __future__ import annotations

import torch
from pytorch_optimizer import WSAM
from small import Line, Task, along, minus, norm, relative, show

RHO, GAMMA, LR = 0.05, 0.9, 0.1


def decoupled() -> float:
    """Return how far one decoupled step around SGD is from the paper's."""
    task = Task()
    w, g = task.weights(), task.gradient()
    perturbed = task.gradient(along(w, g, RHO / norm(g)))
    step = [LR * (x + GAMMA / (1 - GAMMA) * (y - x)) for x, y in zip(g, perturbed, strict=True)]
    WSAM(task.model, task.params, torch.optim.SGD, rho=RHO, gamma=GAMMA, lr=LR).step(task.closure)
    return relative(minus(w, task.weights()), step)


def measure() -> list[Line]:
    """Return what is compared, what the paper gives, what the peer does."""
    task = Task()
    opt = WSAM(task.model, task.params, torch.optim.RMSprop, rho=RHO, gamma=GAMMA, lr=LR)
    return [
        ("around SGD: relative difference of the update", 0, round(decoupled(), 6)),
        ("around RMSprop: its decay alpha", 0.99, float(opt.param_groups[0]["alpha"])),
    ]


if __name__ == "__main__":
    show("WSAM, pytorch_optimizer", measure)
