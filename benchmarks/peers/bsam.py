"""bSAM (Möllenhoff and Khan, ICLR 2023) beside pytorch_optimizer's.

python benchmarks/peers/bsam.py

The paper draws the noise with variance 1/(N s), takes noise and perturbation away again, adds the weight decay to the
gradient, and lets the precision grow by sqrt(s) |g| + delta + gamma, with g from the first pass.
"""

from __future__ import annotations

import math

import torch
from pytorch_optimizer import BSAM
from small import Line, Task, minus, norm, show


def noise(samples: int = 100) -> tuple[float, float]:
    """Return the standard deviation of the noise at s = 1: by the equation, and measured over 20,000 weights."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(20_000))
    weight.grad = torch.zeros_like(weight)
    seen = []

    def closure() -> torch.Tensor:
        seen.append(weight.detach().clone())
        weight.grad = torch.zeros_like(weight)
        return weight.sum()

    BSAM([weight], num_data=samples).step(closure)
    return math.sqrt(1 / samples), float(seen[0].std())


def left_over() -> float:
    """Return how far the weights are from where they were after a step of learning rate 0."""
    torch.manual_seed(0)
    task = Task()
    before = task.weights()
    task.closure()
    BSAM(task.params, num_data=100, lr=0.0, rho=0.05).step(task.closure)
    return float(norm(minus(task.weights(), before)))


def one_weight(*, decay: float, rho: float, betas: tuple[float, float]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Take a step on L(w) = 3/2 w^2 from w = 1, with so many data that there is no noise."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = BSAM([weight], num_data=10**12, lr=0.1, rho=rho, weight_decay=decay, damping=0.1, betas=betas)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = (1.5 * weight**2).sum()
        loss.backward()
        return loss

    closure()
    opt.step(closure)
    return weight.detach(), opt.state[weight]


def measure() -> list[Line]:
    """Return what is compared, what the paper gives, what the peer does."""
    expected, found = noise()
    _, state = one_weight(decay=0.0, rho=0.0, betas=(0.0, 0.999))
    momentum = float(state["momentum"])
    _, state = one_weight(decay=0.5, rho=0.0, betas=(0.0, 0.999))
    decayed = float(state["momentum"])
    _, state = one_weight(decay=0.0, rho=0.0, betas=(0.0, 0.0))
    precision = float(state["s"])
    _, state = one_weight(decay=0.0, rho=0.5, betas=(0.0, 0.0))
    ascended = float(state["s"])
    return [
        ("standard deviation of the noise, N = 100, s = 1", expected, found),
        ("distance of the weights after a step with lr = 0", 0, left_over()),
        ("momentum after one step, beta1 = 0, g = 3, no weight decay", 3.0, momentum),
        ("momentum after one step, beta1 = 0, g = 3, delta = 0.5, w = 1", 3.5, decayed),
        ("s after one step, beta2 = 0, s = 1, g = 3, gamma = 0.1, rho = 0", 3.1, precision),
        ("the same with rho = 0.5, where g' = 7.5", 3.1, ascended),
    ]


if __name__ == "__main__":
    show("bSAM, pytorch_optimizer", measure)
