"""A probe: do two evaluations of the same loss and gradient agree?

Iterations over products of a matrix that changes from product to product converge to nothing, and look as if they did.
So every curvature measure evaluates one part twice first. Global random state is seeded alike before every part; what
is left is what the loss draws from a generator of its own, a counter, or a kernel that adds in another order each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from flatwise.errors import UserError
from flatwise.measure.data import Part
from flatwise.measure.problem import BACKWARD, Mode, Problem
from flatwise.measure.result import Conditions, Cost, plain
from flatwise.measure.select import Parameters

ROUNDING = 1e4
"""Differences below this many units of rounding are those of another order of addition."""


@dataclass(frozen=True)
class Determinism:
    """How far two evaluations of the same loss were apart.

    Attributes:
        same: whether they agree, up to the order of addition.
        loss_difference: of the two losses, relative.
        gradient_difference: length of the difference of the two gradients, over the length of the first.
        random_modules: names of modules that draw random numbers in this mode; the measures seed them alike.
        explanation: in one sentence.
        conditions: under which it was measured.
        cost: what it cost.
    """

    same: bool
    loss_difference: float
    gradient_difference: float
    random_modules: tuple[str, ...]
    explanation: str
    conditions: Conditions
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold.

        Returns:
            A nest of dicts and lists.
        """
        result: dict[str, Any] = plain(self)
        return result

    def __str__(self) -> str:
        return self.explanation


def determinism(
    model: Module,
    loss_fn: Callable[[Module, Any], Tensor],
    data: Any,
    *,
    parameters: Parameters = None,
    mode: Mode = "eval",
    micro_batch_size: int | None = None,
    seed: int = 0,
    process_group: Any = None,
    progress: bool = True,
) -> Determinism:
    """Evaluate the loss and gradient of the first part twice, and say how they differ and why they may.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        data: one batch, or an iterable of batches.
        parameters: which parameters; None: all that are trainable.
        mode: ``"eval"``, ``"train"`` or ``"as is"``.
        micro_batch_size: samples evaluated at once; None: a batch.
        seed: of what the loss draws.
        process_group: whose processes share the data; None: this process alone.
        progress: as in the other measures; nothing is shown here.

    Returns:
        The differences.
    """
    del progress
    problem = Problem(
        model,
        loss_fn,
        data,
        parameters=parameters,
        mode=mode,
        micro_batch_size=micro_batch_size,
        seed=seed,
        process_group=process_group,
    )
    with problem.open():
        first, second = (evaluated(problem, problem.parts[0]) for _ in range(2))
        loss_gap, gradient_gap = differences(first, second)
        names = random_modules(problem)
    same = max(loss_gap, gradient_gap) <= ROUNDING * torch.finfo(problem.dtype).eps
    return Determinism(
        same=same,
        loss_difference=loss_gap,
        gradient_difference=gradient_gap,
        random_modules=names,
        explanation=explained(problem, loss_gap, gradient_gap, names),
        conditions=problem.conditions(),
        cost=problem.cost(),
    )


def evaluated(problem: Problem, part: Part) -> tuple[Tensor, Tensor]:
    """Evaluate the loss and gradient of a part.

    Args:
        problem: open.
        part: which samples.

    Returns:
        The loss, 0-dim, and the gradient, shape (weights,).
    """
    with torch.enable_grad():
        loss = problem.loss_of(part)
    grads = problem.gradients_of(loss)
    problem.spend(part, BACKWARD)
    return loss.detach(), problem.flat(grads)


def differences(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Compare two evaluations.

    Args:
        first: a loss and a gradient.
        second: the same again.

    Returns:
        The relative differences of the losses and of the gradients; 0 where both are equal bit for bit.
    """
    gaps = []
    for a, b in zip(first, second, strict=True):
        length = float(a.double().norm())
        gap = float((a.double() - b.double()).norm())
        gaps.append(gap / length if length > 0 else gap)
    return gaps[0], gaps[1]


def random_modules(problem: Problem) -> tuple[str, ...]:
    """Name the modules that draw random numbers in the mode that they are in.

    Args:
        problem: open.

    Returns:
        Their names.
    """
    return tuple(
        name for name, module in problem.model.named_modules() if isinstance(module, _DropoutNd) and module.training
    )


def explained(problem: Problem, loss_gap: float, gradient_gap: float, names: tuple[str, ...]) -> str:
    """Say what was seen, and what it may come from.

    Args:
        problem: whose.
        loss_gap: relative difference of the losses.
        gradient_gap: relative difference of the gradients.
        names: modules that draw random numbers.

    Returns:
        One sentence.
    """
    if loss_gap == gradient_gap == 0:
        drawn = f"; what {', '.join(names[:3])} draw is the same in every evaluation" if names else ""
        return f"two evaluations agree bit for bit{drawn}"
    seen = f"two evaluations of the same samples differ: the loss by {loss_gap:.1e}, the gradient by {gradient_gap:.1e}"
    if max(loss_gap, gradient_gap) <= ROUNDING * torch.finfo(problem.dtype).eps:
        return f"{seen} (relative): kernels that add in another order each time"
    causes = ["a random generator of its own", "a counter or other state that it changes"]
    norms = [n for n, m in problem.model.named_modules() if isinstance(m, _BatchNorm) and m.training]
    if norms:
        causes.append(f"running statistics that it reads while {norms[0]} updates them")
    if problem.device.type != "cpu":
        causes.append("a kernel that is not deterministic (torch.use_deterministic_algorithms)")
    return (
        f"{seen} (relative). The loss is seeded alike before every evaluation, so it must have "
        f"{', '.join(causes[:-1])} or {causes[-1]}: a Hessian needs the same loss every time"
    )


def insist(problem: Problem, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    """Go on only where two evaluations agree.

    Args:
        problem: takes a note where they differ by rounding.
        first: a loss and a gradient.
        second: the same again.

    Raises:
        UserError: where they differ by more.
    """
    gaps = differences(first, second)
    if max(gaps) == 0:
        return
    sentence = explained(problem, *gaps, random_modules(problem))
    if max(gaps) > ROUNDING * torch.finfo(problem.dtype).eps:
        raise UserError(sentence)
    problem.note(sentence)
