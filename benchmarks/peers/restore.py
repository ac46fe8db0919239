"""Where the weights are after a step of learning rate 0: restored by a copy, or by subtracting what was added.

python benchmarks/peers/restore.py

In floating point (w + eps) - eps is not w. The differences are of the size of one rounding; they matter where replicas
or a resumed run must agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytorch_optimizer
import torch
from pytorch_optimizer import WSAM
from small import Line, Task, show
from temperon import Temperon

STEPS = 20


def _temperon(task: Task) -> Callable[[], object]:
    opt = Temperon(torch.optim.SGD(task.params, lr=0.0), total_steps=STEPS, tail_frac=1.0, rho=0.05)
    return lambda: opt.step(task.closure)


def _wsam(task: Task) -> Callable[[], object]:
    opt = WSAM(task.model, task.params, torch.optim.SGD, rho=0.05, lr=0.0)
    return lambda: opt.step(task.closure)


def _sam(task: Task) -> Callable[[], object]:
    opt = pytorch_optimizer.SAM(task.params, torch.optim.SGD, rho=0.05, lr=0.0)

    def step() -> None:
        task.closure()
        opt.step(task.closure)

    return step


def changed(make: Callable[[Task], Callable[[], object]]) -> int:
    """Return how many of the weights are not those of before, after some steps that do not learn."""
    task = Task(torch.float32)
    before, step = task.weights(), make(task)
    for _ in range(STEPS):
        step()
    return sum(int((now != then).sum()) for now, then in zip(task.weights(), before, strict=True))


def measure() -> list[Line]:
    """Return what is compared, what the paper gives, what the peer does."""
    total = sum(p.numel() for p in Task().params)
    return [
        (f"weights of {total} changed by {STEPS} steps, lr = 0: temperon", 0, changed(_temperon)),
        ("the same: pytorch_optimizer WSAM", 0, changed(_wsam)),
        ("the same: pytorch_optimizer SAM, which restores a copy", 0, changed(_sam)),
    ]


if __name__ == "__main__":
    show("Weights after steps that do not learn, float32", measure)
