"""Ways to make one SAM step, and the limit that none can beat, all over the same model and base optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from step_cost_models import Task

RHO = 0.05
Step = Callable[[], Any]
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.01, "momentum": 0.9}),
    "adamw": (AdamW, {"lr": 1e-4}),
}


class TwoPasses:
    """The limit: two gradients and one step of the base optimizer; the weights are never moved between."""

    def __init__(self, task: Task, base: str) -> None:
        kind, arguments = BASES[base]
        self.task = task
        self.optimizer = kind(task.params, **arguments)

    def closure(self) -> Tensor:
        """Compute a gradient, as in every contestant."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss_again()
        loss.backward()
        return loss

    def step(self) -> None:
        """Take one step."""
        self.closure()
        self.closure()
        self.optimizer.step()


class CloneLoop(TwoPasses):
    """The loop over parameters that most SAM code is: a clone of each, an own launch for each operation."""

    def __init__(self, task: Task, base: str) -> None:
        super().__init__(task, base)
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def ascend(self) -> None:
        """Move the weights."""
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.task.params if p.grad is not None]), p=2)
        scale = RHO / (norm + 1e-12)
        for p in self.task.params:
            if p.grad is None:
                continue
            self.old[p] = p.data.clone()
            e_w = p.grad * scale
            p.add_(e_w)

    def step(self) -> None:
        """Take one step."""
        self.closure()
        self.ascend()
        self.closure()
        for p in self.task.params:
            if p.grad is not None:
                p.data = self.old[p]  # stays in ``old`` until the next step, as it usually does
        self.optimizer.step()


def _limit(task: Task, base: str) -> Step:
    return TwoPasses(task, base).step


def _loop(task: Task, base: str) -> Step:
    return CloneLoop(task, base).step


def _flatwise_closure(task: Task, base: str) -> Step:
    from flatwise import SAM

    inner = TwoPasses(task, base)
    sam = SAM(inner.optimizer, RHO)
    return lambda: sam.step(inner.closure)


def _flatwise_batch(task: Task, base: str) -> Step:
    from flatwise import SAM

    kind, arguments = BASES[base]
    sam = SAM(task.params, kind, RHO, **arguments)
    return lambda: sam.step(task.loss, task.batch)


def _pytorch_optimizer(task: Task, base: str, foreach: bool | None = None) -> Step:
    from pytorch_optimizer import SAM

    kind, arguments = BASES[base]
    sam = SAM(task.params, kind, rho=RHO, foreach=foreach, **arguments)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = task.loss_again()
        loss.backward()
        return loss

    def step() -> None:
        closure()
        sam.step(closure)

    return step


def _pytorch_optimizer_foreach(task: Task, base: str) -> Step:
    return _pytorch_optimizer(task, base, foreach=True)


def _temperon(task: Task, base: str) -> Step:
    from temperon import Temperon

    inner = TwoPasses(task, base)
    sam = Temperon(inner.optimizer, total_steps=10**9, tail_frac=1.0, rho=RHO)  # the tail is the whole training
    return lambda: sam.step(inner.closure)


CONTESTANTS: dict[str, Callable[[Task, str], Step]] = {
    "limit": _limit,
    "flatwise closure": _flatwise_closure,
    "flatwise batch": _flatwise_batch,
    "clone loop": _loop,
    "pytorch_optimizer": _pytorch_optimizer,
    "pytorch_optimizer foreach": _pytorch_optimizer_foreach,
    "temperon": _temperon,
}
