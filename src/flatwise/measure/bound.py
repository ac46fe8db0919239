"""The generalisation bound behind SAM for a trained model, with every term, and whether it says anything.

The terms are those of ``theorem.py``; here are the losses that go in, and the words that come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.ascent import Ball
from flatwise.errors import UserError
from flatwise.measure.average import under_noise
from flatwise.measure.problem import LossFn, Mode, Problem
from flatwise.measure.progress import Bar
from flatwise.measure.result import Conditions, Cost, digits, plain
from flatwise.measure.select import Parameters
from flatwise.measure.theorem import Terms, gaussian_terms, noise, printed_terms
from flatwise.measure.worst import climb


@dataclass(frozen=True)
class PacBayesBound:
    """The bound, term by term, in units of a loss in [0, 1].

    Attributes:
        value: the Gaussian form: ``noisy_loss + terms.root(n)``.
        standard_error: of ``noisy_loss``, over the draws; the true mean may lie that far off.
        vacuous: whether ``value >= 1``, which every loss in [0, 1] satisfies anyway.
        loss: at w, without noise.
        noisy_loss: the mean over the draws.
        terms: of the Gaussian form.
        printed: the theorem as printed, with the highest loss that the ascent found; None where the loss has no
            gradient. An ascent finds a lower bound of the maximum: this number is no certificate.
        worst_loss: that highest loss; None where there is no gradient.
        printed_terms: of the printed form.
        rho: the radius.
        sigma: standard deviation of the noise.
        delta: probability that the bound fails.
        weight_norm: ``|w|``.
        largest_loss: what the losses were divided by.
        statement: in words, what was found.
        conditions: under which it was measured.
        cost: what it cost.
    """

    value: float
    standard_error: float | None
    vacuous: bool
    loss: float
    noisy_loss: float
    terms: Terms
    printed: float | None
    worst_loss: float | None
    printed_terms: Terms
    rho: float
    sigma: float
    delta: float
    weight_norm: float
    largest_loss: float
    statement: str
    conditions: Conditions
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold.

        Returns:
            All fields.
        """
        result: dict[str, Any] = plain(self)
        return result

    def __str__(self) -> str:
        """Write the terms one by one, and what they come to."""
        n, k = self.conditions.samples, self.conditions.weights
        t = self.terms
        lines = [
            f"PAC-Bayes bound ({n} samples, {k} weights, rho={self.rho:g}, delta={self.delta:g})",
            f"  loss at w                              {self.loss:.4g}",
            f"  loss under noise, sigma={self.sigma:<14.3g} {digits(self.noisy_loss, self.standard_error)}",
            f"  complexity  k/4 log(1+|w|^2/(k s^2))   {t.complexity:.4g}   (|w| = {self.weight_norm:.4g})",
            f"  constant    1/4                        {t.constant:.4g}",
            f"  confidence  log(n/delta)               {t.confidence:.4g}",
            f"  union       2 log(6n+3k)               {t.union:.4g}",
            f"  root of their sum over n-1             {t.root(n):.4g}",
            f"  bound                                  {self.value:.4g}",
        ]
        if self.printed is not None and self.worst_loss is not None:
            lines.append(
                f"  as printed: highest loss found {self.worst_loss:.4g} + {self.printed_terms.root(n):.4g} = "
                f"{self.printed:.4g} (no certificate)"
            )
        return "\n".join([*lines, self.statement, *(f"Note: {note}" for note in self.conditions.notes)])


def bounded_loss(per_sample: Callable[[Module, Any], Tensor], largest: float = 1.0) -> LossFn:
    """Make a loss that lies in [0, 1], as the theorem needs, from one that may be large.

    Args:
        per_sample: ``per_sample(model, batch)`` returns one loss >= 0 for each sample.
        largest: each is cut there, and divided by it.

    Returns:
        A ``loss_fn(model, batch)``.

    Raises:
        UserError: if ``largest`` is not a number > 0.
    """
    if not 0 < largest < math.inf:
        raise UserError(f"largest must be a finite number > 0, got {largest!r}")

    def loss_fn(model: Module, batch: Any) -> Tensor:
        return per_sample(model, batch).clamp(0, largest).mean() / largest

    return loss_fn


def pac_bayes_bound(
    model: Module,
    loss_fn: LossFn,
    data: Any,
    *,
    rho: float = 0.05,
    delta: float = 0.05,
    draws: int = 20,
    steps: int = 5,
    largest_loss: float = 1.0,
    parameters: Parameters = None,
    mode: Mode = "eval",
    micro_batch_size: int | None = None,
    seed: int = 0,
    process_group: Any = None,
    progress: bool = True,
) -> PacBayesBound:
    """Evaluate the bound of Theorem 2 of the SAM paper on the training set.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns a mean of losses that lie in [0, ``largest_loss``] sample by sample,
            such as the share of errors. A loss without a limit, such as the cross-entropy, has to be cut:
            see :func:`bounded_loss`.
        data: the whole training set; its samples are the n of the theorem.
        rho: the radius.
        delta: probability that the bound fails.
        draws: of noise, in antithetic pairs; an odd number is rounded up.
        steps: of the ascent for the printed form.
        largest_loss: losses are divided by it.
        parameters: the weights of the theorem; what is left out must not depend on the training set.
        mode: ``"eval"``, ``"train"`` or ``"as is"``.
        micro_batch_size: evaluate at most so many samples at once; None: a batch at once.
        seed: of the noise, and of what the loss draws.
        process_group: processes that each bring their own share of the data.
        progress: show a bar where it takes long.

    Returns:
        The bound, its terms, and whether it is vacuous.

    Raises:
        UserError: if a setting is out of its range, or a loss is.
    """
    for name, value in (("rho", rho), ("largest_loss", largest_loss)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be a finite number > 0, got {value!r}")
    if not 0 < delta < 1:
        raise UserError(f"delta must be between 0 and 1, got {delta!r}")
    for name, count in (("draws", draws), ("steps", steps)):
        if not isinstance(count, int) or count < 1:
            raise UserError(f"{name} must be a whole number >= 1, got {count!r}")
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
    n, k = problem.samples, problem.weights
    if n < 2:
        raise UserError("the bound needs at least 2 samples")
    pairs = (draws + 1) // 2
    sigma = noise(n, k, rho)
    squared = sum(float(torch.linalg.vector_norm(p.detach(), dtype=problem.dtype)) ** 2 for p in problem.params)
    with problem.open(), Bar("bound", pairs + steps, shown=progress) as bar:
        base = problem.losses()
        losses = under_noise(problem, Ball(), sigma, pairs, bar.advance, "bound")
        worst = _worst(problem, rho, steps, base, bar.advance)
        shares = torch.tensor([problem.share(part) for part in problem.parts], dtype=torch.float64)
        rows = torch.cat([base[None], losses, *([worst[None]] if worst is not None else [])]) @ shares
        means = problem.summed(rows.to(problem.device)).cpu() / largest_loss
        _check_range(torch.cat([base, losses.flatten()]), largest_loss)
    noisy, number = means[1 : 1 + pairs], pairs
    error = float(noisy.std() / math.sqrt(number)) if number > 1 else None
    terms, printed = (make(n, k, squared, rho, delta) for make in (gaussian_terms, printed_terms))
    value = float(noisy.mean()) + terms.root(n)
    worst_loss = None if worst is None else float(means[-1])
    return PacBayesBound(
        value=value,
        standard_error=error,
        vacuous=value >= 1,
        loss=float(means[0]),
        noisy_loss=float(noisy.mean()),
        terms=terms,
        printed=None if worst_loss is None else worst_loss + printed.root(n),
        worst_loss=worst_loss,
        printed_terms=printed,
        rho=rho,
        sigma=sigma,
        delta=delta,
        weight_norm=math.sqrt(squared),
        largest_loss=largest_loss,
        statement=_statement(value, n, k, terms, delta),
        conditions=problem.conditions(),
        cost=problem.cost(),
    )


def _worst(problem: Problem, rho: float, steps: int, base: Tensor, tick: Callable[[], object]) -> Tensor | None:
    """Return the losses of the parts at the highest point found; None where the loss has no gradient."""
    with torch.enable_grad():
        differentiable = problem.loss_of(problem.parts[0]).requires_grad
    if not differentiable:
        problem.note("the loss has no gradient: the printed form of the bound, which needs a maximum, was left out")
        return None
    _, gradient = problem.gradient()
    return climb(problem, Ball(), rho, steps, gradient, base, tick)[-1].losses


def _check_range(losses: Tensor, largest: float) -> None:
    low, high = float(losses.min()), float(losses.max())
    if not (low >= 0 and high <= largest * (1 + 1e-6)):
        raise UserError(
            f"the theorem needs every loss in [0, largest_loss={largest:g}], and means from {low:.3g} to {high:.3g} "
            "were met: use the share of errors, or cut the loss with flatwise.measure.bounded_loss"
        )


def _statement(value: float, n: int, k: int, terms: Terms, delta: float) -> str:
    if value >= 1:
        return (
            f"The bound is vacuous: {value:.3g} is not below 1, which every loss in [0, 1] satisfies. With {k} weights "
            f"and {n} samples the complexity term alone gives {math.sqrt(terms.complexity / (n - 1)):.3g}."
        )
    return (
        f"With probability {1 - delta:g} over training sets the expected loss under this noise is at most {value:.3g}, "
        "and so is the loss at w, where noise on the weights does not lower it."
    )
